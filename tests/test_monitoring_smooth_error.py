"""The smoothed calibration error against brute force over rows and grid, and its null against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad

from monitoring.smooth_error import (
    NullError,
    SmoothedResiduals,
    fixed_point,
    smooth_calibration_error,
)

# Rates as of clicks, and as of coin tosses with predictions at both ends.
WORLDS = [(2.0, 38.0, 1200), (0.3, 0.3, 400)]


def _kernel(t: np.ndarray, position: float, width: float) -> np.ndarray:
    """The Gaussian kernel reflected at 0 and 1, by its images."""
    images = [2.0 * k + sign * position for k in (-1, 0, 1) for sign in (1.0, -1.0)]
    total = sum(np.exp(-0.5 * ((t - image) / width) ** 2) for image in images)
    return np.asarray(total / (width * math.sqrt(2.0 * math.pi)))


def _brute(position: np.ndarray, mass: np.ndarray, width: float) -> float:
    t = (np.arange(4000) + 0.5) / 4000
    total = np.zeros(4000)
    for at, much in zip(position, mass, strict=True):
        total += much * _kernel(t, at, width)
    return float(np.abs(total).mean())


@pytest.mark.parametrize(("a", "b", "rows"), WORLDS)
def test_the_error_solves_the_equation_that_defines_it(a: float, b: float, rows: int) -> None:
    rng = np.random.default_rng(1)
    truth = rng.beta(a, b, rows)
    label = rng.random(rows) < truth
    probability, weight = np.clip(1.3 * truth, 0.0, 1.0), rng.uniform(0.5, 2.0, rows)
    found = smooth_calibration_error(label, probability, weight)
    assert found is not None and found.p_value is None
    mass = weight * (probability - label) / weight.sum()
    assert _brute(probability, mass, found.smooth_ece) == pytest.approx(found.smooth_ece, rel=1e-3)
    assert found.relative == pytest.approx(found.smooth_ece * weight.sum() / weight[label].sum())


@pytest.mark.parametrize("width", [0.004, 0.05, 0.6])
def test_smoothing_is_that_of_the_kernel_by_its_images_and_never_grows_with_the_width(width: float) -> None:
    rng = np.random.default_rng(2)
    position, mass = rng.random(60) ** 3, rng.normal(size=60)
    position[:2] = 0.0, 1.0
    residuals = SmoothedResiduals(position, mass)
    assert residuals.absolute(width) == pytest.approx(_brute(position, mass, width), rel=3e-3)
    assert residuals.absolute(1.1 * width) <= residuals.absolute(width)


def test_the_expected_error_of_a_perfect_model_is_the_integral_of_its_formula() -> None:
    position, variance, width = np.array([0.01, 0.03, 0.5, 0.98]), np.array([1.0, 2.0, 0.5, 1.0]) * 1e-4, 0.02

    def spread(t: float) -> float:
        kernel = np.array([float(_kernel(np.array(t), at, width)) for at in position])
        return math.sqrt(2.0 / math.pi * float(variance @ kernel**2))

    expected, _ = quad(spread, 0.0, 1.0, points=[0.05, 0.45, 0.55, 0.9], limit=200)
    assert NullError(position, variance).expected(width) == pytest.approx(expected, rel=2e-3)


def test_the_null_is_the_middle_of_what_calibrated_models_show_and_its_tail_is_uniform() -> None:
    rng = np.random.default_rng(3)
    probability = rng.beta(2, 8, 400)
    found = [
        smooth_calibration_error(rng.random(400) < probability, probability, draws=19, seed=seed)
        for seed in range(500)
    ]
    errors = np.array([one.smooth_ece for one in found if one is not None])
    tails = np.array([one.p_value for one in found if one is not None])
    assert found[0] is not None
    assert found[0].null == pytest.approx(float(errors.mean()), rel=0.05)
    # One of 20 ranks; four standard errors of a share of 0.05 in 500 samples are 0.039.
    assert float(np.mean(tails <= 0.05)) == pytest.approx(0.05, abs=0.039)
    assert float(tails.mean()) == pytest.approx(0.525, abs=4 * 0.29 / math.sqrt(500))


def test_a_constant_shift_that_is_wide_of_the_noise_is_found_at_its_size() -> None:
    rng = np.random.default_rng(4)
    truth = rng.uniform(0.3, 0.5, 100_000)
    found = smooth_calibration_error(rng.random(100_000) < truth, truth + 0.1, draws=19)
    assert found is not None and found.smooth_ece == pytest.approx(0.1, abs=0.005)
    assert found.p_value == pytest.approx(1 / 20)


def test_weights_of_two_are_rows_given_twice_for_the_error_but_not_for_its_noise() -> None:
    rng = np.random.default_rng(5)
    probability = rng.beta(2, 8, 500)
    label = rng.random(500) < 0.7 * probability
    twice = smooth_calibration_error(np.tile(label, 2), np.tile(probability, 2))
    weighted = smooth_calibration_error(label, probability, np.full(500, 2.0))
    assert twice is not None and weighted is not None
    assert weighted.smooth_ece == pytest.approx(twice.smooth_ece, rel=1e-9)
    assert weighted.null > 1.1 * twice.null


def test_rows_without_error_and_no_rows() -> None:
    sure = smooth_calibration_error([0, 1], [0.0, 1.0])
    assert sure is not None and sure.smooth_ece == 0.0 and sure.null == 0.0
    assert smooth_calibration_error([], []) is None
    nobody = smooth_calibration_error([0, 0], [0.1, 0.1])
    assert nobody is not None and nobody.relative is None
    # Two rows of opposite sides of a constant prediction: nothing is left at any width.
    even = smooth_calibration_error([0, 1], [0.5, 0.5])
    assert even is not None and even.smooth_ece == pytest.approx(0.0, abs=1e-12)


def test_fixed_point_of_known_functions() -> None:
    assert fixed_point(lambda width: 0.01 / math.sqrt(width), 0.5) == pytest.approx(0.01 ** (2 / 3), rel=1e-4)
    assert fixed_point(lambda width: 0.2, 1e-6) == pytest.approx(0.2, rel=1e-4)
    assert fixed_point(lambda width: max(0.0, 0.3 - width), 0.9) == pytest.approx(0.15, rel=1e-4)
    assert fixed_point(lambda width: 0.0, 0.5) == 0.0
