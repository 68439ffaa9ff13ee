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

__all__ = ["Connection", "check_reach", "find_partitions", "offsets"]

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


def check_reach(cursor: Cursor, start: Cursor, first: list[int], end: list[int]) -> None:
    """Refuse to begin where the broker holds nothing: rows would be skipped, or read twice.

    Parameters
    ----------
    cursor : Cursor
        Where reading had come to; may lack partitions that are new.
    start : Cursor
        Where it is to go on, of every partition that there is.
    first, end : list of int
        What the broker holds of each partition of ``start``: offsets from ``first`` up to ``end`` - 1.

    Raises
    ------
    StaleStateError
        Naming each range of offsets that is gone, or each place that is not there.
    """
    gaps, beyond, total = [], [], 0
    for index, ((topic, partition), place) in enumerate(start.items()):
        if place.offset < first[index]:
            missing = first[index] - place.offset
            total += missing
            gaps.append(f"{topic}-{partition}: offsets {place.offset} to {first[index] - 1} ({missing})")
        elif place.offset > end[index]:
            beyond.append(f"{topic}-{partition}: offset {place.offset}, but it ends at {end[index]}")
    gone = [f"{topic}-{partition}" for topic, partition in cursor if (topic, partition) not in start]
    if gaps:
        raise StaleStateError(
            f"the broker has deleted {total} messages that were not read yet. {'; '.join(gaps)}.",
            hint="nothing is skipped in silence: train first releases anew from snapshots of the lake that "
            "end after these offsets, and start from them with a new --state folder; then raise the "
            "retention of the topics",
        )
    if beyond or gone:
        beyond += [f"{name}: no such partition" for name in gone]
        raise StaleStateError(
            f"the cursor points beyond what the broker holds: the topics are not the ones that were read. "
            f"{'; '.join(beyond)}.",
            hint="use the broker and topics of this state, or start with an empty state folder",
        )
