"""Segment corrections: closed forms, brute force, an oracle that knows the truth, bounds and state."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import nbinom

from calibration.gamma_poisson import prior_strength
from calibration.link import logit_of, sigmoid
from calibration.segments import SegmentConfig, SegmentCorrection
from pipelines.errors import ConfigError, DataError, StaleStateError

NEVER = 1e15  # a half-life in effective rows that no test reaches


def one_field(**values: float) -> SegmentConfig:
    return SegmentConfig(("campaign_id",), **{"half_life": NEVER, "minimum_support": 0.0, **values})  # type: ignore[arg-type]


def traffic(
    rows: int, seed: int, segments: int = 200
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys (n, 1), model logit, true logit and label; each segment is off by its own factor."""
    rng = np.random.default_rng(seed)
    error = np.log(rng.gamma(20.0, 1 / 20.0, segments))
    key = np.minimum(rng.geometric(0.02, rows) - 1, segments - 1)
    logit = rng.normal(-3.5, 0.8, rows)
    truth = logit + error[key]
    return (key * 7919)[:, None], logit, truth, (rng.random(rows) < sigmoid(truth)).astype(float)


def excess_log_loss(logit: np.ndarray, true_logit: np.ndarray) -> float:
    p = sigmoid(true_logit)
    return float((np.logaddexp(0, logit) - np.logaddexp(0, true_logit) - p * (logit - true_logit)).mean())


def test_multiplier_is_c_plus_a_over_e_plus_a_in_units_of_the_dispersion() -> None:
    segments = SegmentCorrection(one_field(prior_strength=10.0))
    segments.update(np.full((4, 1), 42), [0.1, 0.2, 0.3, 0.4], [1, 1, 0, 1], [1.0, 2.0, 1.0, 1.0])
    table = segments.segments("campaign_id")
    c, e, v = 1 + 2 + 1, 0.1 + 0.4 + 0.3 + 0.4, 0.09 + 2 * 0.16 + 0.21 + 0.24
    a = 10.0 * v / e
    assert table["key"] == [42]
    assert table["multiplier"] == pytest.approx([(c + a) / (e + a)], abs=1e-9)
    assert [table[name][0] for name in ("positives", "expected", "rows")] == pytest.approx([c, e, 5.0])


@pytest.mark.parametrize("p", [0.001, 0.2, 0.9])
def test_a_segment_of_one_probability_is_moved_to_the_shrunk_rate_exactly(p: float) -> None:
    rows, strength = 1_000, 25.0
    label = np.arange(rows) < 0.6 * rows * p
    segments = SegmentCorrection(one_field(prior_strength=strength))
    segments.update(np.zeros((rows, 1), int), np.full(rows, p), label)
    a = strength * max(1.0 - p, 1 / 16)
    m = (label.sum() + a) / (rows * p + a)
    assert sigmoid(segments.transform_logit(logit_of([p]), [[0]]))[0] == pytest.approx(m * p, rel=1e-6)


def test_a_segment_of_unlike_rows_is_moved_to_the_shrunk_rate_nearly() -> None:
    logit = np.random.default_rng(10).normal(-1.0, 1.5, 100_000)
    for true_shift in (-0.7, 0.7):
        segments = SegmentCorrection(one_field(prior_strength=1e-6))
        segments.update(np.zeros((100_000, 1), int), sigmoid(logit), sigmoid(logit + true_shift))
        corrected = segments.transform_logit(logit, np.zeros((100_000, 1), int))
        assert corrected - logit == pytest.approx(np.full(100_000, true_shift), abs=0.05)
        assert sigmoid(corrected).sum() == pytest.approx(sigmoid(logit + true_shift).sum(), rel=0.03)


def test_for_rare_positives_the_shift_is_the_logarithm_of_the_multiplier() -> None:
    segments = SegmentCorrection(one_field())
    segments.update(np.zeros((1000, 1), int), np.full(1000, 1e-4), np.arange(1000) < 3)
    m = segments.segments("campaign_id")["multiplier"][0]
    assert segments.transform_logit([-9.0], [[0]])[0] + 9.0 == pytest.approx(np.log(m), abs=1e-5)


def test_unknown_and_unsupported_segments_are_left_alone_to_the_bit() -> None:
    segments = SegmentCorrection(one_field(minimum_support=10.5))
    segments.update(np.zeros((10, 1), int), np.full(10, 0.1), np.ones(10))
    logit = np.array([-2.0, -1.0])
    assert (segments.transform_logit(logit, [[0], [99]]) == logit).all()
    segments.update(np.zeros((1, 1), int), [0.1], [1])
    assert (segments.transform_logit(logit, [[0], [99]]) > logit).tolist() == [True, False]


def test_fields_act_in_turn_each_expecting_what_those_before_it_left() -> None:
    config = SegmentConfig(("a", "b"), half_life=NEVER, minimum_support=0.0, prior_strength=5.0)
    segments = SegmentCorrection(config)
    rng = np.random.default_rng(0)
    sums: dict[tuple[int, int], list[float]] = {}

    def shift_of(field: int, key: int) -> float:
        if (field, key) not in sums:
            return 0.0
        c, e, n, v = sums[field, key]
        a = 5.0 * v / e
        before, after = e / n, (c + a) / (e + a) * e / n
        odds_ratio = after / (1 - after) / (before / (1 - before))
        return float(np.log(odds_ratio) / (v / (n * before * (1 - before))))

    for _ in range(20):
        keys, logit = rng.integers(0, 3, (50, 2)), rng.normal(-1, 1, 50)
        label = (rng.random(50) < sigmoid(logit + 0.5 * keys[:, 0])).astype(float)
        by_hand = [
            z + shift_of(0, int(a)) + shift_of(1, int(b)) for z, (a, b) in zip(logit, keys, strict=True)
        ]
        assert segments.transform_logit(logit, keys) == pytest.approx(by_hand, abs=1e-7)
        segments.update(keys, sigmoid(logit), label)
        shifts = [shift_of(0, int(a)) for a in keys[:, 0]]
        for z, y, (a, b), before in zip(logit, label, keys.tolist(), shifts, strict=True):
            for field, key, expected in ((0, a, sigmoid([z])[0]), (1, b, sigmoid([z + before])[0])):
                c, e, n, v = sums.get((field, key), (0.0, 0.0, 0.0, 0.0))
                sums[field, key] = [c + y, e + expected, n + 1, v + expected * (1 - expected)]


def test_shrunk_corrections_come_close_to_the_oracle_and_beat_raw_rates() -> None:
    keys, logit, _, label = traffic(300_000, seed=1)
    fresh_keys, fresh, truth, _ = traffic(100_000, seed=1)
    shrunk = SegmentCorrection(one_field())
    told = SegmentCorrection(one_field(prior_strength=20.0))  # the shape that made the segments
    unshrunk = SegmentCorrection(one_field(prior_strength=1e-3))
    for segments in (shrunk, told, unshrunk):
        segments.update(keys, sigmoid(logit), label)
    shrunk.refit()
    gap = excess_log_loss(fresh, truth)
    ours, best, raw = (
        excess_log_loss(each.transform_logit(fresh, fresh_keys), truth) for each in (shrunk, told, unshrunk)
    )
    assert ours < 1.05 * best
    assert ours < 0.3 * gap
    assert ours < 0.8 * raw


def test_where_segments_do_not_differ_the_correction_does_next_to_nothing() -> None:
    rng = np.random.default_rng(2)
    keys, logit = rng.integers(0, 500, (200_000, 1)), rng.normal(-3, 1, 200_000)
    label = rng.random(200_000) < sigmoid(logit)
    segments = SegmentCorrection.fit(one_field(), keys, sigmoid(logit), label)
    assert segments.strength[0] > 500
    assert np.abs(segments.transform_logit(logit, keys) - logit).max() < 0.15
    assert excess_log_loss(segments.transform_logit(logit, keys), logit) < 2e-5


def test_strength_maximises_the_negative_binomial_likelihood_of_scipy() -> None:
    rng = np.random.default_rng(3)
    expected = rng.uniform(1.0, 300.0, 500)
    counts = rng.poisson(expected * rng.gamma(8.0, 1 / 8.0, 500)).astype(float)

    def negative(log_a: float) -> float:
        a = np.exp(log_a)
        return -float(nbinom.logpmf(counts, a, a / (a + expected)).sum())

    best = minimize_scalar(negative, bounds=(-1, 12), method="bounded", options={"xatol": 1e-8})
    assert np.log(prior_strength(counts, expected)) == pytest.approx(best.x, abs=1e-4)
    assert prior_strength(counts, expected) == pytest.approx(8.0, rel=0.2)


def test_a_row_counts_half_after_one_half_life_and_over_many_of_them() -> None:
    segments = SegmentCorrection(one_field(half_life=100.0))
    count, key = 0.0, np.array([[3]])
    rng = np.random.default_rng(4)
    for _ in range(5_000):
        weight, label = float(rng.uniform(0.5, 2.0)), float(rng.random() < 0.3)
        segments.update(key, [0.2], [label], [weight])
        count = count * 0.5 ** (weight / 100.0) + weight * label
    # 5000 rows are 62 half-lives: sums have been scaled, and rounded down, a thousand times.
    assert segments.segments("campaign_id")["positives"] == pytest.approx([count], rel=1e-7)


def test_a_batch_of_many_half_lives_forgets_everything_before_and_overflows_nothing() -> None:
    segments = SegmentCorrection(one_field(half_life=1e-3))
    segments.update([[1]], [0.5], [1])
    segments.update([[2]], [0.5], [1], [1e6])
    assert segments.segments("campaign_id")["rows"] == pytest.approx([0.0, 1e6])


def test_a_config_of_integers_has_the_state_of_the_same_floats() -> None:
    whole = SegmentCorrection(SegmentConfig(("a",), half_life=1000, minimum_support=5, prior_strength=20))
    floats = SegmentCorrection(SegmentConfig(("a",), half_life=1e3, minimum_support=5.0, prior_strength=20.0))
    assert json.dumps(whole.state()) == json.dumps(floats.state())
    assert json.dumps(SegmentCorrection.from_state(whole.state()).state()) == json.dumps(whole.state())


def test_weights_are_duplication() -> None:
    rng = np.random.default_rng(5)
    keys, p = rng.integers(0, 5, (200, 1)), rng.uniform(0.05, 0.5, 200)
    label, weight = (rng.random(200) < 0.3).astype(float), rng.integers(1, 4, 200)
    weighted, repeated = (SegmentCorrection(one_field(half_life=1000.0)) for _ in range(2))
    weighted.update(keys, p, label, weight)
    repeated.update(np.repeat(keys, weight, axis=0), np.repeat(p, weight), np.repeat(label, weight))
    expected = repeated.transform_logit(np.zeros(5), np.arange(5)[:, None])
    assert weighted.transform_logit(np.zeros(5), np.arange(5)[:, None]) == pytest.approx(expected, abs=1e-8)


def test_too_many_segments_drop_the_least_supported_and_of_equals_the_larger_keys() -> None:
    segments = SegmentCorrection(one_field(maximum_segments=16))
    keys = np.concatenate([np.arange(16), np.arange(8, 16), [-5]])[:, None]
    segments.update(keys, np.full(25, 0.1), np.zeros(25))
    # 17 segments: 8..15 seen twice, -5 and 0..7 once. 14 are kept.
    assert segments.segments("campaign_id")["key"] == [-5, 0, 1, 2, 3, 4, *range(8, 16)]
    segments.update([[777]], [0.1], [1])
    assert 777 in segments.segments("campaign_id")["key"]
    assert segments.segments("campaign_id")["rows"][-1] == pytest.approx(1.0)


def test_memory_stays_bounded_on_endless_new_segments_and_what_matters_stays() -> None:
    segments = SegmentCorrection(SegmentConfig(("a", "b"), maximum_segments=64))
    rng = np.random.default_rng(6)
    for step in range(300):
        new = rng.integers(-(2**63), 2**63 - 1, (50, 2))
        new[:25] = step % 3
        segments.update(new, np.full(50, 0.1), np.zeros(50))
    for name in ("a", "b"):
        assert len(segments.segments(name)["key"]) <= 64
        assert {0, 1, 2} <= set(segments.segments(name)["key"])
    assert segments._table._sums.shape[1] <= 512


def test_a_restored_correction_goes_on_to_the_bit() -> None:
    config = SegmentConfig(("a", "b"), half_life=500.0, maximum_segments=40, minimum_support=5.0)
    straight, restored = SegmentCorrection(config), SegmentCorrection(config)
    rng = np.random.default_rng(7)
    for step in range(200):
        keys = np.minimum(rng.zipf(1.4, (64, 2)), 10**9) * (-1) ** step
        logit = rng.normal(-2, 1, 64)
        label = (rng.random(64) < 0.2).astype(float)
        assert (straight.transform_logit(logit, keys) == restored.transform_logit(logit, keys)).all()
        for segments in (straight, restored):
            segments.update(keys, sigmoid(logit), label)
            if step % 50 == 49:
                segments.refit()
        restored = SegmentCorrection.from_state(json.loads(json.dumps(restored.state())))
    assert restored.state() == straight.state()


def test_fitting_and_updating_agree_where_order_and_age_play_no_role() -> None:
    keys, logit, _, label = traffic(50_000, seed=8)
    fitted = SegmentCorrection.fit(one_field(), keys, sigmoid(logit), label)
    updated = SegmentCorrection(one_field())
    updated.update(keys, sigmoid(logit), label)
    updated.refit()
    assert fitted.strength == pytest.approx(updated.strength, rel=1e-6)
    assert fitted.transform_logit(logit, keys) == pytest.approx(
        updated.transform_logit(logit, keys), abs=1e-6
    )


def test_the_second_field_does_not_correct_what_the_first_has_corrected() -> None:
    rng = np.random.default_rng(9)
    key, logit = rng.integers(0, 2, 100_000), rng.normal(-3, 0.5, 100_000)
    truth = logit + np.where(key == 1, 0.7, -0.7)
    label = rng.random(100_000) < sigmoid(truth)
    both = np.stack([key, key], axis=1)
    segments = SegmentCorrection.fit(SegmentConfig(("a", "same")), both, sigmoid(logit), label)
    assert segments.transform_logit(logit, both) == pytest.approx(truth, abs=0.1)


def test_extreme_probabilities_and_weights_stay_finite() -> None:
    segments = SegmentCorrection(one_field(prior_strength=1.0))
    p = sigmoid([-np.inf, np.inf, 0.0, -40.0])
    segments.update(np.zeros((4, 1), int), p, [1, 0, 1, 1], [2.0**20, 2.0**20, 1e-9, 1.0])
    segments.update(np.ones((2, 1), int), sigmoid([np.inf, np.inf]), [1, 1], [1e-9, 2.0**20])
    corrected = segments.transform_logit([-34.0, 0.0, 34.0, 0.0], [[0], [0], [0], [1]])
    assert np.isfinite(corrected).all()


@pytest.mark.parametrize(
    "keys", [[[1.0]], [1], [[1, 2]], [["a"]], [[1], [2]]], ids=["float", "flat", "wide", "text", "long"]
)
def test_keys_of_another_shape_or_type_are_refused_and_nothing_is_counted(keys: list[Any]) -> None:
    segments = SegmentCorrection(one_field())
    with pytest.raises(DataError, match="segment keys"):
        segments.update(keys, [0.5], [1])
    with pytest.raises(DataError, match="segment keys"):
        segments.transform_logit([0.0], keys)
    assert segments.state() == SegmentCorrection(one_field()).state()


def test_no_rows_are_no_change() -> None:
    segments = SegmentCorrection(one_field())
    segments.update(np.zeros((0, 1), int), [], [])
    assert segments.transform_logit([], np.zeros((0, 1), int)).shape == (0,)
    assert segments.effective_rows == 0.0


@pytest.mark.parametrize(
    "values",
    [
        {"names": ()},
        {"names": ("a", "a")},
        {"half_life": 0.0},
        {"minimum_support": -1.0},
        {"maximum_segments": 1},
        {"prior_strength": float("inf")},
    ],
)
def test_a_config_outside_its_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SegmentConfig(**{"names": ("a",), **values})


def test_damaged_state_is_refused() -> None:
    crossed = SegmentConfig(("a", "a*b"))
    segments = SegmentCorrection(crossed)
    segments.update([[1, 5], [2, 6]], [0.5, 0.5], [1, 0])
    state = segments.state()
    assert SegmentCorrection.from_state(state).state() == state
    table = state["table"]
    one, two = table["levels"]

    def levels(*changed: dict[str, Any]) -> dict[str, Any]:
        return {"table": {**table, "levels": list(changed)}}

    for damage in (
        levels(),
        levels(one),
        levels({**one, "key": [2, 1]}, two),
        levels({**one, "key": [1, 2.5]}, two),
        levels({**one, "key": [1, 2**63]}, two),
        levels({**one, "rows": [1]}, two),
        levels({**one, "rows": [1, -1]}, two),
        levels({**one, "rows": [1, 0.5]}, two),
        levels({**one, "more": []}, two),
        levels(one, {**two, "parts": []}),
        levels(one, {**two, "parts": two["parts"][:1]}),
        {"table": {**table, "half_lives": float("nan")}},
        {"strength": [1.0]},
        {"row_units": -1},
        {"row_units": 0.5},
        {"config": {"names": ["a", "a*b"]}},
        {"version": 1},
    ):
        with pytest.raises(StaleStateError):
            SegmentCorrection.from_state({**state, **damage})
