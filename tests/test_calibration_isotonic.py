"""Strictly increasing isotonic calibration, against brute force, scikit-learn and known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from calibration.isotonic import IsotonicCalibrator
from calibration.link import sigmoid
from calibration.platt import PlattCalibrator
from calibration.pooling import pooled_starts
from pipelines.errors import DataError, StaleStateError


def pooled(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    starts = pooled_starts(value, weight)
    means = np.add.reduceat(value * weight, starts) / np.add.reduceat(weight, starts)
    return np.repeat(means, np.diff(np.append(starts, len(value))))


def min_max_isotonic(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The isotonic fit by its min-max formula: max over i <= k of min over j >= k of mean(i..j)."""
    n = len(value)
    mean = [[np.average(value[i : j + 1], weights=weight[i : j + 1]) for j in range(i, n)] for i in range(n)]
    return np.array([max(min(mean[i][j - i] for j in range(k, n)) for i in range(k + 1)) for k in range(n)])


def excess_log_loss(logit: np.ndarray, truth: np.ndarray) -> float:
    """Expected log loss above the oracle's, exactly: no label noise."""
    oracle = -(truth * np.log(truth) + (1 - truth) * np.log1p(-truth))
    return float((np.logaddexp(0, logit) - truth * logit - oracle).mean())


def curved(logit: np.ndarray) -> np.ndarray:
    return sigmoid(-0.5 - np.logaddexp(0.0, -(logit + 1.0)) + 0.15 * logit)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=12))
def test_pooling_is_the_min_max_formula(pairs: list[tuple[int, int]]) -> None:
    value, weight = np.array(pairs, dtype=float).T
    assert pooled(value, weight) == pytest.approx(min_max_isotonic(value, weight), abs=1e-12)


def test_pooling_is_scikit_learns_isotonic_regression() -> None:
    rng = np.random.default_rng(0)
    value, weight = np.linspace(0, 1, 3_000) + rng.normal(0, 0.3, 3_000), rng.uniform(0.1, 5, 3_000)
    reference = IsotonicRegression().fit_transform(np.arange(3_000), value, sample_weight=weight)
    assert pooled(value, weight) == pytest.approx(reference, abs=1e-10)


def test_block_means_increase_strictly() -> None:
    rng = np.random.default_rng(1)
    value, weight = rng.integers(0, 4, 500).astype(float), np.ones(500)
    fitted = pooled(value, weight)
    assert (np.diff(np.unique(fitted)) > 0).all()
    assert len(pooled_starts(value, weight)) == len(np.unique(fitted))


@pytest.mark.parametrize("rows", [10_000, 100_000, 400_000])
def test_where_the_truth_is_curved_it_beats_platt_and_comes_close_to_exact_isotonic(rows: int) -> None:
    rng = np.random.default_rng(2)
    logit, fresh = rng.normal(-2.5, 1.6, rows), rng.normal(-2.5, 1.6, 100_000)
    label = rng.random(rows) < curved(logit)
    truth = curved(fresh)
    ours = excess_log_loss(IsotonicCalibrator.fit(logit, label).transform_logit(fresh), truth)
    platt = excess_log_loss(PlattCalibrator.fit(logit, label).transform_logit(fresh), truth)
    exact = IsotonicRegression(out_of_bounds="clip").fit(logit, label).predict(fresh)
    exact = np.clip(exact, 1e-6, 1 - 1e-6)  # or its log loss is infinite
    reference = excess_log_loss(np.log(exact) - np.log1p(-exact), truth)
    assert ours < 0.5 * platt
    assert ours < reference


def test_where_the_truth_is_a_line_it_costs_next_to_nothing_over_platt() -> None:
    regret = {"ours": 0.0, "platt": 0.0, "raw": 0.0}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logit = rng.normal(-2.5, 1.6, 50_000)
        truth = sigmoid(0.7 * logit - 0.7)
        label = rng.random(50_000) < truth
        regret["ours"] += excess_log_loss(IsotonicCalibrator.fit(logit, label).transform_logit(logit), truth)
        regret["platt"] += excess_log_loss(PlattCalibrator.fit(logit, label).transform_logit(logit), truth)
        regret["raw"] += excess_log_loss(logit, truth)
    assert regret["ours"] < regret["platt"] + 0.02 * regret["raw"]


def test_no_rank_is_lost_where_exact_isotonic_ties() -> None:
    rng = np.random.default_rng(3)
    logit = rng.normal(-2.5, 1.6, 20_000)
    label = (rng.random(20_000) < curved(logit)).astype(float)
    calibrated = IsotonicCalibrator.fit(logit, label).transform(logit)
    assert roc_auc_score(label, calibrated) == roc_auc_score(label, logit)
    assert len(np.unique(calibrated)) == len(np.unique(logit))
    assert (np.argsort(calibrated, kind="stable") == np.argsort(logit, kind="stable")).all()


def test_total_prediction_is_the_total_of_clicks() -> None:
    rng = np.random.default_rng(4)
    logit = rng.normal(-2.5, 1.6, 200_000)
    label = rng.random(200_000) < curved(logit)
    assert IsotonicCalibrator.fit(logit, label).transform(logit).sum() == pytest.approx(
        label.sum(), rel=0.005
    )


def test_past_the_ends_it_goes_on_with_the_platt_slope() -> None:
    rng = np.random.default_rng(5)
    logit = rng.uniform(-4.0, 0.0, 50_000)
    label = rng.random(50_000) < curved(logit)
    isotonic, platt = IsotonicCalibrator.fit(logit, label), PlattCalibrator.fit(logit, label)
    for low, high in ((-12.0, -5.0), (1.0, 9.0)):
        rise = np.diff(isotonic.transform_logit([low, high]))[0] / (high - low)
        assert rise == pytest.approx(platt.slope, rel=1e-3)


def test_where_no_positive_was_seen_it_does_not_say_zero() -> None:
    rng = np.random.default_rng(6)
    logit = np.linspace(-6.0, -1.0, 20_000)
    label = (rng.random(20_000) < sigmoid(logit)) & (logit > -4.0)
    exact = IsotonicRegression().fit(logit, label)
    assert exact.predict([-5.0])[0] == 0.0
    calibrated = IsotonicCalibrator.fit(logit, label).transform([-6.0, -5.0])
    platt = PlattCalibrator.fit(logit, label).transform([-5.0])
    assert 1e-6 < calibrated[0] < calibrated[1] < 0.5 * platt[0]


@pytest.mark.parametrize(
    ("logit", "label"),
    [
        ([0.3], [1]),
        ([0.3] * 50, [0] * 50),
        (list(np.linspace(-3, 3, 50)), [1] * 50),
        (list(np.linspace(-3, 3, 50)), [1] * 25 + [0] * 25),
        ([-np.inf, -40.0, 40.0, np.inf], [1, 0, 1, 0]),
    ],
    ids=["one row", "one logit", "one class", "backwards", "far out"],
)
def test_degenerate_rows_still_give_a_strictly_increasing_map(logit: list[float], label: list[int]) -> None:
    isotonic = IsotonicCalibrator.fit(logit, label)
    grid = np.linspace(-30, 30, 20_001)
    assert (np.diff(isotonic.transform_logit(grid)) > 0).all()


def test_no_rows_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="no rows"):
        IsotonicCalibrator.fit([], [])


@pytest.mark.parametrize(
    "damage",
    [{"knot_logit": [0.0, 0.0]}, {"calibrated_logit": [1.0, 0.5]}, {"knot_logit": []}, {"end_slope": 0.0}],
)
def test_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    state = IsotonicCalibrator([0.0, 1.0], [0.0, 0.5], 1.0).state()
    with pytest.raises(StaleStateError):
        IsotonicCalibrator.from_state({**state, **damage})
