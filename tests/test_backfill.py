"""What the broker has deleted is read from the lake, and nothing that is learned is different for it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from jobs.broker import Broker
from jobs.cli import cli
from jobs.produce import produce
from jobs.samples_ingest import ingest
from pipelines import lake_spool
from pipelines.backfill import Backfill
from pipelines.config import Config, dump_config
from pipelines.cursor import Cursor
from pipelines.errors import DataError, StaleStateError
from pipelines.events import EventBlock
from pipelines.kafka_client import make_admin, make_consumer
from pipelines.kafka_source import KafkaSource
from pipelines.lake import BATCH_MANIFEST, OffsetRange, batch_folder, lake_batches
from pipelines.lake_offsets import find_offsets
from pipelines.storage import open_folder
from tests.kafka_logs import config_for, read_all, story, tables, write_log
from tests.small_run import SmallRun
from tests.test_worker import check_outputs
from tests.workers import Killed, Produced, TickingClock, crash, finished, with_topics

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

TOPICS = ("impressions", "clicks", "conversions")


def delete_records(config: Config, share: dict[str, float]) -> dict[tuple[str, int], int]:
    """Have the broker delete the oldest messages of topics; the first offsets that are left."""
    from kafka import TopicPartition

    consumer, admin = make_consumer(config.kafka), make_admin(config.kafka)
    places = [
        TopicPartition(getattr(config.kafka.topics, topic), partition)
        for topic in share
        for partition in range(config.kafka.partitions)
    ]
    ends = consumer.end_offsets(places)
    of_topic = {getattr(config.kafka.topics, topic): part for topic, part in share.items()}
    first = {place: int(ends[place] * of_topic[place.topic]) for place in places}
    admin.delete_records(first)
    for client in (consumer, admin):
        client.close()
    return {(place.topic, place.partition): offset for place, offset in first.items()}


# The source ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deleted:
    """A log of which the broker has deleted most; a lake that has all of it, and what was read before."""

    config: Config
    lake: Path
    first: dict[tuple[str, int], int]
    starts: list[Cursor]
    rests: list[list[EventBlock]]


def told(blocks: list[EventBlock]) -> dict[str, Any]:
    """All that there is to say of some rows."""
    block = EventBlock.concat(blocks)
    assert block.produced_at is not None
    return {
        "story": story([block]),
        "position": list(
            zip(block.partition.tolist(), block.offset.tolist(), block.row.tolist(), strict=True)
        ),
        "produced_at": block.produced_at.tolist(),
        "letters": block.dead_letters,
        "tables": [table.to_pylist() for table in tables([block])],
    }


@pytest.fixture(scope="module")
def deleted(broker: Broker, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Deleted:
    """JSON first, then packed messages; two batches of the lake."""
    config, lake = config_for(broker, "backfill-source"), tmp_path_factory.mktemp("lake")
    log = write_log(tmp_path_factory.mktemp("log"))
    produce(log, config, stop=log.rows // 2)
    ingest(spark, lake, config)
    produce(log, config, start=log.rows // 2, form="packed")
    ingest(spark, lake, config)
    starts, rests = [], []
    with KafkaSource(config.kafka, until_end=True) as source:
        cursor = source.cursor
        starts.append(cursor)
        for block in read_all(source, max_rows=97):
            cursor = source.advance(cursor, block)
            starts.append(cursor)
    # Cuts in the midst of packed messages are among these.
    starts = starts[::2]
    assert any(place.row for start in starts for place in start.values())
    for start in starts:
        with KafkaSource(config.kafka, start, until_end=True) as source:
            rests.append(read_all(source))
    first = delete_records(config, {"impressions": 0.8, "clicks": 1.0, "conversions": 0.3})
    return Deleted(config, lake, first, starts, rests)


def test_the_lake_and_the_broker_together_give_what_the_broker_gave(
    deleted: Deleted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = 0
    for number, (start, rest) in enumerate(zip(deleted.starts, deleted.rests, strict=True)):
        if number % 2:  # many small buckets, each from several reads and files
            monkeypatch.setattr(lake_spool, "_BUCKET_ROWS", 11)
            monkeypatch.setattr(lake_spool, "_READ_ROWS", 23)
            monkeypatch.setattr(lake_spool, "_WAITING_BYTES", 3_000)
            monkeypatch.setattr(lake_spool, "_BINS", 17)
        backfill = Backfill(deleted.lake, tmp_path / "scratch")
        with KafkaSource(deleted.config.kafka, start, until_end=True, backfill=backfill) as source:
            filled += len(source._past.indices())
            blocks = read_all(source)
            cursor = start
            for block in blocks:
                cursor = source.advance(cursor, block)
        monkeypatch.undo()
        if rest:
            assert told(blocks) == told(rest)
        assert {part: place.offset for part, place in cursor.items()} == ends_of(deleted.config)
        assert not (tmp_path / "scratch").exists()
    assert filled > 2 * len(deleted.starts)


def ends_of(config: Config) -> dict[tuple[str, int], int]:
    with KafkaSource(config.kafka, until_end=True) as source:
        assert source._ends is not None
        return dict(zip(source.partitions, source._ends, strict=True))


def test_without_the_lake_the_gap_is_refused_and_the_way_out_is_named(deleted: Deleted) -> None:
    with pytest.raises(StaleStateError) as caught:
        KafkaSource(deleted.config.kafka, deleted.starts[0])
    for (topic, partition), offset in deleted.first.items():
        assert f"{topic}-{partition}: offsets 0 to {offset - 1} ({offset})" in caught.value.message
    assert caught.value.hint is not None
    assert "--backfill LAKE" in caught.value.hint


def test_offsets_that_the_lake_lacks_are_refused_by_name(deleted: Deleted, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(deleted.lake, lake)
    first, second = sorted(lake_batches(lake), key=lambda batch: sum(part.start for part in batch.offsets))
    shutil.rmtree(batch_folder(open_folder(lake), second.batch).location)
    with pytest.raises(DataError) as caught:
        KafkaSource(deleted.config.kafka, deleted.starts[0], backfill=Backfill(lake, tmp_path / "scratch"))
    assert caught.value.exit_code == 3
    lacking = {(part.topic, part.partition): part.stop for part in first.offsets}
    for part, offset in deleted.first.items():
        begin = lacking[part]
        words = f"{part[0]}-{part[1]}: offsets {begin} to {offset - 1} ({offset - begin})"
        assert (words in caught.value.message) == (begin < offset)
    assert any(begin < deleted.first[part] for part, begin in lacking.items())
    assert not (tmp_path / "scratch").exists()


def test_a_lake_that_lost_a_file_is_refused(deleted: Deleted, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(deleted.lake, lake)
    next(lake.rglob("kind=click/**/*.parquet")).unlink()
    with pytest.raises(DataError, match="expected the rows of the manifest"):
        KafkaSource(deleted.config.kafka, deleted.starts[0], backfill=Backfill(lake, tmp_path / "scratch"))


def test_a_lake_that_has_rows_twice_is_refused(deleted: Deleted, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(deleted.lake, lake)
    path = next(lake.rglob("kind=click/**/*.parquet"))
    shutil.copy(path, path.with_name("copy.parquet"))
    batch = next(found for found in lake_batches(lake) if found.batch in str(path))
    manifest = Path(batch_folder(open_folder(lake), batch.batch).location) / BATCH_MANIFEST
    document = json.loads(manifest.read_text())
    rows = len(read_parquet(path))
    document["rows"]["click"] += rows
    manifest.write_text(json.dumps(document))
    backfill = Backfill(lake, tmp_path / "scratch")
    with (
        KafkaSource(deleted.config.kafka, deleted.starts[0], until_end=True, backfill=backfill) as source,
        pytest.raises(DataError, match="Received twice: row 0 of offset"),
    ):
        read_all(source)


def read_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read()


def test_each_offset_is_taken_from_one_batch_of_those_that_have_it(deleted: Deleted) -> None:
    one, two = lake_batches(deleted.lake)
    part = one.offsets[0]
    stop = max(each.stop for batch in (one, two) for each in batch.offsets if each.topic == part.topic)
    wanted = [OffsetRange(topic=part.topic, partition=part.partition, start=0, stop=stop + 4)]
    copy = one.model_copy(update={"batch": "copy"})
    held, missing = find_offsets(wanted, [one, two, copy])
    taken = sorted(offset for parts in held.values() for each in parts for offset in span(each))
    lacking = [offset for each in missing for offset in span(each)]
    assert sorted(taken + lacking) == list(range(stop + 4))
    assert not lacking or min(lacking) == len(taken)


def span(each: OffsetRange) -> range:
    return range(each.start, each.stop)


# The worker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expired:
    """Workers that were stopped on the way; the lake has what the broker deleted since."""

    produced: Produced
    lake: Path
    stopped: Path


@pytest.fixture(scope="module")
def expired(
    small_run: SmallRun, broker: Broker, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> Expired:
    config = with_topics(small_run.config, broker.bootstrap_servers, "backfill-worker")
    produce(small_run.files, config)
    lake, reference = tmp_path_factory.mktemp("lake"), tmp_path_factory.mktemp("reference")
    ingest(spark, lake, config)
    bare = Produced(small_run, config, reference, "")
    produced = Produced(small_run, config, reference, finished(bare.worker(reference)))
    stopped = tmp_path_factory.mktemp("stopped")
    run_until(produced.worker(stopped), 20).run()
    delete_records(config, {"impressions": 0.9, "clicks": 0.8, "conversions": 1.0})
    return Expired(produced, lake, stopped)


def run_until(worker: Any, steps: int, action: Any = None) -> Any:
    """Make a worker stop, or do something else, in a later step."""
    step, calls = worker.loop.step, itertools.count(1)

    def watched(events: Any) -> Any:
        if next(calls) == steps:
            worker.stop() if action is None else action()
        return step(events)

    worker.loop.step = watched
    return worker


def copied(expired: Expired, folder: Path) -> Path:
    shutil.copytree(expired.stopped, folder, dirs_exist_ok=True)
    return folder


def test_a_worker_that_reads_the_gap_from_the_lake_ends_in_the_state_of_one_that_never_stopped(
    expired: Expired, tmp_path: Path
) -> None:
    folder = copied(expired, tmp_path)
    with pytest.raises(StaleStateError, match="the broker has deleted"):
        expired.produced.worker(folder)
    assert finished(expired.produced.worker(folder, backfill=expired.lake)) == expired.produced.digest
    check_outputs(folder, expired.produced)
    assert not (folder / "state" / "backfill").exists()


def test_a_worker_killed_amid_the_gap_goes_on_from_there(expired: Expired, tmp_path: Path) -> None:
    folder = copied(expired, tmp_path)

    def killed() -> None:
        raise Killed

    for steps in (12, 25):
        worker = run_until(
            expired.produced.worker(folder, backfill=expired.lake, clock=TickingClock()), steps, killed
        )
        worker.close = lambda: None
        with pytest.raises(Killed):
            worker.run()
        crash(worker)
    assert finished(expired.produced.worker(folder, backfill=expired.lake)) == expired.produced.digest
    check_outputs(folder, expired.produced)


@pytest.fixture
def config_file(expired: Expired, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "config.toml"
    path.write_text(dump_config(expired.produced.config), encoding="utf-8")
    yield path


def test_the_command_refuses_a_lake_that_lacks_the_gap_with_exit_code_3(
    expired: Expired, config_file: Path, tmp_path: Path
) -> None:
    folder = copied(expired, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    arguments = ["stream", "--releases", str(folder / "releases"), "--state", str(folder / "state")]
    arguments += ["--until-end", "--config", str(config_file), "--backfill", str(tmp_path / "empty")]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 3
    assert "lacks" in found.stderr
    assert f"{expired.produced.config.kafka.topics.conversions}-0: offsets" in found.stderr
