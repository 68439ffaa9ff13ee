"""Sums of quality over rows that stand for a part of an outcome, of several predictors at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from monitoring.inputs import clipped
from monitoring.quality import QualitySums

__all__ = ["quality_amounts", "quality_sums"]

Floats = NDArray[np.float64]


def quality_amounts(
    positive: Floats, negative: Floats, is_positive: NDArray[np.bool_], probability: Floats
) -> Floats:
    """What each row adds to the sums of each predictor, shape (predictors, 9, n).

    A row stands for ``positive`` outcomes and for ``negative`` times none: a label ``c`` is ``c`` and
    ``1 - c``. The nine are those of `QualitySums`, in its order.

    Parameters
    ----------
    positive, negative : ndarray, shape (n,)
        Not negative.
    is_positive : ndarray of bool, shape (n,)
        Rows that `QualitySums.positives` counts.
    probability : ndarray, shape (predictors, n)
        In [0, 1].

    Examples
    --------
    >>> label = np.array([0.0, 0.5])
    >>> amounts = quality_amounts(label, 1.0 - label, label > 0, np.array([[0.5, 0.5], [0.2, 0.6]]))
    >>> figures = [quality_sums(one).value() for one in amounts.sum(axis=2)]
    >>> [round(one["pcoc"], 2) for one in figures], round(figures[0]["log_loss"], 4)
    ([2.0, 1.6], 0.6931)
    """
    inside, weight, other = clipped(probability), positive + negative, 1.0 - probability
    amounts = np.empty((len(probability), 9, len(positive)))
    amounts[:, 0] = 1.0
    amounts[:, 1] = is_positive
    amounts[:, 2] = weight
    amounts[:, 3] = positive
    np.multiply(probability, weight, out=amounts[:, 4])
    amounts[:, 5] = -np.log(inside) * positive - np.log(1.0 - inside) * negative
    amounts[:, 6] = other * other * positive + probability * probability * negative
    amounts[:, 7] = probability * other * (weight * weight)
    amounts[:, 8] = positive * positive
    return amounts


def quality_sums(amounts: Floats) -> QualitySums:
    """Nine sums of `quality_amounts` as one object."""
    rows, positives, *rest = amounts.tolist()
    return QualitySums(int(rows), int(positives), *rest)
