"""The worker as a process, killed and starved at every point of its commits: the same end every time.

`make torture` is the long form. A broker that dies and rows that it has deleted are in `test_worker`.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jobs.broker import Broker
from jobs.child_process import free_port
from jobs.produce import produce
from pipelines.config import Config
from tests.small_run import SmallRun
from tests.torture import beside_each_other, faults, torture, with_a_corrupt_checkpoint
from tests.torture_life import RANDOM, Life, Log, make_log, poison, settings
from tests.torture_outcome import Outcome
from tests.torture_points import FULL_DISKS, KILLS
from tests.torture_worker import Fault

SEED = 20_261_121

# One of each kind of step of a commit; `make torture` takes them all.
SHORT = (
    "state restored",
    "in a step beside a commit",
    "dead letters acknowledged",
    "dead letters half written",
    "segment written",
    "base half written",
    "delta written",
    "checkpoint renamed",
    "head changed, not committed",
    "head moved",
    "old checkpoint half removed",
    "CURRENT not moved",
    "MLflow record half written",
)

# Rows of the log after the warm-up: twenty-four steps.
ROWS = 24 * 128


@pytest.fixture(scope="module")
def log(small_run: SmallRun, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Log:
    folder = tmp_path_factory.mktemp("torture")
    stop = small_run.warm_rows + ROWS
    return make_log(small_run, broker.bootstrap_servers, "torture", folder, stop=stop)


# Killed --------------------------------------------------------------------------------------------------


def test_a_worker_killed_at_points_of_its_commits_and_at_random_instants_ends_the_same(
    log: Log, tmp_path: Path
) -> None:
    rng = np.random.default_rng([SEED, 0])
    found = torture(log, tmp_path, rng, faults(rng, SHORT, 2))
    assert found.wrong == [] and found.unaccounted == 0
    assert set(found.met) >= {*SHORT, RANDOM}
    assert found.kills >= len(SHORT) + 2
    assert found.equal == found.lives


def test_a_worker_killed_inside_packed_messages_ends_the_same(
    log: Log, broker: Broker, tmp_path: Path
) -> None:
    stop, own = log.small_run.warm_rows + ROWS, tmp_path / "log"
    packed = make_log(
        log.small_run, broker.bootstrap_servers, "torture-packed", own, form="packed", stop=stop
    )
    assert packed.reference.release == log.reference.release
    assert packed.reference.predictions == log.reference.predictions
    rng = np.random.default_rng([SEED, 1])
    found = torture(packed, tmp_path, rng, faults(rng, ("in a step", "head moved"), 2))
    assert found.wrong == []
    assert found.inside >= 2


# Other faults --------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_worker_with_a_message_and_changes_nothing(log: Log, tmp_path: Path) -> None:
    rng = np.random.default_rng([SEED, 2])
    # A restart writes the release that the last full disk prevented, fifteen writes up to CURRENT, then
    # commits: letters, segment, checkpoint and release, about two dozen.
    planned = [Fault("disk full", call) for call in (0, 13, 16, 24)]
    others = [Fault(name, 1) for name in FULL_DISKS if name != "disk full"]
    found = torture(log, tmp_path, rng, [*planned, *others])
    assert found.wrong == []
    assert [found.met[name] for name in FULL_DISKS] == [4, 1, 1, 1, 1]


def test_a_corrupt_newest_checkpoint_is_walked_back_from_to_the_same_end(log: Log, tmp_path: Path) -> None:
    assert with_a_corrupt_checkpoint(log, tmp_path, ["shard-00000.safetensors", "MANIFEST.json"]).wrong == []


def test_workers_started_beside_running_ones_fence_them_and_the_last_ends_the_same(
    log: Log, tmp_path: Path
) -> None:
    found = beside_each_other(log, tmp_path, 3)
    assert found.wrong == []


def test_a_worker_killed_before_it_could_tell_mlflow_of_its_last_commit_tells_it_later(
    log: Log, tmp_path: Path
) -> None:
    life = Life(log.small_run, settings(log.config, 3_600_000), tmp_path)
    assert life.meets(Fault("commit done", 0), life.config) == -signal.SIGKILL
    assert (life.committed() or {})["digest"] == log.reference.digest
    assert life.finish().differences(log.reference) == []


def test_with_mlflow_away_the_worker_learns_on_and_keeps_what_it_has_to_tell(
    log: Log, tmp_path: Path
) -> None:
    tracking = log.config.tracking.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}"})
    config = log.config.model_copy(update={"tracking": tracking})
    life = Life(log.small_run, settings(config, 20), tmp_path, sends=True)
    process = life.start()
    wait_for_outcome(life, log.reference.digest)
    records = (tmp_path / "state" / "outbox" / "outbox.jsonl").read_text().splitlines()
    assert '"op":"register"' in records[-1]
    # It would wait half a minute for MLflow; that it has learned everything is what is asked here.
    process.kill()
    assert life.end(process) == -signal.SIGKILL
    assert Outcome.of(tmp_path).differences(log.reference) == []


def wait_for_outcome(life: Life, digest: str) -> None:
    """Until all is committed, and the last thing that MLflow is to hear has been said."""
    deadline, before = time.monotonic() + 60, ""
    while time.monotonic() < deadline:
        manifest = life.committed()
        told = life.folder / "state" / "outbox" / "outbox.jsonl"
        said = told.read_text().splitlines()[-1] if told.exists() and told.stat().st_size else ""
        if manifest and manifest["digest"] == digest and '"op":"register"' in said and said == before:
            return
        before = said
        time.sleep(1.0)
    raise AssertionError(life.said())


def test_poison_messages_are_set_aside_once_each_and_change_no_model(
    log: Log, broker: Broker, tmp_path: Path
) -> None:
    files, stop = log.small_run.files, log.small_run.warm_rows + ROWS
    middle = stop - ROWS // 2

    sent = []

    def fill(config: Config) -> None:
        produce(files, config, stop=middle)
        sent.append(poison(log.small_run, config))
        produce(files, config, start=middle, stop=stop)

    poisoned = make_log(
        log.small_run, broker.bootstrap_servers, "torture-poison", tmp_path / "log", fill=fill
    )
    assert len(poisoned.reference.letters) == len(log.reference.letters) + sent[0]
    assert poisoned.reference.release == log.reference.release
    assert poisoned.reference.predictions == log.reference.predictions
    rng = np.random.default_rng([SEED, 3])
    names = [name for name in KILLS if "dead letters" in name]
    found = torture(poisoned, tmp_path, rng, faults(rng, names, 0))
    assert found.wrong == []
