"""Tests of calibration whose null distribution is known: alarm on these, not on a threshold of ECE.

Four questions about ``P(y = 1) = p``, each with its own power:

- `pcoc_z_test`: is the level right?
- `cox_score_test`: are level and slope in the logit right?
- `kuiper_test`: is any stretch of the predictions biased (shape)?
- `spiegelhalter_test`: is the Brier score what the predictions promise?

With many rows every test rejects something: `calibration_verdict` asks for a rejection *and* an effect that
matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from monitoring.inputs import (
    BoolArray,
    FloatArray,
    binary_label,
    clipped,
    log_odds,
    probability_array,
    weight_array,
)
from monitoring.null_distributions import brownian_range_tail, chi_square_tail, normal_two_sided

__all__ = [
    "KUIPER_NULL",
    "LEAST_SPREAD",
    "CalibrationTest",
    "calibration_verdict",
    "cox_null",
    "cox_recalibration",
    "cox_score_test",
    "kuiper_test",
    "pcoc_z_test",
    "spiegelhalter_test",
    "step_overshoot",
]

# Effects that cost money: five percent of level, ten percent of slope.
_PCOC_BAND = (0.95, 1.05)
_SLOPE_BAND = (0.9, 1.1)
_NEWTON_STEPS = 30

# Logits that spread less, by their variance, have no slope to test.
LEAST_SPREAD = 1e-12

KUIPER_NULL = "range of Brownian motion on [0, 1]"


@dataclass(frozen=True)
class CalibrationTest:
    """Outcome of one test.

    Attributes
    ----------
    name : str
    statistic : float or None
        None if the rows cannot tell (none, or every probability is 0 or 1).
    p_value : float or None
        Chance of a statistic at least so large from a calibrated model.
    null : str
        The distribution of the statistic for a calibrated model.
    rows : int
    """

    name: str
    statistic: float | None
    p_value: float | None
    null: str
    rows: int


def _rows(
    label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None
) -> tuple[BoolArray, FloatArray, FloatArray]:
    y = binary_label(label)
    given = weight_array(weight, y.shape[0])
    w = np.ones(y.shape[0]) if given is None else given
    return y, clipped(probability_array(probability, y.shape[0])), w


def _normal_test(name: str, total: float, variance: float, rows: int) -> CalibrationTest:
    z = total / math.sqrt(variance) if variance > 0 else None
    return CalibrationTest(name, z, None if z is None else normal_two_sided(z), "standard normal", rows)


def pcoc_z_test(
    label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None
) -> CalibrationTest:
    """Level: ``z = Σw(y - p) / √Σw²p(1 - p)``, standard normal by the central limit theorem (Lyapunov).

    Positive z: more positives than predicted (PCOC below 1).

    Examples
    --------
    >>> pcoc_z_test([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5]).statistic
    2.0
    """
    y, p, w = _rows(label, probability, weight)
    return _normal_test("pcoc_z", float(w @ (y - p)), float(w**2 @ (p * (1.0 - p))), y.shape[0])


def spiegelhalter_test(
    label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None
) -> CalibrationTest:
    """Spread: ``z = Σw(y - p)(1 - 2p) / √Σw²(1 - 2p)²p(1 - p)``, standard normal.

    It is the Brier score less its expectation, standardised [1]_. Positive z: the Brier score is worse than
    promised. At low rates 1 - 2p is nearly 1 and it says little more than `pcoc_z_test`; it tells over-
    from under-confidence where probabilities lie on both sides of one half.

    References
    ----------
    .. [1] Spiegelhalter 1986, Probabilistic prediction in patient management and clinical trials, section 3.
    """
    y, p, w = _rows(label, probability, weight)
    lean = w * (1.0 - 2.0 * p)
    return _normal_test(
        "spiegelhalter_z", float(lean @ (y - p)), float(lean**2 @ (p * (1.0 - p))), y.shape[0]
    )


def cox_score_test(
    label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None
) -> CalibrationTest:
    """Level and slope: score test of (a, b) = (0, 1) in ``logit P(y = 1) = a + b · logit p`` [1]_.

    The statistic is ``U' V⁻¹ U`` with ``U = Σw(y - p)(1, x)``, ``V = Σw²p(1 - p)(1, x)(1, x)'`` and
    ``x = logit p``: chi-square with 2 degrees of freedom, or 1 if all predictions are equal, when there is
    no slope to test. Nothing is fitted.

    References
    ----------
    .. [1] Cox 1958, Two further applications of a model for binary regression; Rao 1948 for the score test.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> probability = rng.beta(1, 10, size=20_000)
    >>> cox_score_test(rng.random(20_000) < probability, probability).p_value > 0.01
    True
    """
    y, p, w = _rows(label, probability, weight)
    variance = w**2 * p * (1.0 - p)
    level = float(variance.sum())
    if level == 0.0:
        return CalibrationTest("cox_score", None, None, cox_null(2), y.shape[0])
    x = log_odds(p)
    # Measured from its weighted mean, x is uncorrelated with the level, and the quadratic form is a sum of
    # two squares.
    x = x - float(variance @ x) / level
    slope = float(variance @ x**2)
    residual = w * (y - p)
    statistic = float(residual.sum()) ** 2 / level
    degrees = 1
    if slope > LEAST_SPREAD * level:
        statistic += float(residual @ x) ** 2 / slope
        degrees = 2
    return CalibrationTest(
        "cox_score", statistic, chi_square_tail(statistic, degrees), cox_null(degrees), y.shape[0]
    )


def cox_null(degrees: int) -> str:
    """What the statistic of `cox_score_test` is distributed as."""
    return f"chi-square, {degrees} degree{'s' if degrees > 1 else ''} of freedom"


def kuiper_test(
    label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None
) -> CalibrationTest:
    """Shape: the range of the cumulative differences, ECCE-R [1]_ over its standard deviation.

    Sort by p; ``C_k = Σ_{i <= k} w(y - p)``; the statistic is ``(max C - min C) / √V`` with ``C_0 = 0``
    included and ``V = Σw²p(1 - p)``. If the predictions are true, C is a random walk whose clock is its
    variance, so the statistic tends to the range of Brownian motion on [0, 1]: mean 1.596, 95 % quantile
    2.498.

    A walk in steps has a shorter range than the motion that it tends to: it steps over its highest and
    lowest points by `step_overshoot` together, which the p-value adds to the range. Without it a level of
    5 % rejects 4.0 % at 20 positives and 4.5 % at 100; with it 5.0 % and 5.0 %.

    C is read only after all rows of one probability, so the order of ties does not matter and a predictor
    of few values is tested conservatively.

    References
    ----------
    .. [1] Arrieta-Ibarra, Gujral, Tannen, Tygert and Xu 2022, Metrics of Calibration for Probabilistic
       Predictions.
    """
    y, p, w = _rows(label, probability, weight)
    variance = float(w**2 @ (p * (1.0 - p)))
    if variance == 0.0:
        return CalibrationTest("kuiper", None, None, KUIPER_NULL, y.shape[0])
    order = np.argsort(p)
    walk = np.cumsum((w * (y - p))[order])
    ordered = p[order]
    read = walk[np.append(ordered[1:] != ordered[:-1], True)]
    spread = max(0.0, float(read.max())) - min(0.0, float(read.min()))
    tail = brownian_range_tail((spread + step_overshoot(p, w)) / math.sqrt(variance))
    return CalibrationTest("kuiper", spread / math.sqrt(variance), tail, KUIPER_NULL, y.shape[0])


def step_overshoot(probability: FloatArray, weight: FloatArray) -> float:
    """How far a walk of steps ``w(y - p)`` oversteps a high level and a low one, on average, together.

    The chance that the walk reaches a level is, to the first order, that of Brownian motion to reach the
    level plus the mean overshoot ``E H² / 2 E H``, H the first step's height above all before [1]_. The two
    overshoots differ by ``E X³ / 3 E X² = (1 - 2p) / 3`` (Wald's identities). For p = 1/m the walk goes down
    by 1/m at most, so that the lower one is p/2 and their sum ``(1 + p) / 3``; likewise ``(2 - p) / 3`` for
    p = 1 - 1/m. Both are used for every p below and above one half, and rows count by their variance, and
    steps by their size.

    Parameters
    ----------
    probability, weight : (n,) float64
        Their Σw²p(1 - p) above 0.

    References
    ----------
    .. [1] Siegmund 1979, Corrected diffusion approximations in certain random walk problems; the 0.583 that
       is usual for continuity corrections is its E H² / 2 E H of a normal step.

    Examples
    --------
    >>> step_overshoot(np.array([0.5]), np.array([2.0]))
    1.0
    """
    variance = weight**2 * probability * (1.0 - probability)
    nearer = np.minimum(probability, 1.0 - probability)
    return float((weight * variance) @ (1.0 + nearer)) / (3.0 * float(variance.sum()))


def cox_recalibration(
    label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None
) -> tuple[float, float] | None:
    """Maximum-likelihood (a, b) of ``logit P(y = 1) = a + b · logit p``: (0, 1) if calibrated.

    b < 1 means over-confident predictions. Newton's method with step halving. None if it has no finite
    solution: one class only, separable rows, or all probabilities equal.
    """
    y, p, w = _rows(label, probability, weight)
    if not y.any() or y.all():
        return None
    x = log_odds(p)
    sign = np.where(y, 1.0, -1.0)
    theta = np.array([0.0, 1.0])

    def loss(at: FloatArray) -> float:
        return float(w @ np.logaddexp(0.0, -sign * (at[0] + at[1] * x)))

    now = loss(theta)
    for _ in range(_NEWTON_STEPS):
        fitted = 1.0 / (1.0 + np.exp(-np.clip(theta[0] + theta[1] * x, -40.0, 40.0)))
        bend = w * fitted * (1.0 - fitted)
        residual = w * (y - fitted)
        hessian = np.array([[bend.sum(), bend @ x], [bend @ x, bend @ x**2]])
        if np.linalg.cond(hessian) > 1e12:
            return None
        step = np.linalg.solve(hessian, np.array([residual.sum(), residual @ x]))
        while loss(theta + step) > now + 1e-12 * abs(now) and float(np.abs(step).max()) > 1e-10:
            step = step / 2.0
        theta = theta + step
        now = loss(theta)
        if float(np.abs(step).max()) < 1e-8:
            return float(theta[0]), float(theta[1])
    return None


def calibration_verdict(
    label: npt.ArrayLike,
    probability: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    level: float = 0.01,
) -> dict[str, Any]:
    """All four tests and what follows from them.

    Returns
    -------
    dict
        ``status``: ``good`` if no test rejects at ``level`` after Bonferroni's correction; ``bad`` if one
        does and PCOC leaves 0.95-1.05 or the slope leaves 0.9-1.1; ``watch`` if one does and both stay
        inside; ``unknown`` without positives. ``why``, a sentence; ``pcoc``; ``intercept`` and ``slope`` of
        `cox_recalibration`; ``tests``, a list of dict.

    Examples
    --------
    >>> rng = np.random.default_rng(2)
    >>> truth = rng.beta(2, 30, size=20_000)
    >>> label = rng.random(20_000) < truth
    >>> calibration_verdict(label, truth)["status"], calibration_verdict(label, 0.8 * truth)["status"]
    ('good', 'bad')
    """
    y, p, w = _rows(label, probability, weight)
    outcomes = [test(y, p, w) for test in (pcoc_z_test, cox_score_test, kuiper_test, spiegelhalter_test)]
    verdict: dict[str, Any] = {"tests": [vars(outcome) for outcome in outcomes]}
    observed = float(w[y].sum())
    if observed == 0.0:
        verdict.update(status="unknown", why="no positives yet", pcoc=None, intercept=None, slope=None)
        return verdict
    pcoc = float(w @ p) / observed
    line = cox_recalibration(y, p, w)
    intercept, slope = (None, None) if line is None else line
    rejected = [
        one.name for one in outcomes if one.p_value is not None and one.p_value * len(outcomes) < level
    ]
    outside = []
    if not _PCOC_BAND[0] <= pcoc <= _PCOC_BAND[1]:
        outside.append(f"PCOC {pcoc:.3f}")
    if slope is not None and not _SLOPE_BAND[0] <= slope <= _SLOPE_BAND[1]:
        outside.append(f"slope {slope:.3f}")
    if not rejected:
        status, why = "good", f"no test rejects at {level:g}"
    elif outside:
        status, why = "bad", f"{', '.join(rejected)} reject and {', '.join(outside)} is outside its band"
    else:
        status, why = "watch", f"{', '.join(rejected)} reject, but level and slope are inside their bands"
    verdict.update(status=status, why=why, pcoc=pcoc, intercept=intercept, slope=slope)
    return verdict
