"""Weights that let a calibrator learn from labels that are still open."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibration.base import checked_label, checked_probability
from calibration.link import FloatArray
from pipelines.errors import DataError

__all__ = ["exposure_weights", "fnw_weight"]


def fnw_weight(probability: npt.ArrayLike, label: npt.ArrayLike) -> FloatArray:
    """Fake-negative weights: each click is shown at once as negative, each conversion later as positive.

    With ``f`` the *current* calibrated probability of the row (never differentiated)::

        label 1:  1 + f
        label 0:  (1 - f) (1 + f)

    Derivation. Let a click convert with probability ``p``. For each click the stream holds one row of label
    0 and, with probability ``p``, one of label 1: ``1 + p`` rows, of which the share ``b(1) = p / (1 + p)``
    is positive and ``b(0) = 1 / (1 + p)`` is not. We want expectations under the true labels, ``P(1) = p``
    and ``P(0) = 1 - p``, so the importance weights are ``P(1)/b(1) = 1 + p`` and ``P(0)/b(0) = (1 - p)(1 +
    p)``, with ``f`` for the unknown ``p``.

    Why the stationary point is the truth although ``f`` may be wrong: the expected gradient of the weighted
    log loss with respect to the logit of ``q`` is, for each click, ::

        (1 - f)(1 + f) q - p (1 + f)(1 - q)

    which for ``f = q`` is ``(1 - q)(1 + q)(q - p)``: zero at ``q = p`` only and of the right sign elsewhere.

    Parameters
    ----------
    probability : array_like, shape (n,), probability space
        What is predicted for the row *now*, at the moment it is learned from; in (0, 1).
    label : array_like, shape (n,)
        0 or 1; soft labels have no single weight.

    Returns
    -------
    ndarray, shape (n,)
        Weights in (0, 2).

    Raises
    ------
    DataError
        A probability outside (0, 1) or a label other than 0 or 1.

    References
    ----------
    Ktena et al. (2019), Addressing Delayed Feedback for Continuous Training with Neural Networks in CTR
    prediction, arXiv 1907.06558.

    Examples
    --------
    >>> fnw_weight([0.2, 0.2], [1, 0]).round(2).tolist()
    [1.2, 0.96]
    """
    f = checked_probability(probability)
    y = checked_label(label, len(f))
    if not ((y == 0.0) | (y == 1.0)).all():
        raise DataError("fnw weights need labels of 0 or 1; got a soft label.")
    weight: FloatArray = np.where(y == 1.0, 1.0 + f, (1.0 - f) * (1.0 + f))
    return weight


def exposure_weights(
    probability: npt.ArrayLike, label: npt.ArrayLike, heard: npt.ArrayLike, share: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Weights ``(positive, negative)`` of what windows have shown since they were last looked at.

    A window is looked at again and again while it is open. With ``F`` the share of the outcomes that have
    come by an age, ``F0`` at the last look, ``F1`` now, and ``f`` the *current* calibrated probability (never
    differentiated)::

        no outcome yet:     0                         (1 - f)(F1 - F0) / ((1 - f F0)(1 - f F1))
        an outcome of c:    c / (1 - f F0)            (1 - c)(1 - F0) / (1 - f F0)

    and after an outcome the window is not looked at any more. These are the weights of log loss that have the
    gradient of the likelihood of the stretch: ``h = f (F1 - F0) / (1 - f F0)`` is the chance of an outcome in
    it, and the derivatives of ``log h`` and ``log(1 - h)`` by the logit of ``f`` are ``(1 - f) / (1 - f F0)``
    and ``-f (1 - f)(F1 - F0) / ((1 - f F0)(1 - f F1))``.

    The second is a difference of ``f (1 - f) F / (1 - f F)`` at ``F1`` and ``F0``: looks add up. So a window
    that has closed has said ``1 - f`` with an outcome and ``-f`` without, exactly what its final label says,
    whatever ``F`` was and however often one looked (``f`` moves a little in between). ``F`` decides only when
    it is said.

    Parameters
    ----------
    probability : array_like, shape (n,), probability space
        In (0, 1).
    label : array_like, shape (n,), in [0, 1]
        The outcome known by now.
    heard, share : array_like, shape (n,), in [0, 1]
        ``F0 <= F1``.

    Returns
    -------
    positive, negative : ndarray, shape (n,)

    Raises
    ------
    DataError
        Values outside their range.

    References
    ----------
    Chapelle (2014), Modeling delayed feedback in display advertising, KDD: the likelihood, here cut into
    stretches of age.

    Examples
    --------
    Two looks without an outcome are one:

    >>> one = exposure_weights([0.2, 0.2], [0, 0], [0.0, 0.5], [0.5, 1.0])[1].sum()
    >>> two = exposure_weights([0.2], [0], [0.0], [1.0])[1].sum()
    >>> round(float(one), 12), round(float(two), 12)
    (1.0, 1.0)
    """
    f = checked_probability(probability)
    c = checked_label(label, len(f))
    before, now = np.asarray(heard, np.float64), np.where(c > 0.0, 1.0, np.asarray(share, np.float64))
    if not ((before >= 0.0) & (before <= now) & (now <= 1.0)).all():
        raise DataError(
            "expected 0 <= heard <= share <= 1: the share of outcomes that have come cannot fall."
        )
    at_risk = 1.0 - f * before
    negative: FloatArray = (1.0 - c) * (1.0 - f) * (now - before) / (at_risk * (1.0 - f * now))
    return c / at_risk, negative
