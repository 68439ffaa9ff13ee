"""A deterministic merge of partitions: one order of arrival, whatever the polls brought together.

Each row has the key (arrival time, kind, XXH64 of the event id). Within a partition rows stay as they are
logged, so the key that counts is the greatest so far; across partitions the smallest key goes first, and of
equal keys that of the first partition. A row is let go once no other partition can bring a smaller key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["UNKNOWN_TIME", "Merged", "PartitionMerge"]

# Arrival time of a row that does not tell: it counts as known when the row before it was.
UNKNOWN_TIME = -1

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Merged:
    """Rows let go, in order.

    Attributes
    ----------
    partition : ndarray of int32, shape (n,)
        Partition of each row: the next of that partition's rows, in the order in which they were pushed.
    arrival_time : ndarray of int64, shape (n,)
        When each row became known, ms; never decreases, not from one call to the next either.
    """

    partition: NDArray[np.int32]
    arrival_time: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.partition)


@dataclass
class _Keys:
    """Keys of rows of one partition, none smaller than the one before it."""

    arrival: NDArray[np.int64]
    kind: NDArray[np.int8]
    hashes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.arrival)

    def key(self, row: int) -> Key:
        return int(self.arrival[row]), int(self.kind[row]), int(self.hashes[row])

    def rows(self, start: int, stop: int | None = None) -> _Keys:
        return _Keys(self.arrival[start:stop], self.kind[start:stop], self.hashes[start:stop])

    @classmethod
    def concat(cls, parts: Sequence[_Keys]) -> _Keys:
        return cls(
            np.concatenate([part.arrival for part in parts]),
            np.concatenate([part.kind for part in parts]),
            np.concatenate([part.hashes for part in parts]),
        )

    @classmethod
    def of(cls, key: Key) -> _Keys:
        return cls(np.array([key[0]]), np.array([key[1]], np.int8), np.array([key[2]], np.uint64))


class PartitionMerge:
    """Merges partitions into one order of arrival.

    Parameters
    ----------
    clocks : sequence of int
        For each partition, the greatest arrival time among the rows before the first one pushed, ms;
        `UNKNOWN_TIME` where there are none. With the rows from there on, that is all it takes to go on.

    Examples
    --------
    >>> merge = PartitionMerge([UNKNOWN_TIME, UNKNOWN_TIME])
    >>> kinds, hashes = np.zeros(2, np.int8), np.zeros(2, np.uint64)
    >>> merge.push(0, np.array([5, 9]), kinds, hashes)
    >>> merge.push(1, np.array([3, 7]), kinds, hashes)
    >>> merge.advance([False, False]).arrival_time.tolist()  # partition 1 may still bring an 8
    [3, 5, 7]
    >>> merge.advance([False, True]).partition.tolist()
    [0]
    """

    def __init__(self, clocks: Sequence[int]) -> None:
        self._last: list[Key] = [(clock, -1, 0) for clock in clocks]
        self._waiting: list[list[_Keys]] = [[] for _ in clocks]
        self._clock = max(clocks, default=UNKNOWN_TIME)

    def add_partition(self) -> None:
        """One more partition, the last one, of which nothing has been read."""
        self._last.append((UNKNOWN_TIME, -1, 0))
        self._waiting.append([])

    @property
    def waiting(self) -> list[int]:
        """For each partition, the number of rows not let go yet."""
        return [sum(map(len, parts)) for parts in self._waiting]

    def push(
        self,
        partition: int,
        arrival_time: NDArray[np.int64],
        kind: NDArray[np.int8],
        hashes: NDArray[np.uint64],
    ) -> None:
        """Add rows of one partition in the order of its log.

        Parameters
        ----------
        partition : int
        arrival_time : ndarray of int64, shape (n,)
            ms; `UNKNOWN_TIME` for a row that does not tell.
        kind : ndarray of int8, shape (n,)
        hashes : ndarray of uint64, shape (n,)
        """
        if not len(arrival_time):
            return
        last = self._last[partition]
        keys = _Keys(np.maximum.accumulate(np.maximum(arrival_time, last[0])), kind, hashes)
        keys = _never_smaller(_Keys.concat([_Keys.of(last), keys])).rows(1)
        self._last[partition] = keys.key(-1)
        self._waiting[partition].append(keys)

    def advance(self, at_end: Sequence[bool]) -> Merged:
        """Let all rows go that no partition can bring a smaller key than.

        Parameters
        ----------
        at_end : sequence of bool
            For each partition, whether nothing more is to be expected of it (for now). Such a partition holds
            no other back. Rows that it brings later all the same count as known no earlier than what has
            been let go.
        """
        bounds = [(self._last[p], p) for p, ended in enumerate(at_end) if not ended]
        bound = min(bounds, default=None)
        chosen = [self._take(partition, bound) for partition in range(len(self._waiting))]
        keys = _Keys.concat([_Keys.of((0, 0, 0)), *chosen]).rows(1)
        owner = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(part) for part in chosen])
        # Stable: of equal keys the first partition's go first, and rows of one stay in order.
        order = np.lexsort((keys.hashes, keys.kind, keys.arrival))
        arrival = np.maximum.accumulate(np.maximum(keys.arrival[order], self._clock))
        if len(arrival):
            self._clock = int(arrival[-1])
        return Merged(owner[order], arrival)

    def _take(self, partition: int, bound: tuple[Key, int] | None) -> _Keys:
        """Remove the rows of one partition up to the bound."""
        if not self._waiting[partition]:
            return _Keys.of((0, 0, 0)).rows(1)
        keys = _Keys.concat(self._waiting[partition])
        count = len(keys) if bound is None else _rows_up_to(keys, partition, bound)
        self._waiting[partition] = [keys.rows(count)] if count < len(keys) else []
        return keys.rows(0, count)


def _rows_up_to(keys: _Keys, partition: int, bound: tuple[Key, int]) -> int:
    """How many rows are not beyond a key of a partition."""
    key, _ = bound
    first, last = (int(np.searchsorted(keys.arrival, key[0], side)) for side in ("left", "right"))
    while first < last and (keys.key(first), partition) <= bound:
        first += 1
    return first


def _never_smaller(keys: _Keys) -> _Keys:
    """Replace each key by the greatest up to it; arrival times do not decrease already."""
    arrival, kind, hashes = keys.arrival, keys.kind, keys.hashes
    same = arrival[1:] == arrival[:-1]
    falls = same & ((kind[1:] < kind[:-1]) | ((kind[1:] == kind[:-1]) & (hashes[1:] < hashes[:-1])))
    if not falls.any():
        return keys
    order = np.lexsort((hashes, kind, arrival))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    greatest = order[np.maximum.accumulate(rank)]
    return _Keys(arrival, kind[greatest], hashes[greatest])
