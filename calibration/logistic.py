"""Logistic regression of a few coefficients between bounds: the one solver of Platt, temperature and beta."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from calibration.link import FloatArray, sigmoid

__all__ = ["fit_logistic", "level_of", "smoothed_target", "spread_of", "tells_slope"]

BoolArray = npt.NDArray[np.bool_]

_MAXIMUM_STEPS = 100
# Standard deviation of logits below which they are all equal.
_NO_SPREAD = 1e-9


def smoothed_target(rows: FloatArray, positives: FloatArray) -> FloatArray:
    """Mean target by group, shape (groups,), as Platt smooths it; ``rows`` > 0.

    With ``P`` positives and ``N`` negatives over all groups a positive counts as ``(P + 1) / (P + 2)`` and a
    negative as ``1 / (N + 2)``, which keeps separable data finite (Platt 1999, section 2.2).

    Examples
    --------
    >>> smoothed_target(np.array([2.0, 1.0]), np.array([0.0, 1.0])).round(3).tolist()
    [0.25, 0.667]
    """
    clicked, total = float(positives.sum()), float(rows.sum())
    positive, negative = (clicked + 1.0) / (clicked + 2.0), 1.0 / (total - clicked + 2.0)
    target: FloatArray = (positives * positive + (rows - positives) * negative) / rows
    return target


def fit_logistic(
    features: FloatArray,
    rows: FloatArray,
    target: FloatArray,
    start: FloatArray,
    *,
    lower: FloatArray | None = None,
    upper: FloatArray | None = None,
    offset: FloatArray | None = None,
) -> FloatArray:
    """Minimise ``Σ rows * cross entropy(target, sigmoid(offset + theta · features))`` between bounds.

    Newton's method on the coefficients that are not held at a bound, with step halving. A coefficient is held
    where the gradient or the step would push it out; the problem is convex, so that any point where nothing
    moves is the minimum. Directions that no row can tell apart stay where they start.

    Parameters
    ----------
    features : ndarray, shape (coefficients, groups)
    rows : ndarray, shape (groups,)
        Weight of each group, > 0.
    target : ndarray, shape (groups,)
        In (0, 1).
    start, lower, upper : ndarray, shape (coefficients,)
        ``lower <= start <= upper``; no bounds without.
    offset : ndarray, shape (groups,), logit space, optional

    Returns
    -------
    ndarray, shape (coefficients,)

    References
    ----------
    Bertsekas (1982), Projected Newton methods for optimization problems with simple constraints.

    Examples
    --------
    >>> ones, target = np.ones((1, 2)), np.array([0.2, 0.4])
    >>> level = fit_logistic(ones, np.array([1.0, 3.0]), target, np.zeros(1))
    >>> sigmoid(level).round(6).tolist()
    [0.35]
    """
    theta = np.array(start, dtype=np.float64)
    low = np.full(len(theta), -np.inf) if lower is None else lower
    high = np.full(len(theta), np.inf) if upper is None else upper
    base = np.zeros(len(rows)) if offset is None else offset
    total = float(rows.sum())
    # A hair of ridge keeps the system solvable where every probability has saturated,
    ridge = 1e-12 * total * np.eye(len(theta))
    for _ in range(_MAXIMUM_STEPS):
        q = sigmoid(_logit(theta, features, base))
        gradient = (features * (rows * (q - target))).sum(axis=1)
        curved = features * (rows * q * (1.0 - q))
        hessian = np.array([[float((a * b).sum()) for b in features] for a in curved]) + ridge
        # and one of its own scale keeps rounding from moving what the rows cannot tell apart.
        hessian += np.diag(1e-9 * np.diag(hessian))
        step = _free_step(gradient, hessian, theta <= low, theta >= high)
        decrement = -float((gradient * step).sum())
        if not decrement > 1e-24 * total:
            break
        room = _room(theta, step, low, high)
        # So close to the minimum that the loss itself cannot tell the steps apart, Newton needs no guard.
        if decrement >= 1e-9 * total:
            room = _descent(room, theta, step, decrement, (features, rows, target, base))
        theta = np.clip(theta + room * step, low, high)
    return theta


def _logit(theta: FloatArray, features: FloatArray, offset: FloatArray) -> FloatArray:
    # Not `theta @ features`: sums in a fixed order, whatever the linear algebra library.
    logit: FloatArray = offset + (theta[:, None] * features).sum(axis=0)
    return logit


def _free_step(
    gradient: FloatArray, hessian: FloatArray, at_low: BoolArray, at_high: BoolArray
) -> FloatArray:
    """The Newton step over the coefficients that it does not push out of their bounds."""
    held = (at_low & (gradient > 0.0)) | (at_high & (gradient < 0.0))
    while True:
        step = np.zeros(len(gradient))
        free = np.flatnonzero(~held)
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], -gradient[free])
        pushed = ~held & ((at_low & (step < 0.0)) | (at_high & (step > 0.0)))
        if not pushed.any():
            return step
        held |= pushed


def _room(theta: FloatArray, step: FloatArray, low: FloatArray, high: FloatArray) -> float:
    """How much of the step, at most 1, there is until the first bound."""
    room = 1.0
    for at, move, bottom, top in zip(theta, step, low, high, strict=True):
        if move != 0.0:
            room = min(room, float(((top if move > 0.0 else bottom) - at) / move))
    return room


def _descent(
    room: float,
    theta: FloatArray,
    step: FloatArray,
    decrement: float,
    problem: tuple[FloatArray, FloatArray, FloatArray, FloatArray],
) -> float:
    """Halve the step until the loss falls as it should (Armijo)."""
    features, rows, target, offset = problem

    def cross_entropy(size: float) -> float:
        logit = _logit(theta + size * step, features, offset)
        return float((rows * (np.logaddexp(0.0, logit) - target * logit)).sum())

    start, size = cross_entropy(0.0), room
    while size > 1e-12 and not cross_entropy(size) <= start - 1e-4 * size * decrement:
        size *= 0.5
    return size


def spread_of(logit: FloatArray, rows: FloatArray) -> tuple[float, float]:
    """Mean and standard deviation of the logits, weighted by rows."""
    total = float(rows.sum())
    centre = float((rows * logit).sum()) / total
    return centre, math.sqrt(float((rows * (logit - centre) ** 2).sum()) / total)


def tells_slope(logit: FloatArray, rows: FloatArray, positives: FloatArray) -> bool:
    """Whether there are both classes and more than one logit; else only a level can be fitted."""
    return 0.0 < float(positives.sum()) < float(rows.sum()) and spread_of(logit, rows)[1] > _NO_SPREAD


def level_of(rows: FloatArray, target: FloatArray) -> float:
    """Log odds of the mean target."""
    mean = float((rows * target).sum()) / float(rows.sum())
    return math.log(mean / (1.0 - mean))
