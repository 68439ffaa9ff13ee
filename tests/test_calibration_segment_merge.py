"""Merging, forgetting and the order of rows: segment sums are whole numbers, so laws hold to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import nbinom

from calibration.gamma_poisson import prior_strength
from calibration.link import sigmoid
from calibration.segments import SegmentConfig, SegmentCorrection
from pipelines.errors import ConfigError, DataError

NESTED = SegmentConfig(("all", "a", "a*b"), minimum_support=5.0, half_life=700.0)

Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def rows(count: int, seed: int) -> Rows:
    """Keys (n, 2), probability, label and weight."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 6, (count, 2))
    p = sigmoid(rng.normal(-1.0, 1.0, count))
    return keys, p, (rng.random(count) < p).astype(float), rng.uniform(0.0, 3.0, count)


def joined(*parts: Rows) -> Rows:
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))  # type: ignore[return-value]


def streamed(config: SegmentConfig, seed: int) -> SegmentCorrection:
    """One that has learned and forgotten batch by batch, and stands between two scalings."""
    segments = SegmentCorrection(config)
    for step in range(7):
        segments.update(*rows(60 + seed, 100 * seed + step))
    return segments


def merged(*segments: SegmentCorrection) -> SegmentCorrection:
    total = SegmentCorrection.from_state(segments[0].state())
    for one in segments[1:]:
        total.merge(one)
    return total


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 80), min_size=2, max_size=4), st.integers(0, 10**6))
def test_fits_of_parts_merge_to_the_fit_of_the_whole_to_the_bit(sizes: list[int], seed: int) -> None:
    parts = [rows(size, seed + place) for place, size in enumerate(sizes)]
    fits = [SegmentCorrection.fit(NESTED, *part) for part in parts]
    assert merged(*fits).state() == SegmentCorrection.fit(NESTED, *joined(*parts)).state()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(0, 10**6), st.sampled_from([("a", "b"), ("all", "a", "b", "a*b")]))
def test_the_order_of_rows_plays_no_role_to_the_bit(count: int, seed: int, names: tuple[str, ...]) -> None:
    config = SegmentConfig(names, minimum_support=3.0)
    part = rows(count, seed)
    order = np.random.default_rng(seed).permutation(count)
    shuffled = [column[order] for column in part]
    fit, other = SegmentCorrection.fit(config, *part), SegmentCorrection.fit(config, *shuffled)
    assert other.state() == fit.state()
    one, two = SegmentCorrection(config), SegmentCorrection(config)
    weight = np.ones(count)
    one.update(part[0], part[1], part[2], weight)
    two.update(shuffled[0], shuffled[1], shuffled[2], weight)
    assert two.state() == one.state()


@pytest.mark.parametrize("names", [("all", "a", "a*b"), ("a", "b")])
def test_merging_is_commutative_and_associative_to_the_bit(names: tuple[str, ...]) -> None:
    config = SegmentConfig(names, minimum_support=5.0, half_life=700.0)
    one, two, three = (streamed(config, seed) for seed in (1, 2, 3))
    assert merged(one, two).state() == merged(two, one).state()
    left, right = merged(merged(one, two), three), merged(one, merged(two, three))
    assert left.state() == right.state() == merged(three, one, two).state()


def test_merging_adds_the_sums_as_of_now_and_leaves_the_other_alone() -> None:
    one, two = streamed(NESTED, 1), streamed(NESTED, 2)
    before = json.dumps(two.state())
    total = merged(one, two)
    assert json.dumps(two.state()) == before
    assert total.effective_rows == one.effective_rows + two.effective_rows
    for name in NESTED.names:
        tables = [each.segments(name) for each in (one, two, total)]
        for column in ("positives", "expected", "rows", "variance"):
            first, second, both = (dict(zip(t["key"], t[column], strict=True)) for t in tables)
            assert both == pytest.approx(
                {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {*first, *second}}, abs=1e-5
            )


def test_merging_keeps_all_segments_and_the_next_update_makes_room() -> None:
    config = SegmentConfig(("a",), maximum_segments=8, minimum_support=0.0)
    one, two = SegmentCorrection(config), SegmentCorrection(config)
    one.update(np.arange(8)[:, None], np.full(8, 0.2), np.zeros(8))
    two.update(np.arange(8, 16)[:, None], np.full(8, 0.2), np.zeros(8), np.full(8, 2.0))
    one.merge(two)
    assert one.segments("a")["key"] == list(range(16))
    one.update([[15]], [0.2], [0.0])
    assert one.segments("a")["key"] == list(range(8, 15)) or one.segments("a")["key"] == [*range(8, 14), 15]


def test_segments_of_another_configuration_are_not_merged() -> None:
    segments = streamed(NESTED, 1)
    before = segments.state()
    for other in (SegmentConfig(("all", "a", "a*b")), SegmentConfig(("all", "b", "a*b"))):
        with pytest.raises(ConfigError, match="merge"):
            segments.merge(SegmentCorrection(other))
    assert segments.state() == before


def test_decay_halves_what_was_counted_and_at_zero_leaves_nothing() -> None:
    segments = streamed(NESTED, 1)
    whole = segments.segments("a*b")
    segments.decay(0.5)
    half = segments.segments("a*b")
    for column in ("positives", "expected", "rows", "variance"):
        assert np.array(half[column]) == pytest.approx(0.5 * np.array(whole[column]), abs=1e-6)
    segments.decay(0.0)
    empty = segments.segments("a*b")
    assert set(empty["rows"]) == {0.0}
    assert set(empty["multiplier"]) == {1.0}
    assert (segments.transform_logit([0.7], [[1, 1]]) == [0.7]).all()
    for factor in (-0.1, 1.5, float("nan")):
        with pytest.raises(DataError, match="decay"):
            segments.decay(factor)


def test_rows_of_weight_zero_are_not_there() -> None:
    part, nothing = rows(100, 1), rows(100, 2)
    nothing = (nothing[0] + 50, *nothing[1:3], np.zeros(100))
    alone, beside = SegmentCorrection(NESTED), SegmentCorrection(NESTED)
    alone.update(*part)
    beside.update(*joined(nothing, part))
    assert beside.state() == alone.state()
    beside.update(*nothing)
    assert beside.state() == alone.state()


def test_more_weight_than_a_segment_holds_is_refused_and_nothing_is_counted() -> None:
    config = SegmentConfig(("a",), half_life=1e15)
    segments = SegmentCorrection(config)
    large = (np.zeros((1_000, 1), int), np.full(1_000, 0.99), np.ones(1_000), np.full(1_000, 2.0**20))
    segments.update(*large)
    before = segments.state()
    with pytest.raises(DataError, match="full"):
        segments.update(*large)
    assert segments.state() == before
    with pytest.raises(DataError, match="full"):
        merged(segments, segments)


def test_a_bound_that_was_never_reached_does_not_refuse_what_has_been_forgotten() -> None:
    segments = SegmentCorrection(SegmentConfig(("a",), half_life=1e6))
    large = (np.zeros((1_000, 1), int), np.full(1_000, 0.5), np.ones(1_000), np.full(1_000, 2.0**20))
    for _ in range(10):
        segments.update(*large)
    assert segments.segments("a")["rows"] == pytest.approx([1_000 * 2.0**20], rel=1e-9)


@pytest.mark.parametrize("shape", [0.7, 3.0, 40.0])
def test_the_strength_of_a_level_is_the_brute_force_maximum_of_its_likelihood(shape: float) -> None:
    rng = np.random.default_rng(5)
    expected = rng.uniform(2.0, 400.0, 800)
    counts = rng.poisson(expected * rng.gamma(shape, 1 / shape, 800)).astype(float)

    def negative(log_a: float) -> float:
        a = np.exp(log_a)
        return -float(nbinom.logpmf(counts, a, a / (a + expected)).sum())

    best = minimize_scalar(negative, bounds=(-1, 12), method="bounded", options={"xatol": 1e-8})
    assert np.log(prior_strength(counts, expected)) == pytest.approx(best.x, abs=1e-4)
    # The same through a correction: rare positives, one segment each, no level above.
    rate = 1e-4
    segments = SegmentCorrection(SegmentConfig(("a",), half_life=1e15, minimum_support=0.0))
    label = np.concatenate([np.ones(800), np.zeros(800)])
    weight = np.concatenate([counts, np.maximum(expected / rate - counts, 0.0)])
    within = weight < 2.0**20
    divided = np.where(within, weight, weight / 4.0)
    for part in range(4):
        now = divided * (~within | (part == 0))
        segments.update(np.tile(np.arange(800), 2)[:, None], np.full(1600, rate), label, now)
    segments.refit()
    assert np.log(segments.strength[0]) == pytest.approx(best.x, abs=2e-3)
