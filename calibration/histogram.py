"""Histogram binning: the observed rate of the group a logit falls into. For comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_logit
from calibration.link import FloatArray, logit_of
from calibration.pooling import equal_starts, pooled_starts
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from calibration.state import finite_list
from pipelines.errors import DataError

__all__ = ["GROUPS", "HistogramCalibrator"]

GROUPS = 20


class HistogramCalibrator(SketchCalibrator):
    """Twenty groups of nearly equal weight, each with its smoothed rate; constant within, and past the ends.

    A group counts one further positive, and its share of negatives at the rate of all rows, so that none says
    0 or 1. Unlike in the original, neighbours that are out of order are pooled: no two rows are turned round.
    Rows of a group are tied, so ranking is lost.

    Parameters
    ----------
    edge_logit : sequence of float, shape (groups - 1,), logit space
        Where each group but the first begins; strictly increasing.
    calibrated_logit : sequence of float, shape (groups,), logit space
        Non-decreasing.

    References
    ----------
    Zadrozny and Elkan (2001), Obtaining calibrated probability estimates from decision trees and naive
    Bayesian classifiers.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(-2.0, 1.0, 50_000)
    >>> histogram = HistogramCalibrator.fit(logit, rng.random(50_000) < 1.0 / (1.0 + np.exp(-logit)))
    >>> histogram.transform([-9.0, -8.0, -2.0, -1.0, 9.0]).round(2).tolist()
    [0.02, 0.02, 0.12, 0.25, 0.52]
    """

    kind: ClassVar[str] = "histogram"
    is_strict: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("edge_logit", "calibrated_logit")

    def __init__(self, edge_logit: npt.ArrayLike, calibrated_logit: npt.ArrayLike) -> None:
        self._edge = checked_logit(edge_logit)
        self._value = checked_logit(calibrated_logit)
        rises = bool((np.diff(self._edge) > 0.0).all() and (np.diff(self._value) >= 0.0).all())
        if len(self._edge) + 1 != len(self._value) or not rises:
            raise DataError("histogram edges must increase and values not fall, one value more than edges.")

    @classmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The groups of a sketch's rows."""
        bins = sketch.binned()
        starts = equal_starts(bins.rows, GROUPS)
        n, c = np.add.reduceat(bins.rows, starts), np.add.reduceat(bins.positives, starts)
        n, c = n + (n.sum() + 2.0) / (c.sum() + 1.0), c + 1.0
        pooled = pooled_starts(c / n, n)
        rate = np.add.reduceat(c, pooled) / np.add.reduceat(n, pooled)
        return cls(bins.lower_logit[starts[pooled[1:]]], logit_of(rate))

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""
        calibrated: FloatArray = self._value[np.searchsorted(self._edge, checked_logit(logit), side="right")]
        return calibrated

    def parameters(self) -> dict[str, Any]:
        """Edges and values."""
        return {"edge_logit": self._edge.tolist(), "calibrated_logit": self._value.tolist()}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The map of :meth:`parameters`."""
        return cls(*(finite_list(parameters[name], name) for name in cls.names))
