"""The delay network: its likelihood, what it recovers, and that it is kept only where it is better."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.delay_world import FIELDS, SPEC, DelayWorld, Drawn
from models import delay_hazard as training
from models.delay_fit import fit_delay_model
from models.delay_hazard import HazardConfig, hazard_columns, train_hazard
from pipelines import delay_hazard as applying
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_bins import GROUP_BINS, DelayBins
from pipelines.delay_groups import DelayGroups
from pipelines.delay_hazard import DelayHazard
from pipelines.delay_model import to_files
from pipelines.delay_rows import DelayRows, delay_loss, whole
from pipelines.delay_selection import choose
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.errors import ConfigError, DataError
from pipelines.feature_spec import Categorical, FeatureSpec, Sequence
from pipelines.simulation_delays import MEAN_CONVERSION_WEIGHTS

Floats = NDArray[np.float64]

WORLD = DelayWorld.draw(20, seed=1)
GRID = DelayGrid(WORLD.window, GROUP_BINS)
AGES = np.array([10 * MINUTE_MS, HOUR_MS, 6 * HOUR_MS, DAY_MS])


@functools.cache
def closed_log() -> Drawn:
    drawn = WORLD.outcomes(30_000, log=28 * DAY_MS, seed=2)
    return drawn.take(drawn.rows.follow_up >= WORLD.window)


@functools.cache
def common_curve() -> DelayCurve:
    rows = closed_log().rows
    return DelayCurve.fit(rows.delay, rows.follow_up)


@functools.cache
def trained() -> DelayHazard:
    return train_hazard(closed_log().rows, SPEC, common_curve(), WORLD.window)


def random_network(seed: int, scale: float = 1.0) -> DelayHazard:
    """Two columns, one number, one layer between, weights as they come."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    bins = DelayBins(DelayGrid(WORLD.window, 6), common_curve())
    layers = ((normal(7, 5), normal(5)), (normal(5, 5), normal(5)))
    return DelayHazard(bins, (0, 2), (1, 20), (4, 6), normal(10, 3), layers, scale, 1.0, "")


def random_rows(seed: int, n: int) -> DelayRows:
    rng = np.random.default_rng(seed)
    buckets = np.stack([rng.integers(1, 9, n), rng.integers(9, 20, n), rng.integers(20, 30, n)], axis=1)
    delay = rng.integers(0, WORLD.window + 1, n)
    follow_up = np.minimum(delay + rng.integers(0, WORLD.window, n), WORLD.window)
    numbers = rng.standard_normal((n, 1)).astype(np.float32)
    nothing = np.zeros((n, 0), np.int64)
    return DelayRows(buckets.astype(np.int32), numbers, nothing, np.arange(n), delay, follow_up)


def share_at(model: DelayHazard | DelayCurve | DelayGroups, rows: DelayRows, elapsed: float) -> Floats:
    age = np.full(len(rows), float(elapsed))
    return model.observed_share(age, rows.buckets, rows.numbers, rows.segment_key)


def error_to_truth(model: DelayHazard | DelayCurve | DelayGroups, drawn: Drawn) -> float:
    """Root mean square error of F over rows and ages."""
    errors = [
        share_at(model, drawn.rows, age) - WORLD.cdf(np.full(len(drawn.rows), age), drawn.weights)
        for age in AGES
    ]
    return float(np.sqrt(np.mean(np.square(errors))))


def test_network_without_scale_is_the_common_curve() -> None:
    network, rows = random_network(3, scale=0.0), random_rows(3, 200)
    at = np.linspace(0, WORLD.window, 200)
    found = network.observed_share(at, rows.buckets, rows.numbers, rows.segment_key)
    np.testing.assert_allclose(found, common_curve().cdf(at), atol=2e-5)


def test_shares_are_the_products_of_the_networks_reverse_hazards() -> None:
    # Row by row and bin by bin, in plain Python.
    network, rows = random_network(4), random_rows(4, 20)
    table = network.table(rows.buckets, rows.numbers)
    base = applying.base_logit(network.bins)
    (first, first_bias), (second, second_bias) = network.layers
    for row in range(20):
        left = (int(rows.buckets[row, 0]) - 1) % 4
        right = 4 + (int(rows.buckets[row, 2]) - 20) % 6
        inputs = [*network.embedding[left], *network.embedding[right], rows.numbers[row, 0]]
        hidden = [max(0.0, sum(x * w for x, w in zip(inputs, first[:, u], strict=True)) + first_bias[u])
                  for u in range(5)]  # fmt: skip
        for k in range(6):
            product = 1.0
            for j in range(k + 1, 6):
                output = sum(h * second[i, j - 1] for i, h in enumerate(hidden)) + second_bias[j - 1]
                product *= 1.0 - 1.0 / (1.0 + np.exp(-(base[j - 1] + output)))
            assert table[row, k] == pytest.approx(product, rel=1e-4, abs=1e-7)


def test_training_loss_is_the_truncated_likelihood() -> None:
    network = random_network(5)
    rows = whole(random_rows(5, 300), network.bins.grid)
    data = training._Tensors.of(rows, network.bins, network.columns, network.offsets, network.sizes)
    weights = {name: torch.from_numpy(array) for name, array in network.arrays().items()}
    loss = float(training._loss(training._moved(weights, data), data))
    own, covered = rows.bins(network.bins.grid)
    table = network.table(rows.buckets, rows.numbers)
    every = np.arange(len(rows))
    density = table[every, own] - np.where(own > 0, table[every, own - 1], 0.0)
    assert loss == pytest.approx(np.mean(np.log(table[every, covered]) - np.log(density)), rel=1e-4)


def test_delays_that_depend_on_campaign_and_hour_are_recovered() -> None:
    fresh = WORLD.outcomes(20_000, log=28 * DAY_MS, seed=6)
    by_curve = error_to_truth(common_curve(), fresh)
    groups = DelayGroups.fit(closed_log().rows.counts(GRID, FIELDS), common_curve())
    by_groups = error_to_truth(groups, fresh)
    by_network = error_to_truth(trained(), fresh)
    assert by_network < 0.4 * by_curve
    assert by_network < 0.5 * by_groups < 0.5 * by_curve


def test_network_is_calibrated_by_campaign_and_by_hour() -> None:
    fresh = WORLD.outcomes(30_000, log=28 * DAY_MS, seed=7)
    fresh = fresh.take(fresh.rows.follow_up >= WORLD.window)
    rows = fresh.rows
    hour = (rows.opened // HOUR_MS) % 24
    campaign = np.array([values[0] for values in fresh.values])
    parts = [hour // 6 == part for part in range(4)] + [campaign == f"c{one}" for one in range(6)]
    for age in AGES:
        predicted, came = share_at(trained(), rows, age), rows.delay <= age
        for part in parts:
            chance = np.sqrt(np.sum(predicted[part] * (1 - predicted[part])))
            gap = np.sum(came[part]) - np.sum(predicted[part])
            # Beyond the binomial error the estimate's own: 3 % of the outcomes.
            assert abs(gap) < 4 * chance + 0.03 * np.sum(part)


def test_open_windows_are_learned_from_without_bias() -> None:
    # No window is old enough to be closed: all that is seen has come early.
    drawn = WORLD.outcomes(30_000, log=7 * DAY_MS, seed=8)
    rows = drawn.rows
    curve = DelayCurve.fit(rows.delay, rows.follow_up)
    aware = train_hazard(rows, SPEC, curve, WORLD.window, open_windows=True)
    blind_rows = DelayRows(
        rows.buckets, rows.numbers, rows.segment_key, rows.opened, rows.delay,
        np.full(len(rows), WORLD.window),
    )  # fmt: skip
    naive_curve = DelayCurve.fit(blind_rows.delay, blind_rows.follow_up)
    blind = train_hazard(blind_rows, SPEC, naive_curve, WORLD.window)
    fresh = WORLD.outcomes(10_000, log=28 * DAY_MS, seed=9)
    mean = [share_at(model, fresh.rows, 6 * HOUR_MS).mean() for model in (aware, blind)]
    truth = WORLD.cdf(np.full(len(fresh.rows), 6 * HOUR_MS), fresh.weights).mean()
    assert abs(mean[0] - truth) < 0.01
    assert mean[1] - truth > 0.02
    assert error_to_truth(aware, fresh) < 0.5 * error_to_truth(curve, fresh)


def test_same_rows_and_seed_give_the_same_bytes_and_threads_are_left_alone() -> None:
    rows = closed_log().rows.take(np.arange(2_000))
    before = torch.get_num_threads()
    first, again = (train_hazard(rows, SPEC, common_curve(), WORLD.window) for _ in range(2))
    other = train_hazard(rows, SPEC, common_curve(), WORLD.window, HazardConfig(seed=18))
    assert to_files(first) == to_files(again)
    assert to_files(first) != to_files(other)
    assert torch.get_num_threads() == before


def test_rows_in_pieces_give_what_they_give_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(10, 1_000)
    network = random_network(10)
    whole_batch = share_at(network, rows, HOUR_MS)
    ages = network.quantiles(0.5, rows.buckets, rows.numbers, rows.segment_key)
    monkeypatch.setattr(applying, "_ROWS_AT_ONCE", 64)
    np.testing.assert_allclose(share_at(network, rows, HOUR_MS), whole_batch, rtol=1e-5)
    in_pieces = network.quantiles(0.5, rows.buckets, rows.numbers, rows.segment_key)
    np.testing.assert_allclose(in_pieces, ages, rtol=1e-4)


@given(seed=st.integers(0, 1_000), scale=st.floats(0, 1.25))
@settings(max_examples=25)
def test_every_network_is_a_distribution_function(seed: int, scale: float) -> None:
    network, one = random_network(seed, scale), random_rows(seed, 1)
    at = np.sort(np.random.default_rng(seed).uniform(-HOUR_MS, 1.1 * WORLD.window, 100))
    rows = one.take(np.zeros(100, np.int64))
    found = network.observed_share(at, rows.buckets, rows.numbers, rows.segment_key)
    assert np.all(np.diff(found) >= 0)
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(found[at < 0] == 0) and np.all(found[at >= WORLD.window] == 1)


def test_extreme_features_leave_shares_finite() -> None:
    rows = random_rows(11, 4)
    numbers = np.array([[np.inf], [-np.inf], [1e30], [0]], np.float32)
    network = random_network(11)
    found = network.observed_share(np.full(4, HOUR_MS), rows.buckets, numbers, rows.segment_key)
    assert np.all(np.isfinite(found))


def test_rarely_seen_values_are_left_out_unless_asked_for() -> None:
    rows = closed_log().rows
    config = HazardConfig()
    names = SPEC.field_names
    chosen = {names[column] for column in hazard_columns(SPEC, rows, config)[0]}
    # 2,000 users have a dozen outcomes each.
    assert chosen == {"campaign_id", "device", "hour_of_day"}
    asked = hazard_columns(SPEC, rows, HazardConfig(fields=("user_id",), largest_table=100))
    assert [names[column] for column in asked[0]] == ["user_id"]
    assert asked[2] == (100,)
    spec = FeatureSpec(
        categorical=(Categorical(name="a", buckets=4),),
        sequence=(Sequence(name="s", buckets=4, max_length=2),),
    )
    for wrong in ("s", "nothing"):
        with pytest.raises(ConfigError, match=wrong):
            hazard_columns(spec, rows, HazardConfig(fields=(wrong,)))


def test_the_network_is_kept_where_it_is_better() -> None:
    rows = closed_log().rows
    model, choice = fit_delay_model(rows, SPEC, common_curve(), WORLD.window, "hazard", FIELDS)
    assert isinstance(model, DelayHazard)
    assert choice.kind == "hazard"
    assert choice.loss["hazard"] < choice.loss["groups"] < choice.loss["curve"]
    mean, error = choice.gain["hazard"]
    assert mean > 5 * error
    assert "hazard beats groups" in choice.reason


def test_the_curve_is_kept_where_features_say_nothing() -> None:
    alike = DelayWorld(np.repeat(MEAN_CONVERSION_WEIGHTS[None, :], 20, axis=0), tilt=0.0)
    rows = alike.outcomes(10_000, log=21 * DAY_MS, seed=12).rows
    base = DelayCurve.fit(rows.delay, rows.follow_up)
    model, choice = fit_delay_model(rows, SPEC, base, alike.window, "hazard", FIELDS)
    assert model is base
    assert choice.kind == "curve"
    assert "does not beat curve" in choice.reason


def test_a_few_outcomes_or_no_wish_for_more_keep_the_curve() -> None:
    rows = closed_log().rows
    for few, kind, words in ((rows.take(np.arange(300)), "hazard", "only 300"), (rows, "curve", "asked for")):
        model, choice = fit_delay_model(few, SPEC, common_curve(), WORLD.window, kind, FIELDS)  # type: ignore[arg-type]
        assert model is common_curve()
        assert words in choice.reason


def test_loss_of_a_right_model_is_the_entropy_and_no_other_is_lower() -> None:
    fresh = WORLD.outcomes(20_000, log=28 * DAY_MS, seed=13)
    own, covered = fresh.rows.bins(GRID)
    fresh = fresh.take(own <= covered)
    held_out = whole(fresh.rows, GRID)
    assert len(held_out) == len(fresh.rows)
    truth = Truth(fresh.weights)
    loss = delay_loss(truth, held_out, GRID)
    for model in (common_curve(), trained()):
        assert np.mean(delay_loss(model, held_out, GRID)) > np.mean(loss)
    choice = choose({"curve": common_curve(), "truth": truth}, held_out, GRID)
    assert choice.kind == "truth" and choice.outcomes == len(held_out)


class Truth(DelayCurve):
    """The world's own F for a fixed set of rows."""

    def __init__(self, weights: Floats) -> None:
        super().__init__(np.zeros(0), np.zeros(0), 0.0)
        object.__setattr__(self, "weights", weights)

    def observed_share(self, elapsed: object, *_: object) -> Floats:
        weights: Floats = self.__dict__["weights"]
        return WORLD.cdf(np.asarray(elapsed, np.float64), weights)


def test_nothing_to_choose_from_is_refused() -> None:
    rows = closed_log().rows
    with pytest.raises(DataError, match="held-out"):
        choose({"curve": common_curve()}, rows.take(np.arange(1)), GRID)
    with pytest.raises(DataError, match="learn delays from"):
        train_hazard(rows.take(np.arange(1)), SPEC, common_curve(), WORLD.window)


def test_arrays_that_do_not_fit_are_refused() -> None:
    network = random_network(14)
    arrays = network.arrays()
    with pytest.raises(DataError, match="do not fit"):
        DelayHazard.from_state(network.state(), arrays | {"embedding": arrays["embedding"][1:]})
    with pytest.raises(DataError, match=r"Without: 1\.bias"):
        DelayHazard.from_state(network.state(), {k: v for k, v in arrays.items() if k != "1.bias"})
    with pytest.raises(DataError, match="more than 2 columns"):
        rows = random_rows(14, 3)
        network.observed_share(np.zeros(3), rows.buckets[:, :2], rows.numbers, rows.segment_key)


def test_size_that_makes_no_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 bins"):
        HazardConfig(bins=1)
    with pytest.raises(ConfigError, match="validation share"):
        HazardConfig(validation=1.0)
