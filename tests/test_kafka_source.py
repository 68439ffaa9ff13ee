"""Reading Kafka: the order of the files again, going on from any row, and what stands in the way."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from kafka import TopicPartition
from kafka.admin import KafkaAdminClient

from jobs.broker import Broker
from jobs.produce import produce
from jobs.topics import ensure_topics
from pipelines import kafka_source
from pipelines.config import Config
from pipelines.config_sections import KafkaConfig
from pipelines.cursor import Cursor, Place
from pipelines.errors import ConfigError, SetupError, StaleStateError, TransientError
from pipelines.event_files import EventFiles
from pipelines.events import DEAD_LETTER, DeadLetter, EventBlock
from pipelines.kafka_client import make_consumer, make_producer
from pipelines.kafka_source import KafkaSource
from tests.kafka_logs import NOW, config_for, read_all, story, tables, write_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventFiles:
    return write_log(tmp_path_factory.mktemp("log"))


def empty_topics(config: Config) -> Any:
    """Create the topics and return a producer."""
    names = config.kafka.topics
    own = (names.impressions, names.clicks, names.conversions)
    ensure_topics(
        config.kafka.bootstrap_servers, dict.fromkeys(own, config.kafka.partitions) | {names.dead_letters: 1}
    )
    return make_producer(config.kafka)


def click(name: str, arrival: int, **changes: Any) -> bytes:
    body = {"event_id": name, "impression_id": "i", "event_time": NOW, "arrival_time": NOW + arrival}
    return orjson.dumps(body | changes)


@pytest.mark.parametrize(("form", "partitions"), [("json", 1), ("json", 3), ("packed", 2)])
def test_a_log_comes_back_in_the_order_of_its_files(
    broker: Broker, log: EventFiles, form: Any, partitions: int
) -> None:
    config = config_for(broker, f"order-{form}-{partitions}", partitions=partitions)
    produce(log, config, form=form)
    with KafkaSource(config.kafka, until_end=True) as source:
        blocks = read_all(source)
        assert source.poll(timeout_s=0.1) is None
    assert story(blocks) == story([*log.blocks()])
    assert [a.equals(b) for a, b in zip(tables(blocks), tables([*log.blocks()]), strict=True)] == [True] * 3


def test_json_and_packed_messages_may_be_mixed_in_a_topic(broker: Broker, log: EventFiles) -> None:
    config = config_for(broker, "mixed")
    cuts = [0, 100, 101, 350, log.rows]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        produce(log, config, start=start, stop=stop, form=("json", "packed")[number % 2])
    with KafkaSource(config.kafka, until_end=True) as source:
        assert story(read_all(source, 50)) == story([*log.blocks()])


@pytest.mark.parametrize("form", ["json", "packed"])
def test_a_reader_that_goes_on_from_any_row_reads_the_rest_and_nothing_else(
    broker: Broker, log: EventFiles, form: Any
) -> None:
    config = config_for(broker, f"go-on-{form}")
    produce(log, config, form=form)
    whole, rest = story([*log.blocks()]), story([*log.blocks()])
    state: Any = None
    rng = np.random.default_rng(4)
    for _ in range(8):
        cursor = None if state is None else Cursor.from_state(json.loads(json.dumps(state)))
        with KafkaSource(config.kafka, cursor, until_end=True) as source:
            block = source.poll(97, 20.0)
            assert block is not None
            upto = int(rng.integers(1, len(block) + 1))
            assert story([block]) == rest[: len(block)]
            state = source.advance(source.cursor, block, upto).to_state()
        rest = rest[upto:]
    with KafkaSource(config.kafka, Cursor.from_state(state), until_end=True) as source:
        blocks = read_all(source)
        end = source.advance(source.cursor, EventBlock.concat(blocks))
    assert story(blocks) == rest != whole
    with KafkaSource(config.kafka, end, until_end=True) as source:
        assert source.exhausted or source.poll(timeout_s=5) is None
        assert source.exhausted and source.lag() == 0


def test_small_buffers_change_nothing(
    broker: Broker, log: EventFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(broker, "small", partitions=3)
    produce(log, config)
    monkeypatch.setattr(kafka_source, "_ROWS_A_POLL", 16)
    monkeypatch.setattr(kafka_source, "_MOST_WAITING", 20)
    with KafkaSource(config.kafka, until_end=True) as source:
        assert story(read_all(source, 33)) == story([*log.blocks()])


def test_positions_name_topic_partition_and_offset(broker: Broker) -> None:
    config = config_for(broker, "positions")
    producer = empty_topics(config)
    before = round(time.time() * 1000)
    for name, partition, arrival in (("a", 1, 3), ("b", 0, 1), ("c", 1, 5)):
        producer.send(config.kafka.topics.clicks, click(name, arrival), partition=partition)
    producer.close()
    with KafkaSource(config.kafka, until_end=True) as source:
        (block,) = read_all(source)
        topic = config.kafka.topics.clicks
        assert [source.partitions[p] for p in block.partition] == [(topic, 0), (topic, 1), (topic, 1)]
        assert source.partitions == sorted(source.partitions) and len(source.partitions) == 6
        assert source.kind_of_source()[topic] == 1
    assert block.offset.tolist() == [0, 0, 1] and block.row.tolist() == [0, 0, 0]
    assert block.produced_at is not None
    assert all(before - 1 <= at <= time.time() * 1000 + 1 for at in block.produced_at)


def test_what_is_no_event_becomes_a_dead_letter_with_its_position(broker: Broker) -> None:
    config = config_for(broker, "dead", partitions=1)
    topic, producer = config.kafka.topics.clicks, empty_topics(config)
    pack = b"\xff\xff\xff\xff garbage"
    for value in (b"early", click("a", 3), b"{", None, click("b", -1), pack, click("c", 4)):
        producer.send(topic, value, key=b"k", partition=0)
    producer.close()
    with KafkaSource(config.kafka, until_end=True) as source:
        (block,) = read_all(source)
    # Rows that do not tell their time come with the row before them; the first, with the first that does.
    assert [arrival - NOW for _, arrival, _ in story([block])] == [3, 3, 3, 3, 3, 3, 4]
    assert sorted((letter.offset, letter.source) for letter in block.dead_letters) == [
        (offset, topic) for offset in (0, 2, 3, 4, 5)
    ]
    reasons = {letter.offset: letter.reason for letter in block.dead_letters}
    assert "tombstone" in reasons[3] and "arrival_time must not be before" in reasons[4]
    assert "Arrow IPC" in reasons[5]


def test_rows_of_a_pack_that_break_the_contract_are_named_by_their_row(broker: Broker) -> None:
    from pipelines.codec import decode_json, encode_packed

    config = config_for(broker, "dead-packed", partitions=1)
    producer = empty_topics(config)
    rows = [click("a", 1), click("", 2), click("b", 3)]
    producer.send(config.kafka.topics.clicks, encode_packed(1, decode_json(1, rows).table), partition=0)
    producer.close()
    with KafkaSource(config.kafka, until_end=True) as source:
        (block,) = read_all(source)
        assert source.advance(source.cursor, block, 2)[config.kafka.topics.clicks, 0][:2] == (0, 2)
        assert source.advance(source.cursor, block, 3)[config.kafka.topics.clicks, 0][:2] == (1, 0)
    (letter,) = block.dead_letters
    assert (letter.offset, letter.row, orjson.loads(letter.payload)["event_id"]) == (0, 1, "")
    assert block.kind.tolist() == [1, DEAD_LETTER, 1] and block.row.tolist() == [0, 1, 2]


def test_until_end_means_the_end_at_the_beginning(broker: Broker) -> None:
    config = config_for(broker, "until-end", partitions=1)
    topic, producer = config.kafka.topics.clicks, empty_topics(config)
    producer.send(topic, click("a", 1), partition=0)
    producer.flush()
    with KafkaSource(config.kafka, until_end=True) as source:
        producer.send(topic, click("b", 2), partition=0)
        producer.close()
        assert [name for *_, name in story(read_all(source))] == ["a"]


def test_messages_of_aborted_transactions_are_not_read(broker: Broker) -> None:
    config = config_for(broker, "transactions", partitions=1)
    topic = config.kafka.topics.clicks
    empty_topics(config).close()
    producer = make_producer(config.kafka, transactional_id="test-transactions")
    producer.init_transactions()
    for name, ends in (("a", True), ("b", False)):
        producer.begin_transaction()
        producer.send(topic, click(name, 1), partition=0)
        producer.flush()
        (producer.commit_transaction if ends else producer.abort_transaction)()
    producer.close()
    with KafkaSource(config.kafka, until_end=True) as source:
        assert [name for *_, name in story(read_all(source))] == ["a"]


def test_an_idle_partition_holds_the_others_back_only_for_a_while(broker: Broker) -> None:
    config = config_for(broker, "idle", 'kafka.idle_timeout="1500ms"', partitions=1)
    topic, producer = config.kafka.topics.clicks, empty_topics(config)
    producer.send(topic, click("a", 5), partition=0)
    producer.flush()
    with KafkaSource(config.kafka) as source:
        began = time.monotonic()
        block = source.poll(timeout_s=20)
        assert block is not None and time.monotonic() - began >= 1.5
        assert not source.exhausted
        # What an idle partition brings later counts as known no earlier than what went before.
        producer.send(config.kafka.topics.conversions, click("late", 2), partition=0)
        producer.close()
        late = source.poll(timeout_s=20)
        assert late is not None
        cursor = source.advance(source.advance(source.cursor, block), late)
    assert story([block, late]) == [(1, NOW + 5, "a"), (2, NOW + 5, "late")]
    assert cursor[config.kafka.topics.conversions, 0] == Place(1, 0, NOW + 5)


def test_a_cursor_that_the_broker_no_longer_reaches_is_refused_with_the_gap(broker: Broker) -> None:
    config = config_for(broker, "stale", partitions=1)
    topic, producer = config.kafka.topics.clicks, empty_topics(config)
    for number in range(6):
        producer.send(topic, click(str(number), number), partition=0)
    producer.close()
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    admin.delete_records({TopicPartition(topic, 0): 4})
    admin.close()
    with pytest.raises(StaleStateError, match=rf"{topic}-0: offsets 2 to 3 \(2\)"):
        KafkaSource(config.kafka, Cursor({(topic, 0): Place(2)}))
    with KafkaSource(config.kafka, Cursor({(topic, 0): Place(4)}), until_end=True) as source:
        assert len(story(read_all(source))) == 2


def test_a_cursor_of_other_topics_is_refused(broker: Broker) -> None:
    config = config_for(broker, "other", partitions=1)
    topic = config.kafka.topics.clicks
    empty_topics(config).close()
    with pytest.raises(StaleStateError, match=rf"{topic}-0: offset 7, but it ends at 0"):
        KafkaSource(config.kafka, Cursor({(topic, 0): Place(7)}))
    with pytest.raises(StaleStateError, match="elsewhere-3: no such partition"):
        KafkaSource(config.kafka, Cursor({("elsewhere", 3): Place(0)}))


def test_records_deleted_while_reading_are_a_gap_too(broker: Broker) -> None:
    config = config_for(broker, "deleted", partitions=1)
    topic, producer = config.kafka.topics.clicks, empty_topics(config)
    with KafkaSource(config.kafka) as source:
        source._consumer.pause(TopicPartition(topic, 0))  # as a reader that is far behind
        for number in range(3):
            producer.send(topic, click(str(number), number), partition=0)
        producer.close()
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
        admin.delete_records({TopicPartition(topic, 0): 2})
        admin.close()
        source._consumer.resume(TopicPartition(topic, 0))
        with pytest.raises(StaleStateError, match=rf"{topic}-0: offsets 0 to 1 \(2\)"):
            for _ in range(50):
                source.poll(timeout_s=0.2)


def test_topics_that_do_not_exist_are_an_error_that_says_how_to_make_them(broker: Broker) -> None:
    with pytest.raises(SetupError, match="the topic absent-impressions does not exist") as caught:
        KafkaSource(config_for(broker, "absent").kafka)
    assert caught.value.hint is not None and "ctrstream produce" in caught.value.hint


def test_offsets_are_told_to_the_broker_for_lag_charts(broker: Broker) -> None:
    config = config_for(broker, "advisory", partitions=1)
    topic, producer = config.kafka.topics.clicks, empty_topics(config)
    producer.send(topic, click("a", 1), partition=0)
    producer.close()
    with KafkaSource(config.kafka, until_end=True) as source:
        source.commit_offsets(source.advance(source.cursor, EventBlock.concat(read_all(source))), "charts")
        consumer = make_consumer(config.kafka, group_id="charts")
        deadline = time.monotonic() + 30
        while consumer.committed(TopicPartition(topic, 0)) != 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert consumer.committed(TopicPartition(topic, 0)) == 1
        consumer.close()


def test_dead_letters_are_published_under_their_position(broker: Broker) -> None:
    config = config_for(broker, "letters", partitions=1)
    empty_topics(config).close()
    letters = [DeadLetter("clicks", 0, offset, 0, "expected JSON.", "{") for offset in (3, 4)]
    with KafkaSource(config.kafka) as source:
        source.publish_dead_letters(letters)
        source.publish_dead_letters([])
    consumer = make_consumer(config.kafka)
    own = TopicPartition(config.kafka.topics.dead_letters, 0)
    consumer.assign([own])
    consumer.seek(own, 0)
    records = [record for found in consumer.poll(10_000).values() for record in found]
    consumer.close()
    assert [record.key for record in records] == [b"clicks:0:3:0", b"clicks:0:4:0"]
    assert [DeadLetter(**orjson.loads(record.value)) for record in records] == letters


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "broker").start() as running:
        yield running


def test_a_broker_that_goes_away_is_waited_for_and_told_of_once(
    own_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(own_broker, "away", partitions=1)
    topic, producer = config.kafka.topics.clicks, empty_topics(config)
    producer.send(topic, click("a", 1), partition=0)
    producer.flush()
    with KafkaSource(config.kafka) as source, caplog.at_level(logging.INFO, "pipelines"):
        blocks = [source.poll(timeout_s=20)]
        own_broker.kill()
        deadline = time.monotonic() + 30
        while not caplog.records and time.monotonic() < deadline:
            assert source.poll(timeout_s=0.3) is None
        for _ in range(5):
            assert source.poll(timeout_s=0.3) is None
        own_broker.start()
        producer.send(topic, click("b", 2), partition=0)
        producer.flush()
        producer.close()
        blocks.append(source.poll(timeout_s=30))
    assert [name for *_, name in story([block for block in blocks if block])] == ["a", "b"]
    messages = [record.message for record in caplog.records if record.name.startswith("pipelines")]
    assert len(messages) == 2 and "is away" in messages[0] and "is back" in messages[1]


def unreachable(**changes: Any) -> KafkaConfig:
    return KafkaConfig.model_validate(
        {"bootstrap_servers": "127.0.0.1:1", "connect_timeout": "300ms"} | changes
    )


def test_no_broker_is_an_error_that_says_where_and_what_to_do() -> None:
    for make in (make_consumer, make_producer, KafkaSource):
        with pytest.raises(TransientError, match=r"no Kafka broker answers at 127\.0\.0\.1:1 after 300ms"):
            make(unreachable())
    error = TransientError("gone")
    assert error.retriable


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"no_such_thing": 1}, r"kafka\.options\.no_such_thing is no option of kafka-python"),
        ({"isolation_level": "read_uncommitted"}, "isolation_level cannot be set"),
        ({"enable_auto_commit": True}, "enable_auto_commit cannot be set"),
        ({"sasl_plain_password": "env:CTRSTREAM_TEST_UNSET"}, "CTRSTREAM_TEST_UNSET is not set"),
    ],
)
def test_options_that_are_unknown_or_endanger_correctness_are_refused(
    option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_consumer(unreachable(options=option))


def test_secrets_are_in_no_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CTRSTREAM_TEST_PASSWORD", "correct horse battery staple")
    options = {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": "worker",
        "sasl_plain_password": "env:CTRSTREAM_TEST_PASSWORD",
    }
    with caplog.at_level(logging.DEBUG), pytest.raises(TransientError) as caught:
        make_consumer(unreachable(options=options))
    assert "correct horse" not in str(caught.value) + caplog.text


def test_a_cursor_state_that_is_none_is_refused() -> None:
    for state in (None, [["clicks", 0]], [["clicks", 0, "x", 0, 0]]):
        with pytest.raises(StaleStateError, match="expected a cursor"):
            Cursor.from_state(state)
