"""Tails of what a calibrated model, or a feature that has not drifted, gives; and the cost of many tests."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray

__all__ = [
    "benjamini_hochberg",
    "brownian_range_tail",
    "chi_square_tail",
    "kolmogorov_tail",
    "normal_two_sided",
]


def normal_two_sided(z: float) -> float:
    """P(|Z| > |z|) of the standard normal.

    Examples
    --------
    >>> round(normal_two_sided(1.959964), 6)
    0.05
    """
    return math.erfc(abs(z) / math.sqrt(2.0))


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(X > statistic) for a chi-square variable with an integer number of degrees of freedom.

    The closed forms of Abramowitz and Stegun 26.4.4 (odd) and 26.4.5 (even), exact to rounding.

    Examples
    --------
    >>> round(chi_square_tail(5.991465, 2), 6)
    0.05
    """
    if degrees <= 0 or statistic <= 0.0:
        return 1.0
    half = statistic / 2.0
    even = degrees % 2 == 0
    tail = 0.0 if even else math.erfc(math.sqrt(half))
    power = 0.0 if even else 0.5
    while power < degrees / 2.0:
        tail += math.exp(power * math.log(half) - math.lgamma(power + 1.0) - half)
        power += 1.0
    return min(1.0, tail)


def brownian_range_tail(spread: float) -> float:
    """P(R > spread), R the range (maximum less minimum, 0 included) of Brownian motion on [0, 1].

    Integrating Feller's density ``8 Σ (-1)^(k-1) k² φ(kr)`` [1]_ gives ``4 Σ (-1)^(k-1) k erfc(kr / √2)``.
    The mean of R is 2√(2/π) = 1.596 and its 95 % quantile is 2.4977.

    References
    ----------
    .. [1] Feller 1951, The Asymptotic Distribution of the Range of Sums of Independent Random Variables.

    Examples
    --------
    >>> round(brownian_range_tail(2.4977), 4)
    0.05
    """
    if (
        spread < 0.4
    ):  # the true tail differs from 1 by less than 1e-11 here, where the series loses its digits
        return 1.0
    terms = math.ceil(12.0 / spread)
    tail, sign = 0.0, 1.0
    for k in range(1, terms + 1):
        tail += sign * 4.0 * k * math.erfc(k * spread / math.sqrt(2.0))
        sign = -sign
    return min(1.0, max(0.0, tail))


def kolmogorov_tail(statistic: float) -> float:
    """P(K > statistic) of the Kolmogorov distribution, the limit of ``√(nm / (n + m)) · KS``.

    ``2 Σ (-1)^(k-1) exp(-2 k² x²)`` (Kolmogorov 1933, Smirnov 1948).

    Examples
    --------
    >>> round(kolmogorov_tail(1.3581), 4)
    0.05
    """
    if statistic < 0.2:  # the true tail differs from 1 by less than 1e-12 here
        return 1.0
    tail, sign = 0.0, 1.0
    for k in range(1, math.ceil(5.0 / statistic) + 1):
        tail += sign * 2.0 * math.exp(-2.0 * (k * statistic) ** 2)
        sign = -sign
    return min(1.0, max(0.0, tail))


def benjamini_hochberg(p_value: npt.ArrayLike) -> FloatArray:
    """q-values of Benjamini and Hochberg 1995: the smallest false discovery rate that rejects each test.

    Examples
    --------
    >>> benjamini_hochberg([0.01, 0.04, 0.03, 0.5]).round(4).tolist()
    [0.04, 0.0533, 0.0533, 0.5]
    """
    p = np.asarray(p_value, dtype=np.float64)
    tests = p.shape[0]
    order = np.argsort(p)
    scaled = p[order] * tests / np.arange(1, tests + 1)
    q = np.empty(tests)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return np.minimum(q, 1.0)
