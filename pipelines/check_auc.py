"""How well one column alone tells two classes apart: AUC, with labels in between and weights.

AUC is the chance that a row of the one class has the larger value than a row of the other, ties counting
one half (Mann-Whitney). A row may belong to both classes in parts: a label of 0.3 is 0.3 of a positive.

Values without an order, such as the buckets of a user, are put in order by what the *other* half of the rows
says of them. Judged by its own label every rare value would seem to know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Classes", "fitted_auc", "ordered_auc", "quantile_codes", "rarity_auc", "soft_auc"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

# What a value is shrunk to the mean by, in rows.
_PRIOR_ROWS = 1.0


@dataclass(frozen=True)
class Classes:
    """Two classes of n rows: the weight of each row in the one (``positive``) and in the other.

    ``half`` divides the rows in two, without regard to anything else.
    """

    positive: Floats
    negative: Floats
    half: Flags

    def take(self, rows: Flags) -> Classes:
        return Classes(self.positive[rows], self.negative[rows], self.half[rows])

    @property
    def support(self) -> int:
        """Rows of the smaller class."""
        return int(min(np.count_nonzero(self.positive), np.count_nonzero(self.negative)))


def soft_auc(value: NDArray[np.float64], positive: Floats, negative: Floats) -> float | None:
    """AUC of a value; None where a class has no weight.

    Examples
    --------
    >>> soft_auc(np.array([1.0, 2.0, 2.0]), np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0]))
    0.75
    """
    above, pairs = _pairs(np.asarray(value, np.float64), positive, negative, None)
    return above / pairs if pairs > 0 else None


def ordered_auc(value: NDArray[np.float64], classes: Classes) -> float | None:
    """AUC of a number, up or down, whichever is more: 0.5 to 1."""
    found = soft_auc(value, classes.positive, classes.negative)
    return None if found is None else max(found, 1.0 - found)


def fitted_auc(code: Ints, classes: Classes) -> float | None:
    """AUC of a value without an order, by the share of positives that the other half gives it.

    Parameters
    ----------
    code : ndarray of int64, shape (n,)
        Values, numbered from 0.
    classes : Classes

    Returns
    -------
    float or None
        Mean over the two halves, by the pairs in each; None where a class is missing.
    """
    return _over_halves(classes, lambda of: _rates(code, classes, of)[code])


def rarity_auc(code: Ints, stratum: Ints, classes: Classes) -> float | None:
    """How well it tells the classes apart that a value is unusual among the negatives of its stratum.

    What is usual is seen on the other half. Pairs are compared within their stratum only.
    """
    size = int(code.max(initial=0)) + 1

    def rarity(of: Flags) -> Floats:
        key, place = np.unique(stratum * size + code, return_inverse=True)
        usual = np.bincount(place[of], classes.negative[of], len(key))[place]
        own = np.unique(stratum, return_inverse=True)[1]
        total = np.bincount(own[of], classes.negative[of], int(own.max(initial=0)) + 1)[own]
        return np.asarray(-usual / np.maximum(total, 1e-300))

    return _over_halves(classes, rarity, stratum)


def quantile_codes(value: NDArray[np.float64], bins: int) -> Ints:
    """Numbers cut into about equally filled bins, numbered from 0."""
    edges = np.unique(np.quantile(value, np.arange(1, bins) / bins)) if len(value) else np.zeros(0)
    return np.searchsorted(edges, value, side="left").astype(np.int64)


def _rates(code: Ints, classes: Classes, of: Flags) -> Floats:
    size = int(code.max(initial=0)) + 1
    positive = np.bincount(code[of], classes.positive[of], size)
    mass = positive + np.bincount(code[of], classes.negative[of], size)
    total = float(mass.sum())
    if total <= 0:
        return np.zeros(size)
    prior = _PRIOR_ROWS * total / max(int(np.count_nonzero(of)), 1)
    return np.asarray((positive + prior * positive.sum() / total) / (mass + prior))


def _over_halves(
    classes: Classes, score: Callable[[Flags], Floats], stratum: Ints | None = None
) -> float | None:
    """AUC of what ``score`` makes of the other half, over the pairs of both."""
    above, pairs = 0.0, 0.0
    for judged in (classes.half, ~classes.half):
        value = score(~judged)[judged]
        own = classes.take(judged)
        groups = None if stratum is None else stratum[judged]
        found = _pairs(value, own.positive, own.negative, groups)
        above, pairs = above + found[0], pairs + found[1]
    return above / pairs if pairs > 0 else None


def _pairs(value: Floats, positive: Floats, negative: Floats, group: Ints | None) -> tuple[float, float]:
    """Weight of the pairs in which the positive is above, ties half, and of all pairs; within groups."""
    if len(value) == 0:
        return 0.0, 0.0
    rank = np.unique(value, return_inverse=True)[1].astype(np.int64)
    own = np.zeros(len(value), np.int64) if group is None else np.unique(group, return_inverse=True)[1]
    block, place = np.unique(own * (int(rank.max()) + 1) + rank, return_inverse=True)
    above, below = np.bincount(place, positive), np.bincount(place, negative)
    of_block = block // (int(rank.max()) + 1)
    totals = np.bincount(of_block, below), np.bincount(of_block, above)
    first = np.concatenate([[0.0], np.cumsum(totals[0])[:-1]])[of_block]
    under = np.cumsum(below) - below - first
    return float((above * (under + 0.5 * below)).sum()), float((totals[0] * totals[1]).sum())
