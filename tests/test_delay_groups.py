"""Delays by group: the product limit, its shrinkage towards the parent, and who falls back to whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_bins import DelayBins
from pipelines.delay_counts import DelayCounts, Path, combined_keys, path_keys
from pipelines.delay_groups import DelayGroups
from pipelines.delay_prior import prior_strength, shrunk_probability
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.errors import DataError
from pipelines.hashing import hash_text
from pipelines.simulation_delays import CONVERSION_DELAY, MEAN_CONVERSION_WEIGHTS

Floats = NDArray[np.float64]

WINDOW = 7 * DAY_MS
GRID = DelayGrid(WINDOW, 32)
NOTHING = np.zeros((1, 0), np.int32)


def keys(*paths: Path) -> NDArray[np.int64]:
    """Segment keys of the values, as the feature encoding makes them."""
    hashed = [[0 if value is None else hash_text(str(value)) for value in path] for path in paths]
    return np.array(hashed, np.uint64).view(np.int64)


def share(model: DelayGroups, elapsed: Floats, *path: str | None) -> Floats:
    """F of one group at some ages."""
    n = len(elapsed)
    return model.observed_share(
        elapsed, np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32), np.repeat(keys(path), n, axis=0)
    )


def exponential_groups(
    rng: np.random.Generator, means: dict[str, float], n: int, log: float = 3 * WINDOW
) -> tuple[list[Path], Floats, Floats]:
    """Outcomes within the window that are known by the end of a log: values, delays, follow-ups."""
    names = rng.choice(list(means), n)
    delay = rng.exponential([means[str(name)] for name in names])
    age = rng.uniform(0, log, n)
    seen = (delay <= WINDOW) & (delay <= age)
    return [(str(name),) for name in names[seen]], delay[seen], age[seen]


def brute_force_reverse(delay: NDArray[np.int64], follow_up: NDArray[np.int64], bins: int) -> list[float]:
    """Lynden-Bell's product over bins, row by row."""
    found = []
    for k in range(bins):
        product = 1.0
        for j in range(k + 1, bins):
            happened = sum(d == j for d in delay)
            at_risk = sum(d <= j <= u for d, u in zip(delay, follow_up, strict=True))
            product *= 1 - happened / at_risk if at_risk else 1.0
        found.append(product)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_events_and_risk_give_the_brute_force_product(seed: int) -> None:
    rng = np.random.default_rng(seed)
    delay = rng.integers(0, 12, 200)
    follow_up = np.minimum(delay + rng.integers(0, 8, 200), 15)
    counts = DelayCounts(
        DelayGrid(WINDOW, 16), ("a",), (("x",),), np.zeros(200, np.int64), delay, follow_up, np.ones(200)
    )
    events, at_risk = counts.events_and_risk()
    uniform = np.linspace(1 / 16, 1, 16)
    own = shrunk_probability(events, at_risk, uniform, 0.0)
    np.testing.assert_allclose(own[0], brute_force_reverse(delay, follow_up, 16), atol=1e-12)


def test_outcomes_of_closed_windows_give_the_kaplan_meier_estimate_of_scipy() -> None:
    rng = np.random.default_rng(1)
    delay = rng.exponential(DAY_MS, 400)
    delay = delay[delay <= WINDOW]
    counts = DelayCounts.of(GRID, ("a",), [("x",)] * len(delay), delay, np.full(len(delay), WINDOW))
    events, at_risk = counts.events_and_risk()
    own = shrunk_probability(events, at_risk, np.linspace(0, 1, 32), 0.0)[0]
    edges = GRID.edges()
    binned = edges[GRID.bin_of(delay)]
    reference = stats.ecdf(stats.CensoredData(uncensored=binned)).cdf.evaluate(edges)
    np.testing.assert_allclose(own, reference, atol=1e-12)


def test_truncated_estimate_agrees_with_kaplan_meier_over_all_windows() -> None:
    # Another way to the same F: of all windows, with and without outcome, the time to the outcome is censored
    # at the follow-up, and 1 - S(e) = p F(e).
    rng = np.random.default_rng(2)
    n = 40_000
    opened = rng.uniform(0, 1.5 * WINDOW, n)
    delay = np.where(rng.random(n) < 0.3, rng.exponential(DAY_MS, n), np.inf)
    delay[delay > WINDOW] = np.inf
    seen, age = delay <= opened, np.minimum(opened, WINDOW)
    censored = stats.CensoredData.right_censored(np.where(seen, delay, age), ~seen)
    sf = stats.ecdf(censored).sf
    edges = GRID.edges()
    reference = (1 - sf.evaluate(edges)) / (1 - sf.evaluate(edges[-1] - 1))
    counts = DelayCounts.of(GRID, ("a",), [("x",)] * int(seen.sum()), delay[seen], opened[seen])
    own = shrunk_probability(*counts.events_and_risk(), np.linspace(0, 1, 32), 0.0)[0]
    assert np.max(np.abs(own - np.minimum(reference, 1))) < 0.01


def test_outcomes_in_an_unfinished_bin_do_not_bend_the_estimate() -> None:
    rng = np.random.default_rng(3)
    delay = rng.uniform(0, WINDOW, 200_000)
    age = rng.uniform(0, WINDOW, 200_000)
    seen = delay <= age
    coarse = DelayGrid(WINDOW, 12)
    counts = DelayCounts.of(coarse, ("a",), [("x",)] * int(seen.sum()), delay[seen], age[seen])
    own = shrunk_probability(*counts.events_and_risk(), np.linspace(0, 1, 12), 0.0)[0]
    edges = coarse.edges()
    # Nothing is known of the last bin, which no follow-up covers: compare what is normalised before it.
    np.testing.assert_allclose(own[5:-1] / own[-2], edges[5:-1] / edges[-2], rtol=0.05)


def test_closed_windows_give_the_mean_of_the_dirichlet_posterior() -> None:
    rng = np.random.default_rng(4)
    parent = np.cumsum(rng.dirichlet(np.ones(8)))
    events = rng.integers(0, 20, (5, 8)).astype(float)
    at_risk = np.cumsum(events, axis=1)
    n = at_risk[:, -1:]
    expected = (7.0 * parent + np.cumsum(events, axis=1)) / (7.0 + n)
    np.testing.assert_allclose(shrunk_probability(events, at_risk, parent, 7.0), expected, rtol=1e-12)


def test_truncated_posterior_agrees_with_weighted_draws_from_the_prior() -> None:
    # Importance sampling over the Dirichlet prior knows nothing of reverse hazards.
    rng = np.random.default_rng(5)
    mass, a = np.array([0.2, 0.3, 0.1, 0.4]), 6.0
    delay, follow_up = np.array([0, 0, 1, 1, 2, 0, 3]), np.array([1, 2, 1, 3, 2, 0, 3])
    draws = rng.dirichlet(a * mass, 400_000)
    cdf = np.cumsum(draws, axis=1)
    log_weight = sum(np.log(draws[:, d]) - np.log(cdf[:, u]) for d, u in zip(delay, follow_up, strict=True))
    weight = np.exp(log_weight - np.max(log_weight))
    expected = np.average(cdf, axis=0, weights=weight)
    counts = DelayCounts(
        DelayGrid(WINDOW, 4), ("a",), (("x",),), np.zeros(7, np.int64), delay, follow_up, np.ones(7)
    )
    found = shrunk_probability(*counts.events_and_risk(), np.cumsum(mass), a)[0]
    np.testing.assert_allclose(found, expected, atol=0.005)


def test_without_outcomes_the_parent_with_many_the_own() -> None:
    parent = np.array([0.1, 0.4, 0.8, 1.0])
    nothing = np.zeros((1, 4))
    np.testing.assert_allclose(shrunk_probability(nothing, nothing, parent, 50.0)[0], parent, rtol=1e-12)
    events = 1e9 * np.array([[0.4, 0.3, 0.2, 0.1]])
    many = shrunk_probability(events, np.cumsum(events, axis=1), parent, 50.0)[0]
    np.testing.assert_allclose(many, [0.4, 0.7, 0.9, 1.0], rtol=1e-6)
    few = np.array([[4.0, 3.0, 2.0, 1.0]])
    rigid = shrunk_probability(few, np.cumsum(few, axis=1), parent, 1e12)[0]
    np.testing.assert_allclose(rigid, parent, rtol=1e-6)


@pytest.mark.parametrize("a", [5.0, 60.0, 800.0])
def test_strength_is_recovered_from_truncated_counts(a: float) -> None:
    rng = np.random.default_rng(6)
    parent = np.linspace(0, 1, 13)[1:]
    groups = 1_500
    own = rng.dirichlet(a * np.diff(parent, prepend=0.0), groups)
    delay = np.array([rng.choice(12, 150, p=p) for p in own])
    follow_up = np.maximum(rng.integers(2, 24, delay.shape), 0)
    seen = delay <= follow_up
    group = np.repeat(np.arange(groups), seen.sum(axis=1))
    paths = tuple((f"{place:05d}",) for place in range(groups))
    counts = DelayCounts(
        DelayGrid(WINDOW, 12),
        ("a",),
        paths,
        group,
        delay[seen],
        np.minimum(follow_up[seen], 11),
        np.ones(len(group)),
    )
    assert prior_strength(*counts.events_and_risk(), parent) == pytest.approx(a, rel=0.15)


def test_groups_that_do_not_differ_are_not_told_apart() -> None:
    rng = np.random.default_rng(7)
    values, delay, age = exponential_groups(rng, {f"c{i}": DAY_MS for i in range(30)}, 20_000)
    curve = DelayCurve.fit(delay, np.minimum(age, WINDOW))
    model = DelayGroups.fit(DelayCounts.of(GRID, ("a",), values, delay, age), curve)
    at = np.geomspace(MINUTE_MS, WINDOW, 40)
    spread = np.array([share(model, at, f"c{i}") - curve.cdf(at) for i in range(30)])
    assert model.levels[0].strength > 2_000
    assert np.max(np.abs(spread)) < 0.03


def test_groups_are_calibrated_within_binomial_error() -> None:
    rng = np.random.default_rng(8)
    means: dict[str, float] = {"quick": HOUR_MS, "middle": 12 * HOUR_MS, "slow": 2 * DAY_MS}
    values, delay, age = exponential_groups(rng, means, 12_000)
    curve = DelayCurve.fit(delay, np.minimum(age, WINDOW))
    model = DelayGroups.fit(DelayCounts.of(GRID, ("a",), values, delay, age), curve)
    for name, mean in means.items():
        fresh = rng.exponential(mean, 2_000)
        fresh = fresh[fresh <= WINDOW]
        at = np.array([0.3, 1.0, 2.0]) * mean
        expected = share(model, at, name)
        observed = np.array([np.mean(fresh <= one) for one in at])
        # Estimate and sample err independently; about as many outcomes stand behind each.
        error = np.sqrt(expected * (1 - expected) * (1 / len(fresh) + 1 / 2_000))
        assert np.all(np.abs(observed - expected) < 4 * error)


def test_known_delays_of_the_simulators_advertisers_are_recovered_better_than_by_one_curve() -> None:
    rng = np.random.default_rng(9)
    weights = rng.dirichlet(12 * MEAN_CONVERSION_WEIGHTS, 25)
    advertiser = rng.integers(25, size=30_000)
    delay = CONVERSION_DELAY.sample(weights[advertiser], rng).astype(float)
    age = rng.uniform(0, 4 * WINDOW, 30_000)
    seen = (delay <= WINDOW) & (delay <= age)
    values: list[Path] = [(f"{one:02d}",) for one in advertiser[seen].tolist()]
    curve = DelayCurve.fit(delay[seen], np.minimum(age, WINDOW)[seen])
    counts = DelayCounts.of(GRID, ("advertiser_id",), values, delay[seen], age[seen])
    at = np.array([15 * MINUTE_MS, HOUR_MS, 6 * HOUR_MS, DAY_MS])
    truth = np.array([CONVERSION_DELAY.cdf(at, w) / CONVERSION_DELAY.cdf(WINDOW, w) for w in weights])
    by_curve = np.sqrt(np.mean((curve.cdf(at) - truth) ** 2))
    for open_windows in (False, True):
        model = DelayGroups.fit(counts, curve, open_windows=open_windows)
        found = np.array([share(model, at, f"{one:02d}") for one in range(25)])
        assert np.sqrt(np.mean((found - truth) ** 2)) < 0.3 * by_curve


def test_unseen_and_rare_values_get_the_parents_curve() -> None:
    rng = np.random.default_rng(10)
    values, delay, age = exponential_groups(rng, {"quick": HOUR_MS, "slow": 2 * DAY_MS}, 4_000)
    values += [("rare",)] * 19
    delay, age = np.append(delay, np.zeros(19)), np.append(age, np.full(19, 2 * WINDOW))
    curve = DelayCurve.fit(delay, np.minimum(age, WINDOW))
    model = DelayGroups.fit(DelayCounts.of(GRID, ("a",), values, delay, age), curve)
    at = np.geomspace(MINUTE_MS, WINDOW, 20)
    for name in ("rare", "never seen", None):
        np.testing.assert_allclose(share(model, at, name), curve.cdf(at), atol=1e-12)
    assert np.max(np.abs(share(model, at, "quick") - curve.cdf(at))) > 0.1


def test_second_field_is_shrunk_towards_the_first() -> None:
    rng = np.random.default_rng(11)
    n = 6_000
    campaign = rng.choice(["quick", "slow"], n)
    device = rng.choice(["phone", "desktop", "watch"], n, p=[0.6, 0.397, 0.003])
    mean = np.where(campaign == "quick", HOUR_MS, DAY_MS) * np.where(device == "phone", 1.0, 3.0)
    delay = np.minimum(rng.exponential(mean), WINDOW)
    age = np.full(n, float(WINDOW))
    values: list[Path] = [(str(a), str(b)) for a, b in zip(campaign, device, strict=True)]
    curve = DelayCurve.fit(delay, age)
    counts = DelayCounts.of(GRID, ("campaign_id", "device"), values, delay, age)
    model = DelayGroups.fit(counts, curve)
    at = np.array([HOUR_MS, 6 * HOUR_MS])
    for name, scale in (("quick", HOUR_MS), ("slow", DAY_MS)):
        for which, factor in (("phone", 1.0), ("desktop", 3.0)):
            truth = 1 - np.exp(-at / (scale * factor))
            np.testing.assert_allclose(share(model, at, name, which), truth, atol=0.05)
    only = DelayGroups.fit(DelayCounts.of(GRID, ("campaign_id",), [v[:1] for v in values], delay, age), curve)
    np.testing.assert_allclose(share(model, at, "slow", "watch"), share(only, at, "slow"), atol=1e-12)
    np.testing.assert_allclose(share(model, at, "new", "phone"), curve.cdf(at), atol=1e-12)


def test_shape_inside_a_bin_is_the_common_curves() -> None:
    rng = np.random.default_rng(12)
    delay = np.where(rng.random(20_000) < 0.5, 100 * MINUTE_MS, rng.exponential(HOUR_MS, 20_000))
    delay = np.minimum(delay, WINDOW)
    curve = DelayCurve.fit(delay, np.full(len(delay), float(WINDOW)))
    bins = DelayBins(GRID, curve)
    at = np.linspace(0, 5 * HOUR_MS, 300)
    table = bins.probability[None, :]
    np.testing.assert_allclose(bins.cdf(table, np.zeros(300, np.int64), at), curve.cdf(at), atol=1e-9)


def test_no_curve_no_correction() -> None:
    model = DelayGroups.fit(DelayCounts.of(GRID, ("a",), [], [], []), DelayCurve.fit([], []))
    assert share(model, np.array([0.0, 1.0, WINDOW]), "x").tolist() == [1.0, 1.0, 1.0]


@given(seed=st.integers(0, 10_000), open_windows=st.booleans(), support=st.integers(1, 400))
@settings(max_examples=40)
def test_share_is_a_distribution_function_and_quantiles_invert_it(
    seed: int, open_windows: bool, support: int
) -> None:
    rng = np.random.default_rng(seed)
    means = {"x": float(rng.uniform(MINUTE_MS, DAY_MS)), "y": float(rng.uniform(MINUTE_MS, DAY_MS))}
    values, delay, age = exponential_groups(rng, means, support + 50)
    curve = DelayCurve.fit(delay, np.minimum(age, WINDOW))
    counts = DelayCounts.of(GRID, ("a",), values, delay, age)
    model = DelayGroups.fit(counts, curve, open_windows=open_windows, minimum_support=1)
    at = np.sort(rng.uniform(-HOUR_MS, 1.1 * WINDOW, 200))
    n = np.zeros((200, 0), np.int32)
    key = np.repeat(keys(("x",)), 200, axis=0)
    found = model.observed_share(at, n, n.astype(np.float32), key)
    assert np.all(np.diff(found) >= -1e-12)
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(found[at >= WINDOW] == 1.0)
    assert np.all(found[at < 0] == 0.0)
    np.testing.assert_array_equal(found + model.survival(at, n, n.astype(np.float32), key), 1.0)
    wanted = float(rng.uniform(0.05, 0.95))
    age_of = model.quantiles(wanted, n[:1], n[:1].astype(np.float32), key[:1])
    assert share(model, age_of, "x")[0] >= wanted - 1e-6
    before = share(model, age_of * (1 - 1e-6) - 1, "x")[0]
    assert before <= wanted + 1e-6


@given(seed=st.integers(0, 10_000), cut=st.floats(0, 1))
@settings(max_examples=30)
def test_merged_counts_are_the_counts_of_all_rows(seed: int, cut: float) -> None:
    rng = np.random.default_rng(seed)
    values, delay, age = exponential_groups(rng, {"x": HOUR_MS, "y": DAY_MS, "z": MINUTE_MS}, 120)
    order = rng.permutation(len(delay))
    at = int(cut * len(delay))
    parts = [
        DelayCounts.of(GRID, ("a",), [values[i] for i in rows], delay[rows], age[rows])
        for rows in (order[:at], order[at:])
    ]
    merged, whole = DelayCounts.merge(parts), DelayCounts.of(GRID, ("a",), values, delay, age)
    assert merged.paths == whole.paths
    for name in ("group", "delay_bin", "follow_up_bin", "count"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_counts_on_other_grids_are_not_merged() -> None:
    one = DelayCounts.of(GRID, ("a",), [("x",)], [0.0], [1.0])
    with pytest.raises(DataError, match="one grid"):
        DelayCounts.merge([one, DelayCounts.of(DelayGrid(WINDOW, 8), ("a",), [("x",)], [0.0], [1.0])])


def test_outcome_before_its_window_is_refused() -> None:
    with pytest.raises(DataError, match="row 1"):
        DelayCounts.of(GRID, ("a",), [("x",), ("x",)], [1.0, -1.0], [5.0, 5.0])


def test_segment_keys_of_other_fields_are_refused() -> None:
    model = DelayGroups.fit(DelayCounts.of(GRID, ("a",), [], [], []), DelayCurve.fit([], []))
    with pytest.raises(DataError, match="one column each"):
        model.observed_share([1.0], NOTHING, NOTHING.astype(np.float32), np.zeros((1, 2), np.int64))


def test_null_is_a_value_of_its_own_and_paths_are_keyed_as_rows_are() -> None:
    paths: list[Path] = [("x", None), ("x", "1"), (None, None)]
    assert path_keys(paths).tolist() == combined_keys(keys(*paths), 2).tolist()
    assert len(set(path_keys(paths).tolist())) == 3
    assert path_keys([(None,), ("x",)]).tolist() == [0, int(np.uint64(hash_text("x")).astype(np.int64))]
