"""Training of teacher and first student: figures, calibration, open labels, tasks that cannot be trained."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from calibration.chain import CalibrationChain
from jobs.first_calibration import fit_first_calibrator
from jobs.held_out import figures, informative, progressive_logit, split_in_time
from jobs.training import Trained, train_models
from models.base import sigmoid
from models.gbdt import GbdtModel
from models.student import Student
from pipelines.config import Config, Task, load_config
from pipelines.errors import DataError
from pipelines.feature_spec import Categorical, FeatureSpec, Numeric
from pipelines.training_set import TrainingSet

HOUR_MS = 3_600_000
# Real logs may not be redistributed: they lie in a folder beside the checkout, where there is one.
LOGS = Path(os.environ.get("CTRSTREAM_LOGS", Path(__file__).resolve().parents[2] / "shared" / "data"))
SPEC = FeatureSpec(
    categorical=(Categorical(name="user_id", buckets=256), Categorical(name="item_id", buckets=64)),
    numeric=(Numeric(name="price", low=0, high=9, mean=4, std=2),),
)
CONFIG = load_config(None, ["attribution.attribution_window=24h", "teacher.rounds=40"])


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def world(n: int, seed: int, *, segments: int = 0) -> tuple[TrainingSet, NDArray[np.float64]]:
    """Two days of mature rows and their true probabilities, about 0.25."""
    noise = np.random.default_rng(seed)
    buckets = np.stack([1 + noise.integers(0, 256, n), 257 + noise.integers(0, 64, n)], 1).astype(np.int32)
    numbers = noise.normal(size=(n, 1)).astype(np.float32)
    effect = np.random.default_rng(77).normal(0.0, 0.8, SPEC.table_rows)
    p = sigmoid(-1.4 + effect[buckets[:, 0]] + effect[buckets[:, 1]] + 0.5 * numbers[:, 0])
    one = np.ones(n, np.float32)
    rows = TrainingSet(
        buckets=buckets,
        numbers=numbers,
        user_key=buckets[:, 0].astype(np.int64),
        segment_key=noise.integers(0, 3, (n, segments)),
        label=(noise.random(n) < p).astype(np.float32),
        weight=one,
        event_time=np.sort(noise.integers(0, 48 * HOUR_MS, n)) + 1_700_000_000_000,
        mature=one > 0,
        observed_share=one,
    )
    return rows, p


def censored(rows: TrainingSet, mean_delay: float) -> TrainingSet:
    """The rows as they look at their end: exponential delays, conversions that have not come are unseen."""
    noise = np.random.default_rng(9)
    elapsed = rows.event_time[-1] - rows.event_time
    share = np.where(elapsed >= 24 * HOUR_MS, 1.0, 1.0 - np.exp(-elapsed / mean_delay))
    seen = noise.random(len(rows)) < share
    return replace(
        rows,
        label=(rows.label * seen).astype(np.float32),
        observed_share=share.astype(np.float32),
        mature=elapsed >= 24 * HOUR_MS,
    )


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.set_num_threads(1)
    return train_models({"click": world(30_000, 1)[0]}, SPEC, CONFIG)


def pcoc(logit: NDArray[np.float64], p: NDArray[np.float64]) -> float:
    return float(sigmoid(logit).mean() / p.mean())


def test_both_models_rank_and_are_calibrated_on_rows_they_never_saw(trained: Trained) -> None:
    one = trained.models["click"]
    fresh, p = world(20_000, 2)
    best = roc_auc_score(fresh.label, p)
    for model, calibrator in (
        (one.teacher, one.teacher_calibrator),
        (one.student, one.student_calibrator),
    ):
        logit = calibrator.transform_logit(model.predict_logit(fresh.buckets, fresh.numbers))
        assert roc_auc_score(fresh.label, logit) > best - 0.03
        assert pcoc(logit, p) == pytest.approx(1.0, abs=0.06)
    assert isinstance(one.teacher, GbdtModel)
    assert trained.skipped == {}


def test_report_is_plain_finite_data_about_the_held_out_window(trained: Trained) -> None:
    report = trained.models["click"].report
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["rows"] == 30_000
    assert report["held_out_rows"] == pytest.approx(6_000, abs=300)
    for name in ("teacher", "student", "student_frozen"):
        part = report[name]
        assert 0.7 < part["ne"] < 0.95
        assert 0.7 < part["auc"] < 0.85
        assert part["pcoc"] == pytest.approx(1.0, abs=0.1)
    assert report["teacher"]["rounds"] <= 40
    assert report["student"]["epochs"] in (1, 2, 3)


def test_training_is_a_function_of_the_data(trained: Trained) -> None:
    again = train_models({"click": world(30_000, 1)[0]}, SPEC, CONFIG).models["click"]
    first = trained.models["click"]
    assert again.report == first.report
    assert dict(again.teacher.to_files()) == dict(first.teacher.to_files())
    assert again.student.to_files() == first.student.to_files()
    assert again.student_calibrator.digest() == first.student_calibrator.digest()
    for key, value in first.student.state().items():
        np.testing.assert_array_equal(value, again.student.state()[key])


def test_open_labels_do_not_pull_predictions_down() -> None:
    rows, _ = world(30_000, 1)
    seen = censored(rows, 6.0 * HOUR_MS)
    assert seen.label.mean() < 0.9 * rows.label.mean()
    one = train_models({"conversion": seen}, SPEC, CONFIG).models["conversion"]
    fresh, p = world(20_000, 2)
    for model, calibrator in (
        (one.teacher, one.teacher_calibrator),
        (one.student, one.student_calibrator),
    ):
        logit = calibrator.transform_logit(model.predict_logit(fresh.buckets, fresh.numbers))
        assert pcoc(logit, p) == pytest.approx(1.0, abs=0.08)
    assert one.report["student"]["pcoc"] == pytest.approx(1.0, abs=0.1)


def test_rows_of_which_hardly_anything_is_known_are_not_trained_on() -> None:
    rows = censored(world(30_000, 1)[0], 6.0 * HOUR_MS)
    used = informative(rows)
    assert used.observed_share.min() >= 0.5
    # Whatever the youngest rows look like, the models are the same.
    strange = rows.label.copy()
    strange[rows.observed_share < 0.5] = 1.0
    one = train_models({"conversion": rows}, SPEC, CONFIG).models["conversion"]
    two = train_models({"conversion": replace(rows, label=strange)}, SPEC, CONFIG).models["conversion"]
    assert one.student.to_files() == two.student.to_files()
    assert dict(one.teacher.to_files()) == dict(two.teacher.to_files())


@pytest.mark.parametrize(("kept", "missing"), [(0.0, "19 positives"), (1.0, "19 negatives")])
def test_task_with_too_few_of_a_class_is_skipped_with_the_reason(kept: float, missing: str) -> None:
    rows = world(2_000, 1)[0]
    label = np.full(2_000, kept, np.float32)
    label[:: 2_000 // 19 + 1] = 1.0 - kept
    sets: dict[Task, TrainingSet] = {"click": world(3_000, 3)[0], "conversion": replace(rows, label=label)}
    result = train_models(sets, SPEC, CONFIG)
    assert list(result.models) == ["click"]
    assert missing in result.skipped["conversion"]
    assert "at least 20" in result.skipped["conversion"]


def test_task_without_rows_is_skipped() -> None:
    result = train_models({"click": world(0, 1)[0]}, SPEC, CONFIG)
    assert result.models == {}
    assert "0 positives" in result.skipped["click"]


def test_task_with_few_outcomes_is_trained_and_not_calibrated() -> None:
    rows = world(3_000, 1)[0]
    label = np.zeros(3_000, np.float32)
    label[::60] = 1.0
    one = train_models({"click": replace(rows, label=label)}, SPEC, CONFIG).models["click"]
    assert one.report["held_out_positives"] < 20
    assert one.student_calibrator.method == "none"
    logit = one.student_calibrator.transform_logit(one.student.predict_logit(rows.buckets, rows.numbers))
    assert sigmoid(logit).mean() == pytest.approx(1 / 60, rel=0.5)


def test_outcomes_that_all_come_at_the_end_are_skipped_with_the_reason() -> None:
    rows = world(3_000, 1)[0]
    label = np.zeros(3_000, np.float32)
    label[-100:] = 1.0
    result = train_models({"click": replace(rows, label=label)}, SPEC, CONFIG)
    assert "before the held-out window" in result.skipped["click"]


def test_network_can_be_the_teacher() -> None:
    config = load_config(None, ["teacher.model=network", "student.model=fm"])
    one = train_models({"click": world(6_000, 1)[0]}, SPEC, config).models["click"]
    assert isinstance(one.teacher, Student)
    assert one.teacher is not one.student
    assert one.report["teacher"]["epochs"] >= 1


def test_held_out_window_begins_where_it_is_asked_to() -> None:
    rows = world(6_000, 1)[0]
    at = int(rows.event_time[4_000])
    report = train_models({"click": rows}, SPEC, CONFIG, now_split=at).models["click"].report
    assert report["held_out_from"] == at
    assert report["held_out_rows"] == int(np.sum(rows.event_time >= at))


def test_last_fifth_is_held_out_by_rows_where_traffic_grows() -> None:
    rows = world(5_000, 1)[0]
    grown = replace(
        rows, event_time=np.sort((np.linspace(0, 1, 5_000) ** 0.2 * 48 * HOUR_MS).astype(np.int64))
    )
    train, held_out = split_in_time(grown)
    assert len(held_out) == 1_000
    assert train.event_time[-1] <= held_out.event_time[0]


def test_segments_are_named_by_the_configuration_or_the_caller() -> None:
    rows = world(3_000, 1, segments=1)[0]
    one = train_models({"click": rows}, SPEC, CONFIG).models["click"]
    assert one.student_calibrator.segments is not None
    assert one.student_calibrator.segments.config.names == ("campaign_id",)
    assert one.teacher_calibrator.segments is None
    two = train_models({"click": world(3_000, 1)[0]}, SPEC, CONFIG).models["click"]
    assert two.student_calibrator.segments is None
    with pytest.raises(DataError, match="2 calibration segments"):
        train_models({"click": rows}, SPEC, CONFIG, segments=("a", "b"))


def test_levels_of_segments_are_the_configured_ones_over_the_columns_of_the_keys() -> None:
    rows = world(3_000, 1, segments=2)[0]
    levels = ("all", "advertiser_id", "advertiser_id*campaign_id")
    config = CONFIG.model_copy(
        update={"calibration": CONFIG.calibration.model_copy(update={"segments": levels})}
    )

    def names(given: tuple[str, ...] | None) -> tuple[str, ...]:
        one = train_models({"click": rows}, SPEC, config, segments=given).models["click"]
        assert one.student_calibrator.segments is not None
        # What the rows are corrected by has a column for each of the keys.
        assert one.student_calibrator.transform(np.zeros(3_000), rows.segment_key).shape == (3_000,)
        return one.student_calibrator.segments.config.names

    assert names(None) == names(("advertiser_id", "campaign_id")) == levels
    # Rows that were made with other columns: a level for each.
    assert names(("site", "campaign_id")) == ("site", "campaign_id")


def test_online_calibration_is_a_switch() -> None:
    rows = world(3_000, 1)[0]
    off = load_config(None, ["calibration.online=false", "calibration.method=platt"])
    one = train_models({"click": rows}, SPEC, off).models["click"]
    assert one.student_calibrator.online is None
    assert one.student_calibrator.method == one.teacher_calibrator.method == "platt"
    on = train_models({"click": rows}, SPEC, Config()).models["click"]
    assert on.student_calibrator.online is not None
    assert on.teacher_calibrator.online is None


def test_calibrator_of_half_observed_labels_has_the_slope_of_the_closed_ones() -> None:
    rows, p = world(40_000, 1)
    # An over-confident model: slope 0.6 is the truth; and a level that the held-out rows do not share.
    logit = np.log(p / (1 - p))
    shown = (logit - logit.mean()) / 0.6
    closed = fit_first_calibrator(shown, rows, "platt", online=False)
    still_open = fit_first_calibrator(
        shown, informative_share(rows, np.linspace(1.0, 0.5, 40_000)), "platt", online=False
    )
    for chain in (closed, still_open):
        slope = np.diff(chain.transform_logit(np.array([-1.0, 1.0])))[0] / 2
        assert slope == pytest.approx(0.6, abs=0.05)


def informative_share(rows: TrainingSet, share: NDArray[np.float64]) -> TrainingSet:
    seen = np.random.default_rng(3).random(len(rows)) < share
    return replace(
        rows, label=(rows.label * seen).astype(np.float32), observed_share=share.astype(np.float32)
    )


def test_first_calibrator_corrects_shape_and_leaves_the_level_to_the_model() -> None:
    rows, p = world(40_000, 1)
    logit = np.log(p / (1 - p))
    chain = fit_first_calibrator(logit - 0.7, rows, "platt", online=False)
    np.testing.assert_allclose(chain.transform_logit(np.array([-2.0, 0.0])), [-2.0, 0.0], atol=0.15)
    assert isinstance(chain, CalibrationChain)


def test_progressive_student_learns_nothing_before_it_can_be_known() -> None:
    rows = world(3_000, 1)[0]
    student = Student.create(SPEC, CONFIG.student)
    student.fit(rows.take(slice(0, 1_000)))
    later = rows.take(slice(1_000, 3_000))
    frozen = student.predict_logit(later.buckets, later.numbers)
    state = student.state()
    beyond = int(later.event_time[-1] - later.event_time[0]) + 1
    np.testing.assert_array_equal(progressive_logit(student, later, beyond), frozen)
    student.load_state(state)
    soon = progressive_logit(student, later, HOUR_MS)
    known_after = np.searchsorted(later.event_time, later.event_time[0] + HOUR_MS)
    first_batch_that_can_differ = (known_after // 256) * 256
    np.testing.assert_array_equal(soon[:first_batch_that_can_differ], frozen[:first_batch_that_can_differ])
    assert not np.array_equal(soon, frozen)


def test_progressive_student_learns_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = world(2_000, 1)[0]
    numbered = replace(rows, numbers=np.arange(2_000, dtype=np.float32)[:, None])
    student = Student.create(SPEC, CONFIG.student)
    learned: list[float] = []
    monkeypatch.setattr(student, "update", lambda _, numbers, *__: learned.extend(numbers[:, 0].tolist()))
    progressive_logit(student, numbered, 2 * HOUR_MS)
    assert learned == sorted(set(learned))
    assert len(learned) == np.sum(rows.event_time <= rows.event_time[-1] - 2 * HOUR_MS)


def test_figures_of_the_truth_are_one_for_pcoc_whatever_is_still_open() -> None:
    rows, p = world(60_000, 1)
    seen = informative_share(rows, np.linspace(1.0, 0.2, 60_000))
    found = figures(np.log(p / (1 - p)), seen, float(p.mean()))
    assert found["pcoc"] == pytest.approx(1.0, abs=0.03)
    assert found["ne"] < 0.95
    mature = seen.observed_share >= 0.95
    assert found["auc"] == pytest.approx(roc_auc_score(seen.label[mature], p[mature]), abs=1e-6)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.skipif(
    not (LOGS / "news_click").is_dir(), reason=f"needs the news_click log in {LOGS} (set CTRSTREAM_LOGS)"
)
def test_online_student_beats_frozen_teacher_and_base_rate_on_a_real_log() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.features import encode

    impressions = pq.read_table(LOGS / "news_click" / "impressions.parquet")
    clicks = pq.read_table(LOGS / "news_click" / "clicks.parquet")
    first_click = dict(
        zip(clicks["impression_id"].to_pylist(), clicks["event_time"].to_pylist(), strict=True)
    )
    impressions = impressions.take(pa.array(np.argsort(impressions["event_time"].to_numpy(), kind="stable")))
    impressions = impressions.slice(0, 120_000)
    time = impressions["event_time"].to_numpy()
    clicked = np.array([first_click.get(name, 1 << 62) for name in impressions["impression_id"].to_pylist()])
    names = ("env", "device", "os", "country", "region", "referrer")
    spec = FeatureSpec(
        categorical=(
            Categorical(name="user_id", buckets=1 << 18, group="user"),
            Categorical(name="item_id", buckets=1 << 15, group="item"),
            *(Categorical(name=name, buckets=64) for name in names),
        )
    )
    encoded = encode(impressions, spec)
    one = np.ones(len(time), np.float32)
    rows = TrainingSet(
        buckets=encoded.buckets,
        numbers=encoded.numbers,
        user_key=encoded.user_key,
        segment_key=encoded.segment_key,
        label=(clicked - time <= 30 * 60_000).astype(np.float32),
        weight=one,
        event_time=time,
        mature=one > 0,
        observed_share=one,
    )
    past, future = rows.take(slice(0, 60_000)), rows.take(slice(60_000, 120_000))
    start = train_models({"click": past}, spec, Config()).models["click"]
    rate = float(past.label.mean())
    frozen = start.teacher_calibrator.transform_logit(
        start.teacher.predict_logit(future.buckets, future.numbers)
    )
    online = progressive_logit(start.student, future, 30 * 60_000)
    student = figures(online, future, rate)
    teacher = figures(np.asarray(frozen), future, rate)
    assert student["log_loss"] < teacher["log_loss"]
    assert student["auc"] > teacher["auc"]
    assert student["ne"] < 0.99
