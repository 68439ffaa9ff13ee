"""What the four sums of a segment say about shifts of its log odds.

With ``E = Σ p``, ``N`` rows, ``e = E / N`` and ``V = Σ p (1 - p)``, a shift of every row's log odds by ``s``
is taken to move what is expected to ::

    E(s) = N sigmoid(logit e + k s)        k = V / (N e (1 - e))

which has the right value and slope at 0 and is exact for equal rows (``k = 1``). ``k`` allows for unlike
rows: their mean moves less than each row's log odds. The log loss of the segment falls by ::

    s C - ∫ E = s C - (N / k) ln(1 + e (exp(k s) - 1))
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from calibration.link import FloatArray, sigmoid

__all__ = ["SegmentResponse", "Shrunk", "shrunk"]

_LARGEST_MEAN = 1.0 - 1e-12
_SMALLEST_MEAN = 1e-300
# Rows of one segment that are split between nearly 0 and nearly 1 would ask for shifts without bound.
_SMALLEST_SLOPE = 0.25
# Where nearly all rows are positive, next to no variance is left, and every deviation would be believed.
_SMALLEST_DISPERSION = 1.0 / 16.0


class SegmentResponse(NamedTuple):
    """How what is expected in segments answers to shifts; arrays of one shape.

    Examples
    --------
    Two rows of 0.1 and two of 0.5, shifted by 0.5 logits (the truth is 1.555):

    >>> response = SegmentResponse.of(np.array([1.2]), np.array([4.0]), np.array([0.68]))
    >>> response.expected_at(np.array([0.5])).round(3).tolist()
    [1.565]
    """

    rows: FloatArray
    mean: FloatArray
    slope: FloatArray

    @classmethod
    def of(cls, expected: FloatArray, rows: FloatArray, variance: FloatArray) -> Self:
        """From the sums ``E``, ``N`` and ``V``; without rows the mean is 1/2."""
        mean = np.divide(expected, rows, out=np.full(np.shape(rows), 0.5), where=rows > 0.0)
        # Inside (0, 1) in exact arithmetic; rounding must not say otherwise.
        mean = np.clip(mean, _SMALLEST_MEAN, _LARGEST_MEAN)
        equal = rows * mean * (1.0 - mean)
        slope = np.divide(variance, equal, out=np.ones(np.shape(rows)), where=equal > 0.0)
        return cls(rows, mean, np.clip(slope, _SMALLEST_SLOPE, 1.0))

    def mean_at(self, shift: FloatArray) -> FloatArray:
        """``E(s) / N``, strictly inside (0, 1)."""
        moved = sigmoid(np.log(self.mean) - np.log1p(-self.mean) + self.slope * shift)
        clipped: FloatArray = np.minimum(moved, _LARGEST_MEAN)
        return clipped

    def expected_at(self, shift: FloatArray) -> FloatArray:
        """``E(s)``."""
        return self.rows * self.mean_at(shift)

    def gain(self, positives: FloatArray, start: FloatArray, shift: FloatArray) -> FloatArray:
        """Nats of log loss that shifts save in all, once the rows have been shifted by ``start``."""
        end = start + shift
        saved: FloatArray = shift * positives - self.rows / self.slope * (
            np.log1p(self.mean * np.expm1(self.slope * end))
            - np.log1p(self.mean * np.expm1(self.slope * start))
        )
        return saved


class Shrunk(NamedTuple):
    """Corrections of segments; arrays of one shape.

    Attributes
    ----------
    due : ndarray
        What the ancestors leave to be expected, the ``E`` of the multiplier.
    dispersion : ndarray
        ``φ``: variance of the count over ``due``, by chance alone.
    multiplier : ndarray
        ``m``, of ``due``.
    shift : ndarray, logits
        What brings it about, beside the ancestors' shifts.
    """

    due: FloatArray
    dispersion: FloatArray
    multiplier: FloatArray
    shift: FloatArray


def shrunk(
    sums: FloatArray, strength: float, minimum_support: float, prior: FloatArray | None = None
) -> Shrunk:
    """Gamma-Poisson shrunk multipliers, and the shifts that bring them about.

    A count of rare positives is Poisson, of variance ``E``. One of frequent positives varies less, by
    ``φ = V / E``; counted in units of ``φ``, it has the mean and the variance of a Poisson count again::

        m = (C / φ + a) / (E / φ + a)

    Parameters
    ----------
    sums : ndarray, shape (4, segments)
        ``C, E, N, V``.
    strength : float, expected positives
        ``a``: multipliers are taken to be drawn from a Gamma distribution of mean 1 and shape ``a``.
    minimum_support : float, effective rows
        Segments with less are left alone.
    prior : ndarray, shape (segments,), logits, optional
        Shift that applies before; 0 without it.
    """
    positives, expected, rows, variance = sums
    response = SegmentResponse.of(expected, rows, variance)
    before = response.mean if prior is None else response.mean_at(prior)
    due = rows * before
    # V / E of rows that the ancestors have shifted.
    dispersion = np.maximum(response.slope * (1.0 - before), _SMALLEST_DISPERSION)
    supported: npt.NDArray[np.bool_] = (rows >= minimum_support) & (rows > 0.0)
    multiplier = np.where(supported, (positives + dispersion * strength) / (due + dispersion * strength), 1.0)
    after = np.minimum(multiplier * before, _LARGEST_MEAN)
    shift = (np.log(multiplier) + np.log1p(-before) - np.log1p(-after)) / response.slope
    return Shrunk(due, dispersion, multiplier, shift)
