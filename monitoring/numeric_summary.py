"""Counts of a numeric feature between fixed edges, so that any two windows of it can be added or compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray, IntArray, feature_column
from pipelines.errors import DataError

__all__ = ["MAX_BINS", "NumericSummary", "numeric_edges"]

# 2048 quantile bins put the error of KS below 1/2048 and still sort, count and merge in milliseconds.
MAX_BINS = 2048


def _numbers(name: str, values: npt.ArrayLike) -> FloatArray:
    try:
        return feature_column(name, values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"expected numbers or None in feature `{name}`, received other values: {error}."
        ) from error


def numeric_edges(values: npt.ArrayLike, bins: int = MAX_BINS) -> tuple[FloatArray, bool]:
    """Edges between bins: quantiles of the reference, or its distinct values if at most ``bins``.

    Returns
    -------
    edges : (k,) float64, ascending, k <= bins + 1
        Bin 0 lies below ``edges[0]``, the minimum; bin i holds ``edges[i - 1] <= x < edges[i]``; bin k lies
        from ``edges[-1]`` up, just above the maximum: bins 0 and k are what the reference never had.
    is_discrete : bool
        Whether the edges are all the distinct values of the reference: then a bin is one value.

    Examples
    --------
    >>> numeric_edges(np.array([3.0, 1.0, np.nan, 3.0]))
    (array([1., 3., 3.]), True)
    """
    finite = _numbers("values", values)
    finite = np.sort(finite[np.isfinite(finite)])
    if finite.shape[0] == 0:
        return np.zeros(0, dtype=np.float64), True
    distinct = finite[np.append(True, finite[1:] != finite[:-1])]
    above = np.nextafter(finite[-1], np.inf)
    if distinct.shape[0] <= bins:
        return np.append(distinct, above), True
    quantiles = finite[(np.arange(1, bins) * finite.shape[0]) // bins]
    return np.unique(np.concatenate(([finite[0]], quantiles, [above]))), False


@dataclass
class NumericSummary:
    """Counts of a numeric feature between fixed edges.

    Attributes
    ----------
    name : str
    edges : (k,) float64, ascending
    is_discrete : bool
        The edges are the values themselves, as `numeric_edges` says.
    counts, sums : (k + 1,) int64, (k + 1,) float64
        Rows and sum of the values of each bin.
    rows, nulls, infinite : int
        All rows, those that are NaN (or None), those that are ±inf.
    minimum, maximum : float
        Of the finite values; inf and -inf while there are none.

    Examples
    --------
    >>> reference = NumericSummary.of("age", np.array([18.0, 30.0, 41.0, 30.0]))
    >>> current = reference.empty_like()
    >>> current.update(np.array([17.0, 30.0, np.nan]))
    >>> current.counts.tolist(), current.nulls
    ([1, 0, 1, 0, 0], 1)
    """

    name: str
    edges: FloatArray
    is_discrete: bool = False
    counts: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    sums: FloatArray = field(default_factory=lambda: np.zeros(0, dtype=np.float64))
    rows: int = 0
    nulls: int = 0
    infinite: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")

    def __post_init__(self) -> None:
        if self.counts.shape[0] == 0:
            self.counts = np.zeros(self.edges.shape[0] + 1, dtype=np.int64)
            self.sums = np.zeros(self.edges.shape[0] + 1, dtype=np.float64)

    @classmethod
    def of(cls, name: str, values: npt.ArrayLike, bins: int = MAX_BINS) -> NumericSummary:
        """Summary of reference values, with edges taken from them."""
        numbers = _numbers(name, values)
        summary = cls(name, *numeric_edges(numbers, bins))
        summary.update(numbers)
        return summary

    @property
    def kind(self) -> Literal["numeric"]:
        """``numeric``."""
        return "numeric"

    @property
    def cardinality(self) -> int | None:
        """Distinct values, where each has its own bin; else unknown."""
        if not self.is_discrete or self.counts[0] or self.counts[-1]:
            return None
        return int((self.counts > 0).sum())

    def empty_like(self) -> NumericSummary:
        """A summary without rows over the same edges."""
        return NumericSummary(self.name, self.edges, self.is_discrete)

    def update(self, values: npt.ArrayLike) -> None:
        """Count a column ``(n,)`` of numbers; NaN and None are nulls, ±inf is counted apart."""
        numbers = _numbers(self.name, values)
        self.rows += numbers.shape[0]
        finite = numbers[np.isfinite(numbers)]
        nulls = int(np.isnan(numbers).sum())
        self.nulls += nulls
        self.infinite += numbers.shape[0] - nulls - finite.shape[0]
        if finite.shape[0] == 0:
            return
        # Sorting the values and looking the few edges up among them is several times faster than the other
        # way round.
        finite.sort()
        below = np.searchsorted(finite, self.edges, side="left")
        start = np.concatenate(([0], below))
        count = np.diff(np.append(start, finite.shape[0]))
        used = count > 0
        self.counts = self.counts + count
        self.sums = self.sums.copy()
        self.sums[used] += np.add.reduceat(finite, start[used])
        self.minimum = min(self.minimum, float(finite[0]))
        self.maximum = max(self.maximum, float(finite[-1]))

    def merge(self, other: NumericSummary) -> NumericSummary:
        """Return the summary of both sets of rows; DataError unless name and edges agree."""
        if self.name != other.name or not np.array_equal(self.edges, other.edges):
            raise DataError(
                f"expected two summaries of `{self.name}` over the same edges, received `{other.name}`.",
                hint="start every window from reference.empty_like()",
            )
        return NumericSummary(
            self.name,
            self.edges,
            self.is_discrete,
            self.counts + other.counts,
            self.sums + other.sums,
            self.rows + other.rows,
            self.nulls + other.nulls,
            self.infinite + other.infinite,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    def state(self) -> dict[str, Any]:
        """JSON state; minimum and maximum are None without finite values, since JSON has no infinity."""
        seen = bool(self.counts.any())
        return {
            "kind": "numeric",
            "name": self.name,
            "edges": self.edges.tolist(),
            "is_discrete": self.is_discrete,
            "counts": self.counts.tolist(),
            "sums": self.sums.tolist(),
            "rows": self.rows,
            "nulls": self.nulls,
            "infinite": self.infinite,
            "minimum": self.minimum if seen else None,
            "maximum": self.maximum if seen else None,
        }
