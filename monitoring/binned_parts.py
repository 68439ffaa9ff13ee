"""Parts of the Brier score, and field errors, from binned rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monitoring.binned_rows import BinnedRows, BinnedSums
from monitoring.bounded import Bounded, Interval
from monitoring.brier import reliability_null
from monitoring.field_error import LABEL_FLOOR, FieldError, error_beside_null, field_figures
from monitoring.inputs import FloatArray
from pipelines.errors import DataError

__all__ = ["BinnedBrierParts", "BinnedFieldError", "binned_brier_parts", "binned_field_error"]


@dataclass(frozen=True)
class BinnedBrierParts:
    """As `monitoring.brier.BrierParts`, over groups of neighbouring bins; with the distance to the rows' own.

    Attributes
    ----------
    reliability, within_variance, within_covariance : Bounded
    resolution, uncertainty : float
        Exact.
    reliability_null : float
        As if rows had their bin's mean.
    reliability_z : float or None
    groups : int
    """

    reliability: Bounded
    resolution: float
    uncertainty: float
    within_variance: Bounded
    within_covariance: Bounded
    reliability_null: float
    reliability_z: float | None
    groups: int


def binned_brier_parts(
    sums: BinnedSums, groups: int = 20, least_weight: float = 1.0
) -> BinnedBrierParts | None:
    """Murphy's parts of the Brier score over groups that end where bins end; None without rows.

    Reliability, resolution and uncertainty need no more than the sums of the groups. Of the terms within
    groups, ``Σwp²`` and ``Σwyp`` are bounded bin by bin.

    Examples
    --------
    >>> class Sums:
    ...     lower_logit, upper_logit = np.array([-2.0, 0.0]), np.array([-1.9, 0.1])
    ...     rows, positives, expected = np.array([10.0, 4.0]), np.array([1.0, 2.0]), np.array([1.25, 2.05])
    ...     squares, positive_squares = rows, positives
    >>> found = binned_brier_parts(Sums())
    >>> round(found.reliability.value, 5), round(found.resolution, 4), round(found.uncertainty, 4)
    (0.00049, 0.0327, 0.1684)
    """
    bins = BinnedRows(sums, least_weight)
    total = float(bins.rows.sum())
    if total == 0.0:
        return None
    start = bins.groups(groups)

    def grouped(of: FloatArray) -> FloatArray:
        return np.add.reduceat(of, start)

    mass, positive = grouped(bins.rows), grouped(bins.positives)
    expected, ends = bins.expected(), bins.expected().ends
    mean = Interval(grouped(np.asarray(ends.low)) / mass, grouped(np.asarray(ends.high)) / mass)
    middle, rate, base = grouped(expected.value) / mass, positive / mass, float(positive.sum()) / total
    reliability = float(mass @ (middle - rate) ** 2) / total
    square, square_ends = bins.square().total()
    within = square_ends - mean.squared().times(mass).sum()
    crossed, crossed_ends = bins.expected_of_positives().total()
    covariance = crossed_ends - mean.times(positive).sum()
    null, spread = reliability_null(mass, grouped(bins.variance().value))
    gap = mean - Interval(rate, rate)
    return BinnedBrierParts(
        reliability=gap.squared().times(mass / total).sum().around(reliability),
        resolution=float(mass @ (rate - base) ** 2) / total,
        uncertainty=base * (1.0 - base),
        within_variance=within.times(1.0 / total).around((square - float(mass @ middle**2)) / total),
        within_covariance=covariance.times(2.0 / total).around(
            2.0 * (crossed - float(positive @ middle)) / total
        ),
        reliability_null=null,
        reliability_z=(reliability - null) / spread if spread > 0 else None,
        groups=len(start),
    )


@dataclass(frozen=True)
class BinnedFieldError:
    """As `monitoring.field_error.FieldError`, with the distance of its two figures to the rows' own.

    Attributes
    ----------
    error : FieldError
    ece_error, rce_error : float
    """

    error: FieldError
    ece_error: float
    rce_error: float


def binned_field_error(
    values: Sequence[BinnedSums], *, draws: int = 40, seed: int = 0, least_weight: float = 1.0
) -> BinnedFieldError | None:
    """Field-ECE and Field-RCE from a sketch of each value of a field; None without rows.

    Both figures follow from sums alone, so that they differ from those of the rows by the rounding of Σwp.
    For the floors, the positives of each bin are drawn as a binomial number with the bin's mean probability;
    with weights, of ``(Σw)² / Σw²`` rows that weigh the same.

    Parameters
    ----------
    values : sequence of BinnedSums
        Such as ``sketch.binned()`` of the segments in a ``calibration.sketch_book.SketchBook``.
    draws, seed : int
        At least two draws.
    least_weight : float
        See `monitoring.binned_rows.BinnedRows`.
    """
    if draws < 2:
        raise DataError(f"expected two draws or more, for their scatter, received {draws}.")
    bins = [BinnedRows(sums, least_weight) for sums in values if len(sums.rows)]
    if not bins:
        return None
    mass, observed, expected, rounding = (
        np.array([getter(one) for one in bins])
        for getter in (
            lambda one: float(one.rows.sum()),
            lambda one: float(one.positives.sum()),
            lambda one: float(one.expected().value.sum()),
            lambda one: one.rounding,
        )
    )
    place = np.repeat(np.arange(len(bins)), [len(one.rows) for one in bins])
    rows, squares, mean = (
        np.concatenate(parts)
        for parts in zip(*((one.rows, one.squares, one.mean) for one in bins), strict=True)
    )
    # Where squares of tiny weights round to nothing, each row counts as one.
    size = np.where(squares > 0.0, squares / rows, 1.0)
    count = np.maximum(1, np.rint(rows / size).astype(np.int64))
    rng = np.random.default_rng(seed)
    null = [
        field_figures(
            np.bincount(place, rng.binomial(count, mean) * (rows / count), len(bins)).astype(np.float64),
            mass,
            expected,
        )
        for _ in range(draws)
    ]
    error = error_beside_null(field_figures(observed, mass, expected), np.array(null), mass)
    total = float(mass.sum())
    return BinnedFieldError(
        error=error,
        ece_error=float(rounding.sum()) / total,
        rce_error=float(mass @ (rounding / (observed + LABEL_FLOOR * mass))) / total,
    )
