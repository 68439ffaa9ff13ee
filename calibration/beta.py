"""Beta calibration: one slope for small probabilities, one for large, and a level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_logit
from calibration.link import FloatArray
from calibration.logistic import fit_logistic, level_of, smoothed_target, tells_slope
from calibration.platt import MINIMUM_SLOPE
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from calibration.state import finite
from calibration.temperature import MAXIMUM_SLOPE
from pipelines.errors import DataError

__all__ = ["BetaCalibrator"]


class BetaCalibrator(SketchCalibrator):
    """``logit q = level + low_slope * ln p - high_slope * ln(1 - p)``.

    In the logit its slope goes from ``low_slope`` far below to ``high_slope`` far above, so that both, kept
    within [0.05, 20], make it strictly increasing: the original has 0 for a bound, and ties. With equal
    slopes it is Platt's line. Targets as for :class:`calibration.platt.PlattCalibrator`. Where all rows are
    of one class or of one logit both slopes stay 1; where all probabilities are small, the rows say next to
    nothing of ``high_slope``.

    Parameters
    ----------
    level : float, logits
    low_slope, high_slope : float, > 0
        ``a`` and ``b`` of the paper.

    References
    ----------
    Kull, Silva Filho and Flach (2017), Beyond sigmoids, Electronic Journal of Statistics 11(2).

    Examples
    --------
    Large probabilities are twice too sure, small ones are right:

    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(0.0, 3.0, 200_000)
    >>> truth = BetaCalibrator(0.0, 1.0, 0.5).transform(logit)
    >>> beta = BetaCalibrator.fit(logit, rng.random(200_000) < truth)
    >>> round(beta.low_slope, 1), round(beta.high_slope, 1)
    (1.0, 0.5)
    """

    kind: ClassVar[str] = "beta"
    names: ClassVar[tuple[str, ...]] = ("level", "low_slope", "high_slope")

    def __init__(self, level: float = 0.0, low_slope: float = 1.0, high_slope: float = 1.0) -> None:
        numbers = (level, low_slope, high_slope)
        if not (all(map(math.isfinite, numbers)) and min(low_slope, high_slope) > 0.0):
            raise DataError(f"beta calibration needs finite numbers and slopes > 0; got {numbers}.")
        self.level = float(level)
        self.low_slope = float(low_slope)
        self.high_slope = float(high_slope)

    @classmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The map of a sketch's rows."""
        logit, rows, positives, _ = sketch.bins()
        target, ones = smoothed_target(rows, positives), np.ones((1, len(logit)))
        level = np.array([level_of(rows, target)])
        if not tells_slope(logit, rows, positives):
            (level,) = fit_logistic(ones, rows, target, level, offset=logit)
            return cls(float(level))
        inner, outer = (
            np.array([-np.inf, MINIMUM_SLOPE, MINIMUM_SLOPE]),
            np.array([np.inf, MAXIMUM_SLOPE, MAXIMUM_SLOPE]),
        )
        features = np.concatenate([ones, _logarithms(logit)])
        start = np.array([0.0, 1.0, 1.0])
        return cls(*map(float, fit_logistic(features, rows, target, start, lower=inner, upper=outer)))

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""
        low, high = _logarithms(checked_logit(logit))
        calibrated: FloatArray = self.level + self.low_slope * low + self.high_slope * high
        return calibrated

    def parameters(self) -> dict[str, Any]:
        """Level and slopes."""
        return {name: getattr(self, name) for name in self.names}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The map of :meth:`parameters`."""
        return cls(*(finite(parameters, name) for name in cls.names))


def _logarithms(logit: FloatArray) -> FloatArray:
    """``ln p`` and ``-ln(1 - p)``, shape (2, n); their sum is the logit."""
    return np.stack([-np.logaddexp(0.0, -logit), np.logaddexp(0.0, logit)])
