"""The tests of calibration on binned rows: statistics and p-values with their bounds.

The bounds are worst cases, as in `monitoring.binned`: a positive may lie anywhere in its bin, which counts
the more against a statistic's scatter the more positives there are. For calibrated models, bins of 1/128
logit and simulated rows, the bound of the p-value and its distance to the rows' own, in the mean:

========= ======= ============== ============== ===============
positives PCOC z  Cox            Kuiper         Spiegelhalter
========= ======= ============== ============== ===============
476       < 1e-5  0.019, 0.0002  0.030, 0.008   0.008, 0.0002
4,515     < 1e-5  0.100, 0.0005  0.154, 0.014   0.033, 0.0002
44,230    < 1e-5  0.266, 0.0002  0.339, 0.017   0.082, 0.0002
========= ======= ============== ============== ===============
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from monitoring.binned_rows import BinnedRows, BinnedSums, Estimate
from monitoring.bounded import Bounded, Interval
from monitoring.calibration_tests import KUIPER_NULL, LEAST_SPREAD, cox_null
from monitoring.null_distributions import brownian_range_tail, chi_square_tail, normal_two_sided

__all__ = [
    "BinnedTest",
    "binned_cox",
    "binned_kuiper",
    "binned_pcoc_z",
    "binned_spiegelhalter",
    "binned_tests",
]


# Stands for infinity where infinity times 0 would come up.
_ENDLESS = 1e300
_BROWNIAN_OVERSHOOT = 0.5826


@dataclass(frozen=True)
class BinnedTest:
    """Outcome of one test on binned rows.

    Attributes
    ----------
    name : str
        As `monitoring.calibration_tests.CalibrationTest` names it.
    statistic, p_value : Bounded or None
        None if the rows cannot tell.
    null : str
        The distribution of the statistic for a calibrated model.
    """

    name: str
    statistic: Bounded | None
    p_value: Bounded | None
    null: str

    def rejects(self, level: float) -> bool | None:
        """Whether the rows' own p-value is below the level; None if the bins cannot tell."""
        if self.p_value is None or self.p_value.low < level <= self.p_value.high:
            return None
        return self.p_value.high < level


def binned_tests(sums: BinnedSums, least_weight: float = 1.0) -> list[BinnedTest]:
    """All four tests; arguments of `monitoring.binned_rows.BinnedRows`."""
    bins = BinnedRows(sums, least_weight)
    return [test(bins) for test in (binned_pcoc_z, binned_cox, binned_kuiper, binned_spiegelhalter)]


def binned_pcoc_z(bins: BinnedRows) -> BinnedTest:
    """Level, `monitoring.calibration_tests.pcoc_z_test`: only the variance is uncertain."""
    return _normal("pcoc_z", bins.observed() - bins.expected(), bins.variance())


def binned_spiegelhalter(bins: BinnedRows) -> BinnedTest:
    """Spread, `spiegelhalter_test`: ``Σw(y - p)(1 - 2p) = Σw(y - p) - 2 Σwyp + 2 Σwp²``."""
    lean = bins.square() - bins.expected_of_positives()
    total = bins.observed() - bins.expected() + lean.times(2.0)
    return _normal("spiegelhalter_z", total, bins.lean_variance())


def binned_cox(bins: BinnedRows) -> BinnedTest:
    """Level and slope, `cox_score_test`, with logits counted from their estimated mean.

    Bins whose means are equal cannot tell a slope: rows in them may have one prediction or several.
    """
    variance, variance_ends = bins.variance().total()
    if variance == 0.0:
        return BinnedTest("cox_score", None, None, cox_null(2))
    origin = float(bins.variance_logit(0.0, 1).value.sum()) / variance
    level, level_ends = (bins.observed() - bins.expected()).total()
    slope, slope_ends = (bins.logit_of_positives(origin) - bins.expected_logit(origin)).total()
    first, first_ends = bins.variance_logit(origin, 1).total()
    second, second_ends = bins.variance_logit(origin, 2).total()
    # What is left of x, of its mean and of its square after x is measured from its mean.
    mean_ends = first_ends.over(variance_ends)
    slope_ends = slope_ends - mean_ends * level_ends
    second_ends = second_ends - first_ends.squared().over(variance_ends)
    ends = level_ends.squared().over(variance_ends) + slope_ends.squared().over(second_ends).within(
        0.0, np.inf
    )
    value, degrees, left = level**2 / variance, 1, second - first**2 / variance
    if left > LEAST_SPREAD * variance:
        value, degrees = value + (slope - first / variance * level) ** 2 / left, 2
    ends = ends.within(0.0, np.inf)
    tails = [chi_square_tail(min(float(end), _ENDLESS), 2) for end in (ends.high, ends.low)]
    tail = chi_square_tail(value, degrees)
    return BinnedTest("cox_score", ends.around(value), Interval(*tails).around(tail), cox_null(degrees))


def binned_kuiper(bins: BinnedRows) -> BinnedTest:
    """Shape, `kuiper_test`: the range of the walk at the ends of bins.

    Inside a bin the walk leaves the span of its two ends by at most ``min(c (1 - low), (n - c) high)``: its
    steps up add up to the first at most, its steps down to the second, and it comes back by the other. On
    average it leaves it as Brownian motion does that is looked at now and then: the range is short by
    ``2 · 0.5826 s`` [1]_, s the standard deviation of a bin's sum (bins count by their variance). The value
    has that added, less what `step_overshoot` says the rows' own walk is short by; for a walk that a fault
    drives one way it is too much.

    References
    ----------
    .. [1] Siegmund 1979, Corrected diffusion approximations in certain random walk problems; 0.5826 is
       -ζ(1/2) / √(2π).
    """
    variance, variance_ends = bins.variance().total()
    if variance == 0.0:
        return BinnedTest("kuiper", None, None, KUIPER_NULL)
    walk = np.concatenate(([0.0], np.cumsum((bins.observed() - bins.expected()).value)))
    beyond = np.minimum(bins.positives * bins.low_rest, (bins.rows - bins.positives) * bins.high)
    highest = float((np.maximum(walk[1:], walk[:-1]) + beyond).max())
    lowest = float((np.minimum(walk[1:], walk[:-1]) - beyond).min())
    at_ends = float(walk.max() - walk.min())
    ends = Interval(max(0.0, at_ends - bins.rounding), highest - lowest + bins.rounding)
    scale = math.sqrt(variance)
    overshoot, overshoot_ends = _overshoot(bins)
    between = 2.0 * _BROWNIAN_OVERSHOOT * float((bins.variance().value ** 1.5).sum()) / variance
    spread = min(at_ends + max(0.0, between - overshoot), highest - lowest)
    tails = (ends + overshoot_ends).over(variance_ends.root())
    tail_ends = [brownian_range_tail(float(end)) for end in (tails.high, tails.low)]
    return BinnedTest(
        "kuiper",
        ends.over(variance_ends.root()).around(spread / scale),
        Interval(*tail_ends).around(brownian_range_tail((spread + overshoot) / scale)),
        KUIPER_NULL,
    )


def _overshoot(bins: BinnedRows) -> tuple[float, Interval]:
    """`monitoring.calibration_tests.step_overshoot`."""
    cubes = bins.cubes()
    both = (bins.low, bins.low_rest), (bins.high, bins.high_rest), (bins.mean, 1.0 - bins.mean)
    nearer = [np.minimum(*pair) for pair in both]
    # p(1 - p)(1 + min(p, 1 - p)) rises up to one half and falls after it, as `nearer` does.
    least, most = np.minimum(nearer[0], nearer[1]), np.maximum(nearer[0], nearer[1])
    most = np.where((bins.low_logit < 0.0) & (bins.high_logit > 0.0), 0.5, most)
    low, high, middle = (p * (1.0 - p) * (1.0 + p) for p in (least, most, nearer[2]))
    variance, ends = bins.variance().total()
    weight = bins.squares**2 / bins.rows
    total = (cubes * Interval(low, high)).sum().times(1.0 / 3.0)
    return float(weight @ middle) / (3.0 * variance), total.over(ends)


def _normal(name: str, total: Estimate, variance: Estimate) -> BinnedTest:
    null = "standard normal"
    above, above_ends = total.total()
    square, square_ends = variance.total()
    if square == 0.0:
        return BinnedTest(name, None, None, null)
    z = above / math.sqrt(square)
    ends = above_ends.over(square_ends.root())
    size = ends.squared().root()
    tails = [normal_two_sided(float(end)) for end in (size.high, size.low)]
    return BinnedTest(name, ends.around(z), Interval(*tails).around(normal_two_sided(z)), null)
