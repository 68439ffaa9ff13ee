"""Quality of binned rows: every figure with the largest distance to that of the rows themselves.

The bounds are worst cases: they hold if within each bin every positive lies at one edge and every other row
at the other. Where rows lie in a bin without regard to their label, the distance is far smaller (the
benchmark ``calibration_power`` prints both).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from monitoring.binned_rows import BinnedRows, BinnedSums
from monitoring.bounded import Bounded, Interval
from monitoring.inputs import FloatArray
from monitoring.quality import entropy, pcoc_ends, relative_error_of_count
from monitoring.rank_histogram import auc_of_bins
from monitoring.reliability import error_of_groups
from monitoring.smooth_error import NullError, SmoothedResiduals, fixed_point

__all__ = [
    "BinnedCalibrationError",
    "BinnedQuality",
    "BinnedSmoothError",
    "binned_calibration_error",
    "binned_quality",
    "binned_smooth_error",
]

# ∫|φ'| and ∫|φ''| of the standard normal density: what moving a mass by a little does to its smoothed self.
_FIRST = np.sqrt(2.0 / np.pi)
_SECOND = 4.0 * np.exp(-0.5) / np.sqrt(2.0 * np.pi)
# What the integral over the grid may be off, and the solution of the equation.
_NUMERIC = 1e-3


@dataclass(frozen=True)
class BinnedQuality:
    """Figures of binned rows; None where the rows cannot give one.

    Attributes
    ----------
    rows, positives : float
        Σw and Σwy.
    effective_rows : float or None
        (Σw)² / Σw²; None where all weights are so small that their squares were rounded to 0.
    base_rate : float or None
    log_loss, ne, rig, brier, auc, pcoc, pcoc_low, pcoc_high : Bounded or None
        As in `monitoring.quality`.
    """

    rows: float
    positives: float
    effective_rows: float | None
    base_rate: float | None
    log_loss: Bounded | None
    ne: Bounded | None
    rig: Bounded | None
    brier: Bounded | None
    auc: Bounded | None
    pcoc: Bounded | None
    pcoc_low: Bounded | None
    pcoc_high: Bounded | None


def binned_quality(sums: BinnedSums, least_weight: float = 1.0) -> BinnedQuality:
    """Figures of binned rows with their errors.

    - Log loss: ``Σ w (-ln(1 - p)) - Σ w y z``. The first is between Jensen's bound and the chord; the second
      is off by a bin's width times the positives at most. Over the entropy of the base rate, NE and RIG.
    - Brier score: ``Σ w p² - 2 Σ w y p + Σ w y``, likewise.
    - AUC: half the pairs of one bin.
    - PCOC: exact up to rounding.

    Examples
    --------
    >>> class Sums:
    ...     lower_logit, upper_logit = np.array([-2.0, 0.0]), np.array([-1.9, 0.1])
    ...     rows, positives, expected = np.array([10.0, 4.0]), np.array([1.0, 2.0]), np.array([1.25, 2.05])
    ...     squares, positive_squares = rows, positives
    >>> found = binned_quality(Sums())
    >>> round(found.ne.value, 3), round(found.ne.error, 3), found.pcoc.error < 1e-8
    (0.832, 0.021, True)
    """
    bins = BinnedRows(sums, least_weight)
    mass, positives = float(bins.rows.sum()), float(bins.positives.sum())
    if mass == 0.0:
        return BinnedQuality(0.0, 0.0, 0.0, None, None, None, None, None, None, None, None, None)
    share, rate, squares = 1.0 / mass, positives / mass, float(bins.squares.sum())
    loss, loss_ends = (bins.softplus() - bins.logit_of_positives()).times(share).total()
    brier, brier_ends = (
        (bins.square() + bins.observed() - bins.expected_of_positives().times(2.0)).times(share).total()
    )
    log_loss, floor = loss_ends.around(loss), entropy(rate)
    ne = Bounded(log_loss.value / floor, log_loss.error / floor) if floor > 0.0 else None
    expected, expected_ends = bins.expected().total()
    pcoc = expected_ends.times(1.0 / positives).around(expected / positives) if positives > 0.0 else None
    ends = _pcoc_ends(pcoc, bins, positives, rate)
    auc = auc_of_bins(bins.positives, bins.rows - bins.positives)
    return BinnedQuality(
        rows=mass,
        positives=positives,
        effective_rows=mass**2 / squares if squares > 0.0 else None,
        base_rate=rate,
        log_loss=log_loss,
        ne=ne,
        rig=None if ne is None else Bounded(1.0 - ne.value, ne.error),
        brier=brier_ends.around(brier),
        auc=None if auc is None else Interval.about(auc.value, auc.error).around(auc.value),
        pcoc=pcoc,
        pcoc_low=ends[0],
        pcoc_high=ends[1],
    )


def _pcoc_ends(
    pcoc: Bounded | None, bins: BinnedRows, positives: float, rate: float
) -> tuple[Bounded | None, Bounded | None]:
    if pcoc is None:
        return None, None
    # Squares of weights are rounded as well, by far less than a standard error's own error.
    relative = relative_error_of_count(positives, float(bins.positive_squares.sum()), rate)
    low, high = pcoc_ends(1.0, relative)
    return pcoc.map(lambda value: value * low), pcoc.map(lambda value: value * high)


@dataclass(frozen=True)
class BinnedCalibrationError:
    """ECE over groups of neighbouring bins, as `monitoring.reliability.CalibrationError`.

    Attributes
    ----------
    ece, null : Bounded
    z : Bounded or None
    relative, null_relative : Bounded or None
        Over the base rate; None without positives.
    groups : int
    """

    ece: Bounded
    null: Bounded
    z: Bounded | None
    relative: Bounded | None
    null_relative: Bounded | None
    groups: int


def binned_calibration_error(
    sums: BinnedSums, groups: int = 20, least_weight: float = 1.0
) -> BinnedCalibrationError | None:
    """ECE of binned rows over groups of nearly equal weight; None without rows.

    A group ends where a bin ends, so that the ECE is exactly that of the rows in these groups, but for the
    rounding of Σwp. A bin belongs to the group in which the middle of its weight falls.
    """
    bins = BinnedRows(sums, least_weight)
    mass = float(bins.rows.sum())
    if mass == 0.0:
        return None
    start = bins.groups(groups)

    def grouped(of: FloatArray) -> FloatArray:
        return np.add.reduceat(of, start)

    variance = bins.variance()
    found = error_of_groups(
        *(grouped(of) for of in (bins.rows, bins.positives, bins.expected().value, variance.value))
    )
    ece = Interval.about(found.ece, bins.rounding / mass)
    ends = Interval(grouped(np.asarray(variance.ends.low)), grouped(np.asarray(variance.ends.high)))
    null = ends.times(2.0 / math.pi).root().sum().times(1.0 / mass)
    spread = ends.sum().times(1.0 - 2.0 / math.pi).root().times(1.0 / mass)
    base = float(bins.positives.sum()) / mass
    errors = ece.around(found.ece), null.around(found.null)
    relative = [Bounded(one.value / base, one.error / base) for one in errors] if base > 0 else [None, None]
    return BinnedCalibrationError(
        ece=errors[0],
        null=errors[1],
        z=None if found.z is None else (ece - null).over(spread).around(found.z),
        relative=relative[0],
        null_relative=relative[1],
        groups=found.bins,
    )


@dataclass(frozen=True)
class BinnedSmoothError:
    """Smoothed calibration error of binned rows.

    Attributes
    ----------
    smooth_ece : Bounded
    null : float
        What a calibrated model shows, as if rows had their bin's mean.
    """

    smooth_ece: Bounded
    null: float


def binned_smooth_error(sums: BinnedSums, least_weight: float = 1.0) -> BinnedSmoothError | None:
    """smECE (`monitoring.smooth_error`) as if rows had their bin's mean; None without rows.

    Bound: let row i lie ``d`` from its bin's mean and bring the mass ``m = w(p - y)``. Moving all masses of
    the bin to the mean changes the smoothed ones by ``|Σ m d| √(2/π) / σ + Σ |m| d² 0.97 / 2σ²`` at most
    (Taylor; the factors are ∫|φ'| and ∫|φ''|), and by ``2 Σ |m|``. As Σwd = 0, the first sum is
    ``Σwd² - Σwyd``, at most ``n (high - mean)(mean - low)`` and ``c`` times the farther edge. Sharing a mass
    between points of a grid h apart costs ``h² 0.97 / 8σ²``. And two errors that differ by B at the width
    that solves the equation of one have solutions that differ by B at most, because neither grows with the
    width. The bound grows as the error falls, as 1 / σ: where a model of a 4.5 % rate errs by a tenth of it,
    the bound is as large as the error, and the distance in truth a thousandth of it.
    """
    bins = BinnedRows(sums, least_weight)
    mass = float(bins.rows.sum())
    if mass == 0.0:
        return None
    difference = (bins.expected() - bins.observed()).value / mass
    null = NullError(bins.mean, bins.variance().value / mass**2).middle
    residuals = SmoothedResiduals(bins.mean, difference)
    value = fixed_point(residuals.absolute, null)
    width = max(value, 1e-12)
    error = float(_moving(bins, width).sum()) / mass
    shared = _SECOND / 8.0 * (residuals.spacing(width) / width) ** 2 * float(np.abs(difference).sum())
    error += min(2.0 * float(np.abs(difference).sum()), shared) + bins.rounding / mass + _NUMERIC * value
    return BinnedSmoothError(Bounded(value, error), null)


def _moving(bins: BinnedRows, width: float) -> FloatArray:
    """What moving each bin's residuals to its mean can change in the integral, (bins,)."""
    residuals = bins.positives * bins.low_rest + (bins.rows - bins.positives) * bins.high
    below, above = bins.mean - bins.low, bins.high - bins.mean
    farthest = np.maximum(below, above)
    first = bins.positives * farthest + bins.rows * below * above
    second = residuals * farthest**2
    moved = first * (_FIRST / width) + second * (0.5 * _SECOND / width**2)
    return np.asarray(np.minimum(2.0 * residuals, moved), np.float64)
