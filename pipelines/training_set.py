"""Labelled rows of one task, ready to train on: a struct of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["TrainingRows", "TrainingSet"]


class TrainingRows(Protocol):
    """Rows to train on, in time order, in memory or not."""

    def __len__(self) -> int:
        """Number of rows."""

    def batches(self, rows: int) -> Iterable[TrainingSet]:
        """All rows from the first on, so many at a time; the last batch may be smaller."""


@dataclass(frozen=True)
class TrainingSet:
    """Rows of one task with the label known at one moment, ordered by ``event_time``.

    Attributes
    ----------
    buckets : ndarray of int32, shape (n, columns)
    numbers : ndarray of float32, shape (n, numeric features)
        See `pipelines.features.Encoded`.
    user_key : ndarray of int64, shape (n,)
    segment_key : ndarray of int64, shape (n, segments)
    label : ndarray of float32, shape (n,)
        1 if the outcome was known by ``as_of``, else 0.
    weight : ndarray of float32, shape (n,)
        Sampling weight, > 0.
    event_time : ndarray of int64, shape (n,)
        When the window of the row opened (impression for clicks, click for conversions), ms.
    mature : ndarray of bool, shape (n,)
        Whether the window had closed by ``as_of``.
    observed_share : ndarray of float32, shape (n,)
        F(elapsed): the share of the outcomes to come that would be known by now; 1 when mature. A row
        with label 0 has the likelihood ``1 - p F``.
    ids : ndarray of int64, shape (n, id columns), or None
        See `pipelines.features.Encoded`; None where they are not known, as in snapshots.
    """

    buckets: NDArray[np.int32]
    numbers: NDArray[np.float32]
    user_key: NDArray[np.int64]
    segment_key: NDArray[np.int64]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    event_time: NDArray[np.int64]
    mature: NDArray[np.bool_]
    observed_share: NDArray[np.float32]
    ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> TrainingSet:
        """The chosen rows, in the given order."""
        columns: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        taken = {name: values[rows] for name, values in columns.items() if values is not None}
        return TrainingSet(**taken)

    def batches(self, rows: int) -> Iterator[TrainingSet]:
        """Views of the rows, so many at a time; the last may be smaller."""
        for start in range(0, len(self), rows):
            yield self.take(slice(start, start + rows))

    def split(self, event_time: int) -> tuple[TrainingSet, TrainingSet]:
        """Rows before and from ``event_time`` (ms)."""
        earlier = self.event_time < event_time
        return self.take(earlier), self.take(~earlier)
