"""Deterministic merge of partitions: one order of all rows, whatever the partitioning and the polling.

A row's key is (arrival time, kind of its topic, hash of its event id). Within a partition keys never go
back: a row takes the largest key before it if its own is smaller, and a dead letter takes that of the row
before it. Rows are given in the order of their keys, and only up to the point below which no partition can
still bring one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.events import DEAD_LETTER, DeadLetter, EventBlock, contract_schema
from pipelines.feature_columns import concat_events

__all__ = ["FIRST_KEY", "Key", "PartitionMerge", "PartitionRows"]

Ints = NDArray[np.int64]


class Key(NamedTuple):
    """Place of a row in the one order; time in ms."""

    arrival_time: int
    topic_kind: int
    event_hash: int


FIRST_KEY = Key(-1, -1, 0)
_ARRAYS = ("arrival_time", "event_hash", "is_bad", "offset", "row", "produced_at")


@dataclass(frozen=True)
class PartitionRows:
    """Consecutive rows of one partition, in the order of its log.

    ``table`` holds the good rows, ``dead_letters`` the ones with ``is_bad``. Arrays have shape (n,), times
    are ms, ``offset`` and ``row`` place each row in the log.
    """

    topic_kind: int
    arrival_time: Ints
    event_hash: NDArray[np.uint64]
    is_bad: NDArray[np.bool_]
    offset: Ints
    row: NDArray[np.int32]
    produced_at: Ints
    table: pa.Table
    dead_letters: list[DeadLetter]

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, row: int) -> Key:
        return Key(int(self.arrival_time[row]), self.topic_kind, int(self.event_hash[row]))

    def slice(self, start: int, stop: int) -> PartitionRows:
        """Rows ``[start, stop)``, without copying."""
        bad_before, bad_inside = int(self.is_bad[:start].sum()), int(self.is_bad[start:stop].sum())
        return replace(
            self,
            **{name: getattr(self, name)[start:stop] for name in _ARRAYS},
            table=self.table.slice(start - bad_before, stop - start - bad_inside),
            dead_letters=self.dead_letters[bad_before : bad_before + bad_inside],
        )

    def after(self, last: Key) -> PartitionRows:
        """The same rows with keys that never go back, the row before the first one having ``last``."""
        if len(self) == 0:
            return self
        low = np.iinfo(np.int64).min
        arrival = np.concatenate([[last.arrival_time], np.where(self.is_bad, low, self.arrival_time)])
        event_hash = np.concatenate([np.array([last.event_hash], np.uint64), self.event_hash])
        order = np.lexsort((event_hash, arrival))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        holder = order[np.maximum.accumulate(rank)][1:]
        return replace(self, arrival_time=arrival[holder], event_hash=event_hash[holder])

    @classmethod
    def concat(cls, parts: Sequence[PartitionRows]) -> PartitionRows:
        if len(parts) == 1:
            return parts[0]
        kind = parts[0].topic_kind
        return cls(
            topic_kind=kind,
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS},
            table=concat_events(kind, [part.table for part in parts]),
            dead_letters=[letter for part in parts for letter in part.dead_letters],
        )


class PartitionMerge:
    """Buffers rows of several partitions and gives them in their one order.

    Parameters
    ----------
    last_keys : sequence of Key
        For each partition the key of the last row taken from it, FIRST_KEY where there is none.
    """

    def __init__(self, last_keys: Sequence[Key]) -> None:
        self._last = list(last_keys)
        self._buffers: list[list[PartitionRows]] = [[] for _ in last_keys]

    def add(self, partition: int, rows: PartitionRows) -> None:
        """Append rows to a partition's buffer."""
        if len(rows):
            ordered = rows.after(self._last[partition])
            self._last[partition] = ordered.key(len(ordered) - 1)
            self._buffers[partition].append(ordered)

    def buffered(self, partition: int) -> int:
        """Rows of a partition that have not been taken."""
        return sum(len(part) for part in self._buffers[partition])

    def take(self, holds_back: Sequence[bool], most: int) -> EventBlock | None:
        """The next rows in order, at most about ``most`` of them; None if no row is safe yet.

        ``holds_back[p]`` says that partition ``p`` may still bring a row with a key that is not above its
        last one; where its buffer is empty, that is any key.
        """
        safe: Key | None = None
        for partition, waits in enumerate(holds_back):
            if waits:
                if not self._buffers[partition]:
                    return None
                last = self._last[partition]
                safe = last if safe is None else min(safe, last)
        taken: list[tuple[int, PartitionRows]] = []
        for partition, buffer in enumerate(self._buffers):
            rows = self._pop_up_to(partition, safe) if buffer else None
            if rows is not None:
                taken.append((partition, rows))
        if not taken:
            return None
        return self._in_order(taken, most)

    def _pop_up_to(self, partition: int, safe: Key | None) -> PartitionRows | None:
        rows = PartitionRows.concat(self._buffers[partition])
        count = len(rows) if safe is None else _count_up_to(rows, safe)
        self._buffers[partition] = [rows.slice(count, len(rows))] if count < len(rows) else []
        return rows.slice(0, count) if count else None

    def _in_order(self, taken: list[tuple[int, PartitionRows]], most: int) -> EventBlock:
        arrival = np.concatenate([rows.arrival_time for _, rows in taken])
        kind = np.concatenate([np.full(len(rows), rows.topic_kind, np.int8) for _, rows in taken])
        event_hash = np.concatenate([rows.event_hash for _, rows in taken])
        which = np.concatenate([np.full(len(rows), n, np.int64) for n, (_, rows) in enumerate(taken)])
        place = np.concatenate([np.arange(len(rows)) for _, rows in taken])
        # Stable: rows with equal keys keep the order of partitions and of the log.
        order = np.lexsort((event_hash, kind, arrival))[:most]
        chosen = which[order]
        for n, (partition, rows) in enumerate(taken):
            count = int((chosen == n).sum())
            if count < len(rows):
                self._buffers[partition].insert(0, rows.slice(count, len(rows)))
                taken[n] = (partition, rows.slice(0, count))
        return _block(taken, which[order], place[order])


def _count_up_to(rows: PartitionRows, safe: Key) -> int:
    """How many leading rows have keys of at most ``safe``; keys of a partition are sorted."""
    start = int(np.searchsorted(rows.arrival_time, safe.arrival_time, side="left"))
    stop = int(np.searchsorted(rows.arrival_time, safe.arrival_time, side="right"))
    if rows.topic_kind != safe.topic_kind:
        return stop if rows.topic_kind < safe.topic_kind else start
    ties = rows.event_hash[start:stop]
    return start + int(np.searchsorted(ties, np.uint64(safe.event_hash), side="right"))


def _block(taken: list[tuple[int, PartitionRows]], which: Ints, place: Ints) -> EventBlock:
    """Compose an event block from the rows ``(which, place)`` of the taken parts."""

    def gather(name: str) -> NDArray[np.generic]:
        first = getattr(taken[0][1], name)
        out = np.empty(len(which), first.dtype)
        for n, (_, rows) in enumerate(taken):
            own = which == n
            out[own] = getattr(rows, name)[place[own]]
        return out

    is_bad = gather("is_bad")
    kinds = np.array([rows.topic_kind for _, rows in taken], np.int8)[which]
    partitions = np.array([partition for partition, _ in taken], np.int32)[which]
    tables = []
    for kind in range(3):
        own = [n for n, (_, rows) in enumerate(taken) if rows.topic_kind == kind and rows.table.num_rows]
        if not own:
            tables.append(contract_schema(kind).empty_table())
            continue
        starts = np.cumsum([0, *(taken[n][1].table.num_rows for n in own)])
        rank = np.full(len(taken), -1)
        rank[own] = np.arange(len(own))
        good = ~is_bad & (rank[which] >= 0)
        good_place = [np.cumsum(~rows.is_bad) - 1 for _, rows in taken]
        where = np.empty(int(good.sum()), np.int64)
        for n in own:
            mine = which[good] == n
            where[mine] = good_place[n][place[good][mine]] + starts[rank[n]]
        table = concat_events(kind, [taken[n][1].table for n in own])
        tables.append(
            table if (np.diff(where) == 1).all() and len(where) == table.num_rows else table.take(where)
        )
    letters = [
        taken[n][1].dead_letters[_bad_rank(taken[n][1], row)] for n, row in _pairs(which, place, is_bad)
    ]
    return EventBlock(
        tables=(tables[0], tables[1], tables[2]),
        kind=np.where(is_bad, np.int8(DEAD_LETTER), kinds),
        arrival_time=gather("arrival_time"),
        partition=partitions,
        offset=gather("offset"),
        row=gather("row"),
        dead_letters=letters,
        produced_at=gather("produced_at"),
        event_hash=gather("event_hash"),
    )


def _pairs(which: Ints, place: Ints, chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return list(zip(which[chosen].tolist(), place[chosen].tolist(), strict=True))


def _bad_rank(rows: PartitionRows, row: int) -> int:
    return int(rows.is_bad[:row].sum())
