"""`ctrstream calibrate`: what Spark finds is what numpy finds, and only what is better is registered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from calibration.chain import CalibrationChain
from calibration.label_origin import LabelOrigin
from calibration.link import logit_of, sigmoid
from calibration.segment_config import SegmentConfig
from calibration.segments import SegmentCorrection
from calibration.sketch import LogitSketch
from calibration.sketch_book import SketchBook
from jobs.calibrate import Calibration, calibrate, track, write_calibration
from jobs.calibration_folds import fold_sketches_of
from jobs.calibration_paired import day_levels, paired_loss
from jobs.calibration_task import CalibrationRule, calibrate_task
from jobs.chain_spark import calibrated
from jobs.cli import cli
from jobs.held_out_rows import HeldOutRows, HeldOutWindow, check_fits, held_out_rows
from jobs.mlflow_server import TrackingServer
from jobs.recalibrated import write_recalibrated
from jobs.release import Release
from jobs.release_pointer import list_releases
from jobs.segment_fit_spark import fit_segments
from jobs.tracking import Tracking
from monitoring.quality import row_log_loss
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import DataError
from pipelines.snapshot import read_rows
from pipelines.training_set import TrainingSet
from tests.browser import browser_page
from tests.calibrate_run import AS_OF, CONFIG, CalibrateRun, calibrate_run

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

RULE = CalibrationRule(segments=("campaign_id",))


@pytest.fixture(scope="module")
def run(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> CalibrateRun:
    return calibrate_run(spark, tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def clicks(run: CalibrateRun) -> TrainingSet:
    return run.held_out("click")


@pytest.fixture(scope="module")
def scored(spark: SparkSession, run: CalibrateRun) -> HeldOutRows:
    return held_out_rows(spark, run.snapshot, run.release, "click", HeldOutWindow(0, AS_OF))


@pytest.fixture(scope="module")
def copied(run: CalibrateRun, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The release in a folder of its own, to be calibrated anew there."""
    folder = tmp_path_factory.mktemp("releases") / run.release.name
    shutil.copytree(run.release.path, folder)
    return Release.load(folder)


@pytest.fixture(scope="module")
def found(spark: SparkSession, run: CalibrateRun, copied: Release) -> Calibration:
    return calibrate(spark, copied, run.snapshot, AS_OF, RULE)


# -- the same rows, logits and sums -----------------------------------------------------------------------


def test_held_out_rows_are_those_of_numpy_with_the_logits_of_serving(
    run: CalibrateRun, clicks: TrainingSet, scored: HeldOutRows
) -> None:
    table: pd.DataFrame = scored.frame.toPandas()
    assert scored.counts["held_out"] == len(table) == len(clicks) > 15_000
    assert sum(scored.counts.values()) == 2 * scored.counts["snapshot"]
    assert (scored.first, scored.last) == (int(clicks.event_time[0]), int(clicks.event_time[-1]))
    expected = run.logit("click", clicks)
    assert sorted(table["logit"]) == sorted(expected.tolist())
    assert sorted(zip(table["event_time"], table["logit"], strict=True)) == sorted(
        zip(clicks.event_time.tolist(), expected.tolist(), strict=True)
    )


def test_folds_of_spark_add_up_to_the_sketch_of_numpy(
    run: CalibrateRun, clicks: TrainingSet, scored: HeldOutRows
) -> None:
    folds = fold_sketches_of(scored.frame, "r", "click", 5)
    assert all(sketch.rows > 0.15 * len(clicks) for sketch in folds.sketches)
    whole = LogitSketch.of(run.logit("click", clicks), clicks.label, clicks.weight)
    assert sum(folds.sketches, LogitSketch()) == whole


def test_a_chain_gives_the_same_bits_in_spark_as_in_serving(
    spark: SparkSession, run: CalibrateRun, clicks: TrainingSet, scored: HeldOutRows
) -> None:
    logit = run.logit("click", clicks)
    chain = CalibrationChain.fit(
        logit,
        clicks.label,
        method="isotonic",
        negative_sampling_rate=0.5,
        segments=SegmentConfig(("campaign_id",)),
        segment_keys=clicks.segment_key,
    )
    table: pd.DataFrame = calibrated(scored.frame.repartition(3), {"z": chain}).toPandas()
    expected = chain.transform_logit(logit, clicks.segment_key)
    assert sorted(zip(table["logit"], table["z"], strict=True)) == sorted(
        zip(logit.tolist(), expected.tolist(), strict=True)
    )


@pytest.mark.parametrize("levels", [("campaign_id",), ("all", "campaign_id")])
def test_segments_fitted_by_spark_are_those_of_numpy_to_the_bit(
    run: CalibrateRun, clicks: TrainingSet, scored: HeldOutRows, levels: tuple[str, ...]
) -> None:
    config = SegmentConfig(levels)
    expected = SegmentCorrection.fit(
        config, clicks.segment_key, sigmoid(run.logit("click", clicks)), clicks.label, clicks.weight
    )
    for partitions in (1, 5):
        fitted = fit_segments(scored.frame.repartition(partitions), "logit", config)
        assert fitted.state() == expected.state()


def test_paired_loss_and_days_are_those_of_numpy(
    run: CalibrateRun, clicks: TrainingSet, scored: HeldOutRows
) -> None:
    logit = run.logit("click", clicks)
    both = scored.frame.selectExpr("*", "logit as a", "logit * 0.9 - 0.2 as b")
    found = paired_loss(both, "a", "b")
    other = 0.9 * logit - 0.2
    is_click = clicks.label > 0.5
    d = row_log_loss(is_click, sigmoid(logit)) - row_log_loss(is_click, sigmoid(other))
    users, place = np.unique(clicks.user_key, return_inverse=True)
    by_user = np.bincount(place, d - d.mean())
    error = np.sqrt((by_user**2).sum() * len(users) / (len(users) - 1)) / len(d)
    assert found.users == len(users)
    assert found.difference == pytest.approx(d.mean(), abs=1e-8)
    assert found.standard_error == pytest.approx(error, rel=1e-4)
    day = clicks.event_time // DAY_MS
    levels = day_levels(both, ("a", "b"))
    assert [one.day for one in levels] == (np.unique(day) * DAY_MS).tolist()
    for one in levels:
        mine = day * DAY_MS == one.day
        assert (one.rows, one.positives) == (int(mine.sum()), float(clicks.label[mine].sum()))
        assert one.expected["b"] == pytest.approx(float(sigmoid(other[mine]).sum()), rel=1e-7)


# -- what is fitted, judged and registered ----------------------------------------------------------------


def test_the_chain_is_fitted_to_the_earlier_rows_only_and_judged_on_the_later(
    run: CalibrateRun, clicks: TrainingSet, found: Calibration
) -> None:
    one = found.tasks["click"]
    earlier, later = clicks.split(one.cut)
    assert 0.2 < len(later) / len(clicks) < 0.4
    logit = run.logit("click", earlier)
    expected = CalibrationChain.fit(
        logit,
        earlier.label,
        earlier.weight,
        method=one.methods.choice,
        segments=SegmentConfig(("campaign_id",)),
        segment_keys=earlier.segment_key,
    )
    width = CONFIG.attribution.width("click")
    expected.labels = LabelOrigin("matured", "snapshot", width, width + CONFIG.attribution.allowed_lateness)
    assert one.chain.digest() == expected.digest()
    after = expected.transform_logit(run.logit("click", later), later.segment_key)
    assert one.sketches["after"] == LogitSketch.of(after, later.label, later.weight)
    before = run.release.calibrators["click"].transform_logit(run.logit("click", later))
    assert one.sketches["before"] == LogitSketch.of(before, later.label, later.weight)


def test_what_is_better_becomes_a_release_with_the_same_weights(copied: Release, found: Calibration) -> None:
    better = {task for task, one in found.tasks.items() if one.is_better}
    assert "click" in better
    assert found.registered == f"{copied.name}-c1"
    new = Release.load(copied.path.parent / found.registered)
    assert new.manifest.parent == copied.name
    for task in copied.tasks:
        chain = found.tasks[task].chain if task in better else copied.calibrators[task]
        assert new.calibrators[task].digest() == chain.digest()
        assert new.manifest.files[f"{task}/calibrator.json"] == chain.digest()
    weights = {name: sha for name, sha in copied.manifest.files.items() if "calibrator" not in name}
    assert weights.items() <= new.manifest.files.items()
    assert new.manifest.extra["calibrated"]["as_of"] == AS_OF
    # Run again after a kill, it finds what it has written.
    chains = {task: found.tasks[task].chain for task in better}
    assert write_recalibrated(copied, chains, {}) == new.path
    assert list_releases(copied.path.parent) == [copied.name, new.name]


def test_a_calibration_that_is_not_better_is_not_registered(
    spark: SparkSession, run: CalibrateRun, copied: Release, found: Calibration
) -> None:
    assert found.registered is not None
    new = Release.load(copied.path.parent / found.registered)
    again = calibrate(spark, new, run.snapshot, AS_OF, RULE, tasks=("click",))
    one = again.tasks["click"]
    assert (again.registered, one.is_better) == (None, False)
    assert one.loss.difference == 0.0
    assert "the same probability" in one.why


def test_only_a_clear_difference_counts(found: Calibration) -> None:
    loss = found.tasks["click"].loss
    assert loss.z is not None
    assert loss.z < -1.645
    assert loss.standard_error is not None
    assert (
        found.tasks["click"].figures["after"]["log_loss"] < found.tasks["click"].figures["before"]["log_loss"]
    )


# -- open labels ------------------------------------------------------------------------------------------


def test_open_labels_bring_in_the_newest_rows_without_a_bias(
    spark: SparkSession, run: CalibrateRun, copied: Release
) -> None:
    rule = CalibrationRule(open_labels=True, segments=("campaign_id",))
    settled = held_out_rows(spark, run.snapshot, copied, "conversion", HeldOutWindow(0, AS_OF))
    with_open = held_out_rows(spark, run.snapshot, copied, "conversion", HeldOutWindow(0, AS_OF, True))
    assert with_open.counts["held_out"] > settled.counts["held_out"]
    assert with_open.last > settled.last
    one = calibrate(spark, copied, run.snapshot, AS_OF, rule, tasks=("conversion",), register=False)
    labels = one.tasks["conversion"].chain.labels
    assert labels is not None
    assert (labels.mode, labels.policy) == ("delay_model", "snapshot")
    figures = one.tasks["conversion"].figures["after"]
    assert figures["pcoc_low"] * 0.95 < 1.0 < figures["pcoc_high"] * 1.05
    assert one.registered is None


# -- recorded predictions ---------------------------------------------------------------------------------


def test_recorded_predictions_take_the_place_of_scoring(
    spark: SparkSession, run: CalibrateRun, copied: Release, tmp_path: Path
) -> None:
    rows = read_rows(run.snapshot, "click")
    noise = np.random.default_rng(0)
    logit, served = noise.normal(-3, 1, len(rows)), noise.uniform(0.01, 0.3, len(rows))
    recorded = pa.table(
        {
            "impression_id": rows["impression_id"],
            "task": ["click"] * len(rows),
            "predicted_at": rows["event_time"],
            "logit": logit,
            "probability": served,
        }
    )
    # Delivered again later, and predicted again: the first prediction is the one that was served.
    again = recorded.slice(0, 500).set_column(2, "predicted_at", pc.add(recorded["predicted_at"][:500], 1))
    again = again.set_column(3, "logit", pa.array(np.full(500, 9.0)))
    place = tmp_path / "predictions.parquet"
    pq.write_table(pa.concat_tables([again, recorded.slice(0, len(rows) - 1_000)]), place)
    window = HeldOutWindow(0, AS_OF, predictions=str(place))
    found = held_out_rows(spark, run.snapshot, copied, "click", window)
    settled = CONFIG.attribution.width("click") + CONFIG.attribution.allowed_lateness
    is_settled = rows["event_time"].to_numpy() + settled < AS_OF
    assert found.counts["learned"] == 0
    assert found.counts["held_out"] + found.counts["not_recorded"] == int(is_settled.sum())
    assert 0 < found.counts["not_recorded"] <= 1_000
    kept = is_settled & (np.arange(len(rows)) < len(rows) - 1_000)
    table: pd.DataFrame = found.frame.toPandas()
    assert sorted(table["logit"]) == sorted(logit[kept].tolist())
    assert sorted(table["served"]) == pytest.approx(sorted(logit_of(served[kept]).tolist()), abs=1e-9)
    one = calibrate_task(copied, "click", found, RULE)
    assert not isinstance(one, str)
    # What was served has nothing to do with the labels; before is not the release's own calibration.
    assert one.figures["before"]["auc"] == pytest.approx(0.5, abs=0.03)
    assert one.is_better


def test_predictions_that_are_none_are_refused(
    spark: SparkSession, run: CalibrateRun, copied: Release, tmp_path: Path
) -> None:
    place = tmp_path / "other.parquet"
    pq.write_table(pa.table({"impression_id": ["i"], "task": ["click"]}), place)
    with pytest.raises(DataError, match="expected recorded predictions"):
        held_out_rows(spark, run.snapshot, copied, "click", HeldOutWindow(0, AS_OF, predictions=str(place)))


def test_a_student_with_ids_is_not_scored_from_a_snapshot_that_has_none(
    run: CalibrateRun, copied: Release
) -> None:
    manifest = copied.manifest.model_copy(update={"kind": "student"})
    spec = copied.spec.with_dynamic(["item_id"])
    student = Release(copied.path, manifest, spec, copied.config_toml, copied.models, copied.calibrators)
    with pytest.raises(DataError, match="does not carry ids") as error:
        check_fits(run.snapshot, student, "click", HeldOutWindow(0, AS_OF))
    assert "--predictions" in (error.value.hint or "")
    check_fits(run.snapshot, student, "click", HeldOutWindow(0, AS_OF, predictions="p.parquet"))


# -- the command ------------------------------------------------------------------------------------------


def test_command_writes_page_figures_and_sketches_and_says_what_it_did(
    shared_spark: SparkSession, run: CalibrateRun, copied: Release, found: Calibration, tmp_path: Path
) -> None:
    arguments = [
        "calibrate",
        "--release",
        str(copied.path),
        "--snapshot",
        run.snapshot,
        "--out",
        str(tmp_path),
    ]
    arguments += ["--as-of", "2026-01-09T00:00:00Z", "--set", "calibration.segments=['campaign_id']"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["registered"] == found.registered
    figures = json.loads((tmp_path / "calibration.json").read_text())
    assert figures["tasks"]["click"]["calibrator"] == found.tasks["click"].chain.digest()
    assert [one["method"] for one in figures["tasks"]["click"]["methods"]][:2] == ["none", "temperature"]
    book = SketchBook.from_bytes((tmp_path / "sketches.parquet").read_bytes())
    assert book.digest() == (found.tasks["click"].book + found.tasks["conversion"].book).digest()
    page = tmp_path / "calibration.html"
    with browser_page() as browser:
        browser.page.goto(page.as_uri())
        click = figures["tasks"]["click"]["figures"]["after"]
        row = browser.page.locator("#task-click table").first.get_by_role("row", name="new calibration")
        assert row.get_by_role("cell").all_inner_texts()[0] == f"{click['log_loss']:.5f}"
        for title in (
            "Tests of calibration, p-values",
            "PCOC by day",
            "Reliability",
            "Cumulative differences",
        ):
            assert browser.page.locator("#task-click").get_by_role("heading", name=title).is_visible()
        assert browser.page.locator("figure img").count() == 4
        assert browser.requests == [page.as_uri()]
        assert browser.problems == []
    with browser_page(width=390, height=844) as browser:
        browser.page.goto(page.as_uri())
        width: Any = browser.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390


def test_mlflow_has_the_figures_the_page_and_the_new_release(found: Calibration, tmp_path: Path) -> None:
    files = write_calibration(found, tmp_path)
    with TrackingServer(tmp_path / "mlflow") as server:
        server.start()
        config = CONFIG.model_copy(
            update={"tracking": CONFIG.tracking.model_copy(update={"uri": server.uri})}
        )
        track(config, found, files)
        track(config, found, files)  # run again, it is the same run and the same version
        tracking = Tracking(server.uri, config.tracking.experiment, config.tracking.registered_model)
        client = tracking.client()
        (run,) = client.search_runs([tracking.experiment_id()])
        after = found.tasks["click"].figures["after"]
        assert run.data.metrics["calibration/click/after/pcoc"] == pytest.approx(after["pcoc"])
        assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"calibration.html"}
        (version,) = client.search_model_versions(f"name='{config.tracking.registered_model}'")
        assert version.tags["release"] == found.registered


@pytest.mark.parametrize(
    ("as_of", "options", "words"),
    [
        ("2026-01-10T00:00:00Z", [], ("expected one as of", "samples relabel")),
        ("2026-01-07T12:00:00Z", ["--labels", "delay_model"], ("says labels as of", "samples relabel")),
        (
            "2026-01-09T00:00:00Z",
            ["--window", "1m"],
            ("may still change their label", "--labels delay_model"),
        ),
        (
            "2026-01-09T00:00:00Z",
            ["--task", "view_through"],
            ("has no samples of the task view_through", "It has: click, conversion"),
        ),
    ],
)
def test_what_cannot_be_judged_is_said_and_exits_with_3(
    shared_spark: SparkSession,
    run: CalibrateRun,
    tmp_path: Path,
    as_of: str,
    options: list[str],
    words: tuple[str, ...],
) -> None:
    arguments = ["calibrate", "--release", str(run.release.path), "--snapshot", run.snapshot]
    result = CliRunner().invoke(cli, [*arguments, "--as-of", as_of, "--out", str(tmp_path), *options])
    assert result.exit_code == 3
    for word in words:
        assert word in result.stderr
    assert list_releases(run.release.path.parent)[-1].startswith(("teacher-0000-0000000000", "student"))


def test_a_snapshot_of_other_features_is_refused(
    spark: SparkSession, run: CalibrateRun, copied: Release
) -> None:
    first = sorted(Path(run.snapshot).parent.glob("20260107*"))[0]
    spec = copied.spec.model_copy(update={"hash_seed": copied.spec.hash_seed + 1})
    other = Release(copied.path, copied.manifest, spec, copied.config_toml, copied.models, copied.calibrators)
    with pytest.raises(DataError, match="was encoded with the feature spec"):
        held_out_rows(spark, str(first), other, "click", HeldOutWindow(0, AS_OF - 2 * DAY_MS))


def test_rows_that_the_release_has_learned_never_judge_it(spark: SparkSession, run: CalibrateRun) -> None:
    learned = sorted(Path(run.snapshot).parent.glob("20260107*"))[0]
    with pytest.raises(DataError, match="were there to be learned"):
        calibrate(spark, run.release, str(learned), AS_OF - 2 * DAY_MS, RULE)
    assert CONFIG.attribution.attribution_window == 6 * HOUR_MS
