"""A batch is in the lake whole or not at all, and once: whoever is killed, repeated or doing the same."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq
import pytest

import pipelines.lake_write
from jobs.samples_ingest import IngestReport, ingest
from pipelines.codec import encode_json
from pipelines.config import Config
from pipelines.errors import DataError
from pipelines.events import CLICK, IMPRESSION
from pipelines.lake import LakeBatch, VoidBatch, lake_batches, lake_version, read_batch_manifest, read_lake
from pipelines.lake_write import OvertakenError, add_file_batch
from pipelines.storage import open_folder
from tests.lake_logs import HOUR, START, clicks, event_ids, impressions, kafka_config, send, write_log

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.broker import Broker


def ids(prefix: str, stop: int) -> list[str]:
    return sorted(f"{prefix}{number}" for number in range(stop))


def attempts(lake: Path) -> list[Path]:
    return sorted(lake.glob("events/batch=*/attempt=*"))


def digests(lake: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(lake.rglob("*.parquet"))
    }


def test_manifest_tells_what_a_batch_of_files_holds(spark: SparkSession, tmp_path: Path) -> None:
    log, lake = write_log(tmp_path / "log", ".jsonl"), tmp_path / "lake"
    ingest(spark, lake, Config(), events=log)
    (batch,) = lake_batches(lake)
    assert batch.rows == {"impression": 9, "click": 6, "conversion": 4, "dead_letter": 3}
    assert batch.total_rows == 22
    assert batch.times["click"].event_time == (START + 5_000, START + 5 * HOUR // 4 + 5_000)
    assert batch.times["click"].arrival_time == (START + 9_000, START + 5 * HOUR // 4 + 9_000)
    assert batch.times["dead_letter"].event_time is None
    # Four impressions an hour; the bad lines have no time at all.
    counts = {(part.kind, part.event_date, part.event_hour): part.rows for part in batch.partitions}
    assert counts == {
        **{("impression", "2026-01-05", hour): rows for hour, rows in enumerate((4, 4, 1))},
        **{("click", "2026-01-05", hour): rows for hour, rows in enumerate((4, 2))},
        ("conversion", "2026-01-05", 0): 4,
        ("dead_letter", "unknown", 0): 3,
    }
    content = (log / "clicks.jsonl").read_bytes()
    (described,) = [file for file in batch.files if file.kind == "click"]
    assert described.model_dump() == {
        "kind": "click",
        "name": "clicks.jsonl",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_late_events_make_a_batch_of_their_own_and_rewrite_nothing(
    spark: SparkSession, tmp_path: Path
) -> None:
    log, lake = write_log(tmp_path / "log"), tmp_path / "lake"
    ingest(spark, lake, Config(), events=log)
    before, version, (first,) = digests(lake), lake_version(lake), lake_batches(lake)
    pq.write_table(clicks(0, 1), log / "clicks-late.parquet")
    ingest(spark, lake, Config(), events=log)
    assert before.items() < digests(lake).items()
    (late,) = [batch for batch in lake_batches(lake) if batch.batch != first.batch]
    assert [(part.event_date, part.event_hour, part.rows) for part in late.partitions] == [
        ("2026-01-05", 0, 1)
    ]
    assert lake_version(lake) != version
    assert read_lake(spark, lake, batches=[late.batch]).count() == 1
    assert read_lake(spark, lake, batches=[]).count() == 0
    assert read_lake(spark, lake).count() == 20
    with pytest.raises(DataError, match="expected the batch nowhere in the lake"):
        read_lake(spark, lake, batches=["nowhere"])


def test_lake_and_files_can_lie_behind_uris(spark: SparkSession, tmp_path: Path) -> None:
    log = write_log(tmp_path / "a log", ".jsonl")
    pq.write_table(impressions(9, 3), log / "impressions-2.parquet")
    by_path = ingest(spark, tmp_path / "lake", Config(), events=log)
    place = f"file://{tmp_path}/a lake"
    by_uri = ingest(spark, place, Config(), events=f"file://{log}")
    assert by_uri == by_path
    assert lake_batches(place, spark) == lake_batches(place) == lake_batches(tmp_path / "a lake")
    for kind, count in (("impression", 12), ("click", 6), ("conversion", 4)):
        found = event_ids(spark, place, kind)
        assert found == event_ids(spark, tmp_path / "lake", kind)
        assert len(found) == count
    assert ingest(spark, place, Config(), events=f"file://{log}").files == []


def test_lake_of_the_former_layout_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "lake" / "events" / "kafka" / "_spark_metadata").mkdir(parents=True)
    with pytest.raises(DataError, match="former layout") as caught:
        read_lake(spark, tmp_path / "lake")
    assert "new --lake" in str(caught.value.hint)
    with pytest.raises(DataError, match="former layout"):
        ingest(spark, tmp_path / "lake", Config(), events=write_log(tmp_path / "log"))


def test_of_two_runs_over_the_same_files_one_adds_them(spark: SparkSession, tmp_path: Path) -> None:
    log, lake = write_log(tmp_path / "log"), tmp_path / "lake"
    reports: list[IngestReport] = []
    start = threading.Barrier(2)

    def run() -> None:
        start.wait()
        reports.append(ingest(spark, lake, Config(), events=log))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(report.files) for report in reports) == [0, 3]
    assert event_ids(spark, lake, "impression") == ids("i", 9)
    assert len(attempts(lake)) == 1


def between_write_and_commit(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Do something once, when the next batch has been written and is not committed."""
    write, turns = pipelines.lake_write._written, iter([True])

    def written(*arguments: Any) -> dict[str, Any]:
        described = write(*arguments)
        if next(turns, False):
            act()
        return described

    monkeypatch.setattr(pipelines.lake_write, "_written", written)


def test_run_that_is_overtaken_adds_only_what_the_other_has_not(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, lake = write_log(tmp_path / "log"), tmp_path / "lake"
    more = shutil.copytree(log, tmp_path / "more")
    pq.write_table(clicks(6, 2), more / "clicks-2.parquet")
    quicker: list[IngestReport] = []
    between_write_and_commit(monkeypatch, lambda: quicker.append(ingest(spark, lake, Config(), events=log)))
    slower = ingest(spark, lake, Config(), events=more)
    assert len(quicker[0].files) == 3
    assert slower.files == ["clicks-2.parquet"]
    assert event_ids(spark, lake, "click") == ids("c", 8)
    assert len(lake_batches(lake)) == len(attempts(lake)) == 2


def test_plan_that_nobody_finishes_is_voided_and_cannot_be_committed_later(
    spark: SparkSession, tmp_path: Path
) -> None:
    log, lake = write_log(tmp_path / "log"), tmp_path / "lake"
    ingest(spark, lake, Config(), events=log)
    (batch,) = lake_batches(lake)
    folder = lake / "events" / f"batch={batch.batch}"
    (folder / "_MANIFEST.json").unlink()  # as a killed run leaves it
    pq.write_table(clicks(6, 2), log / "clicks-2.parquet")
    ingest(spark, lake, Config(), events=log)
    assert event_ids(spark, lake, "click") == ids("c", 8)
    assert isinstance(read_batch_manifest(open_folder(lake), batch.batch), VoidBatch)
    assert len(attempts(lake)) == 1
    with pytest.raises(OvertakenError):
        add_file_batch(open_folder(lake), batch.batch, batch.files, read_lake(spark, lake))
    assert [isinstance(found, LakeBatch) for found in lake_batches(lake)] == [True]


@pytest.fixture
def topics(spark: SparkSession, broker: Broker, tmp_path: Path) -> Any:
    """A lake with two micro-batches of one topic pair, its configuration, and a way to send more."""
    config = kafka_config(broker, f"batches-{tmp_path.name}")
    lake = tmp_path / "lake"

    def more(first: int, count: int) -> None:
        send(broker, config.kafka.topics.impressions, [*encode_json(IMPRESSION, impressions(first, count))])
        send(broker, config.kafka.topics.clicks, [*encode_json(CLICK, clicks(first, count))])

    for first, count in ((0, 6), (6, 3)):
        more(first, count)
        ingest(spark, lake, config)
    return lake, config, more


def test_manifests_of_kafka_cover_each_offset_once(topics: Any) -> None:
    lake, config, _ = topics
    first, second = lake_batches(lake)
    assert first.batch[:-1] == second.batch[:-1]
    covered = Counter(
        (part.topic, part.partition, offset)
        for batch in (first, second)
        for part in batch.offsets
        for offset in range(part.start, part.stop)
    )
    # Messages go to the two partitions in turn: 3 + 3, then 2 + 1.
    assert covered == Counter(
        (topic, partition, offset)
        for topic in (config.kafka.topics.impressions, config.kafka.topics.clicks)
        for partition, count in ((0, 5), (1, 4))
        for offset in range(count)
    )
    assert (second.rows["impression"], second.rows["click"]) == (3, 3)


def test_micro_batch_that_spark_repeats_is_not_written_again(spark: SparkSession, topics: Any) -> None:
    lake, config, _ = topics
    before = digests(lake)
    # As if the run had been killed after its commit to the lake and before Spark's own.
    (lake / "checkpoints" / "kafka" / "commits" / "1").unlink()
    (lake / "checkpoints" / "kafka" / "commits" / ".1.crc").unlink()
    report = ingest(spark, lake, config)
    assert (sum(report.rows.values()), report.messages) == (0, 0)
    assert digests(lake) == before


def test_micro_batch_cut_off_before_its_commit_is_written_anew(spark: SparkSession, topics: Any) -> None:
    lake, config, more = topics
    (lake / "checkpoints" / "kafka" / "commits" / "1").unlink()
    (lake / "checkpoints" / "kafka" / "commits" / ".1.crc").unlink()
    (lake / "events" / f"batch={lake_batches(lake)[1].batch}" / "_MANIFEST.json").unlink()
    more(9, 3)
    report = ingest(spark, lake, config)
    assert (report.rows["impression"], report.messages) == (6, 12)
    assert event_ids(spark, lake, "impression") == ids("i", 12)
    assert len(attempts(lake)) == len(lake_batches(lake)) == 3


def test_lost_checkpoint_loses_and_doubles_nothing(spark: SparkSession, topics: Any) -> None:
    lake, config, more = topics
    shutil.rmtree(lake / "checkpoints")
    more(9, 3)
    assert ingest(spark, lake, config).rows["impression"] == 3
    assert event_ids(spark, lake, "impression") == ids("i", 12)
    assert event_ids(spark, lake, "click") == ids("c", 12)


def test_continuous_ingest_commits_batch_after_batch(spark: SparkSession, topics: Any) -> None:
    lake, config, more = topics
    reports: list[IngestReport] = []
    run = threading.Thread(target=lambda: reports.append(ingest(spark, lake, config, every=500)))
    run.start()
    try:
        for begin in (9, 12):
            more(begin, 3)
            # A batch takes what is there when it begins: one call may come in two of them.
            wait_until(lambda begin=begin: _rows_in(lake) >= 2 * (begin + 3))  # type: ignore[misc]
    finally:
        for query in spark.streams.active:
            query.stop()
        run.join()
    assert reports[0].rows["impression"] == 6
    assert event_ids(spark, lake, "impression") == ids("i", 15)
    assert len(lake_batches(lake)) >= 4


def _rows_in(lake: Path) -> int:
    """Impressions and clicks that have been committed."""
    return sum(batch.rows["impression"] + batch.rows["click"] for batch in lake_batches(lake))


def wait_until(is_so: Callable[[], Any], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


KILLED_INGEST = """
import os, signal, sys
from jobs.cli import cli
from pipelines.storage import LocalFolder

create, moment = LocalFolder.create, sys.argv.pop(1)

def killed(folder, name, content):
    if name != "_MANIFEST.json":
        return create(folder, name, content)
    if moment == "written":
        create(folder, name, content)
    os.killpg(0, signal.SIGKILL)

LocalFolder.create = killed
cli(sys.argv[1:])
"""


def ingest_and_kill(moment: Literal["not written", "written"], lake: Path, *arguments: str) -> None:
    """Ingest in a process of its own; SIGKILL it and its Spark when a batch is committed, or just before."""
    command = ["samples", "ingest", "--lake", str(lake), "--master", "local[1]", *arguments]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_INGEST, moment, *command],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def test_run_over_files_that_is_killed_leaves_nothing_to_see(spark: SparkSession, tmp_path: Path) -> None:
    log, lake = write_log(tmp_path / "log"), tmp_path / "lake"
    pq.write_table(impressions(9, 391), log / "impressions-2.parquet")  # a hundred hours
    ingest_and_kill("not written", lake, "--events", str(log))
    assert len(attempts(lake)) == 1
    assert lake_batches(lake) == []
    assert ingest(spark, lake, Config(), events=log).rows["impression"] == 400
    assert event_ids(spark, lake, "impression") == ids("i", 400)
    assert len(attempts(lake)) == 1


def test_stream_that_is_killed_takes_up_where_it_ended(
    spark: SparkSession, broker: Broker, tmp_path: Path
) -> None:
    config, lake = kafka_config(broker, "killed-stream"), tmp_path / "lake"
    send(broker, config.kafka.topics.impressions, [*encode_json(IMPRESSION, impressions(0, 400))])
    options = [f"--set=kafka.topics.{name}='{topic}'" for name, topic in config.kafka.topics]
    where = ["--bootstrap-servers", broker.bootstrap_servers, *options]
    ingest_and_kill("not written", lake, *where)
    assert lake_batches(lake) == []
    ingest_and_kill("written", lake, *where)
    assert [batch.rows["impression"] for batch in lake_batches(lake)] == [400]
    send(broker, config.kafka.topics.impressions, [*encode_json(IMPRESSION, impressions(400, 2))])
    assert ingest(spark, lake, config).rows["impression"] == 2
    assert event_ids(spark, lake, "impression") == ids("i", 402)
