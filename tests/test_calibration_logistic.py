"""The solver of Platt, temperature and beta, against scikit-learn, scipy and LibSVM's published algorithm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from calibration.link import sigmoid
from calibration.logistic import fit_logistic, smoothed_target
from calibration.platt import fit_line


def lin_lin_weng(decision: np.ndarray, is_positive: np.ndarray) -> tuple[float, float]:
    """A and B of ``P(y = 1) = 1 / (1 + exp(A f + B))``, row by row.

    The pseudo-code of Lin, Lin and Weng (2007), appendix C, written from the paper: what LibSVM does.
    """
    prior1, prior0 = int(is_positive.sum()), int((~is_positive).sum())
    max_iterations, min_step, sigma = 100, 1e-10, 1e-12
    high, low = (prior1 + 1.0) / (prior1 + 2.0), 1.0 / (prior0 + 2.0)
    t = [high if positive else low for positive in is_positive]
    a, b = 0.0, float(np.log((prior0 + 1.0) / (prior1 + 1.0)))

    def objective(a: float, b: float) -> float:
        total = 0.0
        for f, target in zip(decision, t, strict=True):
            z = f * a + b
            if z >= 0:
                total += target * z + np.log1p(np.exp(-z))
            else:
                total += (target - 1.0) * z + np.log1p(np.exp(z))
        return total

    value = objective(a, b)
    for _ in range(max_iterations):
        h11 = h22 = sigma
        h21 = g1 = g2 = 0.0
        for f, target in zip(decision, t, strict=True):
            z = f * a + b
            if z >= 0:
                p, q = np.exp(-z) / (1.0 + np.exp(-z)), 1.0 / (1.0 + np.exp(-z))
            else:
                p, q = 1.0 / (1.0 + np.exp(z)), np.exp(z) / (1.0 + np.exp(z))
            h11, h22, h21 = h11 + f * f * p * q, h22 + p * q, h21 + f * p * q
            g1, g2 = g1 + f * (target - p), g2 + target - p
        if abs(g1) < 1e-9 and abs(g2) < 1e-9:
            break
        determinant = h11 * h22 - h21 * h21
        step_a, step_b = -(h22 * g1 - h21 * g2) / determinant, -(-h21 * g1 + h11 * g2) / determinant
        slope, size = g1 * step_a + g2 * step_b, 1.0
        while size >= min_step:
            new_value = objective(a + size * step_a, b + size * step_b)
            if new_value < value + 0.0001 * size * slope:
                a, b, value = a + size * step_a, b + size * step_b, new_value
                break
            size /= 2.0
        else:
            break
    return a, b


@pytest.mark.parametrize("seed", range(5))
def test_the_line_is_that_of_libsvms_published_algorithm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1.0, 1.5, 300)
    label = rng.random(300) < sigmoid(0.7 * logit + 0.4)
    intercept, slope = fit_line(logit, np.ones(300), label.astype(float))
    a, b = lin_lin_weng(logit, label)
    assert (slope, intercept) == pytest.approx((-a, -b), abs=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_without_smoothing_it_is_scikit_learns_unpenalised_regression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, weight = rng.normal(-1.0, 1.5, (2, 3_000)), rng.uniform(0.1, 4.0, 3_000)
    label = (rng.random(3_000) < sigmoid(0.7 * features[0] - 0.3 * features[1] + 0.4)).astype(float)
    reference = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1_000)
    reference.fit(features.T, label, sample_weight=weight)
    ours = fit_logistic(np.vstack([np.ones(3_000), features]), weight, label, np.zeros(3))
    assert ours == pytest.approx([*reference.intercept_, *reference.coef_[0]], abs=1e-5)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    lower=st.floats(-2.0, 0.9),
    upper=st.floats(1.1, 4.0),
)
def test_between_bounds_it_is_the_minimum_that_scipy_finds(seed: int, lower: float, upper: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(0.0, 1.0, (3, 200)) * rng.uniform(0.2, 3.0, (3, 1))
    x[0] = 1.0
    # Two features that say nearly the same: bounds and Newton steps pull against each other.
    x[2] += rng.uniform(-2.0, 2.0) * x[1]
    rows, theta = rng.uniform(0.5, 20.0, 200), rng.normal(0.0, 3.0, 3)
    target = np.clip(sigmoid(theta @ x) + rng.normal(0.0, 0.05, 200), 0.01, 0.99)
    low, high = np.array([-np.inf, lower, lower]), np.array([np.inf, upper, upper])

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        z = at @ x
        return float((rows * (np.logaddexp(0.0, z) - target * z)).sum()), x @ (rows * (sigmoid(z) - target))

    bounds = list(zip(low, high, strict=True))
    best = minimize(loss, [0.0, 1.0, 1.0], jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-10})
    ours = fit_logistic(x, rows, target, np.array([0.0, 1.0, 1.0]), lower=low, upper=high)
    assert (ours >= low).all()
    assert (ours <= high).all()
    assert loss(ours)[0] <= best.fun + 1e-7 * rows.sum()


def test_what_no_row_tells_apart_stays_where_it_starts() -> None:
    # Twice the same feature: only the sum of the two slopes can be known.
    x = np.linspace(-2.0, 2.0, 50)
    slopes = fit_logistic(np.stack([x, x]), np.ones(50), sigmoid(3.0 * x), np.array([1.0, 1.0]))
    assert slopes == pytest.approx([1.5, 1.5], abs=1e-6)


def test_an_offset_is_part_of_the_logit() -> None:
    rng = np.random.default_rng(0)
    offset, rows = rng.normal(0.0, 1.0, 100), rng.uniform(1.0, 2.0, 100)
    (level,) = fit_logistic(np.ones((1, 100)), rows, sigmoid(offset + 0.7), np.zeros(1), offset=offset)
    assert level == pytest.approx(0.7, abs=1e-9)


def test_targets_are_smoothed_by_the_formula() -> None:
    # Platt (1999): of 3 positives and 7 negatives, 4/5 and 1/9; the groups mix them.
    target = smoothed_target(np.array([4.0, 6.0]), np.array([1.0, 2.0]))
    assert target == pytest.approx([(0.8 + 3 / 9) / 4, (1.6 + 4 / 9) / 6], abs=1e-15)
