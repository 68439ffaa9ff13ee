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
from jobs.checkpoint import CheckpointStore
from jobs.child_process import free_port
from jobs.produce import produce
from pipelines.codec import encode_packed
from pipelines.config import Config
from pipelines.events import TOPICS
from pipelines.kafka_client import make_producer
from tests.small_run import SmallRun
from tests.torture import RANDOM, Life, Log, Outcome, faults, make_log, settings, torture
from tests.torture_worker import FULL_DISKS, KILLS, TOLD, Fault

SEED = 20_261_121

# One of each kind of step of a commit; `make torture` takes them all.
SHORT = (
    "state restored",
    "running.json half written",
    "in a step",
    "dead letters acknowledged",
    "dead letters half written",
    "segment written",
    "checkpoint file half written",
    "checkpoint renamed",
    "head changed, not committed",
    "head moved",
    "old checkpoint half removed",
    "release written",
    "CURRENT moved",
    "before offsets are committed",
)


# Rows of the log after the warm-up: forty steps.
ROWS = 40 * 128


@pytest.fixture(scope="module")
def log(small_run: SmallRun, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Log:
    folder = tmp_path_factory.mktemp("torture")
    stop = small_run.warm_rows + ROWS
    return make_log(small_run, broker.bootstrap_servers, "torture", folder, stop=stop)


def wait_for_commits(life: Life, heads: int) -> None:
    """Until the head has moved so often."""
    seen, deadline = {life.store.head()}, time.monotonic() + 60
    while len(seen) <= heads and time.monotonic() < deadline:
        seen.add(life.store.head())
        time.sleep(0.002)
    assert len(seen) > heads, life.said()


# Killed --------------------------------------------------------------------------------------------------


def test_a_worker_killed_at_points_of_its_commits_and_at_random_instants_ends_the_same(
    log: Log, tmp_path: Path
) -> None:
    rng = np.random.default_rng([SEED, 0])
    found = torture(log, tmp_path, rng, faults(rng, SHORT, 2))
    print(f"seed {SEED}: {dict(found.met)} in {found.lives} lives")
    assert found.wrong == []
    assert set(found.met) >= {*SHORT, RANDOM}
    assert found.faults >= len(SHORT) + 2


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
    planned = [Fault("disk full", call) for call in (0, 6, 13, 14, 16, 19, 24)]
    found = torture(log, tmp_path, rng, [*planned, *(Fault(name, 1) for name in FULL_DISKS)])
    assert found.wrong == []
    assert found.met["disk full"] == 8 and found.met["disk full at the head"] == 1


def test_a_corrupt_newest_checkpoint_is_walked_back_from_to_the_same_end(log: Log, tmp_path: Path) -> None:
    life = Life(log.small_run, settings(log.config, 1), tmp_path)
    for file in ("shard-00000.safetensors", "state.json", "MANIFEST.json"):
        assert life.meets(Fault("offsets committed", 4), life.config) == -signal.SIGKILL
        head = life.store.head()
        assert head is not None
        path = life.store.folder / head / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    outcome = life.finish()
    assert outcome.differences(log.reference) == []
    assert life.said().count("going back to the checkpoint before it") >= 1


def test_workers_started_beside_running_ones_fence_them_and_the_last_ends_the_same(
    log: Log, tmp_path: Path
) -> None:
    life = Life(log.small_run, settings(log.config, 1), tmp_path)
    running = [life.start()]
    for _ in range(3):
        wait_for_commits(life, 5)
        running.append(life.start())
    *fenced, last = [life.end(process) for process in running]
    assert fenced == [TOLD] * 3 and last == 0, life.said()
    assert life.said().count("another worker has taken over") >= 1
    assert life.finish().differences(log.reference) == []


def test_with_mlflow_away_the_worker_learns_on_and_keeps_what_it_has_to_tell(
    log: Log, tmp_path: Path
) -> None:
    tracking = log.config.tracking.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}"})
    config = log.config.model_copy(update={"tracking": tracking})
    life = Life(log.small_run, settings(config, 20), tmp_path)
    process = life.start()
    wait_for_outcome(life, log.reference.digest)
    records = (tmp_path / "state" / "outbox" / "outbox.jsonl").read_text().splitlines()
    assert '"op":"register"' in records[-1]
    # It would wait half a minute for MLflow; that it has learned everything is what is asked here.
    process.kill()
    assert life.end(process) == -signal.SIGKILL
    assert Outcome.of(tmp_path).differences(log.reference) == []


def wait_for_outcome(life: Life, digest: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        manifest = CheckpointStore(life.folder / "state").head() and life.committed()
        told = life.folder / "state" / "outbox" / "outbox.jsonl"
        if manifest and manifest["digest"] == digest and '"register"' in told.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(life.said())


POISON: tuple[bytes | None, ...] = (
    None,
    b"",
    b"\x00\xff\xfe",
    b"{",
    b"[" * 100_000,
    b"[]",
    b"null",
    b'{"event_id": 1e999, "impression_id": {}, "event_time": "soon"}',
    b'{"event_id": "x", "impression_id": "x", "event_time": 99999999999999999999}',
    b'"' + b"x" * 900_000 + b'"',
)


def test_poison_messages_are_set_aside_once_each_and_change_no_model(
    log: Log, broker: Broker, tmp_path: Path
) -> None:
    files, stop = log.small_run.files, log.small_run.warm_rows + ROWS
    middle = stop - ROWS // 2

    def fill(config: Config) -> None:
        produce(files, config, stop=middle)
        producer = make_producer(config.kafka)
        pack = encode_packed(0, next(iter(files.blocks(0, 64, 64))).tables[0])
        broken = (*POISON, pack[: len(pack) // 2], pack[:-100] + bytes(100), pack[:8])
        for topic in TOPICS:
            for number, value in enumerate(broken):
                # The key lets a message without a value through: a tombstone.
                name = str(getattr(config.kafka.topics, topic))
                producer.send(name, value, b"poison", partition=number % 2)
        producer.close()
        produce(files, config, start=middle, stop=stop)

    poisoned = make_log(
        log.small_run, broker.bootstrap_servers, "torture-poison", tmp_path / "log", fill=fill
    )
    assert len(poisoned.reference.letters) == len(log.reference.letters) + 3 * (len(POISON) + 3)
    assert poisoned.reference.release == log.reference.release
    assert poisoned.reference.predictions == log.reference.predictions
    rng = np.random.default_rng([SEED, 3])
    names = [name for name in KILLS if "dead letters" in name]
    found = torture(poisoned, tmp_path, rng, faults(rng, names, 0))
    assert found.wrong == []
