"""Platt scaling on logits: ``logit q = intercept + slope * logit p``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_logit
from calibration.link import FloatArray
from calibration.logistic import fit_logistic, level_of, smoothed_target, spread_of, tells_slope
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from calibration.state import finite
from pipelines.errors import DataError

__all__ = ["MINIMUM_SLOPE", "PlattCalibrator", "fit_line"]

# Below it the calibrated logits of a whole range fall together and ranking is lost in practice.
MINIMUM_SLOPE = 0.05


class PlattCalibrator(SketchCalibrator):
    """A straight line in logit space.

    Targets are smoothed as by Platt: with ``P`` positives and ``N`` negatives (weighted), a positive counts
    as ``(P + 1) / (P + 2)`` and a negative as ``1 / (N + 2)``, which keeps separable data finite. The line
    minimises the weighted cross entropy to these targets, subject to ``slope >= MINIMUM_SLOPE`` (a convex
    problem: where the bound binds, the intercept is the best one on it). Where the rows cannot tell the slope
    (one class only, or all logits equal) it stays 1.

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
    >>> label = rng.random(100_000) < 1.0 / (1.0 + np.exp(-true_logit))
    >>> platt = PlattCalibrator.fit(2.0 * true_logit, label)
    >>> round(platt.slope, 2), abs(round(platt.intercept, 1))
    (0.51, 0.0)
    """

    kind: ClassVar[str] = "platt"
    names: ClassVar[tuple[str, ...]] = ("intercept", "slope")

    def __init__(self, intercept: float = 0.0, slope: float = 1.0) -> None:
        if not (math.isfinite(intercept) and math.isfinite(slope) and slope > 0.0):
            raise DataError(f"a Platt line needs finite numbers and slope > 0; got {intercept}, {slope}.")
        self.intercept = float(intercept)
        self.slope = float(slope)

    @classmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The line of a sketch's rows."""
        logit, rows, positives, _ = sketch.bins()
        return cls(*fit_line(logit, rows, positives))

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""
        line: FloatArray = self.intercept + self.slope * checked_logit(logit)
        return line

    def parameters(self) -> dict[str, Any]:
        """Intercept and slope."""
        return {"intercept": self.intercept, "slope": self.slope}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The line of :meth:`parameters`."""
        return cls(finite(parameters, "intercept"), finite(parameters, "slope"))


def fit_line(
    logit: FloatArray, rows: FloatArray, positives: FloatArray, *, minimum_slope: float = MINIMUM_SLOPE
) -> tuple[float, float]:
    """Intercept and slope of Platt's line for groups of equal logit.

    Parameters
    ----------
    logit : ndarray, shape (groups,)
        Of single rows, or of the bins of a sketch.
    rows, positives : ndarray, shape (groups,)
        Σ weight, above 0, and Σ weight x label.
    minimum_slope : float
        In (0, 1].
    """
    target = smoothed_target(rows, positives)
    # Standardised logits: the Newton system is well conditioned wherever the model's logits lie.
    centre, spread = spread_of(logit, rows)
    level, ones = level_of(rows, target), np.ones(len(logit))
    if not tells_slope(logit, rows, positives):
        (level,) = fit_logistic(ones[None], rows, target, np.array([level]), offset=logit - centre)
        return float(level) - centre, 1.0
    level, unit_slope = fit_logistic(
        np.stack([ones, (logit - centre) / spread]),
        rows,
        target,
        np.array([level, max(1.0, minimum_slope) * spread]),
        lower=np.array([-np.inf, minimum_slope * spread]),
    )
    slope = float(unit_slope) / spread
    return float(level) - slope * centre, slope
