"""Drift against scipy on the raw values, simulated nulls, merge laws, and the ways a feature can break."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from monitoring.categorical_summary import CategoricalSummary
from monitoring.drift import compare, drift_table, is_persistent
from monitoring.feature_summary import FeatureSummary, summarise, summary_from_state
from monitoring.numeric_summary import NumericSummary, numeric_edges
from pipelines.errors import DataError


def _numeric(reference: np.ndarray, current: np.ndarray) -> tuple[NumericSummary, NumericSummary]:
    before = NumericSummary.of("x", reference)
    now = before.empty_like()
    now.update(current)
    return before, now


def _categorical(reference: np.ndarray, current: np.ndarray) -> tuple[CategoricalSummary, CategoricalSummary]:
    before, now = CategoricalSummary("c"), CategoricalSummary("c")
    before.update(reference)
    now.update(current)
    return before, now


@pytest.mark.parametrize(
    ("shift", "scale"),
    [(0.0, 1.0), (0.3, 1.0), (0.0, 1.5), (2.0, 0.5)],
    ids=["same", "mean", "spread", "far"],
)
@pytest.mark.parametrize("shape", ["normal", "pareto", "counts"])
def test_ks_and_w1_are_those_of_scipy_on_the_raw_values(shape: str, shift: float, scale: float) -> None:
    rng = np.random.default_rng(1)

    def draw(n: int) -> np.ndarray:
        if shape == "normal":
            return rng.normal(size=n)
        return rng.pareto(1.5, size=n) if shape == "pareto" else rng.poisson(6, size=n).astype(np.float64)

    reference = draw(30_000)
    current = draw(20_000) * scale + shift
    if shape == "counts":
        current = np.round(current)
    row = compare(*_numeric(reference, current))
    assert row.ks == pytest.approx(stats.ks_2samp(reference, current).statistic, abs=1 / 2048)
    expected = stats.wasserstein_distance(reference, current)
    # Without variance (Pareto 1.5) a few values carry the distance, and crossings among them are left out.
    least = 0.8 * expected if shape == "pareto" else 0.99 * expected - 1e-3
    assert row.w1 is not None and least <= row.w1 <= expected * (1 + 1e-9)


def test_a_constant_feature_that_takes_another_value_has_drifted_either_way() -> None:
    for value in (2.0, 0.5):
        row = compare(*_numeric(np.ones(500), np.full(500, value)))
        assert row.verdict == "drifted"
        assert row.ks == 1.0
        assert row.w1 == pytest.approx(abs(value - 1.0))


def test_js_is_that_of_scipy_and_one_bit_where_nothing_is_shared() -> None:
    row = compare(
        *_categorical(np.repeat(["a", "b", "c"], [50, 30, 20]), np.repeat(["a", "b", "c"], [20, 30, 50]))
    )
    assert row.js == pytest.approx(jensenshannon([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], base=2) ** 2)
    apart = compare(*_categorical(np.repeat(["a"], 100), np.repeat(["b"], 100)))
    assert apart.js == pytest.approx(1.0)


def test_psi_is_its_textbook_sum_for_large_counts_and_p_value_that_of_scipy() -> None:
    before, now = np.array([50_000, 30_000, 20_000]), np.array([48_000, 31_000, 21_000])
    keys = np.array([1, 2, 3])
    row = compare(*_categorical(np.repeat(keys, before), np.repeat(keys, now)))
    p, q = before / before.sum(), now / now.sum()
    assert row.psi == pytest.approx(float(((p - q) * np.log(p / q)).sum()), rel=1e-3)
    assert row.psi_null == pytest.approx(2 * (1e-5 + 1e-5))
    expected = stats.chi2_contingency(np.stack((before, now)), correction=False).pvalue
    assert row.p_value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["numeric", "categorical", "many categories"])
def test_without_drift_psi_averages_its_null_expectation_and_p_values_hold_their_level(kind: str) -> None:
    rng = np.random.default_rng(2)
    excess, chances = [], []
    for _ in range(200):
        if kind == "numeric":
            row = compare(*_numeric(rng.normal(size=4000), rng.normal(size=2000)))
        else:
            top = 20 if kind == "categorical" else 3000
            draw = np.minimum(rng.zipf(1.3, size=6000), top)
            row = compare(*_categorical(draw[:4000], draw[4000:]))
        assert row.psi is not None and row.psi_null is not None and row.p_value is not None
        excess.append(row.psi / row.psi_null)
        chances.append(row.p_value)
    assert float(np.mean(excess)) == pytest.approx(1.0, abs=0.06)
    # Four standard errors of a share of 0.05 in 200 samples are 0.062.
    assert float(np.mean(np.array(chances) < 0.05)) <= 0.112
    # Two tests share a numeric p-value by Bonferroni, which is conservative.
    assert float(np.mean(chances)) >= 0.41
    if kind != "numeric":
        assert float(np.mean(chances)) <= 0.59


def test_false_alarms_over_many_features_stay_below_the_level() -> None:
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(30):
        before = summarise({f"f{i}": rng.normal(size=300) for i in range(20)})
        now = summarise({f"f{i}": rng.normal(size=300) for i in range(20)}, like=before)
        alarms += any(row["verdict"] != "ok" for row in drift_table(before, now))
    assert alarms <= 2


def test_a_certain_but_tiny_difference_is_not_drift() -> None:
    rng = np.random.default_rng(4)
    row = compare(*_numeric(rng.normal(size=200_000), rng.normal(0.02, 1, size=200_000)))
    assert row.p_value is not None and row.p_value < 0.001
    assert row.verdict == "ok" and "floor" in row.why


def test_nulls_are_counted_apart_and_a_jump_of_the_null_rate_is_drift() -> None:
    rng = np.random.default_rng(5)
    current = rng.normal(size=5000)
    current[:1000] = np.nan
    row = compare(*_numeric(rng.normal(size=5000), current))
    assert (row.null_rate_reference, row.null_rate_current) == (0.0, 0.2)
    assert row.verdict == "drifted" and "null rate 0.000 to 0.200" in row.why
    assert row.ks is not None and row.ks < 0.05
    values = np.array(["a", None, float("nan"), "b"], dtype=object)
    summary = CategoricalSummary("c")
    summary.update(values)
    assert (summary.rows, summary.nulls, summary.cardinality) == (4, 2, 2)


def test_infinite_values_are_counted_and_do_not_become_the_maximum() -> None:
    row = compare(*_numeric(np.arange(100.0), np.append(np.arange(100.0), [np.inf, -np.inf, np.inf])))
    assert (row.infinite_reference, row.infinite_current) == (0, 3)
    assert (row.minimum_current, row.maximum_current) == (0.0, 99.0)


def test_new_categories_count_only_above_what_sampling_explains() -> None:
    rng = np.random.default_rng(6)
    # A long tail always shows unseen items; Good and Turing say how many.
    draw = rng.zipf(1.2, size=60_000)
    tail = compare(*_categorical(draw[:30_000], draw[30_000:]))
    assert tail.new_mass is not None and tail.new_mass > 0.05
    assert tail.new_mass_expected == pytest.approx(tail.new_mass, rel=0.1)
    assert tail.verdict == "ok"
    fresh = compare(*_categorical(np.array(["a", "b"] * 500), np.array(["a", "b", "c", "d"] * 250)))
    assert fresh.new_mass == 0.5 and fresh.new_mass_expected == 0.0 and fresh.lost_mass == 0.0
    assert fresh.verdict == "drifted" and "50.0% in new categories" in fresh.why


def test_oov_rate_is_the_share_of_known_values_outside_the_vocabulary() -> None:
    before, now = _categorical(np.array([1, 2, 3]), np.array([1, 1, 4, 9]))
    assert compare(before, now, vocabulary=[1, 2, 3, 4]).oov_rate == 0.25
    assert compare(before, now).oov_rate is None


def test_rows_are_sorted_worst_first_and_a_missing_feature_is_reported() -> None:
    rng = np.random.default_rng(7)
    columns = {name: rng.normal(size=3000) for name in ("calm", "gone", "mild", "wild")}
    before = summarise(columns)
    now = summarise(
        {
            "calm": rng.normal(size=3000),
            "mild": rng.normal(0.35, 1, size=3000),
            "wild": rng.normal(2, 1, size=3000),
        },
        like=before,
    )
    table = drift_table(before, now)
    assert [row["verdict"] for row in table] == ["drifted", "drifted", "watch", "ok"]
    assert [row["feature"] for row in table] == ["wild", "gone", "mild", "calm"]
    assert table[1]["why"] == "absent from the current window" and table[1]["psi"] is None
    assert json.loads(json.dumps(table)) == table


def test_an_empty_window_is_to_be_watched_not_judged() -> None:
    before = summarise({"x": np.arange(10.0), "c": np.array(["a", "b"])})
    empty = {name: one.empty_like() for name, one in before.items()}
    assert {row["why"] for row in drift_table(before, empty)} == {"no rows in the current window"}
    assert {row["verdict"] for row in drift_table(empty, before)} == {"watch"}


def test_all_null_windows_have_no_distance_and_do_not_fail() -> None:
    row = compare(*_numeric(np.full(50, np.nan), np.arange(50.0)))
    assert row.ks is None and row.w1 is None and row.verdict == "drifted"
    row = compare(*_categorical(np.array([None] * 50, dtype=object), np.array(["a"] * 50)))
    assert row.new_mass is None and row.verdict == "drifted"


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "c"])), max_size=8), min_size=3, max_size=3
    )
)
def test_categorical_summaries_merge_to_the_summary_of_the_whole(parts: list[list[str | None]]) -> None:
    summaries = [CategoricalSummary("c") for _ in parts]
    whole = CategoricalSummary("c")
    for summary, part in zip(summaries, parts, strict=True):
        summary.update(np.array(part, dtype=object))
        whole.update(np.array(part, dtype=object))
    first, second, third = summaries
    before = first.state()
    assert first.merge(second).merge(third).state() == whole.state()
    assert third.merge(second.merge(first)).state() == whole.state()
    assert first.state() == before


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.one_of(st.just(float("nan")), st.just(float("inf")), st.integers(-20, 20)), max_size=12),
        min_size=3,
        max_size=3,
    )
)
def test_numeric_summaries_merge_to_the_summary_of_the_whole(parts: list[list[float]]) -> None:
    # Integers, so that even the sums of values are exact.
    reference = NumericSummary("x", *numeric_edges(np.arange(-10.0, 10.0), bins=8))
    summaries: list[NumericSummary] = []
    whole = reference.empty_like()
    for part in parts:
        summary = reference.empty_like()
        summary.update(np.array(part, dtype=float))
        whole.update(np.array(part, dtype=float))
        summaries.append(summary)
    first, second, third = summaries
    before = first.state()
    assert first.merge(second).merge(third).state() == whole.state()
    assert third.merge(second.merge(first)).state() == whole.state()
    assert first.state() == before
    assert int(whole.counts.sum()) + whole.nulls + whole.infinite == whole.rows


def test_bins_hold_the_reference_evenly_and_everything_it_never_had_lies_outside() -> None:
    values = np.random.default_rng(8).normal(size=100_000)
    summary = NumericSummary.of("x", values)
    assert not summary.is_discrete and summary.counts[0] == 0 and summary.counts[-1] == 0
    inner = summary.counts[1:-1]
    assert inner.shape[0] == 2048 and inner.min() >= 48 and inner.max() <= 50
    current = summary.empty_like()
    current.update(np.array([values.max() + 1, values.min() - 1, 0.0]))
    assert current.counts[0] == 1 and current.counts[-1] == 1
    discrete = NumericSummary.of("x", np.array([3.0, 3.0, 7.0]))
    assert discrete.is_discrete and discrete.cardinality == 2


def test_state_survives_json_exactly_for_both_kinds() -> None:
    columns = {
        "number": np.array([1.5, np.nan, np.inf, 0.1]),
        "key": np.array([2**62, -5, 7]),
        "word": np.array(["b", None, "a"], dtype=object),
        "nothing": np.full(3, np.nan),
    }
    for summary in summarise(columns).values():
        again = summary_from_state(json.loads(json.dumps(summary.state(), allow_nan=False)))
        assert again.state() == summary.state()
        if again.rows != again.nulls:
            assert compare(summary, again).psi == 0.0
    with pytest.raises(DataError, match="categorical or numeric"):
        summary_from_state({"kind": "other"})


def test_kinds_follow_the_type_unless_told() -> None:
    columns = {"float": np.array([1.0]), "int": np.array([1]), "str": np.array(["a"])}
    assert [s.kind for s in summarise(columns).values()] == ["numeric", "categorical", "categorical"]
    mixed = {"age": np.array([30, None, 4.5], dtype=object)}
    (told,) = summarise(mixed, kinds={"age": "numeric"}).values()
    assert told.kind == "numeric" and told.nulls == 1


def test_what_cannot_be_compared_is_refused_with_the_remedy() -> None:
    before: dict[str, FeatureSummary] = summarise({"x": np.arange(5.0), "c": np.array(["a"])})
    with pytest.raises(DataError, match="features of the reference"):
        summarise({"y": np.arange(5.0)}, like=before)
    with pytest.raises(DataError, match="like=reference"):
        compare(before["x"], CategoricalSummary("x"))
    with pytest.raises(DataError, match="same edges"):
        compare(before["x"], NumericSummary.of("x", np.arange(9.0)))
    with pytest.raises(DataError, match="empty_like"):
        NumericSummary.of("x", np.arange(5.0)).merge(NumericSummary.of("x", np.arange(6.0)))
    with pytest.raises(DataError, match="`c`"):
        CategoricalSummary("c").merge(CategoricalSummary("d"))
    with pytest.raises(DataError, match="numbers or None"):
        NumericSummary.of("x", np.array(["a", "b"]))
    with pytest.raises(DataError, match="flatten"):
        CategoricalSummary("c").update(np.array([["a"], ["b"]]))
    lists = np.empty(1, dtype=object)
    lists[0] = ["a", "b"]
    with pytest.raises(DataError, match="flatten"):
        CategoricalSummary("c").update(lists)


def test_one_bad_window_is_not_persistent_drift_but_two_of_three_are() -> None:
    assert not is_persistent(["drifted"])
    assert not is_persistent(["ok", "ok", "drifted"])
    assert is_persistent(["ok", "drifted", "watch", "drifted"])
