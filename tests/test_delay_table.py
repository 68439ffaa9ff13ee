"""The table of delays: limits by Greenwood's formula, quantiles and what is outstanding."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from monitoring.delay_table import delay_table, greenwood_interval
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_counts import DelayCounts, Path
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import DataError

WINDOW = 4 * DAY_MS
GRID = DelayGrid(WINDOW, 24)


def counts_of(delay: NDArray[np.float64], age: NDArray[np.float64]) -> DelayCounts:
    return DelayCounts.of(GRID, ("a",), [("x",)] * len(delay), delay, age)


def test_limits_are_those_of_scipys_kaplan_meier_backwards_in_time() -> None:
    # P(-D > -t) is the survival function of the negated delays: their log-log limits are F's.
    rng = np.random.default_rng(1)
    delay = np.minimum(rng.exponential(12 * HOUR_MS, 150), WINDOW)
    edges = GRID.edges()
    binned = edges[GRID.bin_of(delay)]
    backwards = stats.ecdf(stats.CensoredData(uncensored=-binned)).sf
    with pytest.warns(RuntimeWarning, match="undefined at some"):
        limits = backwards.confidence_interval(confidence_level=0.9, method="log-log")
    counts = counts_of(delay, np.full(150, float(WINDOW)))
    share, low, high = (part[0] for part in greenwood_interval(*counts.events_and_risk(), confidence=0.9))
    inside = np.flatnonzero((share > 0) & (share < 1))
    # F(E_k) = P(D <= E_k) = P(-D > -E_{k+1}).
    after = -edges[inside + 1]
    np.testing.assert_allclose(share[inside], backwards.evaluate(after), rtol=1e-9)
    np.testing.assert_allclose(low[inside], limits.low.evaluate(after), rtol=1e-9)
    np.testing.assert_allclose(high[inside], limits.high.evaluate(after), rtol=1e-9)


def test_greenwood_variance_agrees_with_the_bootstrap_under_truncation() -> None:
    rng = np.random.default_rng(2)
    age, delay = rng.uniform(0, 1.5 * WINDOW, 3_000), rng.exponential(DAY_MS, 3_000)
    seen = (delay <= age) & (delay <= WINDOW)
    age, delay = age[seen], delay[seen]
    at = [int(GRID.bin_of(x)) for x in (3 * HOUR_MS, 12 * HOUR_MS, DAY_MS)]
    drawn = []
    for _ in range(400):
        rows = rng.integers(len(delay), size=len(delay))
        drawn.append(greenwood_interval(*counts_of(delay[rows], age[rows]).events_and_risk())[0][0, at])
    bootstrap = np.std(drawn, axis=0)
    share, low, high = (
        part[0, at]
        for part in greenwood_interval(*counts_of(delay, age).events_and_risk(), confidence=0.6827)
    )
    np.testing.assert_allclose((high - low) / 2, bootstrap, rtol=0.15)
    assert np.all((low < share) & (share < high))


def test_limits_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    truth = 1 - np.exp(-GRID.edges() / (12 * HOUR_MS))
    inside = (truth > 0.1) & (truth < 0.9)
    covered = []
    for _ in range(300):
        delay = rng.exponential(12 * HOUR_MS, 120)
        _, low, high = greenwood_interval(
            *counts_of(np.minimum(delay, WINDOW), np.full(120, float(WINDOW))).events_and_risk()
        )
        covered.append((low[0] <= truth) & (truth <= high[0]))
    assert np.mean(np.array(covered)[:, inside]) == pytest.approx(0.95, abs=0.02)


def test_quantiles_of_exponential_delays_and_what_is_outstanding() -> None:
    rng = np.random.default_rng(4)
    mean = {"quick": HOUR_MS, "slow": 10 * HOUR_MS}
    names = rng.choice(list(mean), 4_000)
    delay = np.minimum(rng.exponential([mean[str(name)] for name in names]), WINDOW)
    window = np.full(4_000, float(WINDOW))
    values: list[Path] = [(str(name),) for name in names]
    counts = DelayCounts.of(GRID, ("campaign_id",), values, delay, window)
    table = delay_table(counts, DelayCurve.fit(delay, window), [HOUR_MS, DAY_MS])
    assert table[0]["group"] is None and table[0]["outcomes"] == 4_000
    rows = {row["group"]: row for row in table[1:]}
    assert set(rows) == set(mean)
    for name, scale in mean.items():
        median, last = rows[name]["quantiles"]
        assert (median["share"], last["share"]) == (0.5, 0.9)
        assert median["age"] == pytest.approx(np.log(2) * scale, rel=0.08)
        assert last["age"] == pytest.approx(np.log(10) * scale, rel=0.08)
        assert median["low"] < np.log(2) * scale < median["high"]
        for part in rows[name]["outstanding"]:
            assert part["share"] == pytest.approx(np.exp(-part["age"] / scale), abs=0.03)
            assert 0 <= part["low"] <= part["share"] <= part["high"] <= 1
    assert json.loads(json.dumps(table)) == table


def test_best_supported_groups_come_first_and_small_ones_are_left_out() -> None:
    sizes = {"b": 50, "a": 50, "c": 80, None: 30, "tiny": 5}
    values: list[Path] = [(name,) for name, size in sizes.items() for _ in range(size)]
    delay = np.linspace(1, WINDOW, len(values))
    window = np.full(len(values), float(WINDOW))
    counts = DelayCounts.of(GRID, ("a",), values, delay, window)
    curve = DelayCurve.fit(delay, window)
    assert [row["group"] for row in delay_table(counts, curve, [])] == [None, "c", "a", "b", "(null)"]
    assert [row["group"] for row in delay_table(counts, curve, [], largest=1)] == [None, "c"]
    assert delay_table(DelayCounts.of(GRID, ("a",), [], [], []), DelayCurve.fit([], []), [HOUR_MS]) == []


def test_nothing_later_seen_does_not_mean_that_nothing_is_outstanding() -> None:
    delay, window = np.full(60, 1_000.0), np.full(60, float(WINDOW))
    counts = counts_of(delay, window)
    share, low, high = greenwood_interval(*counts.events_and_risk())
    late = GRID.bins - 2
    assert share[0, late] == 1.0 and high[0, late] == 1.0
    assert low[0, late] == pytest.approx(stats.binomtest(60, 60).proportion_ci(0.95).low)


def test_end_of_an_interval_that_the_data_do_not_reach_is_none() -> None:
    delay = np.append(np.full(20, 1_000.0), np.full(5, 0.99 * WINDOW))
    window = np.full(25, float(WINDOW))
    (row, _) = delay_table(counts_of(delay, window), DelayCurve.fit(delay, window), [])
    ninety = row["quantiles"][1]
    assert ninety["age"] > 3 * DAY_MS
    assert ninety["low"] < ninety["age"]
    assert ninety["high"] is None


def test_confidence_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="confidence"):
        greenwood_interval(np.zeros((1, 2)), np.zeros((1, 2)), 1.0)
