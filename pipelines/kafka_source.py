"""The three topics of a Kafka cluster as one sequence of rows, in the order in which they became known.

Nothing is subscribed to and no offset of the broker is trusted: the reader is given its partitions and the
rows to begin with, and says after each row where to go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from kafka import TopicPartition as KafkaTopicPartition
from kafka.errors import KafkaError, OffsetOutOfRangeError
from numpy.typing import NDArray

from pipelines.backfill import Backfill, PastRows
from pipelines.config_sections import KafkaConfig
from pipelines.cursor import Cursor, Place, RowPositions, TopicPartition
from pipelines.dead_letters import publish
from pipelines.errors import SetupError, TransientError
from pipelines.events import TOPICS, DeadLetter, EventBlock
from pipelines.kafka_client import broker_error, make_consumer, make_producer
from pipelines.kafka_reach import Connection, check_reach, find_gaps, find_partitions, offsets
from pipelines.kafka_rows import Keyed, PolledPartition, Rows, decode_polled, gather
from pipelines.lake import OffsetRange
from pipelines.merge import Merged, PartitionMerge

__all__ = ["Cursor", "KafkaSource", "Place"]

log = logging.getLogger(__name__)

# Rows decoded at a time, and rows of one partition that wait before it is paused: they bound the memory.
_ROWS_A_POLL = 16_384
_MOST_WAITING = 131_072
_PUBLISH_TIMEOUT_S = 120.0
_COMMIT_TIMEOUT_MS = 5_000
_STALLED_S = 30.0
# How often the broker is asked for partitions that are new.
_LOOK_EVERY_S = 10.0
# What is idle, away or at its end is looked at again this often while nothing comes.
_LONGEST_WAIT_S = 0.1
_GROUP = "ctrstream"


class KafkaSource:
    """Reads impressions, clicks and conversions from Kafka, merged into one order of arrival.

    The order follows from the log alone (`pipelines.merge`), except where a partition that has been silent
    for ``idle_timeout`` at its end is passed over and speaks later: its rows then count as known when they
    come. So do those of a partition that a topic gets while it is read: it is found within seconds.

    Parameters
    ----------
    config : KafkaConfig
    cursor : Cursor, optional
        Where to begin; partitions that it does not name are read from their beginning. Without one, all from
        the first message that is there.
    until_end : bool
        Read up to the offsets at which the partitions end now, and then be ``exhausted``.
    backfill : Backfill, optional
        Where to look for messages that the broker has deleted.
    clock : callable
        Monotonic wall clock, seconds.

    Attributes
    ----------
    partitions : list of (str, int)
        Topic and partition number; ``EventBlock.partition`` counts through it. Sorted, those that came later
        behind: what has a number keeps it.
    cursor : Cursor
        Where reading began.

    Raises
    ------
    TransientError
        If no broker answers within ``config.connect_timeout``.
    SetupError
        If a topic does not exist, or the broker refuses the credentials.
    StaleStateError
        If the cursor lies outside of what the broker holds.
    DataError
        If the lake of ``backfill`` lacks some of what the broker has deleted.
    """

    def __init__(
        self,
        config: KafkaConfig,
        cursor: Cursor | None = None,
        until_end: bool = False,
        *,
        backfill: Backfill | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._clock, self._backfill = config, clock, backfill
        age = {"metadata_max_age_ms": round(_LOOK_EVERY_S * 1000)}
        self._consumer = make_consumer(config, max_poll_records=_ROWS_A_POLL, **age)
        self._committer: Any = None
        self._producer: Any = None
        try:
            self._kinds = {str(getattr(config.topics, name)): kind for kind, name in enumerate(TOPICS)}
            found = find_partitions(self._consumer, self._kinds, config)
            known = [] if cursor is None else [partition for partition in cursor if partition in found]
            self.partitions = [*known, *(partition for partition in found if partition not in known)]
            self._looked = clock()
            self.cursor, self._past = self._start(Cursor() if cursor is None else cursor)
            self._ends = self._limits(self.partitions)[1] if until_end else None
        except BaseException:
            self._consumer.close()
            raise
        places = [self.cursor[partition] for partition in self.partitions]
        self._merge = PartitionMerge([place.clock for place in places])
        self._queues: list[list[Rows]] = [[] for _ in places]
        self._skip = {index: (place.offset, place.row) for index, place in enumerate(places) if place.row}
        self._position = [place.offset for place in places]
        self._heard = [clock()] * len(places)
        self._stalled: set[int] = set()
        self._read: set[int] = set()  # partitions that the consumer is told to read
        self._assign([index for index in range(len(places)) if index not in self._past.indices()])
        self._packed_rows: list[dict[int, int]] = [{} for _ in places]
        self._ready: list[EventBlock] = []
        self._rows_a_message = 1.0
        self._connection = Connection(config.bootstrap_servers, clock)

    def kind_of_source(self) -> dict[str, int]:
        """Event kind of each topic."""
        return dict(self._kinds)

    @property
    def exhausted(self) -> bool:
        """Whether every row up to the end that was asked for has been handed out."""
        return self._ends is not None and all(self._at_end()) and not self._ready and not any(self._queues)

    def poll(self, max_rows: int = 8192, timeout_s: float = 1.0) -> EventBlock | None:
        """The next rows, at most ``max_rows``; None if there are none within the timeout.

        Raises
        ------
        StaleStateError
            If the broker has deleted rows that were still to be read.
        SetupError
            If the broker refuses us.
        """
        deadline = self._clock() + timeout_s
        while not self._ready:
            left = deadline - self._clock()
            self._ingest(min(max(left, 0.0), _LONGEST_WAIT_S))
            self._let_go()
            if self._ready or left <= 0 or self.exhausted:
                break
        if not self._ready:
            return None
        block = self._ready.pop(0)
        if len(block) > max_rows:
            self._ready.insert(0, block.slice(max_rows, len(block)))
            block = block.slice(0, max_rows)
        return block

    def advance(self, cursor: Cursor, rows: RowPositions, upto: int | None = None) -> Cursor:
        """The cursor after the first ``upto`` (by default all) of some rows have been applied.

        Parameters
        ----------
        cursor : Cursor
            The cursor before them.
        rows : EventBlock or another RowPositions
            Rows in the order in which `poll` gave them.
        upto : int, optional
        """
        after = Cursor(cursor)
        for partition in self.partitions[len(after) :]:
            after[partition] = Place(0)
        owner = rows.partition[:upto]
        for index in np.unique(owner).tolist():
            last = int(np.flatnonzero(owner == index)[-1])
            offset, row = int(rows.offset[last]), int(rows.row[last])
            packed = self._packed_rows[index]
            is_whole = row + 1 >= packed.get(offset, 1)
            place = (offset + 1, 0) if is_whole else (offset, row + 1)
            after[self.partitions[index]] = Place(*place, int(rows.arrival_time[last]))
            while packed and (first := next(iter(packed))) < place[0]:  # noted in the order of the log
                del packed[first]
        return after

    def lag(self) -> int:
        """How many messages the broker holds beyond those read, plus rows read but not handed out."""
        behind = 0
        for index in range(len(self.partitions)):
            behind += max((self._highwater(index) or 0) - self._position[index], 0)
        return behind + sum(self._merge.waiting) + sum(map(len, self._ready))

    def commit_offsets(self, cursor: Cursor, group: str = _GROUP) -> None:
        """Tell the broker where the cursor is: for lag charts only, nothing ever reads it back."""
        from kafka.structs import OffsetAndMetadata

        offsets = {
            KafkaTopicPartition(*partition): OffsetAndMetadata(place.offset, "", -1)
            for partition, place in cursor.items()
        }
        if not self._connection.up:
            return
        try:
            # A consumer of its own: one that belongs to a group would depend on the group's coordinator.
            if self._committer is None:
                self._committer = make_consumer(self._config, group_id=group)
            self._committer.commit(offsets, timeout_ms=_COMMIT_TIMEOUT_MS)
        except (KafkaError, TransientError) as error:
            log.warning("offsets not committed to the broker (advisory only): %s", error)

    def publish_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Send dead letters to their topic and wait until they are acknowledged.

        Raises
        ------
        TransientError
            If the broker does not acknowledge them in time.
        """
        if not letters:
            return
        if self._producer is None:
            self._producer = make_producer(self._config, linger_ms=5)
        try:
            publish(self._producer, self._config.topics.dead_letters, letters, _PUBLISH_TIMEOUT_S)
        except KafkaError as error:
            raise broker_error(self._config, error) from error

    def close(self) -> None:
        """Leave the broker."""
        self._past.close()
        for client in (self._consumer, self._committer, self._producer):
            if client is not None:
                client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, cursor: Cursor) -> tuple[Cursor, PastRows]:
        first, end = self._limits(self.partitions)
        # A partition that came later is read from its beginning, not from what is left of it.
        start = Cursor(
            {
                partition: cursor.get(partition, Place(0 if cursor else first[index]))
                for index, partition in enumerate(self.partitions)
            }
        )
        gaps = find_gaps(start, first)
        check_reach(cursor, start, end, () if self._backfill else gaps)
        past = PastRows()
        self._fill(past, gaps, start)
        return start, past

    def _fill(self, past: PastRows, gaps: Sequence[OffsetRange], start: Cursor) -> None:
        if gaps and self._backfill is not None:
            past.add(self._backfill.past(gaps), self.partitions, self._kinds, start)

    def _limits(self, partitions: Sequence[TopicPartition]) -> tuple[list[int], list[int]]:
        """First offset and end of each partition, as the broker has them now."""
        lookups = (self._consumer.beginning_offsets, self._consumer.end_offsets)
        first, end = (offsets(lookup, partitions, self._config) for lookup in lookups)
        return first, end

    def _look_for_partitions(self) -> None:
        """Read partitions that topics got meanwhile, from their beginning."""
        if self._ends is not None or not self._connection.up:
            return
        if self._clock() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = self._clock()
        try:
            found = find_partitions(self._consumer, self._kinds, self._config)
            new = [partition for partition in found if partition not in self.partitions]
            if not new:
                return
            first, _ = self._limits(new)
        except (KafkaError, TransientError, SetupError) as error:
            # Just made, it may have no leader yet; a topic that is gone for good is told by the reading.
            log.warning("cannot look for new partitions now: %s", error)
            return
        self._read_new(new, first)

    def _read_new(self, new: Sequence[TopicPartition], first: Sequence[int]) -> None:
        start = Cursor(dict.fromkeys(new, Place(0)))
        gaps = find_gaps(start, first)
        check_reach(Cursor(), start, first, () if self._backfill else gaps)
        idle_since = self._clock() - self._config.idle_timeout / 1000
        for topic, partition in new:
            log.info("%s-%d is new", topic, partition)
            self.partitions.append((topic, partition))
            self._merge.add_partition()
            self._queues.append([])
            self._position.append(0)
            # One that is empty holds nothing back, not even for a moment.
            self._heard.append(idle_since)
            self._packed_rows.append({})
        self._fill(self._past, gaps, start)
        self._regulate()

    def _take_past(self) -> bool:
        """Queue rows of the lake for partitions of which few wait; whether there were such partitions."""
        has_taken = False
        for index in self._past.indices():
            if self._merge.waiting[index] > _MOST_WAITING // 2:
                continue
            has_taken = True
            keyed = self._past.next(index)
            self._heard[index] = self._clock()
            if keyed is None:
                self._position[index] = self._past.finish(index)
                self._regulate()
            elif len(keyed.rows):
                self._position[index] = int(keyed.rows.offset[-1]) + 1
                self._add(keyed)
        return has_taken

    def _ingest(self, timeout_s: float) -> None:
        """Fetch, decode and queue what has come."""
        self._look_for_partitions()
        records = self._fetch(0.0 if self._take_past() else timeout_s)
        now = self._clock()
        polled: dict[str, list[PolledPartition]] = {}
        for partition, found in records.items():
            if not found:
                continue
            index = self.partitions.index((partition.topic, partition.partition))
            self._heard[index] = now
            self._stalled.discard(index)
            if self._ends is not None and found[-1].offset >= self._ends[index]:
                # Written after reading began: not part of what was asked for.
                found = [record for record in found if record.offset < self._ends[index]]
                if not found:
                    continue
            offset, skip = self._skip.pop(index, (-1, 0))
            part = PolledPartition(
                index, *self.partitions[index], found, skip if found[0].offset == offset else 0
            )
            polled.setdefault(partition.topic, []).append(part)
        self._note_positions()
        for topic, parts in polled.items():
            self._queue(topic, parts)
        self._regulate()

    def _note_positions(self) -> None:
        try:
            for index in self._read:
                partition = KafkaTopicPartition(*self.partitions[index])
                position = self._consumer.position(partition, timeout_ms=0)
                self._position[index] = self._position[index] if position is None else position
        except KafkaError as error:
            if not getattr(error, "retriable", False):
                raise broker_error(self._config, error) from error

    def _queue(self, topic: str, parts: list[PolledPartition]) -> None:
        rows = 0
        for keyed in decode_polled(self._kinds[topic], parts):
            rows += len(keyed.rows)
            self._add(keyed)
        messages = sum(len(part.records) for part in parts)
        self._rows_a_message = max(rows / messages, 1.0)

    def _add(self, keyed: Keyed) -> None:
        self._packed_rows[keyed.index] |= keyed.packed_rows
        if len(keyed.rows):
            self._queues[keyed.index].append(keyed.rows)
            self._merge.push(keyed.index, keyed.arrival_time, keyed.rows.kind, keyed.hashes)

    def _fetch(self, timeout_s: float) -> Mapping[Any, list[Any]]:
        if not self._read:  # all is still in the lake
            return {}
        # Packed messages hold many rows: fewer of them make a poll.
        most = max(int(_ROWS_A_POLL / self._rows_a_message), 16)
        try:
            records: Mapping[Any, list[Any]] = self._consumer.poll(
                timeout_ms=round(timeout_s * 1000), max_records=most
            )
        except OffsetOutOfRangeError as error:
            read = sorted(self._read)
            reached = Cursor({self.partitions[index]: Place(self._position[index]) for index in read})
            first, end = self._limits(list(reached))
            check_reach(reached, reached, end, find_gaps(reached, first))
            raise broker_error(self._config, error) from error
        except KafkaError as error:
            if not getattr(error, "retriable", False):
                raise broker_error(self._config, error) from error
            self._connection.is_up(False, type(error).__name__)
            time.sleep(min(timeout_s, 0.1))
            return {}
        if records:
            self._connection.is_up(True)
        else:
            self._connection.check(self._consumer)
            self._warn_of_stalls()
        return records

    def _warn_of_stalls(self) -> None:
        """Tell, once each time, of a partition that has more to read and gives nothing."""
        if not self._connection.up:
            return
        for index in self._read - self._stalled:
            has_more = (self._highwater(index) or 0) > self._position[index]
            if has_more and self._clock() - self._heard[index] > _STALLED_S:
                topic, partition = self.partitions[index]
                log.warning("no progress on %s-%d at offset %d", topic, partition, self._position[index])
                self._stalled.add(index)

    def _regulate(self) -> None:
        """Stop reading partitions of which enough rows wait for others; go on where few do.

        Not by ``pause``: kafka-python 3.0.12 can keep to itself for good what it had fetched of a partition
        that was paused and resumed.
        """
        waiting = self._merge.waiting
        wanted = [
            index
            for index, rows in enumerate(waiting)
            if rows <= (_MOST_WAITING if index in self._read else _MOST_WAITING // 2)
            and not self._is_past_end(index)
            and index not in self._past.indices()
        ]
        if wanted and set(wanted) != self._read:
            self._assign(wanted)

    def _assign(self, indices: Sequence[int]) -> None:
        partitions = [KafkaTopicPartition(*self.partitions[index]) for index in indices]
        self._consumer.assign(partitions)
        for index, partition in zip(indices, partitions, strict=True):
            if index not in self._read:
                self._consumer.seek(partition, self._position[index])
        self._read = set(indices)

    def _at_end(self) -> list[bool]:
        ended = self._is_idle if self._ends is None else self._is_past_end
        return [ended(index) for index in range(len(self.partitions))]

    def _is_past_end(self, index: int) -> bool:
        """Whether a partition has been read up to the end that was asked for."""
        return self._ends is not None and self._position[index] >= self._ends[index]

    def _is_idle(self, index: int) -> bool:
        """Whether a partition has been read to its end and has said nothing for a while."""
        if self._clock() - self._heard[index] < self._config.idle_timeout / 1000 or not self._connection.up:
            return False
        highwater = self._highwater(index)
        return highwater is not None and self._position[index] >= highwater

    def _highwater(self, index: int) -> int | None:
        """End of a partition as the last fetch saw it; None before that, and while it is not read."""
        if index not in self._read:
            return None
        highwater: int | None = self._consumer.highwater(KafkaTopicPartition(*self.partitions[index]))
        return highwater

    def _let_go(self) -> None:
        """Move rows that nothing can come before from the queues to the ready blocks."""
        merged = self._merge.advance(self._at_end())
        if not len(merged):
            return
        parts = [
            self._dequeue(index, int(count))
            for index, count in enumerate(np.bincount(merged.partition, minlength=len(self.partitions)))
        ]
        self._ready.append(gather(parts, merged.partition, _known_times(merged)))

    def _dequeue(self, index: int, count: int) -> list[Rows]:
        taken: list[Rows] = []
        queue = self._queues[index]
        while count:
            rows = queue.pop(0)
            if len(rows) > count:
                queue.insert(0, rows.rows(count))
                rows = rows.rows(0, count)
            taken.append(rows)
            count -= len(rows)
        return taken


def _known_times(merged: Merged) -> NDArray[np.int64]:
    """Arrival times; dead letters before anything that tells the time count as known with what follows."""
    known = merged.arrival_time[merged.arrival_time >= 0]
    return np.maximum(merged.arrival_time, known[0] if len(known) else 0)
