"""Reliability, ECE and the tests of calibration: power, closed forms, other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from monitoring.calibration_tests import (
    CalibrationTest,
    calibration_verdict,
    cox_recalibration,
    cox_score_test,
    kuiper_test,
    pcoc_z_test,
    spiegelhalter_test,
)
from monitoring.null_distributions import (
    benjamini_hochberg,
    brownian_range_tail,
    chi_square_tail,
    kolmogorov_tail,
    normal_two_sided,
)
from monitoring.reliability import (
    equal_mass_bins,
    expected_calibration_error,
    reliability_table,
    wilson_interval,
)

TESTS = [pcoc_z_test, cox_score_test, kuiper_test, spiegelhalter_test]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 64, 255])
@pytest.mark.parametrize("statistic", [0.01, 0.5, 3.0, 12.0, 80.0, 400.0])
def test_chi_square_tail_is_that_of_scipy(degrees: int, statistic: float) -> None:
    expected = stats.chi2.sf(statistic, degrees)
    assert chi_square_tail(statistic, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_normal_tail_is_that_of_scipy() -> None:
    for z in (-3.0, 0.0, 1.2, 8.0):
        assert normal_two_sided(z) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-12)


def test_kolmogorov_tail_is_that_of_scipy() -> None:
    for x in (0.0, 0.15, 0.25, 0.6, 1.0, 2.5, 20.0):
        assert kolmogorov_tail(x) == pytest.approx(stats.kstwobign.sf(x), rel=1e-9, abs=1e-12)


def test_brownian_range_has_the_moments_of_feller_and_falls_from_one_to_zero() -> None:
    spread = np.linspace(0.0, 12.0, 24_001)
    tail = np.array([brownian_range_tail(r) for r in spread])
    assert (np.diff(tail) <= 1e-12).all() and tail[0] == 1.0 and tail[-1] < 1e-30
    # E R = ∫ P(R > r) dr = 2 √(2/π); E R² = 2 ∫ r P(R > r) dr = 4 ln 2 (Feller 1951).
    assert np.trapezoid(tail, spread) == pytest.approx(2 * math.sqrt(2 / math.pi), rel=1e-6)
    assert 2 * np.trapezoid(spread * tail, spread) == pytest.approx(4 * math.log(2), rel=1e-6)


def test_benjamini_hochberg_is_that_of_scipy() -> None:
    p = np.random.default_rng(1).random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p), rtol=1e-12)
    assert benjamini_hochberg([]).tolist() == []


def test_each_test_sees_the_fault_it_is_for() -> None:
    rng = np.random.default_rng(3)
    truth = rng.beta(2, 10, size=40_000)
    label = rng.random(40_000) < truth
    logit = np.log(truth / (1 - truth))

    def p(test: Callable[..., CalibrationTest], at: np.ndarray) -> float:
        return test(label, 1 / (1 + np.exp(-at))).p_value or 0.0

    assert p(pcoc_z_test, logit + 0.1) < 1e-6
    centre = float(logit.mean())
    assert p(cox_score_test, centre + 1.2 * (logit - centre)) < 1e-6
    # Level right, shape wrong: a bump that the level test cannot see.
    bump = logit + 0.3 * np.sign(np.sin(4 * logit))
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if (1 / (1 + np.exp(-bump - middle))).sum() > label.sum() else (middle, high)
        )
    assert p(pcoc_z_test, bump + low) > 0.5
    assert p(kuiper_test, bump + low) < 1e-4


def test_spiegelhalter_tells_over_from_under_confidence_around_one_half() -> None:
    rng = np.random.default_rng(5)
    truth = rng.beta(4, 4, size=20_000)
    label = rng.random(20_000) < truth
    logit = np.log(truth / (1 - truth))
    over = spiegelhalter_test(label, 1 / (1 + np.exp(-1.3 * logit))).statistic
    under = spiegelhalter_test(label, 1 / (1 + np.exp(-0.7 * logit))).statistic
    assert over is not None and over > 6 and under is not None and under < -6


def test_kuiper_does_not_depend_on_the_order_of_ties() -> None:
    rng = np.random.default_rng(4)
    probability = np.round(rng.beta(2, 10, size=1000), 1) + 0.01
    label = rng.random(1000) < probability
    order = rng.permutation(1000)
    first, second = kuiper_test(label, probability), kuiper_test(label[order], probability[order])
    assert first.statistic == pytest.approx(second.statistic, rel=1e-9)


def test_cox_score_of_equal_predictions_is_the_squared_level_test_with_one_degree() -> None:
    label, probability = [1, 0, 0, 1, 1], [0.3] * 5
    z = pcoc_z_test(label, probability)
    cox = cox_score_test(label, probability)
    assert z.statistic is not None and cox.statistic == pytest.approx(z.statistic**2)
    assert cox.p_value == pytest.approx(z.p_value) and "1 degree of" in cox.null


def test_cox_recalibration_is_logistic_regression_on_the_logit() -> None:
    rng = np.random.default_rng(6)
    logit = rng.normal(-2, 1.5, size=20_000)
    label = rng.random(20_000) < 1 / (1 + np.exp(-(0.4 + 0.7 * logit)))
    weight = rng.uniform(0.5, 2, size=20_000)
    fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], label, weight)
    found = cox_recalibration(label, 1 / (1 + np.exp(-logit)), weight)
    assert found == pytest.approx((fit.intercept_[0], fit.coef_[0, 0]), abs=1e-5)


@pytest.mark.parametrize(
    ("label", "probability"),
    [([0, 0, 0], [0.1, 0.2, 0.3]), ([0, 1, 1], [0.2, 0.2, 0.2]), ([0, 0, 1, 1], [0.1, 0.2, 0.7, 0.8])],
    ids=["one class", "equal predictions", "separable"],
)
def test_cox_recalibration_without_a_finite_solution_is_none(
    label: list[int], probability: list[float]
) -> None:
    assert cox_recalibration(label, probability) is None


def test_no_rows_leave_every_test_undecided() -> None:
    for test in TESTS:
        outcome = test([], [])
        assert outcome.statistic is None and outcome.p_value is None
    assert calibration_verdict([], [])["status"] == "unknown"
    assert calibration_verdict([0, 0], [0.1, 0.1])["status"] == "unknown"


def test_verdict_needs_a_rejection_and_an_effect_that_matters() -> None:
    rng = np.random.default_rng(21)
    truth = rng.beta(2, 30, size=400_000)
    label = rng.random(400_000) < truth
    assert calibration_verdict(label, truth)["status"] == "good"
    slightly = calibration_verdict(label, truth * 1.03)
    assert slightly["status"] == "watch" and "inside" in slightly["why"]
    badly = calibration_verdict(label, truth * 1.2)
    assert badly["status"] == "bad" and badly["pcoc"] == pytest.approx(1.2, abs=0.03)
    few = calibration_verdict(label[:300], truth[:300] * 1.2)
    assert few["status"] == "good"


def test_equal_mass_bins_hold_equal_counts_and_never_split_a_value() -> None:
    rng = np.random.default_rng(7)
    place = equal_mass_bins(rng.random(1000), 10)
    assert np.bincount(place).tolist() == [100] * 10
    tied = np.repeat([0.1, 0.2, 0.3], [500, 3, 497])
    place = equal_mass_bins(tied, 10)
    assert all(len(set(place[tied == value].tolist())) == 1 for value in (0.1, 0.2, 0.3))
    assert set(place.tolist()) == set(range(place.max() + 1))
    assert equal_mass_bins(np.full(9, 0.5), 4).tolist() == [0] * 9


def test_wilson_interval_is_that_of_scipy() -> None:
    for positives, rows in [(0, 10), (3, 20), (17, 500), (9, 9)]:
        expected = stats.binomtest(positives, rows).proportion_ci(0.95, method="wilson")
        assert wilson_interval(positives / rows, rows) == pytest.approx(tuple(expected), abs=1e-12)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_reliability_rows_add_up_and_cover_a_calibrated_model() -> None:
    rng = np.random.default_rng(8)
    probability = rng.beta(1, 20, size=50_000)
    label = rng.random(50_000) < probability
    table = reliability_table(label, probability, bins=20)
    assert sum(row["rows"] or 0 for row in table) == 50_000
    assert sum(row["positives"] or 0 for row in table) == label.sum()
    inside = [(row["low"] or 0) <= (row["mean_probability"] or 0) <= (row["high"] or 1) for row in table]
    assert sum(inside) >= 16
    for row in table:
        if row["observed_logit"] is not None and row["observed_rate"] is not None:
            assert 1 / (1 + math.exp(-row["observed_logit"])) == pytest.approx(row["observed_rate"])


def test_reliability_of_a_bin_without_positives_has_no_logit_but_an_upper_end() -> None:
    (row,) = reliability_table([0, 0, 0], [0.1, 0.1, 0.1])
    assert row["observed_logit"] is None and row["low_logit"] is None
    assert row["high_logit"] is not None
    assert reliability_table([], []) == []


def test_weights_of_two_narrow_no_interval_but_uneven_weights_widen_it() -> None:
    label, probability = [0, 1, 0, 1], [0.5] * 4
    plain = reliability_table(label, probability)[0]
    doubled = reliability_table(label, probability, 20, [2] * 4)[0]
    assert doubled["low"] == pytest.approx(plain["low"])
    uneven = reliability_table(label, probability, 20, [4, 4, 1, 1])[0]
    assert (uneven["low"] or 0) < (plain["low"] or 0)


def test_ece_of_a_calibrated_model_is_its_null_level_and_a_biased_one_is_far_above() -> None:
    rng = np.random.default_rng(9)
    z = []
    for _ in range(200):
        probability = rng.beta(1, 20, size=20_000)
        outcome = expected_calibration_error(rng.random(20_000) < probability, probability)
        assert outcome is not None and outcome.z is not None
        z.append(outcome.z)
    assert abs(float(np.mean(z))) < 0.3
    assert float(np.std(z)) == pytest.approx(1.0, abs=0.2)
    biased = expected_calibration_error(rng.random(20_000) < probability, probability * 0.7)
    assert biased is not None and biased.z is not None and biased.z > 6
    assert expected_calibration_error([], []) is None
