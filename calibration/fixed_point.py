"""The arithmetic of a sketch: amounts of rows in whole units, added exactly and scaled exactly."""

from __future__ import annotations

import numpy as np

from calibration.link import FloatArray
from calibration.sketch_layout import BINS, UNITS, IntArray, probability_of
from pipelines.errors import DataError

__all__ = ["CAPACITY", "DECAY_BITS", "add", "amounts", "check_capacity", "scaled"]

# Fixed-point bits of a decay factor: 2**33 (high half of a count) x 2**30 just fits int64.
DECAY_BITS = 30
# A margin below 2**63: sums are checked in float64 before they are made.
CAPACITY = 2.0**62.9
# Sums of whole numbers below it are exact in float64.
_EXACT = 2.0**53


def amounts(
    y: FloatArray, w: FloatArray | None, cell: IntArray, offset: FloatArray
) -> list[tuple[FloatArray | None, float]]:
    """What each row adds to each sum, in units and not yet rounded, and a bound on it; None is one row."""
    p = probability_of(cell, offset)
    if w is None:
        y_units, y_squares = (y / UNITS[1], 1 / UNITS[1]), (y / UNITS[4], 1 / UNITS[4])
        return [(None, 1 / UNITS[0]), y_units, (p / UNITS[2], 1 / UNITS[2]), (None, 1 / UNITS[3]), y_squares]
    squares, largest = w * w, float(w.max())
    amounts = (w, w * y, w * p, squares, squares * y)
    bounds = (largest, largest, largest, largest**2, largest**2)
    return [(a / unit, b / unit) for a, b, unit in zip(amounts, bounds, UNITS, strict=True)]


def add(sums: IntArray, place: IntArray, amount: FloatArray | None, largest: float) -> None:
    """Add the rounded amounts to their bins, exactly; ``DataError`` if that might be too much."""
    if amount is None:
        check_capacity(float(sums.max()) + largest * len(place))
        sums += np.bincount(place, minlength=BINS) * int(largest)
        return
    check_capacity(float(sums.max()) + float(amount.sum()))
    np.rint(amount, out=amount)
    if (largest + 1.0) * len(place) < _EXACT:
        sums += np.bincount(place, amount, minlength=BINS).astype(np.int64)
    else:
        np.add.at(sums, place, amount.astype(np.int64))


def scaled(sums: IntArray, factor: int) -> IntArray:
    """``floor(sums * factor / 2**DECAY_BITS)``, exactly; ``factor`` in [0, 2**DECAY_BITS]."""
    # c = high * 2**30 + low, so c * factor >> 30 = high * factor + (low * factor >> 30): no overflow.
    high, low = sums >> DECAY_BITS, sums & (2**DECAY_BITS - 1)
    result: IntArray = high * factor + ((low * factor) >> DECAY_BITS)
    return result


def check_capacity(units: float) -> None:
    """``DataError`` if a sum of so many units might not fit."""
    if not units < CAPACITY:
        raise DataError(
            "the sketch is full: a bin holds at most Σ weight 5e11, Σ weight² 1e14, 2e9 expected positives.",
            hint="decay it, or keep one sketch a day and merge only what is read together",
        )
