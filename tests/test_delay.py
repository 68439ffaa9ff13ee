"""The delay curve recovers the distribution of delays from a log that ends now."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.delay import DelayCurve, DelayGrid
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.errors import DataError

Floats = NDArray[np.float64]


def brute_force(delay: Floats, follow_up: Floats, at: float) -> float:
    """Lynden-Bell's product, factor by factor: over the distinct delays above ``at``."""
    product = 1.0
    for point in sorted(set(delay.tolist())):
        if point > at:
            happened = np.sum(delay == point)
            at_risk = np.sum((delay <= point) & (follow_up >= point))
            product *= 1 - happened / at_risk
    return product


def mixture(rng: np.random.Generator, n: int) -> Floats:
    """Delays as they are: a hump within the hour, one the same day, one the days after; ms."""
    part = rng.choice(3, size=n, p=[0.4, 0.35, 0.25])
    scale = np.array([15 * MINUTE_MS, 8 * HOUR_MS, 2.5 * DAY_MS])[part]
    return rng.exponential(scale)


def seen_by_now(
    seed: int, n: int = 60_000, log: int = 14 * DAY_MS, window: int = 7 * DAY_MS
) -> tuple[Floats, Floats, Floats]:
    """Outcomes within the window, of windows opened evenly over the log, known by its end."""
    rng = np.random.default_rng(seed)
    delay, age = mixture(rng, n), rng.uniform(0, log, n)
    credited = delay <= window
    seen = credited & (delay <= age)
    return delay[seen], np.minimum(age[seen], window), np.sort(delay[credited])


@pytest.mark.parametrize("seed", range(5))
def test_curve_equals_the_brute_force_product(seed: int) -> None:
    rng = np.random.default_rng(seed)
    delay = rng.integers(0, 30, 300).astype(float)
    follow_up = delay + rng.integers(0, 20, 300).astype(float)
    curve = DelayCurve.fit(delay, follow_up, minimum=0)
    expected = [brute_force(delay, follow_up, point) for point in curve.delay]
    np.testing.assert_allclose(curve.cdf(curve.delay), expected, rtol=1e-12)


def test_weights_are_repetitions() -> None:
    rng = np.random.default_rng(1)
    delay = rng.integers(0, 10, 50).astype(float)
    follow_up, times = delay + rng.integers(0, 9, 50), rng.integers(1, 5, 50)
    weighted = DelayCurve.fit(delay, follow_up, times, minimum=0)
    repeated = DelayCurve.fit(np.repeat(delay, times), np.repeat(follow_up, times), minimum=0)
    np.testing.assert_allclose(weighted.cdf(weighted.delay), repeated.cdf(weighted.delay), rtol=1e-12)


def test_complete_follow_up_gives_the_empirical_distribution() -> None:
    delay = np.random.default_rng(2).exponential(size=500)
    curve = DelayCurve.fit(delay, np.full(500, 100.0))
    empirical = np.searchsorted(np.sort(delay), curve.delay, side="right") / 500
    # Within the first few there are fewer at risk than the curve asks for.
    np.testing.assert_allclose(curve.probability[20:], empirical[20:], rtol=1e-9)


def test_known_mixture_of_delays_is_recovered_where_counting_what_was_seen_is_wrong() -> None:
    delay, follow_up, truth = seen_by_now(seed=3, log=7 * DAY_MS)
    curve = DelayCurve.fit(delay, follow_up)
    at = np.array([5 * MINUTE_MS, HOUR_MS, 6 * HOUR_MS, DAY_MS, 3 * DAY_MS])
    true = np.searchsorted(truth, at) / len(truth)
    naive = np.searchsorted(np.sort(delay), at) / len(delay)
    assert np.max(np.abs(curve.cdf(at) - true)) < 0.02
    assert np.max(np.abs(naive - true)) > 0.05


def test_counts_on_the_grid_give_nearly_the_curve_of_the_rows() -> None:
    delay, follow_up, _ = seen_by_now(seed=4)
    grid = DelayGrid(7 * DAY_MS)
    cells = np.stack([grid.bin_of(delay), grid.bin_of(follow_up)])
    (delay_bin, follow_up_bin), count = np.unique(cells, axis=1, return_counts=True)
    binned = DelayCurve.fit(grid.edges()[delay_bin], grid.edges()[follow_up_bin], count)
    exact = DelayCurve.fit(delay, follow_up)
    at = np.geomspace(MINUTE_MS, 7 * DAY_MS, 50)
    assert np.max(np.abs(binned.cdf(at) - exact.cdf(at))) < 0.01


def test_grid_is_monotone_and_every_edge_lies_in_its_own_bin() -> None:
    grid = DelayGrid(90 * DAY_MS)
    edges = grid.edges()
    assert np.all(np.diff(edges) > 0)
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(90 * DAY_MS)
    assert grid.bin_of(edges).tolist() == list(range(grid.bins))
    duration = np.sort(np.random.default_rng(5).uniform(0, 91 * DAY_MS, 10_000))
    assert np.all(np.diff(grid.bin_of(duration)) >= 0)


def test_normalised_at_the_largest_follow_up() -> None:
    # Half of the outcomes take longer than anything that could have been seen.
    rng = np.random.default_rng(6)
    delay = np.where(rng.random(20_000) < 0.5, rng.uniform(0, 100, 20_000), 1e6)
    follow_up = rng.uniform(0, 100, 20_000)
    seen = delay <= follow_up
    curve = DelayCurve.fit(delay[seen], follow_up[seen])
    assert curve.cdf([50.0])[0] == pytest.approx(0.5, abs=0.03)
    assert curve.cdf([1e6])[0] == 1.0


def test_one_old_outcome_does_not_wipe_out_the_curve() -> None:
    delay = np.append(np.random.default_rng(7).uniform(0, 10, 1000), 900.0)
    follow_up = np.append(np.full(1000, 20.0), 1000.0)
    assert DelayCurve.fit(delay, follow_up, minimum=0).cdf([9.0])[0] == 0.0
    assert DelayCurve.fit(delay, follow_up).cdf([10.0])[0] == 1.0


def test_too_few_outcomes_correct_nothing() -> None:
    curve = DelayCurve.fit([1.0, 2.0], [5.0, 5.0])
    assert curve.cdf([0.0, 1.0, 1e9]).tolist() == [1.0, 1.0, 1.0]
    assert DelayCurve.fit([], []).cdf([0.0, 1.0]).tolist() == [1.0, 1.0]


def test_outcomes_known_at_once_need_no_waiting() -> None:
    curve = DelayCurve.fit(np.zeros(100), np.arange(100.0))
    assert curve.cdf([0.0, 1.0]).tolist() == [1.0, 1.0]


def test_inverse_is_the_least_age_at_which_that_share_has_come() -> None:
    curve = DelayCurve(np.array([10.0, 20.0, 30.0]), np.array([0.2, 0.2, 1.0]), 100.0)
    assert curve.inverse([0.0, 0.1, 0.2, 0.6, 1.0]).tolist() == [0.0, 5.0, 10.0, 25.0, 30.0]
    assert DelayCurve(np.array([0.0, 8.0]), np.array([0.5, 1.0]), 9.0).inverse([0.3, 0.75]).tolist() == [0, 4]


def test_state_gives_the_same_curve() -> None:
    delay, follow_up, _ = seen_by_now(seed=8, n=500)
    curve = DelayCurve.fit(delay, follow_up)
    again = DelayCurve.from_state(json.loads(json.dumps(curve.state())))
    at = np.linspace(0, 7 * DAY_MS, 99)
    np.testing.assert_array_equal(again.cdf(at), curve.cdf(at))
    assert again.support == curve.support


@pytest.mark.parametrize(("delay", "follow_up"), [(-1.0, 5.0), (6.0, 5.0), (np.nan, 5.0), (1.0, np.inf)])
def test_impossible_delay_is_refused(delay: float, follow_up: float) -> None:
    with pytest.raises(DataError, match="0 <= delay <= follow-up"):
        DelayCurve.fit([1.0, delay], [2.0, follow_up])


def test_state_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match="delay_curve"):
        DelayCurve.from_state({"kind": "platt", "version": 1})
