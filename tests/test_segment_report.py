"""Worst segments: exact tails and quantiles, order by evidence, false discoveries under known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, gamma, poisson

from monitoring.segment_report import SegmentCounts, worst_segments
from pipelines.errors import ConfigError, DataError


def counts(positives: Any, expected: Any, **values: Any) -> SegmentCounts:
    c, e = np.asarray(positives, np.float64), np.asarray(expected, np.float64)
    plain = {
        "level": "site",
        "key": np.arange(len(c)),
        "rows": 100.0 * e,
        "dispersion": np.ones(len(c)),
        "gain": np.zeros(len(c)),
        "strength": 25.0,
    }
    return SegmentCounts(positives=c, expected=e, **{**plain, **values})


def test_for_rare_positives_the_tails_are_those_of_poisson() -> None:
    c, e = np.arange(40.0), np.full(40, 12.5)
    found = sorted(worst_segments([counts(c, e)]), key=lambda one: one.key)
    twice = 2.0 * np.minimum(poisson.cdf(c, 12.5), poisson.sf(c - 1.0, 12.5))
    assert [one.p_value for one in found] == pytest.approx(np.minimum(1.0, twice), rel=1e-10)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.35])
def test_for_frequent_positives_the_tails_are_about_those_of_the_binomial(rate: float) -> None:
    rows = 400
    c = np.arange(int(rows * rate) - 40.0, rows * rate + 40.0, 4.0)
    c = c[c >= 0]
    expected = np.full(len(c), rows * rate)
    found = worst_segments([counts(c, expected, dispersion=np.full(len(c), 1.0 - rate))])
    for one in found:
        exact = 2.0 * min(binom.cdf(one.positives, rows, rate), binom.sf(one.positives - 1.0, rows, rate))
        if exact > 1e-5:
            assert one.p_value == pytest.approx(min(1.0, exact), rel=0.6)


def test_bounds_are_quantiles_of_the_gamma_posterior() -> None:
    one, two = sorted(
        worst_segments(
            [counts([30.0, 2.0], [20.0, 9.0], dispersion=np.array([1.0, 0.5]), strength=8.0)], coverage=0.9
        ),
        key=lambda finding: finding.key,
    )
    for finding, c, e in ((one, 30.0, 20.0), (two, 4.0, 18.0)):
        posterior = gamma(c + 8.0, scale=1.0 / (e + 8.0))
        assert finding.multiplier == pytest.approx(posterior.mean())
        assert [finding.lower, finding.upper] == pytest.approx(posterior.ppf([0.05, 0.95]))
    assert one.pcoc == pytest.approx(20.0 / 30.0)


def test_evidence_goes_before_size_and_cost_decides_where_evidence_is_beyond_counting() -> None:
    # Off fivefold by two clicks; by a fifth with thousands; twice beyond any float.
    level = counts([5.0, 6_000.0, 2e6, 2e6], [1.0, 5_000.0, 1e6, 1e6], gain=np.array([1.0, 9.0, 5.0, 6.0]))
    found = worst_segments([level])
    assert [one.key for one in found] == [3, 2, 1, 0]
    assert found[0].p_value == found[1].p_value == 0.0


def test_at_most_the_asked_share_of_those_called_off_is_not() -> None:
    rng = np.random.default_rng(1)
    wrong, called, missed = 0, 0, 0
    for _ in range(20):
        expected = rng.uniform(20.0, 200.0, 1_000)
        truth = np.where(np.arange(1_000) < 100, rng.choice([0.5, 1.7], 1_000), 1.0)
        found = worst_segments(
            [
                counts(rng.poisson(expected * truth)[part], expected[part], key=np.arange(1_000)[part])
                for part in (slice(0, 500), slice(500, None))
            ],
            false_discovery_rate=0.1,
        )
        off = [one.key for one in found if one.is_off]
        called += len(off)
        wrong += sum(key >= 100 for key in off)
        missed += 100 - sum(key < 100 for key in off)
    assert 0.04 < wrong / called < 0.1
    assert missed < 0.15 * 20 * 100


def test_where_nothing_is_wrong_hardly_ever_anything_is_called_off() -> None:
    rng = np.random.default_rng(2)
    false_alarms = 0
    for _ in range(100):
        rate = rng.uniform(0.05, 0.4, 300)
        rows = rng.integers(50, 2_000, 300)
        level = counts(rng.binomial(rows, rate), rows * rate, dispersion=1.0 - rate)
        false_alarms += any(one.is_off for one in worst_segments([level]))
    assert false_alarms <= 10


def test_segments_that_expect_nothing_are_left_out_and_no_positives_have_no_pcoc() -> None:
    found = worst_segments([counts([0.0, 0.0, 3.0], [0.0, 4.0, 3.0])])
    assert [one.key for one in found] == [1, 2]
    assert found[0].pcoc is None
    assert found[0].p_value == pytest.approx(2.0 * np.exp(-4.0))
    assert worst_segments([]) == []


def test_columns_of_other_lengths_and_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(DataError, match="one length"):
        counts([1.0], [1.0], gain=np.zeros(2))
    for values in ({"dispersion": np.zeros(1)}, {"strength": 0.0}):
        with pytest.raises(DataError, match="above 0"):
            counts([1.0], [1.0], **values)
    for values in ({"false_discovery_rate": 0.0}, {"coverage": 1.0}):
        with pytest.raises(ConfigError):
            worst_segments([counts([1.0], [1.0])], **values)
