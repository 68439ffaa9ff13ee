"""Consistency, freshness, accounting and the verdict table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from monitoring.accounting import CLASSES, Accounting
from monitoring.base_rate import running_base_rate_log_loss
from monitoring.consistency import consistency, spearman
from monitoring.freshness import RELATIVE_ERROR, LatencyHistogram
from monitoring.quality import PairedDifference, paired_log_loss
from monitoring.quality_table import quality_table
from monitoring.verdicts import (
    Verdict,
    accounting_verdict,
    base_rate_verdict,
    drift_verdict,
    freshness_verdict,
    overall_status,
    pcoc_verdict,
    recovery_verdict,
    teacher_verdict,
    verdict_table,
)
from pipelines.errors import DataError
from pipelines.events import KINDS


def test_spearman_is_that_of_scipy_with_ties() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, 300), rng.integers(0, 5, 300)
    assert spearman(a, a + b) == pytest.approx(stats.spearmanr(a, a + b).statistic, rel=1e-12)
    assert spearman([1, 1], [2, 3]) is None and spearman([1], [1]) is None


def test_equal_scores_pass_the_gate_and_float_noise_is_counted_but_passes() -> None:
    logit = np.random.default_rng(2).normal(size=1000)
    same = consistency(logit, logit.copy())
    assert (
        same["status"] == "good" and same["max_abs_delta"] == 0.0 and same["spearman"] == pytest.approx(1.0)
    )
    assert same["worst_row"] is None
    noisy = logit.copy()
    noisy[7] += 5e-5
    outcome = consistency(logit, noisy)
    assert outcome["status"] == "good" and outcome["share_over_noise"] == 0.001
    assert outcome["worst_row"] == 7 and outcome["rows_over_gate"] == 0


def test_one_row_over_the_gate_closes_it() -> None:
    logit = np.zeros(1000)
    other = logit.copy()
    other[123] = 2e-4
    outcome = consistency(logit, other)
    assert outcome["status"] == "bad" and outcome["rows_over_gate"] == 1 and outcome["worst_row"] == 123
    assert outcome["p99_abs_delta"] == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_on_one_side_or_both_closes_the_gate(value: float) -> None:
    outcome = consistency([0.0, value], [0.0, value])
    assert outcome["status"] == "bad" and outcome["non_finite"] == 1 and outcome["worst_row"] == 1
    assert consistency([value], [0.0])["max_abs_delta"] is None


def test_the_first_differing_feature_is_named_even_if_the_logits_agree() -> None:
    logged = np.arange(12).reshape(4, 3)
    rescored = logged.copy()
    rescored[2:, 1] += 1
    rescored[0, 2] += 1
    outcome = consistency(
        np.zeros(4),
        np.zeros(4),
        logged_buckets=logged,
        rescored_buckets=rescored,
        feature_names=["user", "item", "hour"],
    )
    assert outcome["status"] == "bad" and outcome["first_differing_feature"] == "item"
    assert outcome["features"] == [
        {"feature": "item", "rows": 2, "share": 0.5, "first_row": 2},
        {"feature": "hour", "rows": 1, "share": 0.25, "first_row": 0},
    ]
    assert json.loads(json.dumps(outcome)) == outcome


def test_no_rows_are_unknown_and_unequal_shapes_are_refused() -> None:
    assert consistency([], [])["status"] == "unknown"
    with pytest.raises(DataError, match="one shape"):
        consistency([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="together"):
        consistency([1.0], [1.0], feature_names=["user"])
    with pytest.raises(DataError, match="bucket matrices"):
        consistency([1.0], [1.0], logged_buckets=[[1]], rescored_buckets=[[1]], feature_names=["a", "b"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95, 0.99, 1.0])
def test_quantiles_are_within_one_percent_of_the_exact_ones(share: float) -> None:
    latency = np.random.default_rng(3).lognormal(1.0, 2.0, size=5001)
    histogram = LatencyHistogram()
    histogram.update(latency)
    exact = float(np.quantile(latency, share, method="inverted_cdf"))
    assert histogram.quantile(share) == pytest.approx(exact, rel=RELATIVE_ERROR + 1e-9)


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-1.0, 1e6), st.integers(0, 5)), max_size=10), min_size=3, max_size=3
    )
)
def test_latency_histograms_merge_exactly_in_any_order(parts: list[list[tuple[float, int]]]) -> None:
    histograms = [LatencyHistogram() for _ in parts]
    whole = LatencyHistogram()
    for histogram, part in zip(histograms, parts, strict=True):
        for seconds, count in part:
            histogram.update(seconds, count)
        whole.update([row[0] for row in part], np.array([row[1] for row in part], dtype=int))
    first, second, third = histograms
    assert first.merge(second).merge(third).state() == whole.state()
    assert third.merge(first).merge(second).state() == whole.state()
    assert LatencyHistogram.from_state(json.loads(json.dumps(whole.state()))) == whole


def test_freshness_counts_weighted_latencies_and_clocks_that_disagree() -> None:
    histogram = LatencyHistogram()
    histogram.update([-0.5, 2.0], [1, 3])
    value = histogram.value()
    assert value["rows"] == 4 and value["negative"] == 1
    assert value["mean_s"] == pytest.approx((-0.5 + 6.0) / 4) and value["max_s"] == 2.0
    assert value["p50_s"] == pytest.approx(2.0, rel=0.01)
    assert histogram.quantile(0.0) == pytest.approx(0.0005)


def test_freshness_of_nothing_is_unknown_and_impossible_latencies_are_refused() -> None:
    histogram = LatencyHistogram()
    histogram.update([])
    assert histogram.quantile(0.5) is None and histogram.value()["mean_s"] is None
    for latency, count in [(np.nan, 1), (1.0, -1), (1.0, 1.5)]:
        with pytest.raises(DataError):
            histogram.update(latency, count)
    with pytest.raises(DataError, match="share"):
        histogram.quantile(95)
    with pytest.raises(DataError, match="bins"):
        LatencyHistogram.from_state({**histogram.state(), "relative_error": 0.05})


_counts = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(CLASSES), st.integers(0, 100)), max_size=12
)


@given(st.lists(_counts, min_size=3, max_size=3))
def test_accounting_merges_like_adding_all_rows_to_one(parts: list[list[tuple[str, str, int]]]) -> None:
    whole = Accounting()
    accountings = []
    for part in parts:
        one = Accounting()
        for kind, row_class, rows in part:
            one.add(kind, row_class, rows)
            whole.add(kind, row_class, rows)
        accountings.append(one)
    first, second, third = accountings
    assert first.merge(second).merge(third) == whole == third.merge(second.merge(first))
    assert whole.total() == sum(row[2] for part in parts for row in part) == sum(whole.by_class().values())
    assert Accounting.from_state(json.loads(json.dumps(whole.state()))) == whole
    assert set(whole.check({kind: whole.total(kind) for kind in KINDS}).values()) == {0}


def test_moving_a_pending_row_keeps_the_total_and_cannot_take_what_is_not_there() -> None:
    accounting = Accounting()
    accounting.add("impression", "pending", 2)
    accounting.move("impression", "pending", "trained")
    assert accounting.total("impression") == 2 and accounting.count("impression", "trained") == 1
    with pytest.raises(DataError, match="at least 5 pending"):
        accounting.move("impression", "pending", "trained", 5)


def test_rows_added_again_elsewhere_are_removed_and_no_more_than_there_are() -> None:
    accounting = Accounting()
    accounting.add("click", "pending", 3)
    accounting.add("click", "trained", 2)
    accounting.remove("click", "pending", 2)
    assert accounting.total("click") == 3 and accounting.count("click", "pending") == 1
    with pytest.raises(DataError, match="to remove"):
        accounting.remove("click", "pending", 2)


def test_a_lost_row_and_a_row_counted_twice_have_opposite_signs() -> None:
    accounting = Accounting()
    accounting.add("click", "trained", 10)
    difference = accounting.check({"impression": 1, "click": 9})
    assert difference == {"impression": 1, "click": -1, "conversion": 0}
    verdict = accounting_verdict(difference)
    assert verdict.status == "bad" and verdict.value == "2 rows"
    assert verdict.why == "1 impression rows lost, 1 click rows counted twice"


def test_unknown_kinds_classes_and_negative_rows_are_refused() -> None:
    accounting = Accounting()
    for kind, row_class, rows in [("view", "trained", 1), ("click", "lost", 1), ("click", "trained", -1)]:
        with pytest.raises(DataError, match="expected"):
            accounting.add(kind, row_class, rows)
    with pytest.raises(DataError, match="event kind"):
        accounting.check({"view": 1})
    with pytest.raises(TypeError):
        hash(accounting)


def test_a_model_worse_than_the_running_base_rate_is_told_so_plainly() -> None:
    rng = np.random.default_rng(4)
    truth = rng.beta(1, 20, size=20_000)
    label = rng.random(20_000) < truth
    wild = np.clip(truth * rng.lognormal(0, 2, size=20_000), 1e-4, 1 - 1e-4)
    time, mature = np.arange(20_000), np.ones(20_000, dtype=bool)
    table = quality_table({"student": wild, "teacher": truth}, label, time, mature)
    lines = verdict_table(
        totals=table["totals"],
        base_rate_log_loss=running_base_rate_log_loss(label),
        difference=paired_log_loss(label, wild, truth),
    )
    assert lines[0]["status"] == "bad" and "must not be served" in lines[0]["why"]
    assert lines[1]["status"] == "bad" and "serve the teacher" in lines[1]["why"]
    assert overall_status(lines) == "bad"


def test_every_figure_that_is_missing_is_unknown_and_never_good() -> None:
    lines = verdict_table()
    assert {line["status"] for line in lines} == {"unknown"}
    assert all(set(line) == {"name", "status", "value", "expected", "why"} for line in lines)
    assert overall_status(lines) == "unknown" == overall_status([])


def test_when_everything_is_right_every_line_is_good() -> None:
    rng = np.random.default_rng(5)
    truth = rng.beta(1, 20, size=100_000)
    label = rng.random(100_000) < truth
    stale = np.clip(truth * 1.3, 0, 1)
    rows = np.arange(100_000)
    table = quality_table({"student": truth, "teacher": stale}, label, rows, np.ones(100_000, dtype=bool))
    lines = verdict_table(
        totals=table["totals"],
        base_rate_log_loss=running_base_rate_log_loss(label),
        difference=paired_log_loss(label, truth, stale),
        consistency=consistency(truth, truth),
        drift=[{"feature": "age", "verdict": "ok", "why": "no more than chance"}],
        freshness_p95_seconds=12.0,
        accounting_difference={"click": 0},
        recovery_exact=True,
    )
    assert [line["status"] for line in lines] == ["good"] * 8
    assert overall_status(lines) == "good"
    assert json.loads(json.dumps(lines)) == lines


def test_pcoc_is_judged_with_its_support() -> None:
    def status(pcoc: float | None, positives: int) -> str:
        return pcoc_verdict({"pcoc": pcoc, "positives": positives, "rows": 100 * positives + 1}).status

    assert status(1.02, 10_000) == "good"
    assert status(1.2, 10_000) == "bad"
    assert status(1.2, 60) == "watch"
    assert status(1.0, 60) == "unknown"
    assert status(None, 0) == "unknown"
    assert "over-predicts by 20.0%" in pcoc_verdict({"pcoc": 1.2, "positives": 9999, "rows": 99_990}).why


def test_a_difference_to_the_teacher_within_its_error_is_not_called() -> None:
    assert teacher_verdict(0.2, 0.2001, PairedDifference(1000, -0.0001, 0.0001)).status == "watch"
    assert teacher_verdict(0.2, 0.21, PairedDifference(1000, -0.01, 0.001)).status == "good"
    assert teacher_verdict(0.2, 0.2).status == "watch"
    assert base_rate_verdict(0.2, 0.2).status == "bad"
    assert base_rate_verdict(math.nextafter(0.2, 0.0), 0.2).status == "good"


def test_drift_freshness_and_recovery_say_what_is_wrong() -> None:
    row = {"feature": "price", "verdict": "drifted", "why": "KS 0.4"}
    assert drift_verdict([row]) == Verdict(
        "feature drift", "bad", "1 drifted, 0 to watch, of 1", "no feature drifted", "`price`: KS 0.4"
    )
    assert drift_verdict([{**row, "verdict": "watch"}]).status == "watch"
    assert [freshness_verdict(p95, 60).status for p95 in (60.0, 90.0, 121.0)] == ["good", "watch", "bad"]
    assert recovery_verdict(False).status == "bad"
