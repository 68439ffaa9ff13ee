"""What a Kafka cluster holds of the topics, and whether it can be reached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kafka import TopicPartition as KafkaTopicPartition
from kafka.errors import KafkaError

from pipelines.config_sections import KafkaConfig
from pipelines.cursor import Cursor, TopicPartition
from pipelines.errors import SetupError, StaleStateError
from pipelines.kafka_client import broker_error
from pipelines.lake import OffsetRange
from pipelines.lake_offsets import tell

__all__ = ["Connection", "check_reach", "find_gaps", "find_partitions", "offsets"]

log = logging.getLogger(__name__)

_CHECK_EVERY_S = 0.5


class Connection:
    """Whether the broker is there; a change is logged once.

    Parameters
    ----------
    where : str
        Address, for the log.
    clock : callable
        Monotonic wall clock, seconds.
    """

    def __init__(self, where: str, clock: Callable[[], float]) -> None:
        self.up = True
        self._where, self._clock, self._checked = where, clock, clock()

    def is_up(self, up: bool, reason: str = "") -> None:
        """Note that the broker is there or is away."""
        if up and not self.up:
            log.info("the Kafka broker at %s is back", self._where)
        elif self.up and not up:
            log.warning("the Kafka broker at %s is away (%s): trying again", self._where, reason)
        self.up = up

    def check(self, client: Any) -> None:
        """Ask a consumer that got nothing whether it has a connection, at most twice a second."""
        if self._clock() - self._checked >= _CHECK_EVERY_S:
            self._checked = self._clock()
            figures = client.metrics().get("consumer-metrics", {})
            self.is_up(figures.get("connection-count", 1) > 0, "no connection")


def find_partitions(consumer: Any, topics: Iterable[str], config: KafkaConfig) -> list[TopicPartition]:
    """All partitions of some topics, sorted.

    Raises
    ------
    SetupError
        If a topic does not exist.
    """
    found: list[TopicPartition] = []
    for topic in topics:
        numbers = consumer.partitions_for_topic(topic)
        if not numbers:
            raise SetupError(
                f"the topic {topic} does not exist at {config.bootstrap_servers}.",
                hint="`ctrstream produce` creates the topics; or name others under [kafka.topics]",
            )
        found += [(topic, number) for number in numbers]
    return sorted(found)


def offsets(
    lookup: Callable[..., Mapping[Any, int]], partitions: Sequence[TopicPartition], config: KafkaConfig
) -> list[int]:
    """What ``consumer.beginning_offsets`` or ``end_offsets`` says of some partitions, in their order.

    Raises
    ------
    TransientError, SetupError
        If the broker does not answer, or refuses us.
    """
    wanted = [KafkaTopicPartition(*partition) for partition in partitions]
    try:
        found = lookup(wanted)
    except KafkaError as error:
        raise broker_error(config, error) from error
    return [found[partition] for partition in wanted]


def find_gaps(start: Cursor, first: Sequence[int]) -> list[OffsetRange]:
    """What was to be read next and the broker holds no longer: offsets below ``first`` of each partition."""
    return [
        OffsetRange(topic=topic, partition=partition, start=place.offset, stop=held)
        for ((topic, partition), place), held in zip(start.items(), first, strict=True)
        if place.offset < held
    ]


def check_reach(cursor: Cursor, start: Cursor, end: Sequence[int], gaps: Sequence[OffsetRange] = ()) -> None:
    """Refuse to begin where the broker holds nothing: rows would be skipped, or read twice.

    Parameters
    ----------
    cursor : Cursor
        Where reading had come to; may lack partitions that are new.
    start : Cursor
        Where it is to go on, of every partition that there is.
    end : sequence of int
        Where each partition of ``start`` ends at the broker.
    gaps : sequence of OffsetRange
        What nothing makes up for.

    Raises
    ------
    StaleStateError
        Naming each range of offsets that is gone, or each place that is not there.
    """
    if gaps:
        total = sum(gap.messages for gap in gaps)
        raise StaleStateError(
            f"the broker has deleted {total} messages that were not read yet. {tell(gaps)}.",
            hint="read them from the lake: start the worker with --backfill LAKE, once `ctrstream samples "
            "ingest` has filled it from these topics; then raise their retention",
        )
    beyond = [
        f"{topic}-{partition}: offset {place.offset}, but it ends at {stop}"
        for ((topic, partition), place), stop in zip(start.items(), end, strict=True)
        if place.offset > stop
    ]
    beyond += [f"{topic}-{partition}: no such partition" for topic, partition in cursor.keys() - start.keys()]
    if beyond:
        raise StaleStateError(
            f"the cursor points beyond what the broker holds: the topics are not the ones that were read. "
            f"{'; '.join(sorted(beyond))}.",
            hint="use the broker and topics of this state, or start with an empty state folder",
        )
