"""Every message and every file reaches the lake exactly once; what cannot be used is kept with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.samples_ingest import ingest
from jobs.samples_kafka import spark_kafka_options
from pipelines.codec import encode_json, encode_packed
from pipelines.config import Config
from pipelines.errors import ConfigError, DataError, TransientError
from pipelines.events import CLICK, CONVERSION, IMPRESSION, KINDS
from pipelines.lake import lake_batches, lake_version, read_lake
from tests.lake_logs import (
    HOUR,
    START,
    clicks,
    conversions,
    impressions,
    kafka_config,
    rows_of,
    send,
    write_log,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.broker import Broker


@pytest.fixture(scope="module")
def from_kafka(spark: SparkSession, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A lake after two runs over JSON, packed and malformed messages, and the reports of all runs."""
    lake = tmp_path_factory.mktemp("lake")
    config = kafka_config(broker, "ingest")
    topics = config.kafka.topics
    send(broker, topics.impressions, [*encode_json(IMPRESSION, impressions(0, 9))])
    send(broker, topics.impressions, [b"{not json", None, b'{"event_id": "x"}'])
    send(broker, topics.clicks, [encode_packed(CLICK, clicks(0, 4)), *encode_json(CLICK, clicks(4, 2))])
    reports = [ingest(spark, lake, config), ingest(spark, lake, config)]
    send(broker, topics.impressions, [encode_packed(IMPRESSION, impressions(9, 6))])
    send(broker, topics.clicks, [*encode_json(CLICK, clicks(5, 1))])
    broken = conversions(0, 4).set_column(2, "event_time", pa.array([START, 5 * START, START, START]))
    send(broker, topics.conversions, [encode_packed(CONVERSION, broken)])
    reports.append(ingest(spark, lake, config))
    return lake, reports


def test_each_message_is_ingested_once_however_often_the_job_runs(from_kafka: Any) -> None:
    _, (first, again, more) = from_kafka
    assert first.rows == {"impression": 9, "click": 6, "conversion": 0}
    assert (first.dead_letters, first.messages) == (3, 15)
    assert again.rows == {"impression": 0, "click": 0, "conversion": 0}
    assert (again.dead_letters, again.messages) == (0, 0)
    # The click that is sent a second time stays in the lake: duplicates are dropped when samples are built.
    assert more.rows == {"impression": 6, "click": 1, "conversion": 3}
    assert first.lake_version == again.lake_version != more.lake_version


def test_lake_holds_the_events_with_their_features_and_positions(
    spark: SparkSession, from_kafka: Any
) -> None:
    lake, _ = from_kafka
    rows = {row["event_id"]: row for row in rows_of(spark, lake, "impression")}
    assert len(rows) == 15
    assert json.loads(rows["i2"]["features"]) == {"price": 0.5, "tags": ["a", 'ä"b']}
    assert (rows["i2"]["source"], rows["i2"]["partition"], rows["i2"]["offset"]) == (
        "ingest-impressions",
        0,
        1,
    )
    assert (rows["i10"]["partition"], rows["i10"]["row"]) == (0, 1)
    assert rows["i9"]["event_time"] == rows["i9"]["arrival_time"] == START + 9 * HOUR // 4
    assert (rows["i9"]["event_date"], rows["i9"]["event_hour"]) == ("2026-01-05", 2)


def test_dead_letters_keep_reason_position_and_payload(spark: SparkSession, from_kafka: Any) -> None:
    lake, _ = from_kafka
    letters = rows_of(spark, lake, "dead_letter")
    assert len(letters) == 4
    packed, no_json, tombstone_or_incomplete = letters[0], letters[1], letters[2:]
    assert packed["source"] == "ingest-conversions"
    assert packed["row"] == 1
    assert "event_time" in packed["reason"]
    assert json.loads(packed["payload"])["event_id"] == "v1"
    assert no_json["payload"] == "{not json"
    assert {letter["payload"] for letter in tombstone_or_incomplete} == {None, '{"event_id": "x"}'}
    assert all(letter["reason"].startswith("impressions: ") for letter in letters[1:])
    assert all(letter["arrival_time"] > START for letter in letters)


def test_rows_that_no_commit_names_are_not_read(spark: SparkSession, from_kafka: Any, tmp_path: Path) -> None:
    lake, _ = from_kafka
    copy = tmp_path / "lake"
    shutil.copytree(lake / "events", copy / "events")
    attempt = next(copy.glob("events/batch=*/attempt=*"))
    shutil.copytree(attempt, attempt.with_name("attempt=left-by-a-killed-run"))
    shutil.copytree(attempt, copy / "events" / "batch=left-by-a-killed-run" / "attempt=1")
    assert len(rows_of(spark, copy, "click")) == 7


def test_absent_broker_and_absent_topic_are_told(spark: SparkSession, broker: Broker, tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="no Kafka broker answers at"):
        ingest(spark, tmp_path, Config(), bootstrap_servers="127.0.0.1:9")
    with pytest.raises(DataError, match="At least one is missing"):
        ingest(spark, tmp_path, kafka_config(broker, "never-made", create=False))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_event_files_of_either_form_give_the_rows_of_kafka(
    spark: SparkSession, from_kafka: Any, tmp_path: Path, suffix: str
) -> None:
    lake = tmp_path / "lake"
    report = ingest(spark, lake, Config(), events=write_log(tmp_path / "log", suffix))
    assert report.rows == {"impression": 9, "click": 6, "conversion": 4}
    assert report.dead_letters == (3 if suffix == ".jsonl" else 0)
    position = {"source", "partition", "offset", "row", "received_at"}
    expected = {row["event_id"]: row for row in rows_of(spark, from_kafka[0], "impression")}
    for number, row in enumerate(rows_of(spark, lake, "impression")):
        assert (row["source"], row["offset"]) == (f"impressions{suffix}", number)
        for name in set(row) - position:
            assert row[name] == expected[row["event_id"]][name], name
    if suffix == ".jsonl":
        letter = rows_of(spark, lake, "dead_letter")[0]
        assert (letter["source"], letter["offset"]) == ("clicks.jsonl", 7)
        assert letter["event_date"] == "unknown"


def test_files_are_ingested_once_and_new_ones_later(spark: SparkSession, tmp_path: Path) -> None:
    log, lake = write_log(tmp_path / "log", ".parquet"), tmp_path / "lake"
    ingest(spark, lake, Config(), events=log)
    version = lake_version(lake)
    again = ingest(spark, lake, Config(), events=log)
    assert (again.files, sum(again.rows.values()), again.lake_version) == ([], 0, version)
    pq.write_table(clicks(6, 2), log / "clicks-2.parquet")
    pq.write_table(clicks(0, 6), log / "clicks-copy.parquet")
    more = ingest(spark, lake, Config(), events=log)
    assert more.files == ["clicks-2.parquet"]
    assert "clicks-copy.parquet" in more.files_known
    assert len(rows_of(spark, lake, "click")) == 8


def test_file_that_changed_after_it_was_ingested_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    log, lake = write_log(tmp_path / "log", ".parquet"), tmp_path / "lake"
    ingest(spark, lake, Config(), events=log)
    pq.write_table(clicks(0, 7), log / "clicks.parquet")
    with pytest.raises(DataError, match="ingested with other content"):
        ingest(spark, lake, Config(), events=log)


def test_batch_without_its_manifest_is_invisible_and_written_again(
    spark: SparkSession, tmp_path: Path
) -> None:
    log, lake = write_log(tmp_path / "log", ".parquet"), tmp_path / "lake"
    ingest(spark, lake, Config(), events=log)
    (batch,) = lake_batches(lake)
    # As if the run had been killed after its files were written and before the commit.
    (lake / "events" / f"batch={batch.batch}" / "_MANIFEST.json").unlink()
    with pytest.raises(DataError, match="expected a lake with ingested events"):
        read_lake(spark, lake)
    ingest(spark, lake, Config(), events=log)
    assert len(rows_of(spark, lake, "impression")) == 9


def test_raw_messages_beside_a_log_are_dead_letters(spark: SparkSession, tmp_path: Path) -> None:
    log, lake = write_log(tmp_path / "log", ".parquet"), tmp_path / "lake"
    line = json.dumps({"topic": "clicks", "value": "{oops", "arrival_time": START + 5})
    (log / "malformed.jsonl").write_text(line + "\n")
    assert ingest(spark, lake, Config(), events=log).dead_letters == 1
    (letter,) = rows_of(spark, lake, "dead_letter")
    assert (letter["source"], letter["payload"], letter["arrival_time"]) == (
        "malformed.jsonl:clicks",
        "{oops",
        START + 5,
    )


def test_column_of_a_wrong_type_is_told_with_its_file(spark: SparkSession, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", ".parquet")
    table = pq.read_table(log / "clicks.parquet")
    names = pa.array(["yesterday"] * len(table))
    pq.write_table(table.set_column(2, "event_time", names), log / "clicks.parquet")
    with pytest.raises(DataError, match=r"^clicks.parquet: column event_time must be int64") as caught:
        ingest(spark, tmp_path / "lake", Config(), events=log)
    assert "milliseconds since the epoch" in str(caught.value.hint)


def test_folder_without_impressions_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected impressions"):
        ingest(spark, tmp_path / "lake", Config(), events=tmp_path)


def test_kafka_options_are_translated_for_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", 'a"b')
    options = spark_kafka_options(
        {
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "PLAIN",
            "sasl_plain_username": "me",
            "sasl_plain_password": "env:PASSWORD",
        }
    )
    assert options["kafka.security.protocol"] == "SASL_SSL"
    assert options["kafka.sasl.jaas.config"] == (
        'org.apache.kafka.common.security.plain.PlainLoginModule required username="me" password="a\\"b";'
    )
    with pytest.raises(ConfigError, match="ssl_context"):
        spark_kafka_options({"ssl_context": "x"})


def test_kinds_of_the_lake_are_those_of_the_contract(spark: SparkSession, from_kafka: Any) -> None:
    kinds = {row["kind"] for row in read_lake(spark, from_kafka[0]).select("kind").distinct().collect()}
    assert kinds == {*KINDS, "dead_letter"}
