"""Temperature scaling: ``logit q = logit p / T``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_logit
from calibration.link import FloatArray
from calibration.logistic import fit_logistic, smoothed_target, tells_slope
from calibration.platt import MINIMUM_SLOPE
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from calibration.state import finite
from pipelines.errors import DataError

__all__ = ["MAXIMUM_SLOPE", "TemperatureCalibrator"]

# Of logits that hardly differ from 0 no slope is steep enough.
MAXIMUM_SLOPE = 1.0 / MINIMUM_SLOPE


class TemperatureCalibrator(SketchCalibrator):
    """One slope through the origin: how sure the model is, and nothing else.

    There is no level. Where the rate is not one half by symmetry, as with clicks, a wrong level is not
    repaired but bent into the slope: see PCOC before this is used alone. Targets as for
    :class:`calibration.platt.PlattCalibrator`; the slope is kept within [0.05, 20], and stays 1 where all
    rows are of one class or of one logit.

    Parameters
    ----------
    slope : float
        ``1 / T``, > 0.

    References
    ----------
    Guo et al. (2017), On calibration of modern neural networks, arXiv 1706.04599, section 4.2.

    Examples
    --------
    A model that is twice too sure of itself:

    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(0.0, 2.0, 50_000)
    >>> label = rng.random(50_000) < 1.0 / (1.0 + np.exp(-logit / 2.0))
    >>> round(TemperatureCalibrator.fit(logit, label).temperature, 1)
    2.0
    """

    kind: ClassVar[str] = "temperature"
    names: ClassVar[tuple[str, ...]] = ("slope",)

    def __init__(self, slope: float = 1.0) -> None:
        if not (math.isfinite(slope) and slope > 0.0):
            raise DataError(f"temperature scaling needs a finite slope > 0; got {slope}.")
        self.slope = float(slope)

    @property
    def temperature(self) -> float:
        """``T``: above 1 the model was too sure."""
        return 1.0 / self.slope

    @classmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The slope of a sketch's rows."""
        logit, rows, positives, _ = sketch.bins()
        if not tells_slope(logit, rows, positives):
            return cls()
        (slope,) = fit_logistic(
            logit[None],
            rows,
            smoothed_target(rows, positives),
            np.ones(1),
            lower=np.array([MINIMUM_SLOPE]),
            upper=np.array([MAXIMUM_SLOPE]),
        )
        return cls(float(slope))

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""
        scaled: FloatArray = self.slope * checked_logit(logit)
        return scaled

    def parameters(self) -> dict[str, Any]:
        """The slope."""
        return {"slope": self.slope}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The map of :meth:`parameters`."""
        return cls(finite(parameters, "slope"))
