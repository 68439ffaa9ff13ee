"""How much the delays of groups really differ: the one parameter of their shrinkage."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["prior_strength", "shrunk_probability"]

Floats = NDArray[np.float64]

# Below 1 a parent would count less than one outcome; beyond 1e6 no group ever leaves it.
_SMALLEST, _LARGEST = 1.0, 1e6
_GRID = 43
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def shrunk_probability(events: Floats, at_risk: Floats, parent: Floats, strength: float) -> Floats:
    """Product-limit estimate of each group's F, shrunk towards its parent's.

    Let ``r_k = P(bin k | bin <= k)`` be the reverse hazard: ``F(E_k) = prod over j > k of (1 - r_j)``. Of
    outcomes that are seen only if they come within their follow-up u, one in bin d has the likelihood ``f(d)
    / F(u) = r_d prod over d < j <= u of (1 - r_j)``. So bins are independent: bin k has ``Y_k`` trials (those
    at risk) and ``D_k`` successes (those in it). A Dirichlet process with base measure the parent's
    distribution ``G`` and total mass a makes the reverse hazards independent as well, ``r_k ~ Beta(a g_k, a
    G_{k-1})``, and the posterior stays of that kind::

        E r_k = (D_k + a g_k) / (Y_k + a G_k)         E F(E_k) = prod over j > k of (1 - E r_j)

    which is exact, since the factors are independent. Limits: without outcomes, or for a to infinity, the
    parent's F; for many outcomes the product limit of the group's own (Lynden-Bell's where follow-ups
    differ, the empirical distribution where all windows have closed: there
    ``E F = (a G + n F_n) / (a + n)``).

    Parameters
    ----------
    events, at_risk : ndarray, shape (groups, bins)
        ``D`` and ``Y``, of `DelayCounts.events_and_risk`.
    parent : ndarray, shape (bins,) or (groups, bins)
        ``G`` at the ends of the bins; the last is 1.
    strength : float
        ``a``: outcomes that the parent counts for.

    Returns
    -------
    ndarray, shape (groups, bins)
        F at the ends of the bins; the last is 1.

    References
    ----------
    Ferguson (1973), A Bayesian analysis of some nonparametric problems; Hjort (1990), Nonparametric Bayes
    estimators based on beta processes in models for life history data; Walker and Muliere (1997), Beta-Stacy
    processes and a generalization of the Polya-urn scheme. They look forward in time at right-censored
    data; truncation from the right is the same backwards.

    Examples
    --------
    A group of 30 outcomes in the first of two bins, a parent that has half there and counts for 10:

    >>> shrunk_probability(np.array([[30.0, 0.0]]), np.array([[30.0, 30.0]]), np.array([0.5, 1.0]), 10.0)
    array([[0.875, 1.   ]])
    """
    mass = np.diff(parent, axis=-1, prepend=0.0)
    below = at_risk + strength * parent
    hazard = np.where(below > 0, (events + strength * mass) / np.where(below > 0, below, 1.0), 0.0)
    staying = 1.0 - np.clip(hazard, 0.0, 1.0)
    later = np.cumprod(staying[:, :0:-1], axis=1)[:, ::-1]
    return np.concatenate([later, np.ones((len(later), 1))], axis=1)


def prior_strength(events: Floats, at_risk: Floats, parent: Floats) -> float:
    """``a`` of `shrunk_probability` under which the counts of all groups are most likely.

    The marginal likelihood is a product of beta-binomials over groups and bins (empirical Bayes, Robbins
    1956)::

        ln P = sum of ln B(a g_k + D_k, a G_{k-1} + Y_k - D_k) - ln B(a g_k, a G_{k-1})

    A Dirichlet process stays one, of the same mass, when bins are put together, so that ``a`` may be read off
    a few bins and used on many. Searched over ``ln a``: the best of a grid, then golden section.

    Returns
    -------
    float
        In [1, 1e6]; 1e6 where groups differ no more than chance makes them, and where there is none.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> parent = np.array([0.1, 0.4, 0.7, 1.0])
    >>> own = rng.dirichlet(40.0 * np.diff(parent, prepend=0.0), size=1_000)
    >>> events = np.stack([rng.multinomial(200, shares) for shares in own]).astype(float)
    >>> round(prior_strength(events, np.cumsum(events, axis=1), parent))
    40
    """
    # Imported here: workers that only apply a model do not need it, and it takes a while.
    from scipy.special import gammaln

    before = np.broadcast_to(parent, events.shape)[:, :-1]
    mass = np.diff(np.broadcast_to(parent, events.shape), axis=1)
    happened, trials = events[:, 1:], at_risk[:, 1:]
    # A bin where the parent has nothing, or nothing before it, says nothing about a.
    counts = (trials > 0) & (mass > 0) & (before > 0)
    happened, trials, mass, before = (part[counts] for part in (happened, trials, mass, before))
    if not len(trials):
        return _LARGEST

    def log_likelihood(log_a: float) -> float:
        a = math.exp(log_a)
        yes, no = a * mass, a * before
        terms = gammaln(yes + happened) - gammaln(yes) + gammaln(no + trials - happened) - gammaln(no)
        return float((terms - gammaln(yes + no + trials) + gammaln(yes + no)).sum())

    grid = np.linspace(math.log(_SMALLEST), math.log(_LARGEST), _GRID)
    best = int(np.argmax([log_likelihood(float(log_a)) for log_a in grid]))
    if best in (0, _GRID - 1):
        return (_SMALLEST, _LARGEST)[best > 0]
    low, high = float(grid[best - 1]), float(grid[best + 1])
    while high - low > 1e-4:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if log_likelihood(left) < log_likelihood(right):
            low = left
        else:
            high = right
    return math.exp(0.5 * (low + high))
