"""Weights for labels that are not final, from the share of outcomes that would be known by now.

The cure likelihood (`models.losses.cure_loss`) takes ``observed_share`` itself. A learner that only knows the
log loss and weights per row takes these.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from pipelines.errors import ConfigError, DataError

__all__ = ["LEAST_SHARE", "relabel_weights"]

Floats = NDArray[np.float64]
Form = Literal["expected", "importance", "inverse"]

# Weights of 1 / F stay below 20. A row that young says next to nothing.
LEAST_SHARE = 0.05


def relabel_weights(
    form: Form,
    label: npt.ArrayLike,
    observed_share: npt.ArrayLike,
    probability: npt.ArrayLike | None = None,
    *,
    least_share: float = LEAST_SHARE,
) -> tuple[Floats, Floats]:
    """Weights ``(w_pos, w_neg)`` of ``w_pos l1 + w_neg l0`` for labels as they are known now.

    A row of age e has the outcome with probability p, and shows it (``v = 1``) with probability ``p F``,
    ``F = F(e | x)``. What is wanted is the expected loss of its final label, ``p l1 + (1 - p) l0``.

    ============ ================= ============================= =====================================
    form         w_pos             w_neg                         expectation over v
    ============ ================= ============================= =====================================
    expected     v + (1 - v) r     (1 - v)(1 - r)                right where f = p
    importance   v / F             (1 - v)(1 - f) / (1 - f F)    right where f = p
    inverse      v / F             1 - v / F                     right for every f; weights below 0
    ============ ================= ============================= =====================================

    ``f`` is the model's own probability, a constant, and ``r = f (1 - F) / (1 - f F)`` the chance that a row
    without an outcome is a positive on its way. Derivations:

    - *expected*, the E step of EM: ``p F l1 + (1 - p F)(r l1 + (1 - r) l0)``, and with f = p there is
      ``p F + (1 - p F) r = p``. Its derivative is that of the cure likelihood.
    - *importance*: ``P(y = 1) / P(v = 1) = 1 / F`` and ``P(y = 0) / P(v = 0) = (1 - p) / (1 - p F)``. The
      derivative is that of *expected* divided by F: the same optimum, but the youngest rows, which know
      least, count most.
    - *inverse*: ``E v / F = p``. Positives alone at ``1 / F``, the negatives at 1, would end at
      ``p / (1 + p - p F)``: each seen positive has to take back the ``1 / F - 1`` fake negatives that it
      stands for.

    Although f is not p before training has ended, p is the only stationary point of all three: for the first
    two the expected derivative with respect to the logit is ``F (1 - f) (f - p) / (1 - f F)``, up to the
    factor 1 / F.

    Rows younger than ``least_share`` get no weight under *importance* and *inverse*, whatever their label:
    age and features decide, so that nothing is biased.

    Parameters
    ----------
    form : {"expected", "importance", "inverse"}
    label : array_like, shape (n,)
        1 if the outcome is known by now, else 0.
    observed_share : array_like, shape (n,)
        F, in [0, 1]; 1 for a mature row, whose weights are those of its label.
    probability : array_like, shape (n,), optional
        ``f``, in [0, 1); *inverse* needs none.
    least_share : float
        In [0, 1].

    Raises
    ------
    ConfigError
        If the form is unknown.
    DataError
        If a value is out of range, the probability is missing, or an outcome is known where F is 0.

    References
    ----------
    Chapelle (2014), Modeling delayed feedback in display advertising (EM for the cure model). Yasui et al.
    (2020), A feedback shift correction in predicting conversion rates under delayed feedback, arXiv
    2002.02068 (importance). Saito et al. (2019), Dual learning algorithm for delayed feedback in display
    advertising, arXiv 1910.01847 (inverse).

    Examples
    --------
    >>> for form in ("expected", "importance", "inverse"):
    ...     positive, negative = relabel_weights(form, [1, 0], [0.5, 0.5], [0.2, 0.2])
    ...     print(positive.round(3).tolist(), negative.round(3).tolist())
    [1.0, 0.111] [0.0, 0.889]
    [2.0, 0.0] [0.0, 0.889]
    [2.0, 0.0] [-1.0, 1.0]
    """
    if form not in ("expected", "importance", "inverse"):
        raise ConfigError(f"expected a form among expected, importance, inverse. Received: {form!r}.")
    v, share = np.asarray(label, np.float64), np.asarray(observed_share, np.float64)
    _check(v, share, least_share if form != "expected" else 1.0)
    if form == "inverse":
        seen = v / np.where(share > 0.0, share, 1.0)
        return _kept(share, least_share, seen, 1.0 - seen)
    if probability is None:
        raise DataError(f"the form {form!r} needs the model's probability of each row.")
    f = np.asarray(probability, np.float64)
    if not ((f >= 0.0) & (f < 1.0)).all():
        raise DataError("expected probabilities in [0, 1).", hint="clip those of a saturated model")
    true_negative = (1.0 - f) / (1.0 - f * share)
    if form == "expected":
        # The difference of the two shares is r, and no rounding can make it negative.
        return v + (1.0 - v) * np.maximum(1.0 - true_negative, 0.0), (1.0 - v) * true_negative
    return _kept(share, least_share, v / np.where(share > 0.0, share, 1.0), (1.0 - v) * true_negative)


def _kept(share: Floats, least: float, positive: Floats, negative: Floats) -> tuple[Floats, Floats]:
    old = share >= least
    return np.where(old, positive, 0.0), np.where(old, negative, 0.0)


def _check(label: Floats, share: Floats, least: float) -> None:
    if not ((label == 0.0) | (label == 1.0)).all():
        raise DataError("expected labels of 0 or 1.")
    if not ((share >= 0.0) & (share <= 1.0)).all():
        raise DataError("expected observed shares in [0, 1].")
    if not 0.0 <= least <= 1.0:
        raise DataError(f"expected a least share in [0, 1]. Received: {least:g}.")
    impossible = np.flatnonzero((label == 1.0) & (share == 0.0))
    if least == 0.0 and len(impossible):
        raise DataError(
            f"an outcome is known where none could be: observed share 0 (row {impossible[0]}).",
            hint="a least share above 0 leaves such rows out",
        )
