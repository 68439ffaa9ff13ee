"""Target encoding of the training rows themselves, by what could be known of each; a chunk at a time.

A row's rates are made of the labels of rows at least ``label_delay`` older, its counts of all older rows. So
it sees neither its own label nor one that could not have been known.

1. Rows come in time order. A second reader of the same rows stays ``label_delay`` behind the first.
2. What it has read, and every row of the chunk could know, is in sums by table row.
3. What only some rows of the chunk could know is sorted together with the chunk by (bucket, time): running
   sums give each row what lies before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from models.target_encoding import Floats, TargetEncoding, contributions
from pipelines.training_set import TrainingRows, TrainingSet

__all__ = ["CHUNK_ROWS", "encode_in_time"]

CHUNK_ROWS = 65_536
Doubles = NDArray[np.float64]


def encode_in_time(
    encoding: TargetEncoding, train: TrainingRows, label_delay: int, chunk_rows: int = CHUNK_ROWS
) -> Iterator[tuple[TrainingSet, Floats]]:
    """Chunks of the training rows with their rates, then log counts, of each field; (n, 2 fields).

    Parameters
    ----------
    encoding : TargetEncoding
        Fitted to the same rows.
    train : TrainingRows
        In time order.
    label_delay : int
        Milliseconds after which an outcome is taken as known.
    chunk_rows : int
        Rows to a chunk; they do not depend on it.
    """
    behind = iter(train.batches(chunk_rows))
    # Strictly older: rows of one moment do not see each other.
    labels = _OlderRows(encoding, max(label_delay, 1), lambda rows: contributions(rows)[:2])
    older = _OlderRows(encoding, 1, lambda rows: contributions(rows)[2:])
    for chunk in train.batches(chunk_rows):
        while labels.newest <= int(chunk.event_time[-1]) - labels.delay:
            # The chunk itself is the last that can be asked for.
            labels.add(next(behind))
        older.add(chunk)
        positives, exposure = labels.sums(chunk)
        (count,) = older.sums(chunk)
        yield chunk, encoding.by_field(chunk.buckets, encoding.rate(positives, exposure), np.log1p(count))


class _OlderRows:
    """Sums over the rows with the same bucket that are at least ``delay`` (ms) older, for a chunk of rows."""

    def __init__(
        self,
        encoding: TargetEncoding,
        delay: int,
        values_of: Callable[[TrainingSet], tuple[Doubles, ...]],
    ) -> None:
        self.delay = delay
        self.newest = np.iinfo(np.int64).min
        self._values_of = values_of
        self._table_rows = len(encoding.count)
        # Columns of one field share its buckets: a value counts wherever in a sequence it stands.
        field = np.asarray(encoding.column_field)
        self._fields = [
            slice(*ends) for ends in pairwise([*np.flatnonzero(np.diff(field, prepend=-1)), len(field)])
        ]
        self._sums: list[Doubles] = []
        self._recent: list[TrainingSet] = []

    def add(self, rows: TrainingSet) -> None:
        """Take further rows; none is older than those before."""
        self._recent.append(rows)
        self.newest = int(rows.event_time[-1])

    def sums(self, chunk: TrainingSet) -> list[Floats]:
        """Of each value, shape (n, columns). The chunk is not older than the last one asked about."""
        self._settle(int(chunk.event_time[0]) - self.delay)
        found = [values[chunk.buckets] for values in self._sums]
        if self._recent:
            self._add_recent(chunk, found)
        return [values.astype(np.float32) for values in found]

    def _settle(self, until: int) -> None:
        """Move what all rows from now on may know into the sums."""
        recent, self._recent = self._recent, []
        for rows in recent:
            known = int(np.searchsorted(rows.event_time, until, side="right"))
            self._sum(rows.take(slice(0, known)))
            if known < len(rows):
                self._recent.append(rows.take(slice(known, len(rows))))

    def _sum(self, rows: TrainingSet) -> None:
        values = self._values_of(rows)
        if not self._sums:
            self._sums = [np.zeros(self._table_rows) for _ in values]
        for total, part in zip(self._sums, values, strict=True):
            np.add.at(total, rows.buckets.ravel(), np.repeat(part, rows.buckets.shape[1]))

    def _add_recent(self, chunk: TrainingSet, found: list[Doubles]) -> None:
        begin = int(min(self._recent[0].event_time[0] + self.delay, chunk.event_time[0]))
        known = [2 * (rows.event_time + (self.delay - begin)) for rows in self._recent]
        # Of one time, what is known stands before who asks.
        moment = np.concatenate([*known, 2 * (chunk.event_time - begin) + 1])
        parts = [self._values_of(rows) for rows in self._recent]
        values = [np.concatenate([*part, np.zeros(len(chunk))]) for part in zip(*parts, strict=True)]
        asks = np.arange(len(moment)) >= len(moment) - len(chunk)
        for columns in self._fields:
            buckets = np.concatenate([rows.buckets[:, columns] for rows in (*self._recent, chunk)])
            width = buckets.shape[1]
            entries = np.repeat(moment, width), np.repeat(asks, width)
            before = _sums_before(buckets.ravel(), *entries, [np.repeat(value, width) for value in values])
            for part, total in zip(before, found, strict=True):
                total[:, columns] += part.reshape(-1, width)


def _sums_before(
    bucket: NDArray[np.int32], moment: NDArray[np.int64], asks: NDArray[np.bool_], values: list[Doubles]
) -> Iterator[Doubles]:
    """For each entry that asks, the sum of each value over entries of its bucket with an earlier moment."""
    order = np.argsort(bucket * np.int64(moment.max() + 1) + moment, kind="stable")
    first = np.flatnonzero(np.diff(bucket[order], prepend=-1))
    start = np.repeat(first, np.diff(first, append=len(order)))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    place = place[asks]
    for value in values:
        running = np.concatenate(([0.0], np.cumsum(value[order])))
        yield running[place] - running[start[place]]
