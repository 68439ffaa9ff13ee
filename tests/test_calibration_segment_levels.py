"""Levels of segments: names, nesting, priors from ancestors, and a simulated hierarchy of known truth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from calibration.link import logit_of, sigmoid
from calibration.segment_levels import levels_over, segment_columns, segment_levels
from calibration.segment_response import SegmentResponse
from calibration.segments import SegmentConfig, SegmentCorrection
from pipelines.delay_counts import combined_keys
from pipelines.errors import ConfigError

NEVER = 1e15  # a half-life in effective rows that no test reaches
NESTED = ("advertiser_id", "advertiser_id*campaign_id")


def levels(*names: str, **values: float) -> SegmentConfig:
    return SegmentConfig(names, **{"half_life": NEVER, "minimum_support": 0.0, **values})  # type: ignore[arg-type]


def hierarchy(rows: int, seed: int, base: float = -2.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys of advertiser and campaign, model logit and true logit; 40 advertisers of 25 campaigns each."""
    world = np.random.default_rng(7)
    above, own = world.normal(0.0, 0.5, 40), world.normal(0.0, 0.2, 1_000)
    rng = np.random.default_rng(seed)
    campaign = np.minimum(rng.geometric(0.005, rows) - 1, 999)
    advertiser = campaign % 40
    logit = rng.normal(base, 0.7, rows)
    return np.stack([advertiser, campaign], axis=1), logit, logit + above[advertiser] + own[campaign]


def excess_log_loss(logit: np.ndarray, truth: np.ndarray) -> float:
    p = sigmoid(truth)
    return float((np.logaddexp(0, logit) - np.logaddexp(0, truth) - p * (logit - truth)).mean())


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("a", "a"),
        ("a*b", "b*a"),
        ("a*a",),
        ("a*",),
        ("",),
        ("a*b", "a"),
        ("a", "all"),
        ("all", "all"),
    ],
)
def test_levels_that_are_empty_twice_or_after_what_divides_them_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="segments"):
        SegmentConfig(names)


def test_columns_and_usable_levels_follow_from_names() -> None:
    names = ("all", "b", "b*a", "c")
    assert segment_columns(names) == ("b", "a", "c")
    assert SegmentConfig(names).columns == ("b", "a", "c")
    assert levels_over(names, ("c", "b")) == ("all", "b", "c")
    assert levels_over(names, ()) == ("all",)
    assert [(one.ancestors, one.before) for one in segment_levels(names)] == [
        ((), ()),
        ((0,), ()),
        ((0, 1), ()),
        ((0,), (1, 2)),
    ]


def test_a_crossed_level_has_the_key_that_the_hashes_mixed_have() -> None:
    segments = SegmentCorrection(levels("a*b"))
    keys = np.array([[3, 5], [5, 3], [3, 5]])
    segments.update(keys, np.full(3, 0.5), np.ones(3))
    table = segments.segments("a*b")
    assert table["key"] == sorted(set(combined_keys(keys, 2).tolist()))
    assert dict(zip(map(tuple, table["values"]), table["rows"], strict=True)) == pytest.approx(
        {(3, 5): 2.0, (5, 3): 1.0}
    )


def test_the_level_all_moves_every_row_to_the_observed_rate() -> None:
    segments = SegmentCorrection(levels("all", prior_strength=1e-9))
    segments.update(np.zeros((1_000, 0)), np.full(1_000, 0.1), np.arange(1_000) < 150)
    assert sigmoid(segments.transform_logit(logit_of([0.1]), np.zeros((1, 0)))) == pytest.approx([0.15])


def test_a_nested_multiplier_has_its_parent_as_its_prior_mean() -> None:
    # Rare positives: dispersion 1 and shifts that are logarithms, so the closed form is plain.
    rate, a = 1e-5, 8.0
    segments = SegmentCorrection(levels(*NESTED, prior_strength=a))
    rows = np.array([4e6, 1e6])  # two campaigns of one advertiser, expecting 40 and 10
    segments.update([[1, 10], [1, 11]], [rate, rate], [0.0, 0.0], rows / 4)
    for _ in range(3):
        segments.update([[1, 10], [1, 11]], [rate, rate], [80 / 3 / 1e6, 5 / 3 / 2.5e5], rows / 4)
    # Weights above 2**20 are refused, so the four parts of the rows came one after the other.
    parent = (85 + a) / (50 + a)
    for campaign, c, e in ((10, 80.0, 40.0), (11, 5.0, 10.0)):
        due = parent * e
        expected = parent * (c + a) / (due + a)
        shift = segments.transform_logit([-11.0], [[1, campaign]])[0] + 11.0
        assert np.exp(shift) == pytest.approx(expected, rel=2e-4)


def test_a_new_campaign_has_the_multiplier_of_its_advertiser() -> None:
    segments = SegmentCorrection(levels(*NESTED))
    alone = SegmentCorrection(levels("advertiser_id"))
    keys, logit, truth = hierarchy(20_000, 1)
    label = np.random.default_rng(2).random(20_000) < sigmoid(truth)
    segments.update(keys, sigmoid(logit), label)
    alone.update(keys[:, :1], sigmoid(logit), label)
    new = np.stack([np.arange(40), np.full(40, 5_000)], axis=1)
    told = alone.transform_logit(np.zeros(40), new[:, :1])
    assert (segments.transform_logit(np.zeros(40), new) == told).all()
    assert np.abs(told).max() > 0.2
    # Of an advertiser that nobody knows: nothing.
    assert segments.transform_logit([0.3], [[99, 5_000]]).tolist() == [0.3]


def test_a_known_hierarchy_is_learned_better_by_levels_than_by_campaigns_alone() -> None:
    keys, logit, truth = hierarchy(100_000, 3)
    label = np.random.default_rng(4).random(100_000) < sigmoid(truth)
    fresh_keys, fresh, fresh_truth = hierarchy(100_000, 5)
    nested = SegmentCorrection.fit(levels(*NESTED), keys, sigmoid(logit), label)
    flat = SegmentCorrection.fit(levels("campaign_id"), keys[:, 1:], sigmoid(logit), label)
    by_levels = excess_log_loss(nested.transform_logit(fresh, fresh_keys), fresh_truth)
    by_campaign = excess_log_loss(flat.transform_logit(fresh, fresh_keys[:, 1:]), fresh_truth)
    raw = excess_log_loss(fresh, fresh_truth)
    assert by_levels < 0.8 * by_campaign < 0.8 * raw
    # Var ln m of a Gamma of shape a is about 1 / a: 0.5**2 for advertisers and 0.2**2 within them.
    assert 2.0 < nested.strength[0] < 8.0
    assert 12.0 < nested.strength[1] < 50.0


def test_a_large_segment_does_not_make_its_siblings_look_alike() -> None:
    # Each advertiser has one campaign of nearly all its rows, which would be its own prior.
    world = np.random.default_rng(8)
    own = world.normal(0.0, 0.3, 1_200)
    rng = np.random.default_rng(9)
    campaign = np.where(
        rng.random(200_000) < 0.7, rng.integers(0, 40, 200_000), rng.integers(0, 1_200, 200_000)
    )
    keys = np.stack([campaign % 40, campaign], axis=1)
    logit = rng.normal(-1.5, 0.5, 200_000)
    label = rng.random(200_000) < sigmoid(logit + own[campaign])
    segments = SegmentCorrection.fit(levels(*NESTED), keys, sigmoid(logit), label)
    assert 6.0 < segments.strength[1] < 20.0


def test_only_children_cannot_tell_how_children_differ_and_keep_the_strength() -> None:
    rng = np.random.default_rng(10)
    campaign = rng.integers(0, 100, 50_000)
    label = rng.random(50_000) < sigmoid(-2.0 + 0.5 * (campaign % 3 - 1))
    segments = SegmentCorrection.fit(
        levels(*NESTED, prior_strength=33.0),
        np.stack([campaign, campaign], axis=1),
        np.full(50_000, 0.12),
        label,
    )
    assert segments.strength[1] == 33.0
    assert segments.strength[0] < 33.0


def test_what_a_nested_level_counts_does_not_depend_on_what_its_parent_has_learned() -> None:
    keys, logit, truth = hierarchy(30_000, 6)
    label = np.random.default_rng(7).random(30_000) < sigmoid(truth)
    streamed = SegmentCorrection(levels(*NESTED))
    for start in range(0, 30_000, 500):
        now = slice(start, start + 500)
        streamed.update(keys[now], sigmoid(logit[now]), label[now])
    at_once = SegmentCorrection(levels(*NESTED))
    at_once.update(keys, sigmoid(logit), label)
    for name in NESTED:
        for column in ("positives", "expected", "rows", "variance", "shift"):
            whole = at_once.segments(name)[column]
            assert streamed.segments(name)[column] == pytest.approx(whole, rel=1e-6, abs=1e-9)


def test_columns_that_cross_correct_each_in_turn_and_their_pair_on_top() -> None:
    rng = np.random.default_rng(11)
    keys = rng.integers(0, 4, (200_000, 2))
    logit = rng.normal(-2.0, 0.5, 200_000)
    pair = np.where((keys == 3).all(axis=1), 0.6, 0.0)
    truth = logit + 0.4 * (keys[:, 0] == 1) - 0.3 * (keys[:, 1] == 2) + pair
    segments = SegmentCorrection.fit(
        levels("all", "a", "b", "a*b"), keys, sigmoid(logit), rng.random(200_000) < sigmoid(truth)
    )
    assert segments.transform_logit(logit, keys) == pytest.approx(truth, abs=0.12)


def test_a_restored_hierarchy_goes_on_to_the_bit() -> None:
    config = SegmentConfig(("all", "campaign_id", *NESTED), half_life=3_000.0, maximum_segments=64)
    straight = SegmentCorrection(config)
    restored = SegmentCorrection(config)
    keys, logit, truth = hierarchy(20_000, 8)
    keys = keys[:, ::-1]  # columns as the config names them first: campaign_id, advertiser_id
    label = np.random.default_rng(9).random(20_000) < sigmoid(truth)
    for start in range(0, 20_000, 250):
        now = slice(start, start + 250)
        for segments in (straight, restored):
            segments.update(keys[now], sigmoid(logit[now]), label[now])
            if start % 5_000 == 0:
                segments.refit()
        restored = SegmentCorrection.from_state(json.loads(json.dumps(restored.state())))
        same = restored.transform_logit(logit[now], keys[now])
        assert (straight.transform_logit(logit[now], keys[now]) == same).all()
    assert restored.state() == straight.state()


@pytest.mark.parametrize("base", [-5.0, -1.0, 1.0])
def test_the_response_to_a_shift_is_that_of_the_rows(base: float) -> None:
    logit = np.random.default_rng(12).normal(base, 0.5, 10_000)
    p = sigmoid(logit)
    response = SegmentResponse.of(
        np.array([p.sum()]), np.array([10_000.0]), np.array([(p * (1.0 - p)).sum()])
    )
    positives = 1.2 * p.sum()
    for start, shift in ((0.0, 0.3), (0.4, -0.6), (-0.5, 0.2)):
        moved = sigmoid(logit + start)
        assert response.expected_at(np.array([start])) == pytest.approx([moved.sum()], rel=2e-2)
        before, after = (np.logaddexp(0, logit + s).sum() - positives * s for s in (start, start + shift))
        gain = response.gain(np.array([positives]), np.array([start]), np.array([shift]))
        assert gain == pytest.approx([before - after], rel=0.05, abs=0.02 * p.sum())
