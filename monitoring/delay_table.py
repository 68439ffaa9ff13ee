"""How late outcomes come, by group: quantiles of the delay and what is still outstanding, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.delay import DelayCurve
from pipelines.delay_bins import DelayBins
from pipelines.delay_counts import DelayCounts
from pipelines.delay_prior import shrunk_probability
from pipelines.errors import DataError

__all__ = ["delay_table", "greenwood_interval"]

Floats = NDArray[np.float64]

_SHARES = (0.5, 0.9)


def greenwood_interval(
    events: Floats, at_risk: Floats, confidence: float = 0.95
) -> tuple[Floats, Floats, Floats]:
    """Product-limit F of each group, with pointwise confidence limits; each of shape (groups, bins).

    Greenwood's formula in reverse time: ``var log F(E_k) = sum over j > k of D_j / (Y_j (Y_j - D_j))``, and
    limits on the scale ``log(-log F)``, so that they stay within [0, 1]. Where all outcomes seen have come,
    F is 1 and has no variance; there the lower limit is the exact one for no event in Y trials, ``(alpha /
    2)^(1 / Y)``. The limits are made monotone.

    Parameters
    ----------
    events, at_risk : ndarray, shape (groups, bins)
        Of `DelayCounts.events_and_risk`.
    confidence : float
        In (0, 1).

    References
    ----------
    Greenwood (1926); Kalbfleisch and Prentice (1980), The statistical analysis of failure time data, section
    1.3 (log-log limits); Wang, Jewell and Tsai (1986), Asymptotic properties of the product limit estimate
    under random truncation (the same variance under truncation).

    Examples
    --------
    30 of 40 outcomes in the first of two bins, as `statsmodels` and `scipy` have it:

    >>> found = greenwood_interval(np.array([[30.0, 10.0]]), np.array([[30.0, 40.0]]))
    >>> [one.round(3).tolist() for one in found]
    [[[0.75, 1.0]], [[0.585, 1.0]], [[0.857, 1.0]]]
    """
    if not 0.0 < confidence < 1.0:
        raise DataError(f"expected a confidence in (0, 1). Received: {confidence:g}.")
    # Imported here: the package is loaded by commands that need no intervals, and it takes a while.
    from scipy.special import ndtri

    z = float(ndtri(0.5 + 0.5 * confidence))
    share = shrunk_probability(events, at_risk, np.linspace(0.0, 1.0, events.shape[1]), 0.0)
    left = at_risk - events
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(events > 0, events / (at_risk * left), 0.0)
        # Over the bins behind each: the last has none.
        later = np.cumsum(terms[:, :0:-1], axis=1)[:, ::-1]
        spread = np.concatenate([later, np.zeros((len(later), 1))], axis=1)
        width = z * np.sqrt(spread) / np.log(share)
        low, high = share ** np.exp(-width), share ** np.exp(width)
    inside = (share > 0.0) & (share < 1.0)
    low, high = np.where(inside, low, share), np.where(inside, high, share)
    alpha = 0.5 * (1.0 - confidence)
    complete = (share == 1.0) & (at_risk > 0.0)
    low = np.where(complete, alpha ** (1.0 / np.maximum(at_risk, 1e-300)), low)
    low[:, -1] = high[:, -1] = 1.0
    return share, np.maximum.accumulate(low, axis=1), np.maximum.accumulate(high, axis=1)


def delay_table(
    counts: DelayCounts,
    base: DelayCurve,
    ages: Sequence[int],
    *,
    open_windows: bool = False,
    shares: Sequence[float] = _SHARES,
    largest: int = 20,
    minimum_support: float = 20.0,
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Delays of all outcomes together, then of the best supported groups of the first field.

    The figures are each group's own, without shrinkage: a report shows what was seen.

    Parameters
    ----------
    counts : DelayCounts
    base : DelayCurve
        The curve of all; it says how outcomes lie inside a bin.
    ages : sequence of int
        Ages (ms) at which to say what is outstanding.
    open_windows : bool
        Count open windows, too; F is then relative to the largest follow-up.
    shares : sequence of float
        Quantiles, in (0, 1).
    largest : int
        Groups at most.
    minimum_support : float
        Groups with fewer outcomes are not shown.
    confidence : float

    Returns
    -------
    list of dict
        ``group`` (None for all; a null value is "(null)"), ``outcomes``, ``quantiles`` (a dict ``share, age,
        low, high`` each, ms) and ``outstanding`` (``age, share, low, high`` each). An end of the interval of
        a quantile is the age at which the limit of F reaches the share (Brookmeyer and Crowley 1982), None
        where none does before the horizon.

    Examples
    --------
    >>> from pipelines.delay import DelayGrid
    >>> rng = np.random.default_rng(1)
    >>> hour, delay = 3_600_000, rng.exponential(3_600_000.0, 500)
    >>> window = np.full(500, 24 * hour)
    >>> counts = DelayCounts.of(DelayGrid(24 * hour, 32), ("site",), [("a",)] * 500, delay, window)
    >>> every, site = delay_table(counts, DelayCurve.fit(delay, window), [hour])
    >>> site["group"], site["outcomes"], round(site["quantiles"][0]["age"] / hour, 2)
    ('a', 500, 0.64)
    >>> {name: round(value, 2) for name, value in site["outstanding"][0].items() if name != "age"}
    {'share': 0.36, 'low': 0.32, 'high': 0.4}
    """
    used = counts if open_windows else counts.closed()
    bins = DelayBins(counts.grid, base)
    tables = [(None, *(part.sum(axis=0) for part in used.events_and_risk()))] if len(used.paths) else []
    first = used.level(1)
    events, at_risk = first.events_and_risk()
    support = events.sum(axis=1)
    order = np.lexsort((np.arange(len(support)), -support))
    shown = [place for place in order.tolist() if support[place] >= minimum_support][:largest]
    names = ["(null)" if first.paths[place][0] is None else str(first.paths[place][0]) for place in shown]
    groups = [*tables, *((name, events[at], at_risk[at]) for name, at in zip(names, shown, strict=True))]
    return [_row(bins, name, own, risk, ages, shares, confidence) for name, own, risk in groups]


def _row(
    bins: DelayBins,
    name: str | None,
    events: Floats,
    at_risk: Floats,
    ages: Sequence[int],
    shares: Sequence[float],
    confidence: float,
) -> dict[str, Any]:
    table = np.concatenate(greenwood_interval(events[None, :], at_risk[None, :], confidence))
    found, low, high = (np.full(len(ages), place) for place in range(3))
    at = np.asarray(ages, np.float64)
    known, least, most = (bins.cdf(table, row, at) for row in (found, low, high))
    return {
        "group": name,
        "outcomes": round(float(events.sum())),
        "quantiles": [_quantile(bins, table, share) for share in shares],
        "outstanding": [
            {"age": int(age), "share": 1.0 - float(f), "low": 1.0 - float(b), "high": 1.0 - float(a)}
            for age, f, a, b in zip(ages, known, least, most, strict=True)
        ],
    }


def _quantile(bins: DelayBins, table: Floats, share: float) -> dict[str, Any]:
    age, late, early = bins.quantiles(table, np.arange(3), share).tolist()
    horizon = float(bins.grid.horizon)
    # Where F reaches the share only because it must end at 1, the data do not say when.
    open_end = table[1, -2] < share
    return {
        "share": share,
        "age": age,
        "low": early,
        "high": None if open_end and not math.isclose(age, horizon) else late,
    }
