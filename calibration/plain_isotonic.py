"""Isotonic regression as it is usually meant: exact on bins, with ties. For comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_logit
from calibration.link import FloatArray, logit_of
from calibration.pooling import pooled_starts
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from calibration.state import finite_list
from pipelines.errors import DataError

__all__ = ["PlainIsotonicCalibrator"]


class PlainIsotonicCalibrator(SketchCalibrator):
    """The non-decreasing step function of largest likelihood over the bins of a sketch.

    Flat within a block and past the ends, a straight line in logits from block to block. So rows of one block
    are tied and ranking is lost: :class:`calibration.isotonic.IsotonicCalibrator` is what to use. The one
    departure from the exact fit: a block of no positives says ``0.5 / (n + 1)`` instead of 0, or half of what
    the next block says if that is less; a block of nothing else, one minus as much.

    Parameters
    ----------
    knot_logit, calibrated_logit : sequence of float, shape (knots,), logit space
        The first strictly increasing, the second non-decreasing; at least one knot.

    References
    ----------
    Zadrozny and Elkan (2002), Transforming classifier scores into accurate multiclass probability estimates.

    Examples
    --------
    >>> plain = PlainIsotonicCalibrator.fit([-2.0, -1.0, 0.0, 1.0], [0, 1, 0, 1])
    >>> plain.transform([-2.0, -1.0, -0.5, 0.0, 1.0]).round(2).tolist()
    [0.25, 0.5, 0.5, 0.5, 0.75]
    """

    kind: ClassVar[str] = "plain_isotonic"
    is_strict: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("knot_logit", "calibrated_logit")

    def __init__(self, knot_logit: npt.ArrayLike, calibrated_logit: npt.ArrayLike) -> None:
        self._x = checked_logit(knot_logit)
        self._y = checked_logit(calibrated_logit)
        rises = bool((np.diff(self._x) > 0.0).all() and (np.diff(self._y) >= 0.0).all())
        if not len(self._x) or self._x.shape != self._y.shape or not rises:
            raise DataError("isotonic knots must increase, their values must not fall, at least one.")

    @classmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The fit to a sketch's rows."""
        logit, rows, positives, _ = sketch.bins()
        starts = pooled_starts(positives / rows, rows)
        ends = np.append(starts[1:], len(rows)) - 1
        n, c = np.add.reduceat(rows, starts), np.add.reduceat(positives, starts)
        value = logit_of(_inside(c / n, n))
        knots = np.stack([logit[starts], logit[ends]], axis=1).ravel()
        # A block of one bin is one knot.
        kept = np.append(True, np.diff(knots) > 0.0)
        return cls(knots[kept], np.repeat(value, 2)[kept])

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""
        calibrated: FloatArray = np.interp(checked_logit(logit), self._x, self._y)
        return calibrated

    def parameters(self) -> dict[str, Any]:
        """The knots."""
        return {"knot_logit": self._x.tolist(), "calibrated_logit": self._y.tolist()}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The map of :meth:`parameters`."""
        return cls(*(finite_list(parameters[name], name) for name in cls.names))


def _inside(rate: FloatArray, rows: FloatArray) -> FloatArray:
    """Increasing rates with a first of 0 and a last of 1 moved inside (0, 1)."""
    inside = rate.copy()
    least, following = 0.5 / (rows + 1.0), np.append(rate[1:], 1.0)
    if inside[0] <= 0.0:
        inside[0] = min(least[0], 0.5 * following[0])
    if inside[-1] >= 1.0:
        before = inside[-2] if len(inside) > 1 else 0.0
        inside[-1] = 1.0 - min(least[-1], 0.5 * (1.0 - before))
    return inside
