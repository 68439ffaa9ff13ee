"""The honest floor: a predictor that knows nothing but the click rate so far.

A model that learns on a stream must beat what could have been said without it, before each row: the running
base rate. The entropy of the final base rate is not that floor, for it uses labels from the future.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray, binary_label, time_array, weight_array
from monitoring.quality import row_log_loss
from pipelines.errors import DataError

__all__ = ["running_base_rate", "running_base_rate_log_loss"]


def running_base_rate(
    label: npt.ArrayLike,
    *,
    event_time: npt.ArrayLike | None = None,
    known_at: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    prior_positives: float = 0.5,
    prior_negatives: float = 0.5,
) -> FloatArray:
    """Probability ``(n,)`` that the base rate so far gives to each row, before it sees the row.

    ``(a + positives so far) / (a + b + rows so far)``, the mean of a Beta(a, b) prior and what was seen: at
    the default Beta(1/2, 1/2) the Krichevsky-Trofimov predictor [1]_, whose total loss exceeds that of the
    best constant by at most ``ln(n) / 2 + ln 2``.

    Parameters
    ----------
    label : (n,) in {0, 1}
        In order of prediction, unless both times are given.
    event_time, known_at : (n,) int64 ms, optional, together
        When each row is predicted and when its label becomes known. A row then learns only from labels known
        strictly before its event time, as a model on the stream does.
    weight : (n,) >= 0, optional
        What each label counts when it is learned.
    prior_positives, prior_negatives : float
        Add the counts of a warm-up that the model has learned from, so that both start from the same
        knowledge.

    References
    ----------
    .. [1] Krichevsky and Trofimov 1981, The performance of universal encoding.

    Examples
    --------
    >>> running_base_rate([1, 0, 0]).tolist()
    [0.5, 0.75, 0.5]
    """
    y = binary_label(label)
    rows = y.shape[0]
    if prior_positives <= 0 or prior_negatives <= 0:
        raise DataError(f"expected prior counts above 0, received {prior_positives} and {prior_negatives}.")
    if (event_time is None) != (known_at is None):
        raise DataError("expected `event_time` and `known_at` together, received one of them.")
    given = weight_array(weight, rows)
    w = np.ones(rows) if given is None else given
    if event_time is None or known_at is None:
        order = seen = np.arange(rows)
    else:
        known = time_array("known_at", known_at, rows)
        order = np.argsort(known, kind="stable")
        seen = np.searchsorted(known[order], time_array("event_time", event_time, rows), side="left")
    mass = np.concatenate(([0.0], np.cumsum(w[order])))[seen]
    positive = np.concatenate(([0.0], np.cumsum(np.where(y, w, 0.0)[order])))[seen]
    return (prior_positives + positive) / (prior_positives + prior_negatives + mass)


def running_base_rate_log_loss(
    label: npt.ArrayLike,
    *,
    event_time: npt.ArrayLike | None = None,
    known_at: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    prior_positives: float = 0.5,
    prior_negatives: float = 0.5,
) -> float | None:
    """Mean log loss in nats of `running_base_rate`, weighted like the rows; None without rows.

    Examples
    --------
    >>> round(running_base_rate_log_loss([1, 0, 0]), 4)   # -(ln 0.5 + ln 0.25 + ln 0.5) / 3
    0.9242
    """
    y = binary_label(label)
    rate = running_base_rate(
        y,
        event_time=event_time,
        known_at=known_at,
        weight=weight,
        prior_positives=prior_positives,
        prior_negatives=prior_negatives,
    )
    given = weight_array(weight, y.shape[0])
    w = np.ones(y.shape[0]) if given is None else given
    mass = float(w.sum())
    return None if mass == 0.0 else float(w @ row_log_loss(y, rate)) / mass
