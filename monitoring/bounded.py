"""Numbers that are known up to an error: what binned rows say of the rows themselves.

`Interval` is interval arithmetic [1]_: whatever the true numbers within the operands, the true result lies
within the result. `Bounded` is what comes out: a value and the largest distance to the true one.

References
----------
.. [1] Moore 1966, Interval Analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray

__all__ = ["Bounded", "Interval", "chord_bounds"]

# Bounds are made with rounded floats; sums of 4096 terms are good to some 1e-13 of the largest.
_ROUNDING = 1e-12

Number: TypeAlias = "float | FloatArray"


@dataclass(frozen=True)
class Bounded:
    """A value and the largest possible distance of the true one.

    Examples
    --------
    >>> Bounded(1.5, 0.25).low, Bounded(1.5, 0.25).high
    (1.25, 1.75)
    """

    value: float
    error: float

    @property
    def low(self) -> float:
        """The least that the true value can be."""
        return self.value - self.error

    @property
    def high(self) -> float:
        """The most that the true value can be."""
        return self.value + self.error

    def map(self, function: Callable[[float], float]) -> Bounded:
        """A monotone function of the true value, over the same range."""
        ends = Interval(*sorted((function(self.low), function(self.high))))
        return ends.around(function(self.value))


@dataclass(frozen=True)
class Interval:
    """Lower and upper ends, floats or arrays of one shape.

    Examples
    --------
    >>> Interval(1.0, 2.0) - Interval(0.0, 0.5)
    Interval(low=0.5, high=2.0)
    >>> (Interval(-1.0, 2.0) * Interval(3.0, 4.0)).around(2.5)
    Bounded(value=2.5, error=6.5...)
    """

    low: Number
    high: Number

    @classmethod
    def about(cls, middle: Number, error: Number) -> Interval:
        """``middle ± error``."""
        return cls(middle - error, middle + error)

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        with np.errstate(invalid="ignore"):
            ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        # An endless end stands for numbers without bound, and 0 times each of these is 0.
        ends = [np.where(np.isnan(end), 0.0, end) for end in ends]
        return Interval(_least(ends), _most(ends))

    def times(self, factor: Number) -> Interval:
        """Each end times a number that is exact; of either sign."""
        return self * Interval(factor, factor)

    def over(self, other: Interval) -> Interval:
        """Divided by what is positive; endless if it may be 0."""
        if not np.all(np.asarray(other.low) > 0.0):
            return Interval(-np.inf, np.inf)
        return self * Interval(1.0 / other.high, 1.0 / other.low)

    def squared(self) -> Interval:
        """The square: not below 0, unlike the interval times itself."""
        ends = [self.low * self.low, self.high * self.high]
        crosses = (np.asarray(self.low) < 0.0) & (np.asarray(self.high) > 0.0)
        return Interval(np.where(crosses, 0.0, _least(ends)), _most(ends))

    def root(self) -> Interval:
        """The square root of what is not negative."""
        return Interval(np.sqrt(np.maximum(self.low, 0.0)), np.sqrt(np.maximum(self.high, 0.0)))

    def within(self, low: Number, high: Number) -> Interval:
        """The part that lies between bounds that are known to hold as well."""
        return Interval(np.clip(self.low, low, high), np.clip(self.high, low, high))

    def sum(self) -> Interval:
        """Sum over the bins."""
        return Interval(float(np.sum(self.low)), float(np.sum(self.high)))

    def around(self, value: float) -> Bounded:
        """The value with the distance to the farther end, floats' own rounding included."""
        low, high = float(self.low), float(self.high)
        error = max(high - value, value - low, 0.0)
        return Bounded(value, error + _ROUNDING * (abs(value) + error))


def chord_bounds(
    mean: Interval,
    low: FloatArray,
    high: FloatArray,
    ends: tuple[FloatArray, FloatArray],
    tangent: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
) -> Interval:
    """Mean of a convex function over values in ``[low, high]`` whose mean is known.

    By Jensen's inequality it is at least the function of the mean; as the function lies below its chord, at
    most the chord at the mean. For a concave function give its negative.

    Parameters
    ----------
    mean : Interval of (bins,)
        Within ``[low, high]``.
    low, high : (bins,), ``low < high``
    ends : pair of (bins,)
        The function at ``low`` and at ``high``.
    tangent : callable
        From points to the function and its derivative there.

    Examples
    --------
    >>> one = np.ones(1)
    >>> half = Interval(0.5 * one, 0.5 * one)
    >>> square = chord_bounds(half, 0 * one, one, (0 * one, one), lambda p: (p * p, 2 * p))
    >>> float(square.low[0]), float(square.high[0])
    (0.25, 0.5)
    """
    below, above = np.asarray(mean.low), np.asarray(mean.high)
    middle = 0.5 * (below + above)
    value, slope = tangent(middle)
    lower = value - 0.5 * np.abs(slope) * (above - below)
    rise = (ends[1] - ends[0]) / (high - low)
    upper = ends[0] + np.maximum(rise * (below - low), rise * (above - low))
    # The two may meet, and then differ by rounding.
    return Interval(np.minimum(lower, upper), np.maximum(lower, upper))


def _least(ends: list[Number]) -> Number:
    least: npt.NDArray[np.float64] = np.minimum.reduce(np.broadcast_arrays(*ends))
    return least


def _most(ends: list[Number]) -> Number:
    most: npt.NDArray[np.float64] = np.maximum.reduce(np.broadcast_arrays(*ends))
    return most
