"""Outcome rates and counts of table rows, as inputs for trees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.base_rate import base_rate_and_weight
from pipelines.feature_spec import FeatureSpec
from pipelines.training_set import TrainingRows, TrainingSet

__all__ = ["TargetEncoding", "contributions"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_SUMMED_ROWS = 65_536


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
    def fit(cls, train: TrainingRows, spec: FeatureSpec, smoothing: float = 20.0) -> Self:
        """Statistics of all training rows: what is known at their end."""
        sums = np.zeros((3, spec.table_rows))
        for batch in train.batches(_SUMMED_ROWS):
            flat, columns = batch.buckets.ravel(), batch.buckets.shape[1]
            # One bincount over all columns: fields own disjoint table rows, so they do not mix.
            for total, values in zip(sums, contributions(batch), strict=True):
                total += np.bincount(flat, np.repeat(values, columns), spec.table_rows)
        # Row 0 is the padding of sequences.
        sums[:, 0] = 0.0
        positives, exposure, count = sums.astype(np.float32)
        prior = base_rate_and_weight(train)[0]
        return cls(positives, exposure, count, prior, smoothing, tuple(spec.column_field))

    def transform(self, buckets: NDArray[np.int32]) -> Floats:
        """Rates, then log counts, of each field by the full statistics; shape (n, 2 fields)."""
        return self.by_field(buckets, self._rate_of_row[buckets], self._log_count_of_row[buckets])

    @cached_property
    def _rate_of_row(self) -> Floats:
        return self.rate(self.positives, self.exposure)

    @cached_property
    def _log_count_of_row(self) -> Floats:
        return np.asarray(np.log1p(self.count), np.float32)

    def rate(self, positives: Floats, exposure: Floats) -> Floats:
        """Smoothed share of positives, any shape."""
        prior = np.float32(self.prior * self.smoothing)
        return np.asarray((positives + prior) / (exposure + np.float32(self.smoothing)), np.float32)

    def by_field(self, buckets: NDArray[np.int32], rate: Floats, count: Floats) -> Floats:
        """Rates, then log counts, of each field from those of each column; shape (n, 2 fields)."""
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


def contributions(rows: TrainingSet) -> tuple[Doubles, Doubles, Doubles]:
    """What each row adds to positives, exposure and count, each (n,)."""
    weight = rows.weight.astype(np.float64)
    return weight * rows.label, weight * rows.observed_share, np.ones(len(rows))
