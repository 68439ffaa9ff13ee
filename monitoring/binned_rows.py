"""Rows of which only sums by bin of logit are left, and what can still be said of sums over the rows.

Conventions
-----------
- A row has logit ``z``, probability ``p = sigmoid(z)``, label ``y`` and weight ``w``; ``v = w²p(1 - p)``.
- A bin holds the rows of an interval of logits; of its rows only five sums are left (`BinnedSums`).
- Every sum over rows comes as two things: `Interval` ends that hold wherever the rows lie in their bins, and
  a value as if each row had its bin's mean probability.
- Sums are fixed-point numbers: each row's ``wp`` was rounded to 2**-32, and its ``p`` is good to 3e-12.
  Weights are taken as the sums hold them, in whole units of 2**-24. What decay rounds down, a unit a bin
  and window, is not in the bounds.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from monitoring.bounded import Interval, chord_bounds
from monitoring.inputs import FloatArray, IntArray
from pipelines.errors import DataError

__all__ = ["BinnedRows", "BinnedSums", "Estimate"]

_HALF_UNIT = 2.0**-33
_HALF_SQUARE_UNIT = 2.0**-17
_PROBABILITY_ERROR = 3e-12


class BinnedSums(Protocol):
    """Sums of the bins that hold rows, in increasing order; arrays of shape ``(bins,)``.

    Attributes
    ----------
    lower_logit, upper_logit : ndarray
        Edges.
    rows, positives, expected, squares, positive_squares : ndarray
        Σw, Σwy, Σwp, Σw², Σw²y.
    """

    @property
    def lower_logit(self) -> FloatArray: ...
    @property
    def upper_logit(self) -> FloatArray: ...
    @property
    def rows(self) -> FloatArray: ...
    @property
    def positives(self) -> FloatArray: ...
    @property
    def expected(self) -> FloatArray: ...
    @property
    def squares(self) -> FloatArray: ...
    @property
    def positive_squares(self) -> FloatArray: ...


class Estimate:
    """Sums over the rows of each bin: values as if rows had their bin's mean, and ends that are certain.

    Parameters
    ----------
    value : ndarray, shape (bins,)
    ends : Interval of (bins,)
    """

    def __init__(self, value: FloatArray, ends: Interval) -> None:
        self.value, self.ends = value, ends

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.value + other.value, self.ends + other.ends)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.ends - other.ends)

    def times(self, factor: float | FloatArray) -> Estimate:
        """Times a number that is exact."""
        return Estimate(self.value * factor, self.ends.times(factor))

    def total(self) -> tuple[float, Interval]:
        """Value and ends of the sum over all bins."""
        return float(self.value.sum()), self.ends.sum()


class BinnedRows:
    """What the sums by bin say of sums over the rows.

    Parameters
    ----------
    sums : BinnedSums
        Such as ``calibration.sketch.LogitSketch.binned()``.
    least_weight : float
        No row weighs less, but for rows of weight 0. It tells how many rows, each rounded, a bin can hold;
        1 or more also tells rows of weight 1 from others, about which less is known.

    Attributes
    ----------
    rows, positives : (bins,)
    low, high : (bins,)
        Probabilities at the edges; ``low_rest`` and ``high_rest`` are 1 less these.
    low_logit, high_logit : (bins,)
    mean : (bins,)
        Mean probability.
    logit : (bins,)
        Logit of the mean.
    alike : bool
        Whether every row is known to weigh 1.
    """

    def __init__(self, sums: BinnedSums, least_weight: float = 1.0) -> None:
        if not least_weight > 0.0:
            raise DataError(f"expected a least weight above 0, received {least_weight}.")
        self.rows, self.positives = sums.rows, sums.positives
        self.squares, self.positive_squares = sums.squares, sums.positive_squares
        self.low_logit, self.high_logit = sums.lower_logit, sums.upper_logit
        self.low, self.high = (1.0 / (1.0 + np.exp(-edge)) for edge in (self.low_logit, self.high_logit))
        # 1 - p from the logit: near 1 the difference has no digits.
        self.low_rest, self.high_rest = (
            1.0 / (1.0 + np.exp(edge)) for edge in (self.low_logit, self.high_logit)
        )
        # With Σw(w - 1) = 0 and no w between 0 and 1, every w is 0 or 1.
        self.alike = least_weight >= 1.0 and bool((self.squares == self.rows).all())
        error = self.rows * (_HALF_UNIT / least_weight + _PROBABILITY_ERROR)
        ends = self.rows * self.low, self.rows * self.high
        self._expected = Estimate(
            np.clip(sums.expected, *ends), Interval.about(sums.expected, error).within(*ends)
        )
        self._mean = self._expected.ends.times(1.0 / self.rows)
        self.mean: FloatArray = self._expected.value / self.rows
        self.logit: FloatArray = np.log(self.mean) - np.log1p(-self.mean)
        slack = 0.0 if self.alike else _HALF_SQUARE_UNIT / least_weight
        self._squares = Interval.about(self.squares, self.rows * slack).within(0.0, np.inf)

    @property
    def rounding(self) -> float:
        """The most by which Σwp over any of the bins can be off."""
        ends = self._expected.ends
        return float(np.sum(np.maximum(ends.high - self._expected.value, self._expected.value - ends.low)))

    def groups(self, most: int) -> IntArray:
        """First bins of at most so many groups of nearly equal weight; a bin goes where its middle lies."""
        middle = np.cumsum(self.rows) - 0.5 * self.rows
        group = np.minimum((middle / self.rows.sum() * most).astype(np.int64), most - 1)
        return np.flatnonzero(np.diff(group, prepend=-1))

    # -- sums over rows ----------------------------------------------------------------------------

    def observed(self) -> Estimate:
        """Σwy: exact."""
        return Estimate(self.positives, Interval(self.positives, self.positives))

    def expected(self) -> Estimate:
        """Σwp: exact up to rounding."""
        return self._expected

    def expected_of_positives(self) -> Estimate:
        """Σwyp: the positives lie in the bin, and so do the others, whose share of Σwp is the rest."""
        negatives = self.rows - self.positives
        ends = self._expected.ends
        low = np.maximum(self.positives * self.low, ends.low - negatives * self.high)
        high = np.minimum(self.positives * self.high, ends.high - negatives * self.low)
        value = self.positives * self.mean
        return Estimate(value, Interval(np.minimum(low, value), np.maximum(high, value)))

    def logit_of_positives(self, origin: float = 0.0) -> Estimate:
        """Σwy(z - origin): wherever in the bin."""
        ends = Interval(
            self.positives * (self.low_logit - origin), self.positives * (self.high_logit - origin)
        )
        return Estimate(self.positives * (self.logit - origin), ends)

    def square(self) -> Estimate:
        """Σwp²: p² is convex."""
        ends = (self.low**2, self.high**2)
        mean = self._convex(ends, lambda p: (p * p, 2.0 * p))
        return Estimate(self.rows * self.mean**2, mean.times(self.rows))

    def softplus(self) -> Estimate:
        """``-Σ w ln(1 - p)``, the log loss of rows without a positive: convex in p."""
        ends = (np.logaddexp(0.0, self.low_logit), np.logaddexp(0.0, self.high_logit))
        mean = self._convex(ends, lambda p: (-np.log1p(-p), 1.0 / (1.0 - p)))
        return Estimate(-self.rows * np.log1p(-self.mean), mean.times(self.rows))

    def expected_logit(self, origin: float) -> Estimate:
        """Σwp(z - origin): ``p logit p`` is convex."""
        ends = (self.low * self.low_logit, self.high * self.high_logit)

        def tangent(p: FloatArray) -> tuple[FloatArray, FloatArray]:
            logit = np.log(p) - np.log1p(-p)
            return p * logit, logit + 1.0 / (1.0 - p)

        mean = self._convex(ends, tangent)
        value = self._expected.value * (self.logit - origin)
        return Estimate(value, mean.times(self.rows) - self._expected.ends.times(origin))

    def variance(self) -> Estimate:
        """Σv: p(1 - p) is concave if all rows weigh 1; else it is only known to lie between its ends."""
        value = self.squares * self.mean * (1.0 - self.mean)
        if self.alike:
            ends = (-self.low * self.low_rest, -self.high * self.high_rest)
            mean = self._convex(ends, lambda p: (p * (p - 1.0), 2.0 * p - 1.0))
            return Estimate(value, mean.times(-self.rows))
        return Estimate(value, self._squares * self._row_variance())

    def lean_variance(self) -> Estimate:
        """``Σv(1 - 2p)²``: with u = p(1 - p) it is Σw²u(1 - 4u), which rises up to u = 1/8 and then falls."""
        u = self._row_variance()
        least, greatest = np.asarray(u.low), np.asarray(u.high)
        at_ends = [end * (1.0 - 4.0 * end) for end in (least, greatest)]
        inside = (least < 0.125) & (greatest > 0.125)
        most = np.where(inside, 0.0625, np.maximum(*at_ends))
        middle = self.mean * (1.0 - self.mean)
        return Estimate(
            self.squares * middle * (1.0 - 4.0 * middle),
            self._squares * Interval(np.minimum(*at_ends), most),
        )

    def variance_logit(self, origin: float, power: int) -> Estimate:
        """Σv(z - origin) or its square, ``power`` 1 or 2."""
        variance = self.variance()
        place = Interval(self.low_logit - origin, self.high_logit - origin)
        factor = place if power == 1 else place.squared()
        return Estimate(variance.value * (self.logit - origin) ** power, variance.ends * factor)

    def cubes(self) -> Interval:
        """Σw³ of each bin, for a correction that needs it only roughly."""
        if self.alike:
            return Interval(self.rows, self.rows)
        # Cauchy and Schwarz: (Σw²)² <= Σw Σw³; and no weight exceeds Σw or √Σw².
        low = np.asarray(self._squares.low) ** 2 / self.rows
        most = np.minimum(self.rows, np.sqrt(self._squares.high))
        return Interval(low, self._squares.high * most)

    def _row_variance(self) -> Interval:
        """p(1 - p) of any row."""
        ends = self.low * self.low_rest, self.high * self.high_rest
        crosses = (self.low_logit < 0.0) & (self.high_logit > 0.0)
        return Interval(np.minimum(*ends), np.where(crosses, 0.25, np.maximum(*ends)))

    def _convex(self, ends: tuple[FloatArray, FloatArray], tangent: _Tangent) -> Interval:
        return chord_bounds(self._mean, self.low, self.high, ends, tangent)


class _Tangent(Protocol):
    def __call__(self, p: FloatArray, /) -> tuple[FloatArray, FloatArray]: ...
