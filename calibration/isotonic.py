"""Isotonic calibration that keeps every rank: blocks, shrunk to a Platt line, joined by straight lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_logit
from calibration.link import FloatArray, logit_of
from calibration.platt import MINIMUM_SLOPE, PlattCalibrator, fit_line
from calibration.pooling import equal_starts, pooled_starts
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from calibration.state import finite, finite_list
from pipelines.errors import DataError

__all__ = ["IsotonicCalibrator"]

# A block of its own counts as if one further positive and its share of negatives had been seen on the line.
_BLOCK_PRIOR = 1.0
# How far a deviation from the line reaches: an eighth of all information. Blocks share the line's prior in
# proportion to their information within such a stretch, so that cutting finer does not shrink harder.
_STRETCHES = 8
# Groups that test the line: at most 20, at least 5, each with an information of 20 (about 20 rare positives).
_GROUP_INFORMATION, _FEWEST_GROUPS, _MOST_GROUPS = 20.0, 5, 20
_LARGEST_PRIOR = 1e6


class IsotonicCalibrator(SketchCalibrator):
    """A strictly increasing, piecewise linear map between logits.

    Exact isotonic regression ties neighbouring logits (ranking is lost) and says 0 where no positive was
    seen. This one does neither. On the bins of a sketch:

     1. pool adjacent violators of the observed rate into blocks;
     2. fit the Platt line, and measure from ``Q = Σ (C - E)² / I`` over groups of equal information, ``C``
        observed, ``E`` expected on the line, ``I`` the variance, by how much the truth strays from it:
        variance ``tau² = max(0, (Q - degrees of freedom) / Σ I)``, strength of the line ``1 / tau²``;
     3. shrink each block's log odds towards the line, with 1 observation a block and the line's strength
        spread over a stretch of an eighth of the information;
     4. pool again, for a slope of at least 0.05 of the line's everywhere;
     5. join the block centres by straight lines, and go on with the Platt slope past the ends.

    Where the truth is a line, step 2 finds it and the result is nearly Platt's; where it is not, the result
    tends to the isotonic fit as rows grow.

    Parameters
    ----------
    knot_logit, calibrated_logit : sequence of float, shape (knots,), logit space
        Strictly increasing both; at least one knot.
    end_slope : float
        Slope past the first and last knot, > 0.

    References
    ----------
    DerSimonian and Laird (1986), Meta-analysis in clinical trials: the estimate of tau² (equal information).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(-3.0, 1.5, 200_000)
    >>> truth = 1.0 / (1.0 + np.exp(0.5 + np.logaddexp(0.0, -logit)))
    >>> isotonic = IsotonicCalibrator.fit(logit, rng.random(200_000) < truth)
    >>> round(float(np.abs(isotonic.transform(logit) - truth).mean() / truth.mean()), 2)
    0.04
    """

    kind: ClassVar[str] = "isotonic"
    names: ClassVar[tuple[str, ...]] = ("knot_logit", "calibrated_logit", "end_slope")

    def __init__(self, knot_logit: npt.ArrayLike, calibrated_logit: npt.ArrayLike, end_slope: float) -> None:
        self._x = checked_logit(knot_logit)
        self._y = np.array(calibrated_logit, dtype=np.float64)
        self.end_slope = float(end_slope)
        rises = bool((np.diff(self._x) > 0.0).all() and (np.diff(self._y) > 0.0).all())
        if not len(self._x) or self._x.shape != self._y.shape or not rises or not self.end_slope > 0.0:
            raise DataError("isotonic knots must increase strictly, at least one, with an end slope > 0.")

    @classmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The map of a sketch's rows, in the five steps of the class."""
        logit, rows, positives, _ = sketch.bins()
        platt = PlattCalibrator(*fit_line(logit, rows, positives))
        on_line = platt.transform(logit)
        information = rows * on_line * (1.0 - on_line)
        # 1. pool the observed rates
        starts = pooled_starts(positives / rows, rows)
        n, c, i = (np.add.reduceat(sums, starts) for sums in (rows, positives, information))
        centre = np.add.reduceat(rows * logit, starts) / n
        # 2. how far to trust the line
        strength = _line_strength(rows, positives, on_line, information)
        # 3. shrink: a beta prior whose information is `prior` at the line's rate
        prior = _BLOCK_PRIOR + strength * _STRETCHES * i / i.sum()
        line = np.add.reduceat(rows * on_line, starts) / n
        shrunk = (c + prior / (1.0 - line)) / (n + prior / (line * (1.0 - line)))
        calibrated = platt.transform_logit(centre) + logit_of(shrunk) - logit_of(line)
        # 4. pool once more what shrinking by unequal amounts may have turned round
        floor = MINIMUM_SLOPE * platt.slope * centre
        above, trust = calibrated - floor, i + prior
        again = pooled_starts(above, trust)
        pooled = np.add.reduceat(above * trust, again) / np.add.reduceat(trust, again)
        lengths = np.diff(np.append(again, len(above)))
        # 5. the knots
        return cls(centre, np.repeat(pooled, lengths) + floor, platt.slope)

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""
        z = checked_logit(logit)
        inside = np.interp(z, self._x, self._y)
        past = np.minimum(z - self._x[0], 0.0) + np.maximum(z - self._x[-1], 0.0)
        calibrated: FloatArray = inside + self.end_slope * past
        return calibrated

    def parameters(self) -> dict[str, Any]:
        """Knots and the slope past them."""
        return {
            "knot_logit": self._x.tolist(),
            "calibrated_logit": self._y.tolist(),
            "end_slope": self.end_slope,
        }

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The map of :meth:`parameters`."""
        knots = finite_list(parameters["knot_logit"], "knot_logit")
        values = finite_list(parameters["calibrated_logit"], "calibrated_logit")
        return cls(knots, values, finite(parameters, "end_slope"))


def _line_strength(
    rows: FloatArray, positives: FloatArray, on_line: FloatArray, information: FloatArray
) -> float:
    """``1 / tau²``: pseudo-information that the Platt line is worth, from how well equal groups fit it."""
    total = float(information.sum())
    groups = int(np.clip(total / _GROUP_INFORMATION, _FEWEST_GROUPS, _MOST_GROUPS))
    starts = equal_starts(information, groups)
    residual = np.add.reduceat(positives - rows * on_line, starts)
    misfit = float((residual**2 / np.add.reduceat(information, starts)).sum())
    # The line has used up two degrees of freedom.
    excess = misfit - (len(starts) - 2)
    return min(_LARGEST_PRIOR, total / excess) if excess > 0.0 else _LARGEST_PRIOR
