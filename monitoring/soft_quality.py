"""Sums of quality over rows that stand for a part of an outcome, of several predictors at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from monitoring.inputs import clipped
from monitoring.quality import QualitySums

__all__ = ["soft_quality_sums"]

Floats = NDArray[np.float64]


def soft_quality_sums(
    positive: Floats, negative: Floats, is_positive: NDArray[np.bool_], probability: Floats
) -> list[QualitySums]:
    """The sums of each predictor over the same rows.

    A row stands for ``positive`` outcomes and for ``negative`` times none: a label ``c`` is ``c`` and
    ``1 - c``. The sums are added up in an order that does not depend on where the arrays lie in memory.

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
    >>> probability = np.array([[0.5, 0.5], [0.2, 0.6]])
    >>> soft = soft_quality_sums(np.array([0.0, 0.5]), np.array([1.0, 0.5]), np.array([0, 1]) > 0, probability)
    >>> [round(sums.value()["pcoc"], 2) for sums in soft], round(soft[0].value()["log_loss"], 4)
    ([2.0, 1.6], 0.6931)
    """
    inside = clipped(probability)
    weight = positive + negative
    loss = (-np.log(inside) * positive - np.log(1.0 - inside) * negative).sum(axis=1).tolist()
    predicted = (probability * weight).sum(axis=1).tolist()
    brier = ((1.0 - probability) ** 2 * positive + probability**2 * negative).sum(axis=1).tolist()
    variance = (probability * (1.0 - probability) * weight**2).sum(axis=1).tolist()
    shared = float(weight.sum()), float(positive.sum()), float((positive**2).sum())
    rows, positives = len(positive), int(is_positive.sum())
    return [
        QualitySums(
            rows=rows,
            positives=positives,
            weight_sum=shared[0],
            positive_sum=shared[1],
            probability_sum=predicted[place],
            log_loss_sum=loss[place],
            brier_sum=brier[place],
            variance_sum=variance[place],
            positive_square_sum=shared[2],
        )
        for place in range(len(probability))
    ]
