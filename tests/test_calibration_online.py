"""The online line: known drift, open labels, and what must not throw it off."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import log_loss

from calibration.chain import CalibrationChain
from calibration.delayed import fnw_weight
from calibration.link import logit_of, sigmoid
from calibration.online import OnlineConfig, OnlinePlatt
from calibration.platt import PlattCalibrator
from calibration.segments import SegmentConfig, SegmentCorrection
from calibration.sketch import LogitSketch
from pipelines.errors import ConfigError, DataError, StaleStateError

STILL = OnlineConfig(intercept_noise=0.0, slope_noise=0.0)


def excess_log_loss(logit: np.ndarray, true_logit: np.ndarray) -> float:
    """Expected log loss above the oracle's, exactly: no label noise."""
    p = sigmoid(true_logit)
    return float((np.logaddexp(0, logit) - np.logaddexp(0, true_logit) - p * (logit - true_logit)).mean())


def progressive(online: OnlinePlatt, logit: np.ndarray, label: np.ndarray, batch: int = 256) -> np.ndarray:
    """Predict, then learn, batch by batch."""
    said = np.empty_like(logit)
    for start in range(0, len(logit), batch):
        now = slice(start, start + batch)
        said[now] = online.transform_logit(logit[now])
        online.update(logit[now], label[now])
    return said


def drifting(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Model logits, true logits whose level swings by 0.6 and whose slope falls from 1 to 0.7, and labels."""
    rng = np.random.default_rng(seed)
    logit, share = rng.normal(-2.5, 1.2, rows), np.arange(rows) / rows
    level, slope = 0.6 * np.sin(2 * np.pi * share), 1.0 - 0.3 * share
    truth = -2.5 + level + slope * (logit + 2.5)
    return logit, truth, (rng.random(rows) < sigmoid(truth)).astype(float)


def test_before_the_first_row_it_is_the_identity() -> None:
    logit = np.linspace(-30, 30, 101)
    assert (OnlinePlatt().transform_logit(logit) == logit).all()
    assert (OnlinePlatt(centre=-3.0).transform_logit(logit) == logit).all()


def test_one_update_is_the_mode_of_prior_times_likelihood() -> None:
    rng = np.random.default_rng(0)
    logit, label = rng.normal(-1.0, 1.0, 300), (rng.random(300) < 0.6).astype(float)
    weight = rng.uniform(0.5, 2.0, 300)
    config = OnlineConfig(
        intercept_deviation=0.4,
        slope_deviation=0.2,
        intercept_noise=1e-4,
        slope_noise=1e-5,
        noise_factors=(1.0,),
    )
    online = OnlinePlatt(config, centre=-1.0)
    online.update(logit, label, weight)
    variance = [0.16 + 1e-4 * weight.sum(), 0.04 + 1e-5 * weight.sum()]

    def negative_log_posterior(theta: np.ndarray) -> float:
        z = logit + theta[0] + (theta[1] - 1.0) * (logit + 1.0)
        loss = (weight * (np.logaddexp(0, z) - label * z)).sum()
        return float(loss + 0.5 * theta[0] ** 2 / variance[0] + 0.5 * (theta[1] - 1) ** 2 / variance[1])

    best = minimize(
        negative_log_posterior, [0.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12}
    )
    assert [online.intercept, online.slope] == pytest.approx(best.x, abs=1e-6)
    # Covariance: inverse of the Hessian, by finite differences.
    h = 1e-4
    steps = np.array([[h, 0.0], [0.0, h]])
    f = negative_log_posterior
    hessian = [
        [
            (f(best.x + a + b) - f(best.x + a - b) - f(best.x - a + b) + f(best.x - a - b)) / (4 * h * h)
            for b in steps
        ]
        for a in steps
    ]
    expected = np.linalg.inv(hessian)
    assert online.intercept_variance == pytest.approx(expected[0, 0], rel=1e-4)
    assert online.slope_variance == pytest.approx(expected[1, 1], rel=1e-4)
    assert online.covariance == pytest.approx(expected[0, 1], rel=1e-2)


def test_without_drift_it_ends_where_platt_fits_all_rows_at_once() -> None:
    rng = np.random.default_rng(1)
    logit = rng.normal(-2.0, 1.2, 200_000)
    label = (rng.random(200_000) < sigmoid(0.4 + 0.8 * logit)).astype(float)
    online = OnlinePlatt(OnlineConfig(0.0, 0.0, intercept_deviation=1.0, slope_deviation=1.0))
    progressive(online, logit, label)
    platt = PlattCalibrator.fit(logit, label)
    grid = np.linspace(-6, 2, 50)
    assert online.transform_logit(grid) == pytest.approx(platt.transform_logit(grid), abs=0.01)


def test_under_drift_it_closes_most_of_the_gap_between_model_and_truth() -> None:
    logit, truth, label = drifting(1_000_000)
    first = slice(0, 200_000)
    gap = excess_log_loss(logit, truth)
    static = PlattCalibrator.fit(logit[first], label[first])
    online = excess_log_loss(progressive(OnlinePlatt(), logit, label), truth)
    assert 1 - online / gap > 0.95
    assert 1 - excess_log_loss(static.transform_logit(logit), truth) / gap < 0.5


def test_after_a_jump_the_level_is_right_again_within_fifty_thousand_rows() -> None:
    rng = np.random.default_rng(2)
    logit = rng.normal(-2.5, 1.0, 300_000)
    truth = logit + np.where(np.arange(300_000) < 150_000, 0.0, np.log(1.5))
    label = (rng.random(300_000) < sigmoid(truth)).astype(float)
    said = sigmoid(progressive(OnlinePlatt(), logit, label))
    before, after = slice(100_000, 150_000), slice(200_000, 300_000)
    for part in (before, after):
        assert said[part].sum() / sigmoid(truth[part]).sum() == pytest.approx(1.0, abs=0.03)


def test_the_result_hardly_depends_on_the_batching() -> None:
    logit, truth, label = drifting(200_000)
    ends, regrets = [], []
    for batch in (64, 256, 1024):
        online = OnlinePlatt(centre=-2.0)
        regrets.append(excess_log_loss(progressive(online, logit, label, batch), truth))
        ends.append(online.transform_logit([-4.0, -2.0, 0.0]))
    # The fastest filters remember fewer rows than a batch of 1024 has, so that they do depend on it.
    assert np.ptp(ends, axis=0).max() < 0.05
    assert np.ptp(regrets) < 0.05 * excess_log_loss(logit, truth)


def test_a_row_of_whole_weight_is_the_row_that_many_times() -> None:
    rng = np.random.default_rng(3)
    logit, label = rng.normal(-2, 1, 500), (rng.random(500) < 0.2).astype(float)
    weight = rng.integers(1, 5, 500)
    weighted, repeated = OnlinePlatt(), OnlinePlatt()
    weighted.update(logit, label, weight)
    repeated.update(np.repeat(logit, weight), np.repeat(label, weight))
    for name in (
        "intercept",
        "slope",
        "intercept_variance",
        "slope_variance",
        "covariance",
        "effective_rows",
    ):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-9)


@pytest.mark.parametrize("label", [0, 1])
def test_batches_of_one_class_only_keep_it_finite_and_rising(label: int) -> None:
    online = OnlinePlatt()
    rng = np.random.default_rng(4)
    for _ in range(200):
        online.update(rng.normal(-3, 1, 256), np.full(256, label))
    grid = np.linspace(-30, 30, 10_001)
    assert np.isfinite([online.intercept, online.slope]).all()
    assert (np.diff(online.transform_logit(grid)) > 0).all()
    assert online.intercept_variance * online.slope_variance > online.covariance**2


def test_a_model_that_ranks_backwards_stops_at_the_smallest_slope_with_the_right_level() -> None:
    rng = np.random.default_rng(5)
    online = OnlinePlatt(OnlineConfig(slope_deviation=1.0))
    for _ in range(500):
        logit = rng.normal(-2, 1, 256)
        online.update(-logit - 4.0, rng.random(256) < sigmoid(logit))
    assert online.slope == pytest.approx(online.config.minimum_slope, abs=1e-12)
    logit = rng.normal(-2, 1, 50_000)
    assert online.transform(-logit - 4.0).mean() == pytest.approx(sigmoid(logit).mean(), rel=0.1)


def test_a_few_absurd_logits_do_not_turn_the_line() -> None:
    rng = np.random.default_rng(6)
    online = OnlinePlatt()
    for _ in range(100):
        logit = rng.normal(-2, 1, 256)
        label = (rng.random(256) < sigmoid(logit)).astype(float)
        logit[0], label[0] = np.inf, 0.0
        online.update(logit, label)
    calibrated = online.transform(np.array([-3.0, -2.0, -1.0]))
    assert calibrated == pytest.approx(sigmoid([-3.0, -2.0, -1.0]), rel=0.5)
    assert online.slope > 0.5


def test_from_far_off_a_single_batch_goes_to_the_mode_without_overshooting() -> None:
    online = OnlinePlatt(OnlineConfig(intercept_deviation=1.0, slope_deviation=1.0), centre=0.0)
    online.update(np.full(256, -12.0), np.ones(256), np.full(256, 1000.0))
    assert online.transform([-12.0])[0] > 0.99
    assert np.isfinite(online.transform_logit([-34.0, 34.0])).all()


def test_an_empty_batch_changes_nothing() -> None:
    online = OnlinePlatt()
    before = online.state()
    online.update([], [])
    assert online.state() == before


def test_a_refused_batch_changes_nothing() -> None:
    online = OnlinePlatt()
    online.update([0.0, 1.0], [0, 1])
    before = online.state()
    for bad in (([np.nan], [0], None), ([0.0], [2], None), ([0.0], [1], [-1.0])):
        with pytest.raises(DataError):
            online.update(*bad)
    assert online.state() == before


def test_a_restored_filter_goes_on_to_the_bit() -> None:
    logit, _, label = drifting(20_000)
    straight, restored = OnlinePlatt(), OnlinePlatt()
    for start in range(0, 20_000, 256):
        now = slice(start, start + 256)
        straight.update(logit[now], label[now])
        restored.update(logit[now], label[now])
        restored = OnlinePlatt.from_state(json.loads(json.dumps(restored.state())))
    assert restored.state() == straight.state()
    assert (restored.transform_logit(logit) == straight.transform_logit(logit)).all()


@pytest.mark.parametrize(
    "values",
    [
        {"intercept_noise": -1e-9},
        {"slope_noise": float("nan")},
        {"intercept_deviation": 0.0},
        {"slope_deviation": 2.0},
        {"minimum_slope": 0.0},
        {"noise_factors": ()},
        {"noise_factors": (1.0, 0.0)},
        {"half_life": 0.0},
    ],
)
def test_a_config_outside_its_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        OnlineConfig(**values)


def test_damaged_state_is_refused() -> None:
    state = OnlinePlatt().state()
    damages: list[dict[str, Any]] = [
        {"slope": [float("nan")] * 4},
        {"slope": "1"},
        {"slope": [1.0] * 3},
        {"version": 1},
        {"config": {}},
        {"kind": "platt"},
        {"more": 1},
    ]
    for damage in damages:
        with pytest.raises(StaleStateError):
            OnlinePlatt.from_state({**state, **damage})


# -- several speeds -----------------------------------------------------------------------------------


def test_each_filter_of_several_is_what_it_is_alone() -> None:
    logit, _, label = drifting(5_000)
    together = OnlinePlatt(centre=-2.0)
    alone = [
        OnlinePlatt(OnlineConfig(noise_factors=(f,)), centre=-2.0) for f in together.config.noise_factors
    ]
    for online in (together, *alone):
        progressive(online, logit, label)
    for name in ("level", "slope", "level_variance", "slope_variance", "covariance"):
        assert together.state()[name] == [online.state()[name][0] for online in alone]


def test_shares_are_the_faded_likelihoods_of_what_each_filter_predicted() -> None:
    logit, _, label = drifting(4_096)
    together = OnlinePlatt(OnlineConfig(half_life=1_000.0), centre=-2.0)
    factors = together.config.noise_factors
    alone = [OnlinePlatt(OnlineConfig(noise_factors=(f,)), centre=-2.0) for f in factors]
    score = np.zeros(len(factors))
    for start in range(0, 4_096, 256):
        now = slice(start, start + 256)
        losses = [log_loss(label[now], online.transform(logit[now]), normalize=False) for online in alone]
        score = 0.5 ** (256 / 1_000) * score - np.array(losses)
        score = np.maximum(score - score.max(), -8.0)
        for online in (together, *alone):
            online.update(logit[now], label[now])
    expected = np.exp(score)
    assert together.shares == pytest.approx(expected / expected.sum(), abs=1e-9)
    assert together.intercept == pytest.approx((together.shares * [o.intercept for o in alone]).sum())
    level, variance = np.array([o.intercept for o in alone]), np.array([o.intercept_variance for o in alone])
    spread = (together.shares * (variance + (level - together.intercept) ** 2)).sum()
    assert together.intercept_variance == pytest.approx(spread)


@pytest.mark.parametrize(("swing", "fastest"), [(0.0, 0), (0.3, 2), (0.9, 3)])
def test_the_faster_the_truth_moves_the_faster_the_filter_that_counts(swing: float, fastest: int) -> None:
    rng = np.random.default_rng(3)
    logit, row = rng.normal(-2.0, 1.0, 300_000), np.arange(300_000)
    truth = logit + swing * np.sin(2 * np.pi * row / 20_000)
    online = OnlinePlatt()
    progressive(online, logit, (rng.random(300_000) < sigmoid(truth)).astype(float), batch=1_000)
    if fastest == 0:
        assert online.shares[:2].sum() > 0.7
    else:
        assert online.shares[fastest:].sum() > 0.7


def test_no_filter_is_given_up() -> None:
    rng = np.random.default_rng(4)
    online = OnlinePlatt()
    for step in range(1_000):
        logit = rng.normal(-2.0, 1.0, 256)
        level = 0.5 * np.sin(step / 8)
        online.update(logit, rng.random(256) < sigmoid(logit + level))
    assert online.shares[0] < 0.01
    assert online.shares.min() >= np.exp(-8.0) / len(online.shares)


@pytest.mark.parametrize("noise", [1e-8, 1e-6, 1e-5])
def test_one_default_comes_close_to_the_best_of_its_speeds_whatever_the_drift(noise: float) -> None:
    rng = np.random.default_rng(5)
    logit = rng.normal(-2.0, 1.0, 300_000)
    truth = logit + np.cumsum(rng.normal(0.0, noise**0.5, 300_000))
    label = (rng.random(300_000) < sigmoid(truth)).astype(float)
    regret = {}
    for factors in (OnlineConfig().noise_factors, (0.1,), (1.0,), (10.0,), (100.0,)):
        online = OnlinePlatt(OnlineConfig(noise_factors=factors))
        regret[factors] = excess_log_loss(progressive(online, logit, label, batch=1_000), truth)
    default = regret.pop(OnlineConfig().noise_factors)
    assert default < 1.25 * min(regret.values())
    assert default < 0.7 * max(regret.values())


# -- windows as sketches, and merging ------------------------------------------------------------------


def test_a_window_as_a_sketch_teaches_what_its_rows_do() -> None:
    logit, _, label = drifting(20_000)
    rows, sketch = OnlinePlatt(centre=-2.0), OnlinePlatt(centre=-2.0)
    for start in range(0, 20_000, 1_000):
        now = slice(start, start + 1_000)
        rows.update(logit[now], label[now])
        sketch.update_sketch(LogitSketch.of(logit[now], label[now]))
    grid = np.linspace(-6.0, 1.0, 50)
    assert sketch.transform_logit(grid) == pytest.approx(rows.transform_logit(grid), abs=1e-3)
    assert sketch.effective_rows == rows.effective_rows


def test_merging_is_the_product_of_the_beliefs_over_the_prior() -> None:
    config = OnlineConfig(0.0, 0.0, intercept_deviation=0.4, slope_deviation=0.2, noise_factors=(1.0,))
    logit, _, label = drifting(8_000)
    a, b = (
        OnlinePlatt.fit(logit[p], label[p], config=config, centre=-2.5)
        for p in (slice(3_000), slice(3_000, None))
    )

    def gaussian(online: OnlinePlatt) -> tuple[np.ndarray, np.ndarray]:
        mixed = online.covariance
        covariance = np.array([[online.intercept_variance, mixed], [mixed, online.slope_variance]])
        return np.array([online.intercept, online.slope]), np.linalg.inv(covariance)

    (mean_a, precise_a), (mean_b, precise_b) = gaussian(a), gaussian(b)
    prior = np.diag([1 / 0.16, 1 / 0.04])
    precise = precise_a + precise_b - prior
    mean = np.linalg.solve(precise, precise_a @ mean_a + precise_b @ mean_b - prior @ [0.0, 1.0])
    found, found_precise = gaussian(a.merge(b))
    assert found == pytest.approx(mean, rel=1e-9)
    assert found_precise == pytest.approx(precise, rel=1e-9)


def test_merging_with_what_has_heard_nothing_changes_no_belief() -> None:
    logit, _, label = drifting(8_000)
    still = OnlineConfig(intercept_noise=0.0, slope_noise=0.0)
    online = OnlinePlatt.fit(logit, label, config=still, centre=-2.5)
    merged = online.merge(OnlinePlatt(still, centre=-2.5))
    grid = np.linspace(-6.0, 1.0, 50)
    assert merged.transform_logit(grid) == pytest.approx(online.transform_logit(grid), abs=1e-9)
    assert merged.intercept_variance == pytest.approx(online.intercept_variance, rel=1e-9)


# -- open labels ------------------------------------------------------------------------------------


def test_fnw_weights_are_the_formula() -> None:
    f = np.array([0.1, 0.1, 0.9])
    assert fnw_weight(f, [1, 0, 0]) == pytest.approx([1.1, 0.9 * 1.1, 0.1 * 1.9], abs=1e-15)
    for bad in (
        ([0.0], [1]),
        ([1.0], [1]),
        ([np.nan], [1]),
        ([0.5], [0.5]),
        ([[0.5]], [1]),
        ([0.5, 0.5], [1]),
    ):
        with pytest.raises(DataError):
            fnw_weight(*bad)


@pytest.mark.parametrize("start", [-3.0, 2.0])
@pytest.mark.parametrize("p", [0.02, 0.228, 0.7])
def test_the_fixed_point_of_the_weighted_chain_is_the_truth(p: float, start: float) -> None:
    # Exact expectations instead of samples: each click once as a negative, p of it as a positive.
    chain = CalibrationChain(online=OnlinePlatt(OnlineConfig(1e-3, 0.0, intercept_deviation=1.0)))
    logit = np.full(2, float(logit_of([p])[0] + start))
    for _ in range(3_000):
        f = chain.transform(logit)
        chain.update(logit, [0, 1], fnw_weight(f, [0, 1]) * [100.0, 100.0 * p])
    assert chain.transform(logit)[0] == pytest.approx(p, rel=0.01)


def delayed_stream(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logit, label, true logit, key: each click at once as negative, each conversion later as positive."""
    rng = np.random.default_rng(seed)
    true_logit = rng.normal(-1.3, 0.8, rows)
    key = rng.integers(0, 2, rows)
    converts = rng.random(rows) < sigmoid(true_logit)
    # The model is wrong in level and in slope, and twice as wrong in one segment.
    logit = -1.3 + 0.4 + 0.6 * key + 1.4 * (true_logit + 1.3)
    clock = np.arange(rows, dtype=float)
    later = clock[converts] + rng.exponential(5_000.0, converts.sum())
    label = np.concatenate([np.zeros(rows), np.ones(converts.sum())])
    time = np.concatenate([clock, later])
    # Cut where the clicks end, or the last rows would be conversions only.
    order = np.argsort(time, kind="stable")[: int((time < rows).sum())]
    every = np.concatenate([np.arange(rows), np.flatnonzero(converts)])[order]
    return logit[every], label[order], true_logit[every], key[every]


@pytest.mark.parametrize("with_segments", [False, True])
def test_on_a_stream_of_open_labels_the_chain_converges_to_the_true_rate(with_segments: bool) -> None:
    logit, label, true_logit, key = delayed_stream(300_000, seed=7)
    segments = SegmentCorrection(SegmentConfig(("site",), half_life=100_000.0)) if with_segments else None
    chain = CalibrationChain(online=OnlinePlatt(OnlineConfig(1e-8, 1e-9)), segments=segments)
    keys = key[:, None]
    for start in range(0, len(logit), 256):
        now = slice(start, start + 256)
        f = chain.transform(logit[now], keys[now])
        chain.update(logit[now], label[now], fnw_weight(f, label[now]), keys[now])
    # Judged on fresh clicks, each once.
    fresh = (np.arange(len(logit)) > 200_000) & (label == 0)
    truth, said = sigmoid(true_logit[fresh]), chain.transform(logit[fresh], keys[fresh])
    assert said.sum() / truth.sum() == pytest.approx(1.0, abs=0.02)
    segment_pcoc = [said[key[fresh] == s].sum() / truth[key[fresh] == s].sum() for s in (0, 1)]
    if with_segments:
        assert segment_pcoc == pytest.approx([1.0, 1.0], abs=0.04)
    else:
        assert segment_pcoc[0] < 0.9 < 1.1 < segment_pcoc[1]


def test_without_the_weights_the_same_stream_under_predicts_as_theory_says() -> None:
    # The control: plain rows have the rate p / (1 + p).
    logit, label, true_logit, _ = delayed_stream(200_000, seed=8)
    chain = CalibrationChain(online=OnlinePlatt(STILL))
    for start in range(0, len(logit), 256):
        now = slice(start, start + 256)
        chain.update(logit[now], label[now])
    clicks = label == 0
    p = sigmoid(true_logit[clicks])
    pcoc = chain.transform(logit[clicks]).sum() / p.sum()
    assert pcoc == pytest.approx((p / (1 + p)).sum() / p.sum(), abs=0.03)
    assert pcoc < 0.85
