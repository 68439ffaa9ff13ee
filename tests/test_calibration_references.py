"""Beta, temperature, histogram, plain isotonic and decayed calibration, against independent references."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from sklearn.isotonic import IsotonicRegression

from calibration.base import Calibrator
from calibration.beta import BetaCalibrator
from calibration.decayed import DecayedCalibrator
from calibration.histogram import GROUPS, HistogramCalibrator
from calibration.isotonic import IsotonicCalibrator
from calibration.link import sigmoid
from calibration.plain_isotonic import PlainIsotonicCalibrator
from calibration.platt import MINIMUM_SLOPE, PlattCalibrator
from calibration.sketch import LogitSketch
from calibration.temperature import MAXIMUM_SLOPE, TemperatureCalibrator
from pipelines.errors import ConfigError, DataError
from tests.calibrators import click_log


def smoothed(label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Platt's targets, row by row."""
    positives, negatives = (weight * label).sum(), (weight * (1 - label)).sum()
    targets: np.ndarray = label * (positives + 1) / (positives + 2) + (1 - label) / (negatives + 2)
    return targets


def one_a_bin(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows so far apart that each has a bin of its own: what a sketch then costs is rounding only."""
    rng = np.random.default_rng(seed)
    logit = rng.permutation(np.linspace(-6.0, 6.0, rows))
    label = (rng.random(rows) < sigmoid(0.7 * logit + np.sin(logit))).astype(float)
    return logit, label, rng.integers(1, 9, rows).astype(float)


# -- plain isotonic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_rows_one_a_bin_give_scikit_learns_isotonic_regression(seed: int) -> None:
    logit, label, weight = one_a_bin(1_000, seed)
    reference = IsotonicRegression().fit_transform(logit, label, sample_weight=weight)
    ours = PlainIsotonicCalibrator.fit(logit, label, weight).transform(logit)
    inside = (reference > 0.0) & (reference < 1.0)
    # A bin says where its row is to some 1e-8 logits: at the end of a block that is a hair off its value.
    assert ours[inside] == pytest.approx(reference[inside], abs=1e-6)
    assert (ours[reference == 0.0] < 0.5 * reference[inside].min() + 1e-6).all()
    assert (1.0 - ours[reference == 1.0] < 0.5 * (1.0 - reference[inside].max()) + 1e-6).all()


def test_bins_give_scikit_learns_isotonic_regression_of_the_bins() -> None:
    logit, label = click_log(50_000)
    sketch = LogitSketch.of(logit, label)
    z, rows, positives, _ = sketch.bins()
    reference = IsotonicRegression().fit_transform(z, positives / rows, sample_weight=rows)
    ours = PlainIsotonicCalibrator.fit_sketch(sketch).transform(z)
    inside = (reference > 0.0) & (reference < 1.0)
    assert ours[inside] == pytest.approx(reference[inside], abs=1e-9)


def test_of_no_positives_plain_isotonic_says_half_of_one_among_one_more() -> None:
    plain = PlainIsotonicCalibrator.fit(np.linspace(-1.0, 1.0, 99), np.zeros(99))
    assert plain.transform([-5.0, 0.0, 5.0]) == pytest.approx([0.5 / 100] * 3, rel=1e-12)


# -- histogram -----------------------------------------------------------------------------------------


def test_histogram_says_the_smoothed_rate_of_each_twentieth_of_the_rows() -> None:
    logit, label, _ = one_a_bin(1_000, 0)
    order = np.argsort(logit)
    base = (label.sum() + 1.0) / 1_002.0
    rates = [(label[part].sum() + 1.0) / (50.0 + 1.0 / base) for part in np.split(order, GROUPS)]
    pooled = IsotonicRegression().fit_transform(np.arange(GROUPS), rates)
    ours = HistogramCalibrator.fit(logit, label).transform(logit[order])
    assert ours == pytest.approx(np.repeat(pooled, 50), abs=1e-9)


def test_histogram_and_plain_isotonic_are_constant_past_the_ends() -> None:
    logit, label = click_log()
    for calibrator in (HistogramCalibrator.fit(logit, label), PlainIsotonicCalibrator.fit(logit, label)):
        for far, end in ((-30.0, logit.min()), (30.0, logit.max())):
            assert calibrator.transform([far])[0] == pytest.approx(calibrator.transform([end])[0], abs=1e-6)


# -- temperature ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_temperature_is_the_minimum_that_scipy_finds(seed: int) -> None:
    logit, label, weight = one_a_bin(500, seed)
    target = smoothed(label, weight)

    def loss(slope: float) -> float:
        z = slope * logit
        return float((weight * (np.logaddexp(0.0, z) - target * z)).sum())

    best = minimize_scalar(loss, bounds=(0.05, 20.0), method="bounded", options={"xatol": 1e-10})
    fitted = TemperatureCalibrator.fit(logit, label, weight)
    assert fitted.slope == pytest.approx(best.x, abs=1e-6)
    assert fitted.temperature == pytest.approx(1.0 / best.x, abs=1e-6)


def test_temperature_keeps_a_wrong_level() -> None:
    # Why it is not for clicks: all it can do about a level is to bend the slope.
    rng = np.random.default_rng(0)
    logit = rng.normal(-2.0, 1.0, 100_000)
    label = (rng.random(100_000) < sigmoid(logit + 0.7)).astype(float)
    temperature, platt = TemperatureCalibrator.fit(logit, label), PlattCalibrator.fit(logit, label)
    assert platt.transform(logit).sum() == pytest.approx(label.sum(), rel=1e-3)
    assert temperature.transform([0.0])[0] == 0.5
    low = logit < -3.0
    assert temperature.transform(logit[low]).sum() > 1.3 * label[low].sum()


def test_slopes_stay_between_their_bounds() -> None:
    far = np.array([-3.0, -2.0, 2.0, 3.0] * 50)
    backwards = (far < 0).astype(float)
    assert TemperatureCalibrator.fit(far, backwards).slope == MINIMUM_SLOPE
    assert TemperatureCalibrator.fit(far / 1e4, 1.0 - backwards).slope == MAXIMUM_SLOPE
    beta = BetaCalibrator.fit(far, backwards)
    assert (beta.low_slope, beta.high_slope) == (MINIMUM_SLOPE, MINIMUM_SLOPE)
    assert beta.transform(far).sum() == pytest.approx(100.0, rel=0.01)


# -- beta ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_beta_is_the_minimum_that_scipy_finds(seed: int) -> None:
    logit, label, weight = one_a_bin(500, seed)
    target, p = smoothed(label, weight), sigmoid(logit)

    def loss(theta: np.ndarray) -> float:
        # As in the paper, by probabilities: c + a ln p - b ln(1 - p).
        z = theta[0] + theta[1] * np.log(p) - theta[2] * np.log1p(-p)
        return float((weight * (np.logaddexp(0.0, z) - target * z)).sum())

    bounds = [(None, None), (MINIMUM_SLOPE, MAXIMUM_SLOPE), (MINIMUM_SLOPE, MAXIMUM_SLOPE)]
    best = minimize(
        loss, [0.0, 1.0, 1.0], bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 9999}
    )
    fitted = BetaCalibrator.fit(logit, label, weight)
    found = np.array([fitted.level, fitted.low_slope, fitted.high_slope])
    assert loss(found) <= best.fun + 1e-6
    assert found == pytest.approx(best.x, abs=0.01)


def test_beta_gives_betacals_numbers() -> None:
    # Slopes of betacal 1.1.0, `BetaCalibration("abm")`, fitted to these rows; it does not smooth targets.
    rng = np.random.default_rng(0)
    logit = rng.normal(-1.0, 2.0, 50_000)
    label = rng.random(50_000) < sigmoid(0.7 * logit + 0.3 * np.sin(logit))
    fitted = BetaCalibrator.fit(logit, label)
    assert fitted.low_slope == pytest.approx(0.6709955530595241, abs=1e-3)
    assert fitted.high_slope == pytest.approx(0.9440608985109481, abs=2e-3)


def test_beta_of_equal_slopes_is_a_line() -> None:
    logit = np.linspace(-20.0, 20.0, 101)
    line = PlattCalibrator(-0.3, 0.8).transform_logit(logit)
    assert BetaCalibrator(-0.3, 0.8, 0.8).transform_logit(logit) == pytest.approx(line, abs=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.5, 1.0), (1.0, 0.4), (1.5, 0.7)])
def test_beta_finds_the_map_that_made_the_labels(low: float, high: float) -> None:
    rng = np.random.default_rng(1)
    logit = rng.normal(0.0, 3.0, 300_000)
    truth = BetaCalibrator(-0.5, low, high)
    fitted = BetaCalibrator.fit(logit, rng.random(300_000) < truth.transform(logit))
    assert fitted.level == pytest.approx(-0.5, abs=0.05)
    assert (fitted.low_slope, fitted.high_slope) == pytest.approx((low, high), abs=0.03)


# -- decayed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_decayed_is_the_fit_to_rows_weighed_by_their_age(method: str) -> None:
    logit, label = click_log(20_000)
    windows = np.split(np.arange(20_000), 10)
    decayed = DecayedCalibrator.fit(logit[windows[0]], label[windows[0]], half_life=5_000.0, method=method)
    for window in windows[1:]:
        decayed.update(logit[window], label[window])
    # Whole windows have passed since a row's own.
    age = 2_000.0 * (9 - np.arange(20_000) // 2_000)
    reference: dict[str, type[Calibrator]] = {"isotonic": IsotonicCalibrator, "platt": PlattCalibrator}
    by_hand = reference[method].fit(logit, label, 0.5 ** (age / 5_000.0))
    grid = np.linspace(-8.0, 4.0, 200)
    assert decayed.transform_logit(grid) == pytest.approx(by_hand.transform_logit(grid), abs=1e-4)


def test_decayed_parts_of_the_same_windows_add_up() -> None:
    logit, label = click_log(8_000)
    a, b = (slice(0, 4_000), slice(4_000, 8_000))
    parts = [DecayedCalibrator.fit(logit[p][:2_000], label[p][:2_000], half_life=3_000.0) for p in (a, b)]
    for calibrator, p in zip(parts, (a, b), strict=True):
        calibrator.update(logit[p][2_000:], label[p][2_000:])
    first, last = np.r_[0:2_000, 4_000:6_000], np.r_[2_000:4_000, 6_000:8_000]
    # The whole has twice the rows a window, so that it forgets at twice the half-life.
    whole = DecayedCalibrator.fit(logit[first], label[first], half_life=6_000.0)
    whole.update(logit[last], label[last])
    grid = np.linspace(-8.0, 4.0, 200)
    merged = parts[0].merge(parts[1])
    assert merged.transform_logit(grid) == pytest.approx(whole.transform_logit(grid), abs=1e-4)


@pytest.mark.parametrize(("half_life", "method"), [(0.0, "isotonic"), (float("nan"), "platt"), (1.0, "beta")])
def test_a_decayed_calibrator_of_nonsense_is_refused(half_life: float, method: str) -> None:
    with pytest.raises(ConfigError, match="decayed"):
        DecayedCalibrator.fit([0.0], [1], half_life=half_life, method=method)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BetaCalibrator(0.0, 0.0, 1.0),
        lambda: BetaCalibrator(float("inf"), 1.0, 1.0),
        lambda: TemperatureCalibrator(0.0),
        lambda: HistogramCalibrator([0.0], [1.0]),
        lambda: HistogramCalibrator([0.0], [1.0, 0.0]),
        lambda: PlainIsotonicCalibrator([0.0, 1.0], [1.0, 0.0]),
        lambda: PlainIsotonicCalibrator([], []),
        lambda: IsotonicCalibrator([0.0, 1.0], [0.0, 0.0], 1.0),
    ],
)
def test_parameters_that_turn_rows_round_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(DataError):
        make()
