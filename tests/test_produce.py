"""Sending an event log to Kafka."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import xxhash
from click.testing import CliRunner
from kafka import TopicPartition

from jobs.broker import Broker
from jobs.cli import cli
from jobs.produce import produce
from pipelines.arrival_header import ARRIVAL_HEADER
from pipelines.codec import decode_packed, is_packed
from pipelines.config import Config
from pipelines.errors import SetupError, TransientError
from pipelines.event_files import EventFiles
from pipelines.events import DEAD_LETTER
from pipelines.hashing import HASH_SEED
from pipelines.kafka_client import make_consumer
from tests.kafka_logs import NOW, TOPICS, config_for, write_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventFiles:
    return write_log(tmp_path_factory.mktemp("log"))


def records_of(config: Config) -> dict[str, list[Any]]:
    """All records of the three topics, by the first name of the topic."""
    consumer = make_consumer(config.kafka)
    found: dict[str, list[Any]] = {}
    for name in TOPICS[:3]:
        topic = str(getattr(config.kafka.topics, name))
        own = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        ends = consumer.end_offsets(own)
        consumer.assign(own)
        for partition in own:
            consumer.seek(partition, 0)
        records: list[Any] = []
        while len(records) < sum(ends.values()):
            records += [one for part in consumer.poll(1_000).values() for one in part]
        found[name] = records
    consumer.close()
    return found


def test_every_row_is_sent_once_keyed_and_placed_by_its_impression(broker: Broker, log: EventFiles) -> None:
    config = config_for(broker, "sent", partitions=3)
    report = produce(log, config)
    records = records_of(config)
    assert report.messages == sum(report.rows.values()) == log.rows
    assert {name: len(found) for name, found in records.items()} == {
        name: report.rows[f"sent-{name}"] for name in TOPICS[:3]
    }
    placed: dict[bytes, set[int]] = {}
    for record in (record for found in records.values() for record in found):
        if record.key is not None:
            assert orjson.loads(record.value)["impression_id"].encode() == record.key
            assert record.partition == xxhash.xxh64_intdigest(record.key, HASH_SEED) % 3
            placed.setdefault(record.key, set()).add(record.partition)
    assert {len(partitions) for partitions in placed.values()} == {1}
    assert {next(iter(partitions)) for partitions in placed.values()} == {0, 1, 2}


def test_rows_that_are_no_events_are_sent_as_they_are_with_their_time(
    broker: Broker, log: EventFiles
) -> None:
    config = config_for(broker, "as-they-are")
    produce(log, config)
    sent = [
        (record.value, int(dict(record.headers)[ARRIVAL_HEADER]))
        for found in records_of(config).values()
        for record in found
        if record.headers
    ]
    assert Counter(sent) == Counter((row.payload, row.arrival_time) for row in log.rejected)
    assert b'{"event_id": "bro\xffken"}' in {value for value, _ in sent}


def test_packs_hold_up_to_256_neighbours_of_one_partition(broker: Broker, log: EventFiles) -> None:
    config = config_for(broker, "packs", partitions=1)
    report = produce(log, config, form="packed")
    sizes, rows = [], 0
    for kind, found in enumerate(records_of(config).values()):
        packs = [decode_packed(kind, record.value) for record in found if is_packed(record.value)]
        assert not any(pack.rejected for pack in packs)
        sizes += [pack.rows for pack in packs]
        rows += sum(pack.rows for pack in packs)
    assert rows == int((log.kind != DEAD_LETTER).sum())
    assert max(sizes) <= 256
    assert report.messages == len(sizes) + len(log.rejected) < sum(report.rows.values()) == log.rows


def test_a_pack_is_never_larger_than_256_rows(broker: Broker, tmp_path: Path) -> None:
    events = [
        {"event_id": f"i{n}", "impression_id": f"i{n}", "event_time": NOW + n, "user_id": "u", "item_id": "a"}
        for n in range(600)
    ]
    (tmp_path / "impressions.jsonl").write_bytes(b"\n".join(map(orjson.dumps, events)))
    config = config_for(broker, "large-packs", partitions=1)
    assert produce(EventFiles(tmp_path), config, form="packed").messages == 3
    found = records_of(config)["impressions"]
    assert [decode_packed(0, record.value).rows for record in found] == [256, 256, 88]


def test_a_part_of_the_log_is_sent_by_rows_and_at_a_rate(broker: Broker, log: EventFiles) -> None:
    config = config_for(broker, "part")
    done: list[tuple[str, int, int]] = []
    report = produce(
        log, config, start=100, stop=160, rate=200.0, progress=lambda *figures: done.append(figures)
    )
    assert sum(report.rows.values()) == 60 == sum(map(len, records_of(config).values()))
    assert done[-1] == ("produce", 60, 60) and len(done) == 15  # four rows, 20 ms of them, at a time
    assert report.seconds >= 56 / 200  # the last four are not due earlier


def test_topics_of_another_size_are_refused(broker: Broker, log: EventFiles) -> None:
    produce(log, config_for(broker, "resized", partitions=1), stop=1)
    with pytest.raises(SetupError, match="expected topic resized-"):
        produce(log, config_for(broker, "resized", partitions=2), stop=1)


def test_no_broker_is_an_error(log: EventFiles) -> None:
    config = Config.model_validate(
        {"kafka": {"bootstrap_servers": "127.0.0.1:1", "connect_timeout": "300ms"}}
    )
    with pytest.raises(TransientError, match="no Kafka broker answers"):
        produce(log, config)


def iso(time: int) -> str:
    return datetime.fromtimestamp(time / 1000, UTC).isoformat(timespec="milliseconds")


def test_command_sends_what_arrived_between_two_times(broker: Broker, log: EventFiles) -> None:
    begin, end = NOW + 1_000, NOW + 1_500
    overrides = [f'--set=kafka.topics.{topic}="command-{topic}"' for topic in TOPICS]
    result = CliRunner().invoke(
        cli,
        [
            *("produce", "--events", str(log.folder), "--bootstrap-servers", broker.bootstrap_servers),
            *("--from", iso(begin), "--until", iso(end), *overrides),
        ],
    )
    assert result.exit_code == 0, result.output
    expected = int(((log.arrival_time >= begin) & (log.arrival_time < end)).sum())
    assert sum(json.loads(result.stdout)["rows"].values()) == expected > 0


def test_command_without_a_broker_fails_with_a_hint(log: EventFiles) -> None:
    result = CliRunner().invoke(
        cli,
        [
            *("produce", "--events", str(log.folder), "--bootstrap-servers", "127.0.0.1:1"),
            "--set=kafka.connect_timeout=300ms",
        ],
    )
    assert result.exit_code == 1
    assert "no Kafka broker answers at 127.0.0.1:1" in result.stderr and "broker up" in result.stderr
