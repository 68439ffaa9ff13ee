"""The worker on a real broker: killed anywhere it ends as if it had not been; nothing is lost or doubled."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from jobs import worker_publishing
from jobs.broker import Broker
from jobs.checkpoint import CheckpointStore, state_digest
from jobs.cli import cli
from jobs.predictions import PredictionLog
from jobs.produce import produce
from jobs.release import list_releases, pointed
from jobs.release_manifest import Manifest
from jobs.single_thread import use_one_thread
from jobs.worker import Worker
from monitoring.accounting import Accounting
from pipelines.config import Config, dump_config
from pipelines.errors import StaleStateError
from pipelines.kafka_client import make_admin, make_consumer
from tests.small_run import SmallRun
from tests.torture_worker import stay_close
from tests.workers import (
    Killed,
    Plant,
    Produced,
    crash,
    finished,
    killed_at,
    with_topics,
)

SEED = 20_260_105


@pytest.fixture(scope="module")
def produced(small_run: SmallRun, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Produced:
    return Produced.to(broker, "worker", small_run, tmp_path_factory.mktemp("reference"))


def committed(folder: Path) -> dict[str, Any]:
    store = CheckpointStore(folder / "state")
    found = store.load()
    assert found is not None
    assert state_digest(found.arrays, found.plain) == found.manifest["digest"]
    return {**found.plain, "outputs": found.manifest["outputs"], "digest": found.manifest["digest"]}


def check_outputs(folder: Path, produced: Produced) -> None:
    """Rows, predictions and dead letters are each there exactly once."""
    state, files = committed(folder), produced.small_run.files
    accounting = Accounting.from_state(state["accounting"])
    assert set(accounting.check(state["read"]).values()) == {0}
    assert sum(state["read"].values()) == files.rows

    log = PredictionLog(folder / "state" / "predictions")
    assert sorted(path.name for path in log.folder.iterdir()) == sorted(state["outputs"])
    table = log.read(state["outputs"])
    pairs = Counter(zip(table["impression_id"].to_pylist(), table["task"].to_pylist(), strict=True))
    assert set(pairs.values()) == {1}
    assert {name for name, _ in pairs} == impressions_to_predict(produced.small_run)
    assert len(pairs) == 2 * len(impressions_to_predict(produced.small_run))

    letters = [json.loads(line) for line in (folder / "state/dead_letters.jsonl").read_text().splitlines()]
    positions = [(one["source"], one["partition"], one["offset"], one["row"]) for one in letters]
    assert len(set(positions)) == len(positions)
    counted = sum(kinds["dead_lettered"] for kinds in accounting.value().values())
    assert len(positions) == counted >= len(files.dead_letters)
    assert all(one["reason"] for one in letters)


def impressions_to_predict(small_run: SmallRun) -> set[str]:
    """Those that come first after the warm-up, or again when they have been forgotten."""
    table, begins_at = small_run.files.impressions, small_run.backtest.warm_up_until
    attribution = small_run.config.attribution
    patience = attribution.click_window + attribution.allowed_lateness
    first: dict[str, int] = {}
    wanted = set()
    for name, arrival, time_shown in zip(
        *(table[column].to_pylist() for column in ("impression_id", "arrival_time", "event_time")),
        strict=True,
    ):
        first.setdefault(name, arrival)
        if arrival >= begins_at and (first[name] >= begins_at or arrival > time_shown + patience):
            wanted.add(name)
    return wanted


def dead_letter_keys(config: Config) -> list[bytes]:
    """Keys of all messages of the dead-letter topic."""
    from kafka import TopicPartition

    consumer = make_consumer(config.kafka)
    place = TopicPartition(config.kafka.topics.dead_letters, 0)
    consumer.assign([place])
    consumer.seek_to_beginning(place)
    end, keys = consumer.end_offsets([place])[place], []
    while consumer.position(place) < end:
        for records in consumer.poll(timeout_ms=200).values():
            keys += [record.key for record in records]
    consumer.close()
    return keys


# Undisturbed ---------------------------------------------------------------------------------------------


def test_an_undisturbed_worker_accounts_for_every_row_and_says_each_thing_once(produced: Produced) -> None:
    check_outputs(produced.reference, produced)
    letters = (produced.reference / "state/dead_letters.jsonl").read_text().splitlines()
    keys = dead_letter_keys(produced.config)[: len(letters)]
    assert len(set(keys)) == len(keys) == len(letters)


def test_each_release_is_cut_from_a_committed_state_and_names_its_parent(produced: Produced) -> None:
    releases = produced.reference / "releases"
    names = [name for name in list_releases(releases) if name.startswith("student")]
    assert len(names) > 3
    assert pointed(releases, "CURRENT") == names[-1]
    manifests = [Manifest.read(releases / name) for name in names]
    assert [one.parent for one in manifests[1:]] == names[:-1]
    assert manifests[-1].extra["state_digest"] == produced.digest
    events = sum(count for one in manifests[1:] for _, count in one.extra["produced_at"]["counts"])
    assert events == produced.small_run.backtest.events


def test_packed_messages_of_another_number_of_partitions_give_the_same_models(
    produced: Produced, tmp_path: Path
) -> None:
    config = with_topics(produced.config, produced.config.kafka.bootstrap_servers, "packed")
    config = config.model_copy(update={"kafka": config.kafka.model_copy(update={"partitions": 3})})
    produce(produced.small_run.files, config, form="packed")
    worker = produced.worker(tmp_path, config=config)
    finished(worker)
    assert models_of(tmp_path) == models_of(produced.reference)
    check_outputs(tmp_path, produced)


def models_of(folder: Path) -> dict[str, str]:
    """Digests of the files of the newest release: weights and calibrators."""
    releases = folder / "releases"
    newest = pointed(releases, "CURRENT")
    assert newest is not None
    return Manifest.read(releases / newest).files


def test_the_first_releases_outlive_garbage_collection(produced: Produced, tmp_path: Path) -> None:
    stream = produced.config.stream.model_copy(update={"keep_releases": 2})
    config = produced.config.model_copy(update={"stream": stream})
    finished(produced.worker(tmp_path, config=config))
    assert finished(produced.worker(tmp_path, config=config)) == produced.digest


# Killed --------------------------------------------------------------------------------------------------


def at_a_step(worker: Worker, patch: pytest.MonkeyPatch, after: int) -> None:
    step, calls = worker.loop.step, itertools.count()

    def killed(events: Any) -> Any:
        if next(calls) == 5 * after:
            raise Killed
        return step(events)

    patch.setattr(worker.loop, "step", killed)


MOMENTS: dict[str, Plant] = {
    "in a step": at_a_step,
    "after the dead letters are acknowledged": killed_at(
        lambda worker: worker.source, "publish_dead_letters", before=False
    ),
    "after the dead letters are in the file": killed_at(
        lambda worker: worker.dead_letters, "append", before=False
    ),
    "before the predictions are written": killed_at(
        lambda worker: worker.predictions, "write_segment", before=True
    ),
    "after the predictions are written": killed_at(
        lambda worker: worker.predictions, "write_segment", before=False
    ),
    "before the head moves": killed_at(lambda worker: worker.store, "_move_head", before=True),
    "after the head has moved": killed_at(lambda worker: worker.store, "_move_head", before=False),
    "before the release is written": killed_at(
        lambda worker: worker_publishing, "publish_student", before=True
    ),
    "after the release is published": killed_at(
        lambda worker: worker_publishing, "publish_student", before=False
    ),
}


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_killed_again_and_again_ends_in_the_same_state(
    produced: Produced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = np.random.default_rng([SEED, seed])
    moments = rng.permutation(list(MOMENTS))[: 3 + 3 * (seed > 0)]
    kills = []
    for moment in moments:
        worker = produced.worker(tmp_path)
        after = int(rng.integers(0, 4))
        with monkeypatch.context() as patch:
            MOMENTS[moment](worker, patch, after)
            patch.setattr(worker, "close", lambda: None)
            try:
                worker.run()
            except Killed:
                kills.append((moment, after, worker.loop.step_number))
            finally:
                crash(worker)
    print(f"seed {SEED}/{seed}: killed {kills}")
    assert len(kills) >= 2
    assert finished(produced.worker(tmp_path)) == produced.digest
    check_outputs(tmp_path, produced)
    releases = tmp_path / "releases"
    newest = pointed(releases, "CURRENT")
    assert newest is not None
    assert Manifest.read(releases / newest).extra["state_digest"] == produced.digest


def test_a_release_that_a_kill_prevented_is_published_at_the_next_start(
    produced: Produced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = produced.worker(tmp_path)
    with monkeypatch.context() as patch:
        killed_at(lambda _: worker_publishing, "publish_student", before=True)(worker, patch, 1)
        patch.setattr(worker, "close", lambda: None)
        with pytest.raises(Killed):
            worker.run()
    crash(worker)
    missing = committed(tmp_path)["digest"]
    releases = tmp_path / "releases"
    before = pointed(releases, "CURRENT")
    again = produced.worker(tmp_path)
    crash(again)
    newest = pointed(releases, "CURRENT")
    assert newest is not None
    assert newest != before
    assert Manifest.read(releases / newest).extra["state_digest"] == missing
    assert Manifest.read(releases / newest).parent == before


def run_worker(folder: Path, config: Config) -> None:
    """A worker in a process of its own, committing as often as it can."""
    use_one_thread()
    stream = config.stream.model_copy(update={"publish_every": 1})
    stay_close()
    Worker(
        config.model_copy(update={"stream": stream}), folder / "releases", folder / "state", until_end=True
    ).run()


def test_a_process_ended_by_sigkill_ends_in_the_same_state(produced: Produced, tmp_path: Path) -> None:
    # A server that has imported torch once forks the victims: only the kills are repeated, not the start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_worker", "models.gbdt", "lightgbm"])
    produced.small_run.first_releases(tmp_path / "releases")
    store, killed_at = CheckpointStore(tmp_path / "state"), []
    rng = np.random.default_rng([SEED, 9])
    for _ in range(4):
        heads, wanted = {store.head()}, int(rng.integers(2, 12))
        process = context.Process(target=run_worker, args=(tmp_path, produced.config))
        process.start()
        try:
            while process.is_alive() and len(heads) < wanted:
                heads.add(store.head())
                time.sleep(0.002)
            time.sleep(float(rng.uniform(0, 0.1)))
        finally:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            killed_at.append(store.head())
    print(f"seed {SEED}/9: killed at {killed_at}")
    assert killed_at
    (tmp_path / "config.toml").write_text(dump_config(produced.config))
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.cli", "stream", "--until-end"),
            *("--config", str(tmp_path / "config.toml")),
            *("--releases", str(tmp_path / "releases"), "--state", str(tmp_path / "state")),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["digest"] == produced.digest
    printed = CliRunner().invoke(cli, ["checkpoint", "digest", str(tmp_path / "state")])
    assert printed.stdout.strip() == produced.digest
    check_outputs(tmp_path, produced)


# Other faults --------------------------------------------------------------------------------------------


def test_a_second_worker_fences_the_first_and_ends_in_the_same_state(
    produced: Produced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = produced.worker(tmp_path)
    second: list[Worker] = []
    step = first.loop.step

    def taken_over(events: Any) -> Any:
        if first.digest is not None and not second:
            second.append(produced.worker(tmp_path))
        return step(events)

    monkeypatch.setattr(first.loop, "step", taken_over)
    with pytest.raises(StaleStateError, match="another worker has taken over"):
        first.run()
    at_takeover = committed(tmp_path)["step"]
    assert finished(second[0]) == produced.digest
    assert committed(tmp_path)["step"] > at_takeover
    # What the first had written when it was refused is named by nothing; the next start sweeps it.
    crash(produced.worker(tmp_path))
    check_outputs(tmp_path, produced)


def test_a_state_of_another_first_student_is_refused(produced: Produced, tmp_path: Path) -> None:
    from tests.releases import publish

    with pytest.raises(StaleStateError, match="another first student"):
        releases = tmp_path / "releases"
        publish(releases, 0, epoch=0, kind="teacher")
        publish(releases, 0, epoch=0)
        Worker(produced.config, releases, produced.reference / "state", until_end=True)


def test_a_stopped_worker_commits_and_goes_on_to_the_same_state(produced: Produced, tmp_path: Path) -> None:
    worker = produced.worker(tmp_path)
    step, calls = worker.loop.step, itertools.count()

    def stopped(events: Any) -> Any:
        if next(calls) == 20:
            worker.stop()
        return step(events)

    worker.loop.step = stopped  # type: ignore[method-assign]
    worker.run()
    assert committed(tmp_path)["step"] == 21
    assert finished(produced.worker(tmp_path)) == produced.digest


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "broker").start() as running:
        yield running


# kafka-python leaves sockets that it could not connect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_dies_in_mid_stream_is_waited_for(
    produced: Produced, own_broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_topics(produced.config, own_broker.bootstrap_servers, "worker")
    produce(produced.small_run.files, config)
    worker = produced.worker(tmp_path, config=config)
    poll, polls, restarts = worker.source.poll, itertools.count(), list[threading.Timer]()

    def interrupted(max_rows: int, timeout_s: float) -> Any:
        if next(polls) == 2:
            own_broker.kill()
            restarts.append(threading.Timer(1.5, own_broker.start))
            restarts[0].start()
        return poll(min(max_rows, 500), timeout_s)

    # Small fetches, so that most of the log is still with the broker when it dies.
    worker.source._consumer.config["max_partition_fetch_bytes"] = 20_000
    monkeypatch.setattr(worker.source, "poll", interrupted)
    assert finished(worker) == produced.digest
    restarts[0].join()
    check_outputs(tmp_path, produced)


def test_rows_deleted_by_the_broker_before_they_were_read_are_a_gap_that_is_named(
    produced: Produced, tmp_path: Path
) -> None:
    from kafka import TopicPartition

    bootstrap_servers = produced.config.kafka.bootstrap_servers
    config = with_topics(produced.config, bootstrap_servers, "worker-deleted")
    files = produced.small_run.files
    half = (produced.small_run.warm_rows + files.rows) // 2
    produce(files, config, stop=half)
    finished(produced.worker(tmp_path, config=config))
    produce(files, config, start=half)
    consumer, admin = make_consumer(config.kafka), make_admin(config.kafka)
    place = TopicPartition(config.kafka.topics.impressions, 0)
    end = consumer.end_offsets([place])[place]
    read = next(
        offset
        for topic, partition, offset, *_ in committed(tmp_path)["cursor"]
        if (topic, partition) == (place.topic, 0)
    )
    admin.delete_records({place: end - 5})
    for client in (consumer, admin):
        client.close()
    with pytest.raises(StaleStateError, match=f"offsets {read} to {end - 6}"):
        produced.worker(tmp_path, config=config)
