"""Rows of Kafka messages: decoded a poll at a time, and put together in merged order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.arrival_header import ARRIVAL_HEADER, told_arrival
from pipelines.codec import Messages, decode_messages, is_packed
from pipelines.event_file_reading import row_as_json
from pipelines.events import DEAD_LETTER, DeadLetter, EventBlock, contract_schema
from pipelines.feature_columns import concat_events
from pipelines.hashing import hash_column
from pipelines.merge import UNKNOWN_TIME
from pipelines.validation import validate

__all__ = ["DecodedBatch", "Keyed", "PolledPartition", "Rows", "decode_polled", "gather"]


@dataclass(frozen=True)
class PolledPartition:
    """Records of one partition as a poll gave them.

    Attributes
    ----------
    index : int
        Place of the partition among all that are read.
    topic, partition : str, int
    records : sequence of kafka ConsumerRecord
    skip : int
        Rows of the first record that have been applied already.
    """

    index: int
    topic: str
    partition: int
    records: Sequence[Any]
    skip: int = 0


@dataclass(frozen=True, eq=False)
class DecodedBatch:
    """What the rows of one poll of one topic hold: good ones as a table, others as dead letters."""

    kind: int
    table: pa.Table
    letters: list[DeadLetter]


@dataclass(frozen=True)
class Rows:
    """Rows of one partition, in the order of its log.

    Attributes
    ----------
    batch : DecodedBatch
    kind : ndarray of int8, shape (n,)
        The topic's kind or DEAD_LETTER.
    place : ndarray of int64, shape (n,)
        Row of ``batch.table``, or of ``batch.letters`` for a DEAD_LETTER.
    offset, row, produced_at : ndarray, shape (n,)
        See `pipelines.events.EventBlock`.
    """

    batch: DecodedBatch
    kind: NDArray[np.int8]
    place: NDArray[np.int64]
    offset: NDArray[np.int64]
    row: NDArray[np.int32]
    produced_at: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kind)

    def rows(self, start: int, stop: int | None = None) -> Rows:
        """Rows ``[start, stop)``."""
        part = slice(start, stop)
        return Rows(
            self.batch,
            self.kind[part],
            self.place[part],
            self.offset[part],
            self.row[part],
            self.produced_at[part],
        )


@dataclass(frozen=True)
class Keyed:
    """Rows of one partition with the keys that they are merged by (`pipelines.merge`)."""

    index: int
    rows: Rows
    arrival_time: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    packed_rows: dict[int, int]


def decode_polled(kind: int, polled: Sequence[PolledPartition]) -> list[Keyed]:
    """Decode and validate the records of all partitions of one topic at once.

    ``packed_rows`` of the result holds the number of rows of each packed message, by offset.
    """
    records = [record for part in polled for record in part.records]
    owner = np.repeat(np.arange(len(polled)), [len(part.records) for part in polled])
    messages = decode_messages(kind, [record.value for record in records])
    decoded, message = messages.decoded, messages.message
    ok, reasons = validate(kind, decoded.table)
    table = decoded.table if ok.all() else decoded.table.filter(pa.array(ok))
    good, rows = decoded.row[ok], decoded.rows
    kinds = np.full(rows, DEAD_LETTER, np.int8)
    place, arrival = np.zeros(rows, np.int64), np.full(rows, UNKNOWN_TIME, np.int64)
    hashes = np.zeros(rows, np.uint64)
    kinds[good] = kind
    place[good] = np.arange(len(good))
    arrival[good] = table.column("arrival_time").to_numpy()
    hashes[good] = hash_column(table.column("event_id"))
    dead, letters = np.flatnonzero(kinds == DEAD_LETTER), []
    if len(dead):
        found = [*_dead_letters(kind, polled, owner, messages, records, reasons)]
        letters = [letter for letter, _ in found]
        place[dead] = np.arange(len(dead))
        arrival[dead] = [_told_arrival(records[index].headers) for index in message[dead].tolist()]
        hashes[dead] = hash_column(pa.array([payload for _, payload in found], pa.binary()))
    whole = Rows(
        DecodedBatch(kind, table, letters),
        kinds,
        place,
        np.array([record.offset for record in records], np.int64)[message],
        messages.row_in_message,
        np.array([record.timestamp for record in records], np.int64)[message],
    )
    return _by_partition(polled, whole, arrival, hashes, owner[message])


def _dead_letters(
    kind: int,
    polled: Sequence[PolledPartition],
    owner: NDArray[np.int64],
    messages: Messages,
    records: Sequence[Any],
    invalid: dict[int, str],
) -> Iterator[tuple[DeadLetter, bytes]]:
    """Letter and payload of each row that cannot be used; ``invalid`` are those that could be read."""
    decoded = messages.decoded
    table_row = {int(decoded.row[row]): row for row in invalid}
    faults = decoded.rejected | {flat: invalid[row] for flat, row in table_row.items()}
    for flat in sorted(faults):
        index = int(messages.message[flat])
        record, part = records[index], polled[int(owner[index])]
        payload = record.value or b""
        if flat in table_row and is_packed(payload):
            payload = row_as_json(kind, decoded.table, table_row[flat])
        row, text = int(messages.row_in_message[flat]), payload.decode(errors="replace")
        yield DeadLetter(part.topic, part.partition, record.offset, row, faults[flat], text), payload


def _by_partition(
    polled: Sequence[PolledPartition],
    whole: Rows,
    arrival: NDArray[np.int64],
    hashes: NDArray[np.uint64],
    owner: NDArray[np.int64],
) -> list[Keyed]:
    ends = np.searchsorted(owner, np.arange(len(polled) + 1))
    found = []
    for number, part in enumerate(polled):
        start, stop = int(ends[number]), int(ends[number + 1])
        own = whole.rows(start, stop)
        packed = own.offset[own.row > 0]
        sizes = zip(*np.unique(packed, return_counts=True), strict=True) if len(packed) else ()
        packed_rows = {int(offset): int(count) + 1 for offset, count in sizes}
        if part.skip and len(own):
            first = part.records[0].offset
            start += int(((own.offset == first) & (own.row < part.skip)).sum())
        found.append(
            Keyed(part.index, whole.rows(start, stop), arrival[start:stop], hashes[start:stop], packed_rows)
        )
    return found


def _told_arrival(headers: Sequence[tuple[str, bytes | None]]) -> int:
    return told_arrival(value for name, value in headers if name == ARRIVAL_HEADER)


def gather(
    parts: Sequence[Sequence[Rows]], owner: NDArray[np.int32], arrival_time: NDArray[np.int64]
) -> EventBlock:
    """Put rows of all partitions together in merged order.

    Parameters
    ----------
    parts : sequence of sequence of Rows
        For each partition, its next rows; their number is how often ``owner`` names the partition.
    owner : ndarray of int32, shape (n,)
        Partition of each row.
    arrival_time : ndarray of int64, shape (n,)
        When each row became known, ms.
    """
    n = len(owner)
    batches = _Batches()
    kind, place = np.zeros(n, np.int8), np.zeros(n, np.int64)
    offset, produced_at = np.zeros(n, np.int64), np.zeros(n, np.int64)
    row = np.zeros(n, np.int32)
    for partition, pieces in enumerate(parts):
        if pieces:
            where = np.flatnonzero(owner == partition)
            kind[where] = np.concatenate([piece.kind for piece in pieces])
            place[where] = np.concatenate([piece.place + batches.base(piece) for piece in pieces])
            offset[where] = np.concatenate([piece.offset for piece in pieces])
            row[where] = np.concatenate([piece.row for piece in pieces])
            produced_at[where] = np.concatenate([piece.produced_at for piece in pieces])
    impressions, clicks, conversions = (batches.take(which, place[kind == which]) for which in range(3))
    letters = batches.letters()
    return EventBlock(
        tables=(impressions, clicks, conversions),
        kind=kind,
        arrival_time=arrival_time,
        partition=owner,
        offset=offset,
        row=row,
        dead_letters=[letters[index] for index in place[kind == DEAD_LETTER]],
        produced_at=produced_at,
    )


class _Batches:
    """The batches that rows refer to, one behind the other for each kind."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[int, int]] = {}
        self._batches: list[DecodedBatch] = []
        self._rows = [0, 0, 0, 0]

    def base(self, piece: Rows) -> NDArray[np.int64]:
        """What to add to the places of some rows, so that they count through all batches of their kind."""
        batch = piece.batch
        if id(batch) not in self._by_id:
            self._by_id[id(batch)] = (self._rows[batch.kind], self._rows[DEAD_LETTER])
            self._batches.append(batch)
            self._rows[batch.kind] += batch.table.num_rows
            self._rows[DEAD_LETTER] += len(batch.letters)
        good, dead = self._by_id[id(batch)]
        return np.where(piece.kind == DEAD_LETTER, dead, good)

    def take(self, kind: int, places: NDArray[np.int64]) -> pa.Table:
        tables = [batch.table for batch in self._batches if batch.kind == kind and batch.table.num_rows]
        if not tables or not len(places):
            return contract_schema(kind).empty_table()
        table = concat_events(kind, tables)
        first, last = int(places[0]), int(places[-1])
        if last - first == len(places) - 1 and (np.diff(places) == 1).all():
            return table.slice(first, len(places))
        return table.take(pa.array(places))

    def letters(self) -> list[DeadLetter]:
        return [letter for batch in self._batches for letter in batch.letters]
