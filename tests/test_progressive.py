"""Provisional figures say of every policy what the mature ones will say, and leave learning alone."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.online import OnlineLoop
from jobs.progressive import ProgressiveQuality, mature_rows, provisional_rows, provisional_weights
from jobs.worker_tracking import WorkerTracking
from models.base import sigmoid
from monitoring.quality import QualitySums
from monitoring.soft_quality import quality_amounts, quality_sums
from pipelines.config import load_config
from pipelines.duration import HOUR_MS
from pipelines.joined import Closed, Examples
from pipelines.label_news import CONFIRM, FIRST, POSITIVE
from tests.small_run import SmallRun

P = np.array([0.02, 0.3, 0.7])
LATE = 0.4


def said(policy: str, p: NDArray[np.float64], s: float) -> list[tuple[int, float, NDArray[np.float64]]]:
    """Kind and label of the rows that windows with outcome probability p give, and how many of each."""
    early, late = p * (1 - s), p * s
    if policy in ("fnw", "fnc"):
        return [(FIRST, 0.0, np.ones_like(p)), (POSITIVE, 1.0, p)]
    rows = [(FIRST, 1.0, early), (FIRST, 0.0, 1 - early)]
    if policy == "relabel":
        return [*rows, (CONFIRM, 1.0, p), (CONFIRM, 0.0, 1 - p)]
    rows.append((POSITIVE, 1.0, late))
    return [*rows, (CONFIRM, 1.0, early), (CONFIRM, 0.0, 1 - p)] if policy == "defer" else rows


def examples_of(rows: list[tuple[int, float, NDArray[np.float64]]], known_at: int = 0) -> Examples:
    n = len(P)
    return Examples(
        slot=np.tile(np.arange(n), len(rows)),
        kind=np.repeat([kind for kind, _, _ in rows], n).astype(np.int8),
        label=np.repeat([label for _, label, _ in rows], n).astype(np.float64),
        label_version=np.zeros(n * len(rows), np.int32),
        event_time=np.zeros(n * len(rows), np.int64),
        known_at=np.full(n * len(rows), known_at),
        elapsed=np.zeros(n * len(rows), np.int64),
        weight=np.concatenate([times for _, _, times in rows]),
    )


def features_of(probability: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    logit = np.log(probability / (1 - probability))[:, None]
    return {"probability": probability[:, None], "logit": logit - 1.0, "teacher_logit": logit + 1.0}


def learn(
    quality: ProgressiveQuality,
    rows: Examples,
    features: dict[str, NDArray[Any]],
    policy: str,
    late_share: NDArray[np.float64],
) -> None:
    judged = provisional_rows("click", 0, rows, features["probability"], policy, late_share)
    quality.update([judged], features)


@pytest.mark.parametrize(
    "policy", ["vanilla", "fnw", "fnc", "esdfm", "defer", "defuse", "bidefuse", "relabel"]
)
def test_provisional_figures_of_a_true_model_are_those_of_final_labels(policy: str) -> None:
    quality, rows = ProgressiveQuality(), examples_of(said(policy, P, LATE))
    learn(quality, rows, features_of(P), policy, np.full(len(rows), LATE))
    sums = quality.totals("click", "student", "provisional")
    figures = sums.value()
    assert sums.weight_sum == pytest.approx(len(P))
    assert sums.positive_sum == pytest.approx(P.sum())
    assert figures["pcoc"] == pytest.approx(1.0)
    assert figures["log_loss"] == pytest.approx(-np.mean(P * np.log(P) + (1 - P) * np.log(1 - P)))
    assert quality.totals("click", "teacher", "provisional").probability_sum == pytest.approx(
        sigmoid(np.log(P / (1 - P)) + 1.0).sum()
    )
    assert quality.hours() == []


def test_provisional_figures_of_a_wrong_model_show_it() -> None:
    p, e = np.full(len(P), 0.05), 0.5
    quality, rows = ProgressiveQuality(), examples_of(said("fnw", p, LATE))
    learn(quality, rows, features_of(p * (1 + e)), "fnw", np.full(len(rows), LATE))
    pcoc = quality.totals("click", "student", "provisional").value()["pcoc"]
    assert pcoc == pytest.approx((1 + e) * (1 - 0.05 * e))


def test_labels_that_are_final_when_learned_are_not_provisional() -> None:
    quality, rows = ProgressiveQuality(), examples_of([(FIRST, 1.0, P), (FIRST, 0.0, 1 - P)])
    learn(quality, rows, features_of(P), "wait", np.full(len(rows), LATE))
    assert quality.state() == []


def test_rows_that_were_not_predicted_on_arrival_are_left_out() -> None:
    quality, features = ProgressiveQuality(), features_of(P)
    features["probability"][1] = np.nan
    rows = examples_of(said("esdfm", P, LATE))
    learn(quality, rows, features, "esdfm", np.full(len(rows), LATE))
    assert quality.totals("click", "student", "provisional").weight_sum == pytest.approx(2.0)


def test_provisional_hours_are_of_what_was_known_then_and_leave_after_a_day() -> None:
    quality = ProgressiveQuality()
    for hour in (100, 101, 103, 126):
        rows = examples_of(said("fnw", P, LATE), known_at=hour * HOUR_MS + 5)
        learn(quality, rows, features_of(P), "fnw", np.full(len(rows), LATE))
    kept = [(task, start // HOUR_MS) for task, start, name, _ in quality.hours("provisional")]
    assert sorted(set(kept)) == [("click", 103), ("click", 126)]
    again = ProgressiveQuality.from_state(json.loads(json.dumps(quality.state())))
    assert again.state() == quality.state()
    assert again.trailing(24, "provisional").keys() == quality.trailing(24, "provisional").keys()


def test_mature_sums_are_those_of_the_rows_one_by_one() -> None:
    rng = np.random.default_rng(4)
    n = 50
    label, p = rng.random(n) < 0.3, rng.random(n)
    closed = Closed(np.arange(n), label.astype(float), np.arange(n) * (HOUR_MS // 20), np.zeros(n, np.int64))
    quality = ProgressiveQuality()
    features = features_of(p)
    quality.update([mature_rows("click", 0, closed, features["probability"])], features)
    expected = QualitySums()
    expected.update(label, p)
    found = quality.totals("click", "student").state()
    assert found == pytest.approx(expected.state())
    assert [start // HOUR_MS for _, start, name, _ in quality.hours() if name == "teacher"] == [0, 1, 2]


def test_a_soft_label_is_that_part_of_a_positive() -> None:
    amounts = quality_amounts(np.array([0.25]), np.array([0.75]), np.array([True]), np.array([[0.25]]))
    sums = quality_sums(amounts[0, :, 0])
    figures = sums.value()
    assert figures["pcoc"] == pytest.approx(1.0)
    assert figures["log_loss"] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert (sums.rows, sums.positives) == (1, 1)


def test_defer_counts_a_window_once_though_it_says_it_twice() -> None:
    ones, half = np.ones(2), np.full(2, 0.5)
    positive, negative = provisional_weights("defer", np.array([1.0, 0.0]), half, 0.0 * ones)
    np.testing.assert_allclose(positive + negative, half)


def test_judging_changes_nothing_that_is_learned(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(loop: OnlineLoop) -> dict[tuple[str, str], NDArray[Any]]:
        return {
            (task, name): values
            for task, one in loop.students.items()
            for name, values in one.state().items()
        }

    steps = [events for _, events in zip(range(25), small_run.steps(small_run.warm_rows), strict=False)]
    judged, bare = small_run.warm_loop(), small_run.warm_loop()
    for events in steps:
        judged.step(events)
        with monkeypatch.context() as patch:
            patch.setattr(OnlineLoop, "_judge", lambda *given: None)
            bare.step(events)
    assert judged.progressive.hours("provisional")
    assert bare.progressive.state() == []
    own, other = weights(judged), weights(bare)
    assert own.keys() == other.keys()
    assert all(np.array_equal(values, other[key], equal_nan=True) for key, values in own.items())
    assert all(judged.calibrators[task].state() == bare.calibrators[task].state() for task in judged.tasks)


def test_a_run_has_figures_of_both_maturities_for_every_task_and_predictor(small_run: SmallRun) -> None:
    progressive = small_run.backtest.loop.progressive
    for task, name in product(("click", "conversion"), ("student", "student_uncalibrated", "teacher")):
        mature = progressive.totals(task, name).value()
        provisional = progressive.totals(task, name, "provisional").value()
        assert min(mature["rows"] or 0, provisional["rows"] or 0) > 100
        assert provisional["ne"] is not None
    # The log is the last day's: both see the same level of clicks, one of them before it is final.
    pcoc = [progressive.totals("click", "student", one).value()["pcoc"] for one in ("mature", "provisional")]
    assert pcoc == pytest.approx([1.0, 1.0], abs=0.25)


def test_mlflow_gets_provisional_figures_under_a_name_of_their_own(
    small_run: SmallRun, tmp_path: Any
) -> None:
    tracking = WorkerTracking(load_config(None, ['tracking.uri="http://127.0.0.1:9"']), tmp_path / "state")
    logged: list[tuple[str, float, int, int]] = []
    tracking._run.log_metrics = logged.extend  # type: ignore[method-assign, assignment]
    tracking.committed(small_run.backtest.loop, {})
    names = {name for name, *_ in logged}
    assert {"quality/click/student/ne", "quality/provisional/click/student/ne"} <= names
    logged.clear()
    tracking.committed(small_run.backtest.loop, {})
    assert not [name for name, *_ in logged if name.startswith("quality/")]
