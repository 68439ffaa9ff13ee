"""Partitions that topics get while they are read: found, read from the beginning, kept in the cursor."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition

from jobs.broker import Broker
from jobs.produce import produce
from jobs.topics import ensure_topics
from monitoring.accounting import Accounting
from pipelines import kafka_source
from pipelines.config import Config
from pipelines.cursor import Cursor, Place
from pipelines.errors import StaleStateError, TransientError
from pipelines.kafka_client import make_admin, make_producer
from pipelines.kafka_source import KafkaSource
from tests.kafka_logs import NOW, config_for, story
from tests.small_run import SmallRun
from tests.test_kafka_source import click
from tests.test_worker import committed
from tests.workers import Produced, finished, with_topics

EVENTS = ("impressions", "clicks", "conversions")


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_source, "_LOOK_EVERY_S", 0.2)


def create_topics(config: Config) -> Any:
    """Topics of one partition each, and a producer."""
    names = [getattr(config.kafka.topics, name) for name in (*EVENTS, "dead_letters")]
    ensure_topics(config.kafka.bootstrap_servers, dict.fromkeys(names, 1))
    return make_producer(config.kafka)


def grow(config: Config, counts: dict[str, int]) -> None:
    admin = make_admin(config.kafka)
    admin.create_partitions({getattr(config.kafka.topics, name): count for name, count in counts.items()})
    admin.close()


def poll_until(source: KafkaSource, done: Any, limit_s: float = 20.0) -> list[Any]:
    blocks: list[Any] = []
    until = time.monotonic() + limit_s
    while not done(blocks):
        assert time.monotonic() < until
        block = source.poll(timeout_s=0.05)
        if block is not None:
            blocks.append(block)
    return blocks


def test_a_partition_that_comes_later_is_read_from_its_beginning_and_kept_in_the_cursor(
    broker: Broker,
) -> None:
    config = config_for(broker, "grow", 'kafka.idle_timeout="200ms"', partitions=1)
    producer, topic = create_topics(config), config.kafka.topics.clicks
    before = [(getattr(config.kafka.topics, name), 0) for name in sorted(EVENTS)]
    with KafkaSource(config.kafka) as source:
        assert source.partitions == before
        producer.send(topic, click("a", 1), partition=0).get(10)
        first = poll_until(source, lambda blocks: blocks)
        grow(config, {"clicks": 3})
        poll_until(source, lambda blocks: len(source.partitions) == 5)
        # What has a number keeps it: rows of the joiner's state are told by it.
        assert source.partitions == [*before, (topic, 1), (topic, 2)]
        producer.close()
        producer = make_producer(config.kafka)  # the former one does not know yet
        for partition in (0, 2):
            producer.send(topic, click(f"new-{partition}", 5 + partition), partition=partition).get(10)
        later = poll_until(source, lambda blocks: sum(map(len, blocks)) == 2)
        cursor = source.cursor
        for block in (*first, *later):
            cursor = source.advance(cursor, block)
    producer.close()
    assert story(later) == [(1, NOW + 5, "new-0"), (1, NOW + 7, "new-2")]
    assert cursor[topic, 0].offset == 2
    assert cursor[topic, 2] == Place(1, 0, NOW + 7)
    # One that has given nothing yet is listed, so that a later start does not take it for a new one.
    assert cursor[topic, 1] == Place(0)
    again = Cursor.from_state(json.loads(json.dumps(cursor.to_state())))
    with KafkaSource(config.kafka, again, until_end=True) as source:
        assert source.partitions == [*before, (topic, 1), (topic, 2)]
        assert source.poll(timeout_s=1) is None
        assert source.exhausted


def test_a_new_partition_without_messages_holds_nothing_back(broker: Broker) -> None:
    config = config_for(broker, "grow-empty", 'kafka.idle_timeout="2m"', partitions=1)
    producer, topic = create_topics(config), config.kafka.topics.clicks
    ahead = 0.0
    with KafkaSource(config.kafka, clock=lambda: time.monotonic() + ahead) as source:
        ahead = 120.0  # what is there at the start is idle at once; what comes later would take too long
        producer.send(topic, click("a", 1), partition=0).get(10)
        poll_until(source, lambda blocks: blocks)
        grow(config, {"conversions": 2})
        poll_until(source, lambda blocks: len(source.partitions) == 4)
        producer.send(topic, click("b", 2), partition=0).get(10)
        blocks = poll_until(source, lambda blocks: blocks)
    producer.close()
    assert story(blocks) == [(1, NOW + 2, "b")]


def test_a_new_partition_that_lost_its_beginning_is_a_gap(broker: Broker) -> None:
    config = config_for(broker, "grow-gap", 'kafka.idle_timeout="200ms"', partitions=1)
    producer, topic = create_topics(config), config.kafka.topics.clicks
    with KafkaSource(config.kafka) as source:
        source._looked += 3_600  # as one that is slow to look
        grow(config, {"clicks": 2})
        ensure_topics(broker.bootstrap_servers, {topic: 2})
        for number in range(5):
            producer.send(topic, click(str(number), number), partition=1).get(10)
        producer.close()
        admin = make_admin(config.kafka)
        admin.delete_records({TopicPartition(topic, 1): 3})
        admin.close()
        source._looked -= 3_600
        with pytest.raises(StaleStateError, match=rf"{topic}-1: offsets 0 to 2 \(3\)"):
            poll_until(source, lambda blocks: False)


def test_a_broker_that_cannot_tell_yet_is_asked_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(broker, "grow-again", 'kafka.idle_timeout="200ms"', partitions=1)
    create_topics(config).close()
    with KafkaSource(config.kafka) as source:
        limits, calls = source._limits, itertools.count()

        def fails_once(partitions: Any) -> Any:
            if next(calls) == 0:
                raise TransientError("the partition has no leader")
            return limits(partitions)

        monkeypatch.setattr(source, "_limits", fails_once)
        grow(config, {"clicks": 2})
        with caplog.at_level(logging.WARNING):
            poll_until(source, lambda blocks: len(source.partitions) == 4)
    assert "cannot look for new partitions now: the partition has no leader" in caplog.text


def test_a_worker_whose_topics_grow_accounts_for_every_row_and_goes_on(
    small_run: SmallRun, broker: Broker, tmp_path: Path
) -> None:
    config, files = with_topics(small_run.config, broker.bootstrap_servers, "grow-worker"), small_run.files
    config = config.model_copy(update={"kafka": config.kafka.model_copy(update={"idle_timeout": 300})})
    half = (small_run.warm_rows + files.rows) // 2
    produce(files, config, stop=half)
    produced = Produced(small_run, config, tmp_path, "")
    worker = produced.worker(tmp_path, until_end=False, clock=time.time)
    poll, grown = worker.source.poll, False

    def polled(max_rows: int, timeout_s: float) -> Any:
        nonlocal grown
        read = sum(worker.loop.read.values())
        if read == half and not grown:
            grown = True
            grow(config, dict.fromkeys(EVENTS, 4))
            ensure_topics(broker.bootstrap_servers, dict.fromkeys(worker.source.kind_of_source(), 4))
            more = config.model_copy(update={"kafka": config.kafka.model_copy(update={"partitions": 4})})
            produce(files, more, start=half)
        if read == files.rows:
            worker.stop()
        return poll(max_rows, timeout_s)

    worker.source.poll = polled  # type: ignore[method-assign,assignment]
    digest = finished(worker)
    state = committed(tmp_path)
    assert grown
    assert sum(state["read"].values()) == files.rows
    assert set(Accounting.from_state(state["accounting"]).check(state["read"]).values()) == {0}
    parts = Counter(topic for topic, *_ in state["cursor"])
    assert set(parts.values()) == {4}
    assert len(parts) == 3
    assert all(offset > 0 for _, partition, offset, *_ in state["cursor"] if partition > 1)
    letters = [json.loads(line) for line in (tmp_path / "state/dead_letters.jsonl").read_text().splitlines()]
    positions = [(one["source"], one["partition"], one["offset"], one["row"]) for one in letters]
    assert len(set(positions)) == len(positions) >= len(files.dead_letters)
    # A later start finds nothing to read, and the partitions under the same numbers.
    assert finished(produced.worker(tmp_path)) == digest
