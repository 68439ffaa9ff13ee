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
    "cure_base_rate",
    "cure_derivatives",
    "cure_loss",
    "cure_posterior",
    "cured_log_loss",
    "distillation_gradient",
    "policy_gradient",
    "policy_weights",
]

Array = NDArray[np.float64]


def policy_weights(
    policy: str, label: Array, probability: Array, late_share: float = 1.0
) -> tuple[Array, Array]:
    """Weights ``(w_pos, w_neg)`` of ``w_pos l1 + w_neg l0`` for rows emitted under a delayed-feedback policy.

    ``f`` in the weights is a constant: it is never differentiated. A soft label ``c`` counts as ``c`` of a
    positive and ``1 - c`` of a negative.

    ========== ================== ====================== ==========================================
    policy     w_pos              w_neg                  optimum for outcome probability p
    ========== ================== ====================== ==========================================
    wait       v                  1 - v                  p
    vanilla    v                  1 - v                  p / (1 + p_dp), p_dp of them delayed
    fnw        v (1 + f)          (1 - v)(1 - f)(1 + f)  p
    fnc        v                  (1 - f) / (1 + f)      p
    esdfm      v (1 + d)          (1 - v)(1 + d) r       p
    ========== ================== ====================== ==========================================

    For ES-DFM ``d = f s`` is the chance of an outcome after the observation window, ``s`` being the share of
    outcomes that come that late, and ``r = (1 - f) / (1 - f + d)`` that of a true negative among rows without
    an outcome by then. The paper learns ``d`` and ``r`` by further networks; here ``s`` is read off the delay
    curve of the warm-up and ``f`` is the model's own, as in FNW, which is the case ``s = 1``.

    FNC is cross entropy of ``q``, the share of positives among emitted rows, followed by ``p = q / (1 - q)``.
    We predict ``p`` itself and substitute ``q = p / (1 + p)``: the loss becomes ``-v log p + log(1 + p)``,
    whose derivative is that of the weights above. So the prediction needs no correction at serving and no
    clipping, and training for ``fnc`` can go on from any model of ``p``.

    Parameters
    ----------
    policy : {"wait", "vanilla", "fnw", "fnc", "esdfm"}
    label : ndarray, shape (n,)
        In [0, 1].
    probability : ndarray, shape (n,)
        The model's own prediction at this moment.
    late_share : float
        ``s``, in [0, 1]; used by ``esdfm`` only.

    Raises
    ------
    ConfigError
        If the policy is unknown.

    References
    ----------
    Ktena et al. (2019), arXiv 1907.06558, section 3.2 (FNW: eq. 9; FNC: eq. 13). Yang et al. (2021),
    Capturing delayed feedback in conversion rate prediction via elapsed-time sampling, arXiv 2012.03245
    (ES-DFM).

    Examples
    --------
    >>> positive, negative = policy_weights("fnw", np.array([1.0, 0.0]), np.array([0.2, 0.2]))
    >>> positive.tolist(), negative.round(2).tolist()
    ([1.2, 0.0], [0.0, 0.96])
    """
    if policy in ("wait", "vanilla"):
        return label, 1.0 - label
    if policy == "fnw":
        return label * (1.0 + probability), (1.0 - label) * (1.0 - probability) * (1.0 + probability)
    if policy == "fnc":
        return label, (1.0 - probability) / (1.0 + probability)
    if policy == "esdfm":
        late = probability * late_share
        true_negative = (1.0 - probability) / (1.0 - probability + late)
        return label * (1.0 + late), (1.0 - label) * (1.0 + late) * true_negative
    raise ConfigError(f"expected a policy among wait, vanilla, fnw, fnc, esdfm. Received: {policy!r}.")


def policy_gradient(policy: str, label: Array, probability: Array, late_share: float = 1.0) -> Array:
    """Derivative of the policy's loss with respect to the logit, shape (n,)."""
    positive, negative = policy_weights(policy, label, probability, late_share)
    return negative * probability - positive * (1.0 - probability)


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
    that would be known by now. With ``F = 1`` it is the log loss.

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
    return np.where(label > 0.5, np.logaddexp(0.0, -logit), negative)


def cure_derivatives(
    logit: Array, label: Array, observed_share: Array, *, majorised: bool = False
) -> tuple[Array, Array]:
    """Gradient and second derivative of `cure_loss` with respect to the logit.

    Label 1: ``p - 1`` and ``p (1 - p)``. Label 0: ``p - r`` and ``p (1 - p) - r (1 - r)`` with ``r`` the
    `cure_posterior`. The loss of a fresh negative is not convex; ``majorised`` gives ``p (1 - p)`` for all
    rows instead: the curvature of the EM bound, positive and never below the true one. LightGBM gets that.
    """
    probability = sigmoid(logit)
    positive = label > 0.5
    posterior = np.where(positive, 1.0, cure_posterior(logit, observed_share))
    curvature = probability * (1.0 - probability)
    if not majorised:
        curvature = curvature - posterior * (1.0 - posterior)
    return probability - posterior, curvature


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
