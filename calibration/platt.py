"""Platt scaling on logits: ``logit q = intercept + slope * logit p``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_logit, checked_rows
from calibration.link import FloatArray, sigmoid
from calibration.sketch import LogitSketch
from calibration.state import expect_fields, finite
from pipelines.errors import DataError, StaleStateError

__all__ = ["MINIMUM_SLOPE", "PlattCalibrator"]

# Below it the calibrated logits of a whole range fall together and ranking is lost in practice.
MINIMUM_SLOPE = 0.05
_MAXIMUM_STEPS = 100


class PlattCalibrator:
    """A straight line in logit space.

    Targets are smoothed as by Platt: with ``P`` positives and ``N`` negatives (weighted), a positive counts
    as ``(P + 1) / (P + 2)`` and a negative as ``1 / (N + 2)``, which keeps separable data finite. The line
    minimises the weighted cross entropy to these targets by Newton's method with step halving, subject to
    ``slope >= minimum_slope`` (a convex problem: where the bound binds, the intercept is the best one on
    it). Where the rows cannot tell the slope (one class only, or all logits equal) it stays 1.

    Unlike scikit-learn's ``sigmoid`` calibration, the input is always a logit, never a probability.

    Parameters
    ----------
    intercept : float, logits
    slope : float
        At least ``MINIMUM_SLOPE``.

    References
    ----------
    Platt (1999), Probabilistic outputs for support vector machines, section 2.2.
    Lin, Lin and Weng (2007), A note on Platt's probabilistic outputs for support vector machines.

    Examples
    --------
    A model that is twice too sure of itself:

    >>> rng = np.random.default_rng(0)
    >>> true_logit = rng.normal(-2.0, 1.0, 100_000)
    >>> label = rng.random(100_000) < sigmoid(true_logit)
    >>> platt = PlattCalibrator.fit(2.0 * true_logit, label)
    >>> round(platt.slope, 2), abs(round(platt.intercept, 1))
    (0.51, 0.0)
    """

    def __init__(self, intercept: float = 0.0, slope: float = 1.0) -> None:
        if not (math.isfinite(intercept) and math.isfinite(slope) and slope > 0.0):
            raise DataError(f"a Platt line needs finite numbers and slope > 0; got {intercept}, {slope}.")
        self.intercept = float(intercept)
        self.slope = float(slope)

    @classmethod
    def fit(
        cls,
        logit: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
        *,
        minimum_slope: float = MINIMUM_SLOPE,
    ) -> Self:
        """Fit to rows; conventions of :mod:`calibration.base`.

        Raises
        ------
        DataError
            No rows, or bad values.
        """
        z, y, w = checked_rows(logit, label, weight)
        return cls(*_fit_line(z, w, w * y, minimum_slope))

    @classmethod
    def fit_sketch(cls, sketch: LogitSketch, *, minimum_slope: float = MINIMUM_SLOPE) -> Self:
        """Fit to a sketch: as to its rows, each with the logit of its bin's mean probability."""
        logit, rows, positives, _ = sketch.bins()
        return cls(*_fit_line(logit, rows, positives, minimum_slope))

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""
        line: FloatArray = self.intercept + self.slope * checked_logit(logit)
        return line

    def transform(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated probability, shape ``(n,)``."""
        return sigmoid(self.transform_logit(logit))

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"kind": "platt", "intercept": self.intercept, "slope": self.slope}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The line that :meth:`state` described; ``StaleStateError`` if it is none."""
        expect_fields(state, "platt", ("intercept", "slope"))
        slope = finite(state, "slope")
        if slope <= 0.0:
            raise StaleStateError(f"a Platt line must rise; got slope {slope}.")
        return cls(finite(state, "intercept"), slope)


def _fit_line(
    logit: FloatArray, rows: FloatArray, positives: FloatArray, minimum_slope: float
) -> tuple[float, float]:
    """Intercept and slope for groups of equal logit; ``rows``, ``positives``: weighted sums, (groups,)."""
    total = float(rows.sum())
    if total <= 0.0:
        raise DataError("cannot fit a Platt line to no rows.", hint="wait until labels have matured")
    clicked = float(positives.sum())
    positive_target = (clicked + 1.0) / (clicked + 2.0)
    negative_target = 1.0 / (total - clicked + 2.0)
    target = (positives * positive_target + (rows - positives) * negative_target) / rows
    # Standardised logits: the Newton system is well conditioned wherever the model's logits lie.
    centre = float((rows * logit).sum()) / total
    spread = math.sqrt(float((rows * (logit - centre) ** 2).sum()) / total)
    mean_target = float((rows * target).sum()) / total
    level = math.log(mean_target / (1.0 - mean_target))
    slope_is_known = spread > 1e-9 and 0.0 < clicked < total
    if not slope_is_known:
        level, _ = _newton(logit - centre, rows, target, (level, 1.0), fixed_slope=True)
        return level - centre, 1.0
    unit = (logit - centre) / spread
    level, unit_slope = _newton(unit, rows, target, (level, spread), fixed_slope=False)
    if unit_slope < minimum_slope * spread:
        unit_slope = minimum_slope * spread
        level, _ = _newton(unit, rows, target, (level, unit_slope), fixed_slope=True)
    slope = unit_slope / spread
    return level - slope * centre, slope


def _newton(
    x: FloatArray, rows: FloatArray, target: FloatArray, start: tuple[float, float], *, fixed_slope: bool
) -> tuple[float, float]:
    """Minimise the weighted cross entropy of ``a + b x`` to ``target``; convex, so any minimum is the one."""
    a, b = start
    total = float(rows.sum())
    # A hair of ridge keeps the system solvable where every probability has saturated.
    ridge = 1e-12 * total
    for _ in range(_MAXIMUM_STEPS):
        q = sigmoid(a + b * x)
        residual, curvature = rows * (q - target), rows * q * (1.0 - q)
        g_a, g_b = float(residual.sum()), float((residual * x).sum())
        h_aa, h_bb = float(curvature.sum()) + ridge, float((curvature * x * x).sum()) + ridge
        h_ab = float((curvature * x).sum())
        if fixed_slope:
            step = (-g_a / h_aa, 0.0)
        else:
            determinant = h_aa * h_bb - h_ab * h_ab
            step = ((h_ab * g_b - h_bb * g_a) / determinant, (h_ab * g_a - h_aa * g_b) / determinant)
        decrement = -(g_a * step[0] + g_b * step[1])
        if decrement <= 1e-24 * total:
            break
        # So close to the minimum that the loss itself cannot tell the steps apart, Newton needs no guard.
        is_close = decrement < 1e-9 * total
        size = 1.0 if is_close else _step_size(x, rows, target, (a, b), step, decrement)
        a, b = a + size * step[0], b + size * step[1]
    return a, b


def _step_size(
    x: FloatArray,
    rows: FloatArray,
    target: FloatArray,
    at: tuple[float, float],
    step: tuple[float, float],
    decrement: float,
) -> float:
    """Halve the Newton step until the loss falls as it should (Armijo)."""

    def cross_entropy(size: float) -> float:
        logit = at[0] + size * step[0] + (at[1] + size * step[1]) * x
        return float((rows * (np.logaddexp(0.0, logit) - target * logit)).sum())

    start, size = cross_entropy(0.0), 1.0
    while size > 1e-12 and not cross_entropy(size) <= start - 1e-4 * size * decrement:
        size *= 0.5
    return size
