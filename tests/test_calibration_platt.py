"""Platt scaling and the sampling correction, against LibSVM, scikit-learn, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from calibration.link import LOGIT_LIMIT, logit_of, sigmoid
from calibration.platt import MINIMUM_SLOPE, PlattCalibrator, fit_line
from calibration.sampling import SamplingCorrection
from calibration.sketch import LogitSketch
from pipelines.errors import ConfigError, DataError, StaleStateError


def click_log(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(-3.0, 1.5, rows)
    return logit, (rng.random(rows) < 1.0 / (1.0 + np.exp(0.3 - 0.6 * logit))).astype(float)


def smoothed(label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    positives, negatives = (weight * label).sum(), (weight * (1 - label)).sum()
    targets: np.ndarray = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    return targets


def line_of(logit: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> PlattCalibrator:
    """The line of rows as they are, without a sketch's resolution."""
    rows = np.ones(len(logit)) if weight is None else weight.astype(float)
    return PlattCalibrator(*fit_line(np.asarray(logit, float), rows, rows * label))


def test_fit_gives_libsvms_numbers() -> None:
    # LibSVM writes 1 / (1 + exp(A f + B)); these A, B are its own for these three rows.
    platt = PlattCalibrator.fit([5.0, -4.0, 1.0], [1, 0, 0])
    assert platt.slope == pytest.approx(0.20261354391187855, abs=1e-4)
    assert platt.intercept == pytest.approx(-0.65236314980010512, abs=1e-4)


def test_fit_is_the_minimum_that_a_general_optimiser_finds() -> None:
    logit, label = click_log(2_000)
    weight = np.random.default_rng(1).uniform(0.2, 3.0, 2_000)
    target = smoothed(label, weight)

    def loss(line: np.ndarray) -> float:
        z = line[0] + line[1] * logit
        return float((weight * (np.logaddexp(0, z) - target * z)).sum())

    best = minimize(loss, [0.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-10})
    platt = line_of(logit, label, weight)
    assert [platt.intercept, platt.slope] == pytest.approx(best.x, abs=1e-5)


def test_fit_is_scikit_learns_logistic_regression_on_smoothed_targets() -> None:
    logit, label = click_log(20_000)
    target = smoothed(label, np.ones(20_000))
    # A soft target t is a positive of weight t and a negative of weight 1 - t.
    both = np.concatenate([logit, logit])[:, None]
    labels = np.repeat([1, 0], 20_000)
    reference = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000)
    reference.fit(both, labels, sample_weight=np.concatenate([target, 1 - target]))
    platt = line_of(logit, label)
    assert platt.slope == pytest.approx(reference.coef_[0, 0], abs=1e-5)
    assert platt.intercept == pytest.approx(reference.intercept_[0], abs=1e-5)


def test_fit_to_a_sketch_is_the_fit_to_its_rows() -> None:
    logit, label = click_log(100_000)
    sketch = LogitSketch()
    sketch.update(logit, label)
    rows, bins = line_of(logit, label), PlattCalibrator.fit_sketch(sketch)
    assert [bins.intercept, bins.slope] == pytest.approx([rows.intercept, rows.slope], abs=2e-4)


def test_a_row_of_whole_weight_is_the_row_that_many_times() -> None:
    logit, label = click_log(1_000)
    weight = np.random.default_rng(1).integers(1, 5, 1_000)
    weighted = line_of(logit, label, weight)
    repeated = line_of(np.repeat(logit, weight), np.repeat(label, weight))
    assert [weighted.intercept, weighted.slope] == pytest.approx(
        [repeated.intercept, repeated.slope], abs=1e-11
    )


def test_mean_prediction_is_the_mean_target() -> None:
    # The gradient of the intercept is zero: a property of every logistic fit.
    logit, label = click_log(5_000)
    platt = line_of(logit, label)
    assert platt.transform(logit).sum() == pytest.approx(smoothed(label, np.ones(5_000)).sum(), abs=1e-8)


def test_separable_rows_stay_finite() -> None:
    platt = PlattCalibrator.fit([-1.0, -2.0, 1.0, 2.0], [0, 0, 1, 1])
    assert np.isfinite([platt.intercept, platt.slope]).all()
    assert 0 < platt.slope < 10


@pytest.mark.parametrize(("label", "rate"), [(0, 1 / 12), (1, 11 / 12)])
def test_one_class_moves_the_level_to_the_smoothed_rate_and_leaves_the_slope(label: int, rate: float) -> None:
    logit = np.linspace(-4, -2, 10)
    platt = line_of(logit, np.full(10, label))
    assert platt.slope == PlattCalibrator.fit(logit, np.full(10, label)).slope == 1.0
    assert platt.transform(logit).mean() == pytest.approx(rate, abs=1e-9)


def test_equal_logits_move_the_level_and_leave_the_slope() -> None:
    platt = line_of(np.full(998, -1.0), np.arange(998) < 99)
    # 99 positives at 100/101 and 899 negatives at 1/901.
    mean_target = (99 * 100 / 101 + 899 / 901) / 998
    assert platt.slope == 1.0
    assert platt.transform([-1.0])[0] == pytest.approx(mean_target, abs=1e-10)


def test_a_model_that_ranks_backwards_gets_the_smallest_slope_and_the_right_level() -> None:
    logit, label = click_log(20_000)
    platt = PlattCalibrator.fit(-logit, label)
    assert platt.slope == pytest.approx(MINIMUM_SLOPE, abs=1e-12)
    assert platt.transform(-logit).sum() == pytest.approx(label.sum(), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 20.0])
@pytest.mark.parametrize("shift", [-25.0, 0.0, 25.0])
def test_the_fit_converges_wherever_the_logits_lie(scale: float, shift: float) -> None:
    rng = np.random.default_rng(5)
    unit = rng.uniform(-0.4, 0.4, 4_000)
    label = (rng.random(4_000) < sigmoid(2 * unit - 1)).astype(float)
    platt = line_of(shift + scale * unit, label)
    reference = line_of(unit, label)
    assert platt.slope * scale == pytest.approx(reference.slope, abs=1e-6)
    assert platt.transform(shift + scale * unit) == pytest.approx(reference.transform(unit), abs=1e-6)


def test_no_rows_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="no rows"):
        PlattCalibrator.fit([], [])
    with pytest.raises(DataError, match="no rows"):
        PlattCalibrator.fit_sketch(LogitSketch())


@pytest.mark.parametrize("slope", [0.0, -1.0])
def test_a_line_that_does_not_rise_is_refused(slope: float) -> None:
    with pytest.raises(DataError):
        PlattCalibrator(0.0, slope)
    with pytest.raises(StaleStateError):
        PlattCalibrator.from_state({**PlattCalibrator().state(), "slope": slope})


def test_sampling_correction_is_the_closed_form_in_probabilities() -> None:
    p = np.linspace(0.001, 0.999, 400)
    for kept in (1.0, 0.5, 0.01):
        assert SamplingCorrection(kept).transform(logit_of(p)) == pytest.approx(
            p / (p + (1 - p) / kept), abs=1e-14
        )


def test_sampling_correction_recovers_the_true_rate_of_a_down_sampled_fit() -> None:
    rng = np.random.default_rng(6)
    label = (rng.random(400_000) < 0.02).astype(float)
    kept = (label == 1) | (rng.random(400_000) < 0.1)
    model_logit = logit_of([label[kept].mean()])
    assert SamplingCorrection(0.1).transform(model_logit)[0] == pytest.approx(0.02, rel=0.03)


def test_keeping_every_negative_changes_no_bit() -> None:
    logit = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, 1001)
    assert (SamplingCorrection(1.0).transform_logit(logit) == logit).all()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_sampling_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="negative_sampling_rate"):
        SamplingCorrection(rate)
