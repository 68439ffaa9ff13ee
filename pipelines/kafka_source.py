"""The three topics as one ordered stream of event blocks, from exact cursors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from kafka import OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError
from numpy.typing import NDArray

from pipelines.codec import decode_messages
from pipelines.config import KafkaConfig
from pipelines.errors import DataError, StaleStateError, TransientError
from pipelines.events import TOPICS, DeadLetter, EventBlock
from pipelines.hashing import hash_column
from pipelines.kafka_client import make_consumer, make_producer
from pipelines.merge import FIRST_KEY, Key, PartitionMerge, PartitionRows
from pipelines.validation import validate

__all__ = ["Cursor", "KafkaSource", "Place"]

log = logging.getLogger(__name__)

# Rows that may wait for other partitions before their own is paused: a few seconds of a busy partition.
_BUFFER_ROWS = 60_000
_GROUP = "ctrstream"


class Place(NamedTuple):
    """Where a partition goes on: the next message and row in it, and the key of the last row taken."""

    offset: int
    row: int
    last: Key


class Cursor(dict[tuple[str, int], Place]):
    """The place of each (topic, partition). A partition that is missing is read from its beginning."""

    def to_state(self) -> list[list[Any]]:
        return [
            [topic, partition, place.offset, place.row, place.last[0], place.last[1], str(place.last[2])]
            for (topic, partition), place in sorted(self.items())
        ]

    @classmethod
    def from_state(cls, state: Sequence[Sequence[Any]]) -> Cursor:
        return cls(
            {
                (str(topic), int(partition)): Place(
                    int(offset), int(row), Key(int(arrival), int(kind), int(event_hash))
                )
                for topic, partition, offset, row, arrival, kind, event_hash in state
            }
        )


class RowPositions(Protocol):
    """Positions of consecutive rows of a block: see `pipelines.events.EventBlock`."""

    partition: NDArray[np.int32]
    offset: NDArray[np.int64]
    row: NDArray[np.int32]


@dataclass
class _Partition:
    topic: TopicPartition
    kind: int
    end: int
    skip_rows: int
    spoke_at: float


class KafkaSource:
    """Reads impressions, clicks and conversions in their one order.

    Parameters
    ----------
    config : KafkaConfig
    cursor : Cursor, optional
        Where to go on; None begins at the first message of every partition.
    until_end : bool
        Stop where the partitions end now. Otherwise a partition that has been silent for
        ``kafka.idle_timeout`` and is read to its end no longer holds the others back.
    clock : callable
        Monotonic seconds.

    Raises
    ------
    TransientError
        If no broker answers.
    DataError
        If a topic is missing.
    StaleStateError
        If the broker no longer has the rows that the cursor asks for; the gap is named.
    """

    def __init__(
        self,
        config: KafkaConfig,
        cursor: Cursor | None = None,
        *,
        until_end: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._until_end, self._clock = config, until_end, clock
        self._consumer = make_consumer(config, _GROUP)
        self._producer: Any = None
        self.cursor = Cursor(cursor or {})
        self._parts = self._assign()
        self.partitions = [(part.topic.topic, part.topic.partition) for part in self._parts]
        self._index = {part.topic: index for index, part in enumerate(self._parts)}
        self._merge = PartitionMerge(
            [self.cursor[name].last if name in self.cursor else FIRST_KEY for name in self.partitions]
        )
        self._paused: set[TopicPartition] = set()
        self._complained = False

    @property
    def exhausted(self) -> bool:
        """Whether everything up to the end has been given (``until_end`` only)."""
        return self._until_end and all(
            self._is_at_end(part) and self._merge.buffered(index) == 0
            for index, part in enumerate(self._parts)
        )

    def poll(self, most: int, timeout_s: float) -> EventBlock | None:
        """The next rows in order, about ``most`` at most; None if none can be given yet.

        A broker that is away is waited for: the client goes on trying, and it is said once in the log.
        """
        self._fetch(0.0 if self._has_backlog(most) else timeout_s)
        return self._merge.take([self._holds_back(part) for part in self._parts], most)

    def advance(self, cursor: Mapping[tuple[str, int], Place], positions: Any) -> Cursor:
        """The cursor after rows that a block of this source gave; ``positions`` as `RowPositions`.

        ``positions.arrival_time`` and ``positions.event_hash`` are those of the block.
        """
        moved = Cursor(cursor)
        partition = positions.partition
        for index in np.unique(partition).tolist():
            last = int(np.flatnonzero(partition == index)[-1])
            key = Key(
                int(positions.arrival_time[last]), self._parts[index].kind, int(positions.event_hash[last])
            )
            moved[self.partitions[index]] = Place(
                int(positions.offset[last]), int(positions.row[last]) + 1, key
            )
        return moved

    def lag(self) -> int:
        """Messages that the broker has beyond what has been fetched."""
        try:
            ends = self._consumer.end_offsets([part.topic for part in self._parts])
        except KafkaError:
            return -1
        return sum(max(0, ends[part.topic] - self._consumer.position(part.topic)) for part in self._parts)

    def publish_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Send dead letters to their topic and wait until the broker has them.

        Raises
        ------
        TransientError
            If the broker does not acknowledge them.
        """
        if not letters:
            return
        from pipelines.dead_letters import publish

        if self._producer is None:
            self._producer = make_producer(self._config)
        publish(self._producer, self._config.topics.dead_letters, letters)

    def commit_offsets(self, cursor: Cursor) -> None:
        """Tell the broker where we are, for lag charts; state is never restored from it."""
        offsets = {
            TopicPartition(topic, partition): OffsetAndMetadata(place.offset + (place.row > 0), "", -1)
            for (topic, partition), place in cursor.items()
        }
        try:
            self._consumer.commit_async(offsets)
        except KafkaError as error:
            log.warning("offsets not committed to the broker reason=%r", str(error))

    def close(self) -> None:
        """Leave the broker."""
        if self._producer is not None:
            self._producer.close(timeout=10)
        self._consumer.close(timeout_ms=10_000)

    # Assignment ----------------------------------------------------------------------------------------

    def _assign(self) -> list[_Partition]:
        kinds = {str(getattr(self._config.topics, name)): kind for kind, name in enumerate(TOPICS)}
        topics: list[tuple[TopicPartition, int]] = []
        for name, kind in kinds.items():
            found = self._consumer.partitions_for_topic(name)
            if not found:
                raise DataError(
                    f"the broker at {self._config.bootstrap_servers} has no topic {name}.",
                    hint="create it, send events with `ctrstream produce`, or set kafka.topics in the config",
                )
            topics += [(TopicPartition(name, partition), kind) for partition in sorted(found)]
        own = [topic for topic, _ in topics]
        self._consumer.assign(own)
        first, end = self._consumer.beginning_offsets(own), self._consumer.end_offsets(own)
        self._refuse_gaps(first)
        parts = []
        for topic, kind in topics:
            place = self.cursor.get((topic.topic, topic.partition), Place(first[topic], 0, FIRST_KEY))
            self._consumer.seek(topic, place.offset)
            parts.append(_Partition(topic, kind, end[topic], place.row, self._clock()))
        return parts

    def _refuse_gaps(self, first: Mapping[TopicPartition, int]) -> None:
        gaps = [
            f"{topic.topic}-{topic.partition}: offsets {self.cursor[topic.topic, topic.partition].offset} "
            f"to {offset - 1}"
            for topic, offset in first.items()
            if (topic.topic, topic.partition) in self.cursor
            and self.cursor[topic.topic, topic.partition].offset < offset
        ]
        if gaps:
            raise StaleStateError(
                "the broker has deleted rows that have not been read: " + "; ".join(gaps) + ".",
                hint="going on would lose them; start a new --state folder from a later release",
            )

    # Fetching ------------------------------------------------------------------------------------------

    def _has_backlog(self, most: int) -> bool:
        return all(
            self._merge.buffered(index) >= most or self._is_at_end(part)
            for index, part in enumerate(self._parts)
        )

    def _fetch(self, timeout_s: float) -> None:
        self._apply_back_pressure()
        try:
            found = self._consumer.poll(timeout_ms=round(timeout_s * 1000))
        except KafkaError as error:
            if not getattr(error, "retriable", False):
                raise TransientError(f"reading from Kafka failed: {error}.") from error
            if not self._complained:
                log.warning("the broker does not answer, waiting reason=%r", str(error))
            self._complained = True
            return
        for topic, records in found.items():
            self._complained = False
            index = self._index[topic]
            part = self._parts[index]
            part.spoke_at = self._clock()
            self._merge.add(index, _decode(part, records))
            part.skip_rows = 0

    def _apply_back_pressure(self) -> None:
        full = {
            part.topic for index, part in enumerate(self._parts) if self._merge.buffered(index) > _BUFFER_ROWS
        }
        if full - self._paused:
            self._consumer.pause(*(full - self._paused))
        if self._paused - full:
            self._consumer.resume(*(self._paused - full))
        self._paused = full

    def _is_at_end(self, part: _Partition) -> bool:
        return bool(self._consumer.position(part.topic) >= part.end)

    def _holds_back(self, part: _Partition) -> bool:
        if self._until_end:
            return not self._is_at_end(part)
        silent = self._clock() - part.spoke_at
        if silent * 1000 < self._config.idle_timeout:
            return True
        high = self._consumer.highwater(part.topic)
        return high is not None and self._consumer.position(part.topic) < high


def _decode(part: _Partition, records: Sequence[Any]) -> PartitionRows:
    """Rows of consecutive messages, the first ``skip_rows`` of which have been taken before."""
    payloads = [record.value for record in records]
    messages = decode_messages(part.kind, payloads)
    decoded = messages.decoded
    ok, faults = validate(part.kind, decoded.table)
    reasons = dict(decoded.rejected)
    reasons.update({int(decoded.row[row]): reason for row, reason in faults.items()})
    offset = np.array([record.offset for record in records], np.int64)[messages.message]
    produced_at = np.array([record.timestamp for record in records], np.int64)[messages.message]
    is_bad = np.zeros(decoded.rows, np.bool_)
    is_bad[list(reasons)] = True
    table = decoded.table if ok.all() else decoded.table.filter(pa.array(ok))
    arrival, event_hash = np.zeros(decoded.rows, np.int64), np.zeros(decoded.rows, np.uint64)
    if table.num_rows:
        arrival[~is_bad] = table.column("arrival_time").to_numpy()
        event_hash[~is_bad] = hash_column(table.column("event_id"))
    letters = [
        DeadLetter(
            part.topic.topic,
            part.topic.partition,
            int(offset[row]),
            int(messages.row_in_message[row]),
            reasons[row],
            (payloads[int(messages.message[row])] or b"").decode("utf-8", "replace"),
        )
        for row in sorted(reasons)
    ]
    rows = PartitionRows(
        part.kind, arrival, event_hash, is_bad, offset, messages.row_in_message, produced_at, table, letters
    )
    return rows.slice(part.skip_rows, len(rows)) if part.skip_rows else rows
