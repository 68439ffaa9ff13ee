"""Figures and tests of binned rows: those of the rows lie within the bounds, wherever the rows lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.sketch import LogitSketch
from monitoring.binned import binned_calibration_error, binned_quality, binned_smooth_error
from monitoring.binned_rows import BinnedRows, BinnedSums
from monitoring.binned_tests import binned_tests
from monitoring.bounded import Bounded, Interval
from monitoring.calibration_tests import (
    cox_score_test,
    kuiper_test,
    pcoc_z_test,
    spiegelhalter_test,
    step_overshoot,
)
from monitoring.null_distributions import brownian_range_tail, chi_square_tail, normal_two_sided
from monitoring.quality import QualitySums
from monitoring.ranking import auc
from monitoring.smooth_error import smooth_calibration_error
from pipelines.errors import DataError


@dataclass
class Rows:
    """Rows, and what they themselves say; by logits, which keep the digits of 1 - p."""

    z: np.ndarray
    y: np.ndarray
    w: np.ndarray

    def __post_init__(self) -> None:
        self.z = np.clip(self.z, -34.0, 34.0)
        self.p, self.q = 1.0 / (1.0 + np.exp(-self.z)), 1.0 / (1.0 + np.exp(self.z))
        self.residual = np.where(self.y, self.q, -self.p)
        self.v = self.w**2 * self.p * self.q

    def sums(self) -> BinnedSums:
        return LogitSketch.of(self.z, self.y, self.w).binned()

    def log_loss(self) -> float:
        return float(self.w @ (np.logaddexp(0.0, self.z) - self.y * self.z) / self.w.sum())

    def brier(self) -> float:
        return float(self.w @ self.residual**2 / self.w.sum())

    def z_of(self, lean: np.ndarray) -> float:
        return float((self.w * lean) @ self.residual / math.sqrt(lean**2 @ self.v))

    def cox(self) -> tuple[float, int]:
        level, total = float(self.w @ self.residual), float(self.v.sum())
        x = self.z - float(self.v @ self.z) / total
        slope = float(self.v @ x**2)
        if slope <= 1e-12 * total:
            return level**2 / total, 1
        return level**2 / total + float((self.w * self.residual) @ x) ** 2 / slope, 2

    def kuiper(self) -> tuple[float, float]:
        order = np.argsort(self.z, kind="stable")
        walk, z = np.cumsum((self.w * self.residual)[order]), self.z[order]
        read = np.append(0.0, walk[np.append(z[1:] != z[:-1], True)])
        scale, spread = math.sqrt(float(self.v.sum())), float(read.max() - read.min())
        return spread / scale, brownian_range_tail((spread + step_overshoot(self.p, self.w)) / scale)


def within(found: Bounded | None, exact: float) -> bool:
    assert found is not None and math.isfinite(found.value) and found.error >= 0.0
    return found.low <= exact <= found.high


def check_all(rows: Rows, least_weight: float) -> None:
    """Every bound against the rows."""
    sums = rows.sums()
    total, positives = float(rows.w.sum()), float(rows.w @ rows.y)
    found = binned_quality(sums, least_weight)
    assert found.rows == total and found.positives == positives
    assert found.effective_rows == pytest.approx(total**2 / float(rows.w @ rows.w), rel=1e-3)
    assert within(found.log_loss, rows.log_loss()) and within(found.brier, rows.brier())
    if positives > 0.0:
        assert within(found.pcoc, float(rows.w @ rows.p) / positives)
    if 0.0 < positives < total:
        rate = positives / total
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
        assert within(found.ne, rows.log_loss() / entropy) and within(
            found.rig, 1 - rows.log_loss() / entropy
        )
        exact = auc(rows.y, rows.p, rows.w)
        assert exact is not None and within(found.auc, exact)
    check_tests(rows, least_weight)


def check_tests(rows: Rows, least_weight: float) -> None:
    level, cox, kuiper, spread = binned_tests(rows.sums(), least_weight)
    one = rows.z_of(np.ones(len(rows.z)))
    assert within(level.statistic, one) and within(level.p_value, normal_two_sided(one))
    lean = rows.q - rows.p
    if (np.abs(lean) > 1e-6).any():
        two = rows.z_of(lean)
        assert within(spread.statistic, two) and within(spread.p_value, normal_two_sided(two))
    statistic, degrees = rows.cox()
    assert cox.statistic is not None and cox.p_value is not None
    assert cox.statistic.low <= statistic <= cox.statistic.high
    assert cox.p_value.low <= chi_square_tail(statistic, degrees) <= cox.p_value.high
    spread_of_walk, tail = rows.kuiper()
    assert within(kuiper.statistic, spread_of_walk) and within(kuiper.p_value, tail)


EDGE = st.integers(-4352, 4352).map(lambda k: k / 128.0)
ONE_BIN = st.integers(0, 64).map(lambda k: -3.0 + k / 128.0 / 65.0)
LOGIT = st.one_of(st.floats(-40.0, 40.0), EDGE, ONE_BIN, st.floats(-4.0, 1.0))
WEIGHT = st.integers(1, 1024).map(lambda k: k / 256.0)


@settings(max_examples=300)
@given(st.lists(st.tuples(LOGIT, st.booleans()), min_size=1, max_size=60))
def test_bounds_hold_for_any_rows(rows: list[tuple[float, bool]]) -> None:
    z, y = (np.array(column) for column in zip(*rows, strict=True))
    check_all(Rows(z, y, np.ones(len(z))), 1.0)


@settings(max_examples=300)
@given(st.lists(st.tuples(LOGIT, st.booleans(), WEIGHT), min_size=1, max_size=60))
def test_bounds_hold_for_any_weights(rows: list[tuple[float, bool, float]]) -> None:
    z, y, w = (np.array(column) for column in zip(*rows, strict=True))
    check_all(Rows(z, y, w), 1.0 / 256.0)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("bins", [1, 40])
def test_bounds_hold_where_all_positives_lie_at_one_edge_of_their_bins(upper: bool, bins: int) -> None:
    rng = np.random.default_rng(1)
    low = -3.0 + rng.integers(0, bins, 5000) / 128.0
    y = rng.random(5000) < 0.05
    check_all(Rows(np.where(y == upper, low + 0.99999 / 128.0, low), y, np.ones(5000)), 1.0)


def _world(rows: int, seed: int = 2) -> Rows:
    rng = np.random.default_rng(seed)
    z = rng.normal(-3.0, 1.0, rows)
    y = rng.random(rows) < 1.0 / (1.0 + np.exp(-1.1 * z - 0.1))
    return Rows(z, y, np.ones(rows))


def test_the_rows_own_figures_are_those_of_monitoring() -> None:
    rows = _world(5000)
    sums = QualitySums()
    sums.update(rows.y, rows.p)
    figures = sums.value()
    assert (rows.log_loss(), rows.brier()) == pytest.approx((figures["log_loss"], figures["brier"]))
    assert pcoc_z_test(rows.y, rows.p).statistic == pytest.approx(rows.z_of(np.ones(5000)))
    assert spiegelhalter_test(rows.y, rows.p).statistic == pytest.approx(rows.z_of(rows.q - rows.p))
    assert cox_score_test(rows.y, rows.p).statistic == pytest.approx(rows.cox()[0])
    outcome = kuiper_test(rows.y, rows.p)
    assert (outcome.statistic, outcome.p_value) == pytest.approx(rows.kuiper())
    found = binned_quality(rows.sums())
    assert within(found.pcoc_low, figures["pcoc_low"] or 0.0)
    assert within(found.pcoc_high, figures["pcoc_high"] or 0.0)


def test_ordinary_rows_lie_far_closer_than_the_bounds_say_and_level_tests_are_sharp() -> None:
    rows = _world(100_000)
    found, tests = binned_quality(rows.sums()), binned_tests(rows.sums())
    assert found.ne is not None and found.auc is not None and found.brier is not None
    assert found.ne.error < 2e-3 and found.auc.error < 2e-3 and found.brier.error < 1e-3
    assert (
        abs(found.log_loss.value - rows.log_loss()) < 0.05 * found.log_loss.error if found.log_loss else False
    )
    level, cox, kuiper, spread = tests
    for one, exact in ((level, rows.z_of(np.ones(100_000))), (spread, rows.z_of(rows.q - rows.p))):
        assert one.statistic is not None and one.statistic.value == pytest.approx(exact, abs=0.01)
    assert level.statistic is not None and level.statistic.error < 1e-3
    assert cox.statistic is not None and cox.statistic.value == pytest.approx(rows.cox()[0], rel=0.02)
    assert kuiper.statistic is not None
    assert kuiper.statistic.value == pytest.approx(rows.kuiper()[0], abs=0.05)
    assert [one.rejects(0.01) for one in (level, cox)] == [True, True]


def test_p_values_of_calibrated_rows_are_those_of_the_rows_on_average() -> None:
    rng = np.random.default_rng(3)
    away = []
    for _ in range(100):
        z = rng.normal(-3.5, 1.0, 20_000)
        rows = Rows(z, rng.random(20_000) < 1.0 / (1.0 + np.exp(-z)), np.ones(20_000))
        check_tests(rows, 1.0)
        _, cox, kuiper, _ = binned_tests(rows.sums())
        assert cox.p_value is not None and kuiper.p_value is not None
        away.append(
            (cox.p_value.value - chi_square_tail(*rows.cox()), kuiper.p_value.value - rows.kuiper()[1])
        )
    assert np.abs(np.mean(away, axis=0)) == pytest.approx([0.0, 0.0], abs=5e-3)
    assert np.abs(away).mean(axis=0) == pytest.approx([0.0, 0.01], abs=6e-3)


def test_a_test_whose_bound_straddles_the_level_says_neither() -> None:
    rng = np.random.default_rng(4)
    z = -3.0 + rng.random(4000) / 128.0
    (_, cox, kuiper, _) = binned_tests(Rows(z, rng.random(4000) < 0.05, np.ones(4000)).sums())
    assert cox.rejects(0.05) is None and kuiper.rejects(0.05) is None
    assert "1 degree of" in cox.null


@pytest.mark.parametrize("weighted", [False, True])
def test_smoothed_error_of_bins_is_that_of_the_rows_within_its_bound(weighted: bool) -> None:
    for seed, rows in enumerate([_world(300), _world(5000), _world(60_000)]):
        if weighted:
            rows.w = np.random.default_rng(seed).integers(1, 512, len(rows.z)) / 128.0
        exact = smooth_calibration_error(rows.y, rows.p, rows.w)
        found = binned_smooth_error(rows.sums(), 1.0 / 128.0 if weighted else 1.0)
        assert exact is not None and found is not None
        assert within(found.smooth_ece, exact.smooth_ece)
        assert found.smooth_ece.value == pytest.approx(exact.smooth_ece, rel=0.01)
        assert found.null == pytest.approx(exact.null, rel=0.01)


@pytest.mark.parametrize("stretch", [1, 25])
def test_smoothed_error_holds_where_positives_change_their_edge_of_the_bin_with_each_stretch(
    stretch: int,
) -> None:
    rng = np.random.default_rng(11)
    low = -2.0 + rng.integers(0, 200, 50_000) / 128.0
    y = rng.random(50_000) < 1.0 / (1.0 + np.exp(-low))
    upper = (np.floor(low * 128.0) // stretch) % 2 == y
    rows = Rows(np.where(upper, low + 0.99999 / 128.0, low), y, np.ones(50_000))
    exact, found = smooth_calibration_error(rows.y, rows.p), binned_smooth_error(rows.sums())
    assert exact is not None and found is not None and within(found.smooth_ece, exact.smooth_ece)
    if stretch > 1:
        # The bound is not idle: these rows use a good part of it.
        assert abs(exact.smooth_ece - found.smooth_ece.value) > 0.02 * found.smooth_ece.error


@settings(max_examples=50)
@given(st.lists(st.tuples(st.one_of(ONE_BIN, st.floats(-6.0, 6.0)), st.booleans()), min_size=1, max_size=30))
def test_smoothed_error_holds_for_any_rows(rows: list[tuple[float, bool]]) -> None:
    z, y = (np.array(column) for column in zip(*rows, strict=True))
    world = Rows(z, y, np.ones(len(z)))
    exact, found = smooth_calibration_error(world.y, world.p), binned_smooth_error(world.sums())
    assert exact is not None and found is not None
    # The rows' own value is taken on a grid as well.
    assert abs(found.smooth_ece.value - exact.smooth_ece) <= found.smooth_ece.error + 2e-3 * exact.smooth_ece


@pytest.mark.parametrize("groups", [1, 7, 20])
def test_ece_over_groups_that_end_at_bins_is_that_of_the_rows_in_these_groups(groups: int) -> None:
    rows = _world(20_000)
    found = binned_calibration_error(rows.sums(), groups)
    assert found is not None and found.z is not None and found.groups <= groups
    # The groups once more, row by row: where the middle of a row's bin falls in the cumulated rows.
    place = np.floor(rows.z * 128.0)
    _, bin_of_row, count = np.unique(place, return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - 0.5 * count) / 20_000
    group = np.minimum((middle * groups).astype(int), groups - 1)[bin_of_row]
    difference, noise = np.bincount(group, rows.residual), np.bincount(group, rows.v)
    ece = float(np.abs(difference).sum()) / 20_000
    null = float(np.sqrt(noise * 2 / math.pi).sum()) / 20_000
    spread = math.sqrt(float(noise.sum()) * (1 - 2 / math.pi)) / 20_000
    assert within(found.ece, ece) and found.ece.error < 1e-9
    assert within(found.null, null) and found.null.error < 1e-3 * null
    assert within(found.z, (ece - null) / spread)
    assert within(found.relative, ece / rows.y.mean())


def test_no_rows_give_nothing() -> None:
    sums = LogitSketch().binned()
    found = binned_quality(sums)
    assert found.rows == 0.0 and found.log_loss is None and found.pcoc is None
    assert all(one.statistic is None and one.rejects(0.05) is None for one in binned_tests(sums))
    assert binned_smooth_error(sums) is None and binned_calibration_error(sums) is None
    nobody = binned_quality(LogitSketch.of([0.0, 1.0], [0, 0]).binned())
    assert nobody.pcoc is None and nobody.ne is None and nobody.auc is None and nobody.log_loss is not None


def test_rounding_of_many_rows_of_the_least_rates_is_in_the_bounds() -> None:
    rng = np.random.default_rng(9)
    z = rng.uniform(-16.0, -14.0, 200_000)
    y = rng.random(200_000) < 1e-3
    check_all(Rows(z, y, np.ones(200_000)), 1.0)
    weight = rng.integers(1, 3, 200_000) / 65536.0
    light = Rows(z, y, weight)
    found = binned_quality(light.sums(), 2.0**-16)
    # Each w p is far below the unit of 2**-32, and the sum says nothing; the bins' edges still do.
    assert found.pcoc is not None and found.pcoc.error < 0.01 * found.pcoc.value
    assert found.effective_rows is None
    assert within(found.pcoc, float(light.w @ light.p) / float(light.w @ light.y))


def test_a_least_weight_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="least weight above 0"):
        BinnedRows(LogitSketch.of([0.0], [1]).binned(), 0.0)


def test_rows_of_weight_one_are_told_from_others_only_where_no_weight_may_lie_below() -> None:
    sums = LogitSketch.of([0.0, 1.0], [0, 1]).binned()
    assert BinnedRows(sums).alike and not BinnedRows(sums, 0.5).alike
    assert not BinnedRows(LogitSketch.of([0.0, 1.0], [0, 1], [1.0, 2.0]).binned()).alike


FINITE = st.floats(-1e3, 1e3)
SPAN = st.tuples(FINITE, FINITE).map(lambda pair: Interval(min(pair), max(pair)))


@given(SPAN, SPAN, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_interval_arithmetic_holds_the_results_of_all_numbers_within(
    a: Interval, b: Interval, s: float, t: float
) -> None:
    x, y = (float(one.low) + share * (float(one.high) - float(one.low)) for one, share in ((a, s), (b, t)))
    x, y = min(x, float(a.high)), min(y, float(b.high))
    for found, exact in ((a + b, x + y), (a - b, x - y), (a * b, x * y), (a.squared(), x * x)):
        slack = 1e-12 * (1.0 + abs(exact))
        assert float(found.low) - slack <= exact <= float(found.high) + slack
    positive = b.within(0.5, 1e3)
    ratio = a.over(positive)
    exact = x / min(max(y, 0.5), 1e3)
    assert float(ratio.low) - 1e-9 <= exact <= float(ratio.high) + 1e-9
    endless = a.over(Interval(0.0, 1.0))
    assert (endless.low, endless.high) == (-math.inf, math.inf)
    nothing = Interval(0.0, 0.0) * endless
    assert (float(nothing.low), float(nothing.high)) == (0.0, 0.0)
