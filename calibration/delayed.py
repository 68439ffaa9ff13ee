"""Weights that let a calibrator learn from labels that are still open."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibration.base import checked_label, checked_probability
from calibration.link import FloatArray
from pipelines.errors import DataError

__all__ = ["fnw_weight"]


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
