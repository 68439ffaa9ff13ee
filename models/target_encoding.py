"""Outcome rates and counts of table rows, as inputs for trees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from models.losses import cure_base_rate
from pipelines.feature_spec import FeatureSpec
from pipelines.training_set import TrainingSet

__all__ = ["TargetEncoding"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TargetEncoding:
    """Positives, exposure and count of each table row, and from them a smoothed rate and a log count.

    A training row of which the share F of its outcomes would be known counts as exposure F: then positives
    over exposure is the rate of outcomes once all are known. Crosses are fields like any other.

    Attributes
    ----------
    positives, exposure : ndarray of float32, shape (table_rows,)
        Weighted sums over the training rows.
    count : ndarray of float32, shape (table_rows,)
        Training rows, whatever became of them.
    prior : float
        Overall rate, probability space.
    smoothing : float
        Exposure that the prior is worth.
    column_field : tuple of int
        See `FeatureSpec.column_field`.

    Examples
    --------
    >>> table = np.float32([[0, 0, 0], [3, 10, 12], [0, 0, 0]]).T
    >>> TargetEncoding(*table, 0.1, 10.0, (0,)).transform(np.array([[1], [2]], np.int32)).round(2).tolist()
    [[0.20000000298023224, 2.559999942779541], [0.10000000149011612, 0.0]]
    """

    positives: Floats
    exposure: Floats
    count: Floats
    prior: float
    smoothing: float
    column_field: tuple[int, ...]

    @classmethod
    def fit(cls, train: TrainingSet, spec: FeatureSpec, smoothing: float = 20.0) -> Self:
        """Statistics of all training rows: what is known at their end."""
        flat, columns = train.buckets.ravel(), train.buckets.shape[1]
        # One bincount over all columns: fields own disjoint table rows, so they do not mix.
        sums = [
            np.bincount(flat, np.repeat(values, columns), spec.table_rows).astype(np.float32)
            for values in _contributions(train)
        ]
        for values in sums:
            # Row 0 is the padding of sequences.
            values[0] = 0.0
        weight, label = train.weight.astype(np.float64), train.label.astype(np.float64)
        prior = cure_base_rate(label, train.observed_share.astype(np.float64), weight)
        return cls(sums[0], sums[1], sums[2], prior, smoothing, tuple(spec.column_field))

    def transform(self, buckets: NDArray[np.int32]) -> Floats:
        """Rates, then log counts, of each field by the full statistics; shape (n, 2 fields)."""
        return self._by_field(buckets, self._rate_of_row[buckets], self._log_count_of_row[buckets])

    def transform_in_time(self, train: TrainingSet, label_delay: int) -> Floats:
        """Rates and log counts of the training rows themselves, shape (n, 2 fields).

        A row's rates are made of the labels of rows at least ``label_delay`` older, its counts of all older
        rows. So it sees neither its own label nor one that could not have been known.

        Parameters
        ----------
        train : TrainingSet
            The rows that were given to `fit`.
        label_delay : int
            Milliseconds after which an outcome is taken as known.
        """
        seen, exposed, one = _contributions(train)
        time = train.event_time - train.event_time.min()
        # Strictly older: rows of one moment do not see each other.
        known_until = np.maximum(time - max(label_delay, 1), -1)
        positives, exposure, count = (np.zeros(train.buckets.shape, np.float32) for _ in range(3))
        for column in range(train.buckets.shape[1]):
            older = _OlderRows(train.buckets[:, column], time)
            until = older.ends(known_until)
            positives[:, column] = older.sums(seen, until)
            exposure[:, column] = older.sums(exposed, until)
            count[:, column] = older.sums(one, older.ends(time - 1))
        return self._by_field(train.buckets, self._rate(positives, exposure), np.log1p(count))

    @cached_property
    def _rate_of_row(self) -> Floats:
        return self._rate(self.positives, self.exposure)

    @cached_property
    def _log_count_of_row(self) -> Floats:
        return np.asarray(np.log1p(self.count), np.float32)

    def _rate(self, positives: Floats, exposure: Floats) -> Floats:
        prior = np.float32(self.prior * self.smoothing)
        return np.asarray((positives + prior) / (exposure + np.float32(self.smoothing)), np.float32)

    def _by_field(self, buckets: NDArray[np.int32], rate: Floats, count: Floats) -> Floats:
        field = np.asarray(self.column_field)
        if len(field) == len(np.unique(field)):
            return np.concatenate((rate, count), axis=1)
        # The mean over the values of a sequence; an empty one gives 0, which no value does.
        starts = np.flatnonzero(np.diff(field, prepend=-1))
        present = (buckets != 0).astype(np.float32)
        values = np.maximum(np.add.reduceat(present, starts, axis=1), 1.0)
        return np.concatenate(
            [np.add.reduceat(part * present, starts, axis=1) / values for part in (rate, count)], axis=1
        )


class _OlderRows:
    """Sums over the rows with the same bucket up to some time, for every row at once."""

    def __init__(self, bucket: NDArray[np.int32], time: NDArray[np.int64]) -> None:
        # One sortable number for (bucket, time): both fit, 2**20 rows and centuries of milliseconds.
        self._first = bucket.astype(np.int64) * (int(time.max(initial=0)) + 1)
        key = self._first + time
        self._order = np.argsort(key, kind="stable")
        self._key = key[self._order]
        self._start = np.searchsorted(self._key, self._first, side="left")

    def ends(self, until: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows of each row's bucket with time <= ``until`` end; -1 is before all."""
        found = np.searchsorted(self._key, self._first + until, side="right")
        return np.maximum(found, self._start)

    def sums(self, values: NDArray[np.float64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
        total = np.concatenate(([0.0], np.cumsum(values[self._order])))
        return np.asarray(total[ends] - total[self._start], np.float64)


def _contributions(train: TrainingSet) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    weight = train.weight.astype(np.float64)
    return weight * train.label, weight * train.observed_share, np.ones(len(train))
