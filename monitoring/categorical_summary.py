"""Counts of each value of a categorical feature, which add up over batches, windows and partitions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monitoring.inputs import feature_column
from pipelines.errors import DataError

__all__ = ["CategoricalSummary"]


@dataclass
class CategoricalSummary:
    """Counts of each value of a categorical feature.

    Memory grows with the number of distinct values; comparison reads the most frequent ones
    (`monitoring.drift`).

    Attributes
    ----------
    name : str
    rows, nulls : int
        All rows, and those that hold None (or NaN).
    counts : Counter
        Value -> rows, nulls left out.

    Examples
    --------
    >>> summary = CategoricalSummary("campaign")
    >>> summary.update(np.array(["a", None, "b", "a"], dtype=object))
    >>> summary.rows, summary.nulls, summary.counts["a"]
    (4, 1, 2)
    """

    name: str
    rows: int = 0
    nulls: int = 0
    counts: Counter[Any] = field(default_factory=Counter)

    @property
    def kind(self) -> Literal["categorical"]:
        """``categorical``."""
        return "categorical"

    @property
    def cardinality(self) -> int:
        """Distinct values seen."""
        return len(self.counts)

    def empty_like(self) -> CategoricalSummary:
        """A summary without rows that can be compared with this one."""
        return CategoricalSummary(self.name)

    def update(self, values: npt.ArrayLike) -> None:
        """Count a column ``(n,)``: int or str array, or object array with None as null."""
        column = feature_column(self.name, values)
        if column.dtype.kind in "iub":
            self.rows += column.shape[0]
            found, count = np.unique(column, return_counts=True)
            self.counts.update(dict(zip(found.tolist(), count.tolist(), strict=True)))
            return
        try:
            batch = Counter(column.tolist())
        except TypeError as error:
            raise DataError(
                f"expected single values in feature `{self.name}`, received {error}.",
                hint="flatten lists into one value a row before summarising",
            ) from error
        self.rows += column.shape[0]
        # NaN is the one value that differs from itself.
        for null in [key for key in batch if key is None or key != key]:
            self.nulls += batch.pop(null)
        self.counts.update(batch)

    def merge(self, other: CategoricalSummary) -> CategoricalSummary:
        """Return the summary of both sets of rows; neither input changes."""
        if self.name != other.name:
            raise DataError(f"expected two summaries of `{self.name}`, received one of `{other.name}`.")
        both = CategoricalSummary(
            self.name, self.rows + other.rows, self.nulls + other.nulls, Counter(self.counts)
        )
        both.counts.update(other.counts)
        return both

    def state(self) -> dict[str, Any]:
        """JSON state: keys and counts as lists (JSON has no integer keys), sorted."""
        items = sorted(self.counts.items(), key=lambda item: (str(type(item[0])), item[0]))
        return {
            "kind": "categorical",
            "name": self.name,
            "rows": self.rows,
            "nulls": self.nulls,
            "keys": [key for key, _ in items],
            "counts": [count for _, count in items],
        }
