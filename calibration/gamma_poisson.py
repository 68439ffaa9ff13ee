"""How much the rates of segments really differ: the one parameter of Gamma-Poisson shrinkage."""

from __future__ import annotations

import math

import numpy as np

from calibration.link import FloatArray

__all__ = ["prior_strength"]

# Shapes below 0.5 would mean that segments commonly differ tenfold; above 1e6 that no support ever moves one.
_SMALLEST, _LARGEST = 0.5, 1e6
_GRID = 57
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def prior_strength(positives: FloatArray, expected: FloatArray) -> float:
    """Shape ``a`` of the Gamma distribution of multipliers, by maximum marginal likelihood.

    With ``C ~ Poisson(m E)`` and ``m ~ Gamma(a, rate a)`` the counts are negative binomial::

        ln P(C) = ln G(C + a) - ln G(a) + a ln a - (C + a) ln(E + a) + terms without a

    Searched over ``ln a``: the best of a grid, then golden section around it. Deterministic.

    Parameters
    ----------
    positives : ndarray, shape (segments,)
        Observed, weighted; need not be whole numbers.
    expected : ndarray, shape (segments,)
        Expected by the model, > 0.

    Returns
    -------
    float
        In [0.5, 1e6]; 1e6 where segments differ no more than chance makes them.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> expected = rng.uniform(5.0, 500.0, 2_000)
    >>> counts = rng.poisson(expected * rng.gamma(20.0, 1.0 / 20.0, 2_000)).astype(float)
    >>> round(prior_strength(counts, expected))
    20
    """

    # Imported here: serving loads this module and never refits, and scipy.special takes a while.
    from scipy.special import gammaln

    def log_likelihood(log_a: float) -> float:
        a = math.exp(log_a)
        # a ln a - (C + a) ln(E + a) = -a ln(1 + E/a) - C ln(E + a): no cancellation for large a.
        terms = gammaln(positives + a) - gammaln(a) - a * np.log1p(expected / a)
        return float((terms - positives * np.log(expected + a)).sum())

    grid = np.linspace(math.log(_SMALLEST), math.log(_LARGEST), _GRID)
    best = int(np.argmax([log_likelihood(float(log_a)) for log_a in grid]))
    if best in (0, _GRID - 1):
        return (_SMALLEST, _LARGEST)[best > 0]
    low, high = float(grid[best - 1]), float(grid[best + 1])
    while high - low > 1e-6:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if log_likelihood(left) < log_likelihood(right):
            low = left
        else:
            high = right
    return math.exp(0.5 * (low + high))
