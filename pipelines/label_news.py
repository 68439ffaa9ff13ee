"""What label windows hear, and the rows that they say: structs of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CONFIRM",
    "FIRST",
    "POSITIVE",
    "ROW_KINDS",
    "Emission",
    "News",
    "WindowLabel",
]

# Kinds of rows: places in `ROW_KINDS`.
FIRST, POSITIVE, CONFIRM = 0, 1, 2
ROW_KINDS = ("first", "delayed_positive", "confirm")

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Emission:
    """Rows to be said: arrays of equal length, (n,).

    Attributes
    ----------
    slot, known_at, elapsed : ndarray of int64
        Slot of the window; when the row could first be said and how old the window was then, ms.
    kind : ndarray of int8
        FIRST, POSITIVE (a delayed positive) or CONFIRM.
    label, weight : ndarray of float64
    label_version : ndarray of int32
    """

    slot: Ints
    known_at: Ints
    elapsed: Ints
    kind: NDArray[np.int8]
    label: Floats
    weight: Floats
    label_version: NDArray[np.int32]

    @classmethod
    def concat(cls, parts: Sequence[Emission]) -> Emission:
        """All rows in order of ``known_at``; those of one instant in the order in which they were said."""
        if not parts:
            none, nought = np.zeros(0, np.int64), np.zeros(0, np.float64)
            return cls(none, none, none, none.astype(np.int8), nought, nought, none.astype(np.int32))
        known_at = np.concatenate([part.known_at for part in parts])
        order = np.argsort(known_at, kind="stable")
        return cls(
            **{
                name: np.concatenate([getattr(part, name) for part in parts])[order]
                for name in vars(parts[0])
            }
        )


@dataclass(frozen=True)
class News:
    """Accepted outcomes of windows, at most one a window: arrays of equal length, (n,).

    ``known`` is when an outcome and its window are both known; ``op`` is a place in
    `pipelines.events.OPERATIONS`.
    """

    slot: Ints
    event_time: Ints
    known: Ints
    op: NDArray[np.int8]
    credit: Floats
    event_hash: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.slot)

    def take(self, rows: Ints | Flags) -> News:
        return News(**{name: values[rows] for name, values in vars(self).items()})


class WindowLabel(NamedTuple):
    """The label of one window, as `LabelWindows` keeps it."""

    credit: float
    time: int
    happened: int
    version: int
