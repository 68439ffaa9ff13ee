"""Losses of labels that may still change: their weights and derivatives in closed form.

Conventions: ``logit`` and ``probability`` are those of P(outcome), for every policy; derivatives are with
respect to the logit; ``l1 = -log f`` and ``l0 = -log(1 - f)`` with ``f`` the predicted probability.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.base import sigmoid
from pipelines.errors import ConfigError
from pipelines.training_set import TrainingSet

__all__ = [
    "SAYS_THE_SAME",
    "cure_base_rate",
    "cure_derivatives",
    "cure_loss",
    "cure_posterior",
    "cured_log_loss",
    "distillation_gradient",
    "head_gradients",
    "head_weights",
    "policy_gradient",
    "policy_weights",
]

Array = NDArray[np.float64]
# Where a probability is 1 to the last bit.
_LEAST = 1e-12

# Policies that say the same rows, for those without weights that make a single row unbiased: the loss of fnc
# has none, and bidefuse has two heads.
SAYS_THE_SAME = {"fnc": "fnw", "defuse": "esdfm", "bidefuse": "esdfm"}


def policy_weights(
    policy: str,
    label: Array,
    probability: Array,
    late_share: float | Array = 1.0,
    first: bool | NDArray[np.bool_] = True,
) -> tuple[Array, Array]:
    """Weights ``(w_pos, w_neg)`` of ``w_pos l1 + w_neg l0`` for rows emitted under a delayed-feedback policy.

    ``f`` in the weights is a constant: it is never differentiated. A soft label ``c`` counts as ``c`` of a
    positive and ``1 - c`` of a negative.

    ========== ====================== ========================== ==================================
    policy     w_pos                  w_neg                      optimum for outcome probability p
    ========== ====================== ========================== ==================================
    wait       v                      1 - v                      p
    vanilla    v                      1 - v                      p / (1 + p_dp), p_dp of them delayed
    fnw        v (1 + f)              (1 - v)(1 - f)(1 + f)      p
    fnc        v                      (1 - f) / (1 + f)          p
    esdfm      v (1 + d)              (1 - v)(1 + d) r           p
    defer      v f / (f - d/2)        (1 - v)(1 - f) / (1 - f + d/2)    p
    defuse     v (1 + d) + (1 - v) z d, a delayed positive: v
                                      (1 - v)(1 - z)(1 + d)      p
    relabel    v + (1 - v) z          (1 - v)(1 - z)             p
    ========== ====================== ========================== ==================================

    ``s`` is the share of the outcomes that come later than the row, ``d = f s`` the chance of one,
    ``r = (1 - f) / (1 - f + d)`` that of a true negative among rows without an outcome by then, and
    ``z = 1 - r``. The papers learn ``d`` and ``r`` by further networks; here ``s`` is read off the delay
    curve and ``f`` is the model's own, as in FNW, which is ES-DFM with ``s = 1``. So DEFER's
    ``f / (f - d/2)`` lies in [1, 2]. The weights of ``relabel`` are those of one step of EM on `cure_loss`:
    they have its gradient.

    FNC is cross entropy of ``q``, the share of positives among emitted rows, followed by ``p = q / (1 - q)``.
    We predict ``p`` itself and substitute ``q = p / (1 + p)``: the loss becomes ``-v log p + log(1 + p)``,
    whose derivative is that of the weights above. So the prediction needs no correction at serving and no
    clipping, and training for ``fnc`` can go on from any model of ``p``.

    Parameters
    ----------
    policy : str
        One of `pipelines.config_sections.Policy` but ``bidefuse``: see `head_weights`.
    label : ndarray, shape (n,)
        In [0, 1].
    probability : ndarray, shape (n,)
        The model's own prediction at this moment.
    late_share : float or ndarray of shape (n,)
        ``s``, in [0, 1]; after the observation window, or for ``relabel`` after the row's age.
    first : bool or ndarray of bool, shape (n,)
        Whether it is the first row of its window; used by ``defuse`` only.

    Raises
    ------
    ConfigError
        If the policy is unknown.

    References
    ----------
    Ktena et al. (2019), arXiv 1907.06558, section 3.2 (FNW: eq. 9; FNC: eq. 13). Yang et al. (2021),
    Capturing delayed feedback in conversion rate prediction via elapsed-time sampling, arXiv 2012.03245
    (ES-DFM). Gu et al. (2021), Real negatives matter, arXiv 2104.14121 (DEFER). Chen et al. (2022),
    Asymptotically unbiased estimation for delayed feedback modeling via label correction, arXiv 2202.06472
    (DEFUSE).

    Examples
    --------
    >>> positive, negative = policy_weights("fnw", np.array([1.0, 0.0]), np.array([0.2, 0.2]))
    >>> positive.tolist(), negative.round(2).tolist()
    ([1.2, 0.0], [0.0, 0.96])
    """
    other = 1.0 - label
    if policy in ("wait", "vanilla"):
        return label, other
    if policy == "fnw":
        return label * (1.0 + probability), other * (1.0 - probability) * (1.0 + probability)
    if policy == "fnc":
        return label, (1.0 - probability) / (1.0 + probability)
    late, never = probability * late_share, np.maximum(1.0 - probability, _LEAST)
    if policy == "defer":
        return label / (1.0 - 0.5 * np.asarray(late_share)), other * never / (never + 0.5 * late)
    real, fake = never / (never + late), late / (never + late)
    if policy == "esdfm":
        return label * (1.0 + late), other * (1.0 + late) * real
    if policy == "defuse":
        positive = np.where(first, label * (1.0 + late) + other * fake * late, label)
        return positive, np.where(first, other * (1.0 + late) * real, 0.0)
    if policy == "relabel":
        return label + other * fake, other * real
    raise ConfigError(
        "expected a policy among wait, vanilla, fnw, fnc, esdfm, defer, defuse, relabel. "
        f"Received: {policy!r}."
    )


def policy_gradient(
    policy: str,
    label: Array,
    probability: Array,
    late_share: float | Array = 1.0,
    first: bool | NDArray[np.bool_] = True,
) -> Array:
    """Derivative of the policy's loss with respect to the logit, shape (n,); parameters as `policy_weights`.

    For ``bidefuse`` ``late_share`` is what the second head predicts, and the gradient is the first one of
    `head_gradients`.
    """
    if policy == "bidefuse":
        return head_gradients(label, probability, np.asarray(late_share, np.float64), first)[0]
    positive, negative = policy_weights(policy, label, probability, late_share, first)
    return negative * probability - positive * (1.0 - probability)


def head_weights(
    label: Array, outside: Array, first: bool | NDArray[np.bool_]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Bi-DEFUSE's weights ``(w_pos, w_neg)`` of the in-window head, and those of the out-of-window head.

    The in-window head sees first rows, by cross entropy; its optimum is the probability ``p_in`` of an
    outcome by the first row. The other head sees every first row as a negative, and delayed positives, with
    the weights of FNW; its optimum is the probability ``p_out`` of a later outcome.

    Parameters
    ----------
    label : ndarray, shape (n,)
        In [0, 1].
    outside : ndarray, shape (n,)
        The prediction of ``p_out`` at this moment.
    first : bool or ndarray of bool, shape (n,)

    References
    ----------
    Chen et al. (2022), arXiv 2202.06472, section 4.3.
    """
    is_first = np.broadcast_to(np.asarray(first, np.bool_), label.shape)
    inside = (np.where(is_first, label, 0.0), np.where(is_first, 1.0 - label, 0.0))
    weight = 1.0 + outside
    return inside, (
        np.where(is_first, 0.0, label * weight),
        np.where(is_first, (1.0 - outside) * weight, 0.0),
    )


def head_gradients(
    label: Array, probability: Array, late_share: Array, first: bool | NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Derivatives of Bi-DEFUSE's loss with respect to two logits, each of shape (n,).

    The heads are the probability ``p`` of an outcome and the share ``s`` of the outcomes that come late:
    ``p_in = p (1 - s)`` and ``p_out = p s``. So their sum, which is served, is the first head itself and
    never leaves [0, 1]; the paper learns the two parts and clips the sum. The optimum is the same.

    Parameters
    ----------
    label, probability, late_share : ndarray, shape (n,)
        In [0, 1]; the last two predicted at this moment.
    first : bool or ndarray of bool, shape (n,)

    Returns
    -------
    by the logit of p, by the logit of s
    """
    never = np.maximum(1.0 - probability, _LEAST)
    inside, outside = probability * (1.0 - late_share), probability * late_share
    (in_pos, in_neg), (out_pos, out_neg) = head_weights(label, outside, first)
    # By the logarithms of p_in and p_out. These have the derivative 1 - p by the logit of p, and -s and 1 - s
    # by that of s.
    by_inside = in_neg * inside / (never + outside) - in_pos
    by_outside = out_neg * outside / (never + inside) - out_pos
    return (
        (by_inside + by_outside) * never,
        by_outside * (1.0 - late_share) - by_inside * late_share,
    )


def distillation_gradient(policy: str, probability: Array, teacher_probability: Array) -> Array:
    """Derivative of the cross entropy to the teacher with respect to the student's logit, shape (n,).

    For ``fnc`` the cross entropy is the one of ``q``, towards ``p / (1 + p)`` of the teacher: the same loss
    with the teacher's ``q`` as a soft label. For every policy the optimum is the teacher's probability.
    """
    if policy == "fnc":
        soft = teacher_probability / (1.0 + teacher_probability)
        return policy_gradient("fnc", soft, probability)
    return probability - teacher_probability


def cure_posterior(logit: Array, observed_share: Array) -> Array:
    """P(y = 1 | nothing seen yet): the chance that a row labelled 0 is a positive on its way.

    ``p (1 - F) / (1 - p F)``, which is the sigmoid of ``logit + log(1 - F)``; 0 for a mature row.
    """
    with np.errstate(divide="ignore"):
        return sigmoid(logit + np.log1p(-np.asarray(observed_share, np.float64)))


def cure_loss(logit: Array, label: Array, observed_share: Array) -> Array:
    """Negative log likelihood of labels as they are known now, shape (n,).

    ``-log p`` for label 1 and ``-log(1 - p F)`` for label 0, ``F`` being the share of the outcomes to come
    that would be known by now. With ``F = 1`` it is the log loss. A label ``c`` between is ``c`` of the one
    and ``1 - c`` of the other.

    References
    ----------
    Chapelle (2014), Modeling delayed feedback in display advertising, KDD, eq. 10-11, with any F.

    Examples
    --------
    >>> cure_loss(np.zeros(3), np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.5])).round(4).tolist()
    [0.6931, 0.6931, 0.2877]
    """
    with np.errstate(divide="ignore"):
        hidden = logit + np.log1p(-np.asarray(observed_share, np.float64))
    # 1 - pF = (1 + (1 - F) e^z) / (1 + e^z): its logarithm is a difference of softplus, stable for every z.
    negative = np.logaddexp(0.0, logit) - np.logaddexp(0.0, hidden)
    return np.asarray(label * np.logaddexp(0.0, -logit) + (1.0 - label) * negative, np.float64)


def cure_derivatives(
    logit: Array, label: Array, observed_share: Array, *, majorised: bool = False
) -> tuple[Array, Array]:
    """Gradient and second derivative of `cure_loss` with respect to the logit.

    Label 1: ``p - 1`` and ``p (1 - p)``. Label 0: ``p - r`` and ``p (1 - p) - r (1 - r)`` with ``r`` the
    `cure_posterior`. The loss of a fresh negative is not convex; ``majorised`` gives ``p (1 - p)`` for all
    rows instead: the curvature of the EM bound, positive and never below the true one. LightGBM gets that.
    """
    probability, posterior = sigmoid(logit), cure_posterior(logit, observed_share)
    curvature = probability * (1.0 - probability)
    if not majorised:
        curvature = curvature - (1.0 - label) * posterior * (1.0 - posterior)
    return probability - label - (1.0 - label) * posterior, curvature


def cure_base_rate(label: Array, observed_share: Array, weight: Array) -> float:
    """Share of positives once all outcomes are known: positives seen over the exposure ``sum F``, in (0, 1).

    Examples
    --------
    >>> cure_base_rate(np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.5, 0.0]), np.ones(4))
    0.4
    """
    exposure = float(np.sum(weight * observed_share, dtype=np.float64))
    positives = float(np.sum(weight * label, dtype=np.float64))
    rate = positives / exposure if exposure > 0.0 else 0.5
    return min(max(rate, 1e-6), 1.0 - 1e-6)


def cured_log_loss(logit: NDArray[np.float64], rows: TrainingSet) -> float:
    """Weighted mean of the cure-model loss: the log loss, where all rows are mature."""
    loss = cure_loss(logit, rows.label.astype(np.float64), rows.observed_share.astype(np.float64))
    return float(np.average(loss, weights=rows.weight.astype(np.float64)))
