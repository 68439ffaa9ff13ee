"""``ctrstream calibrate``: a release calibrated anew on rows that it has not learned."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import Duration, as_of_option, config_options, output_option
from jobs.spark_options import location_option, spark_for, spark_options
from pipelines.errors import DataError
from pipelines.synced_files import replacing

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.calibration_task import CalibrationRule, TaskCalibration
    from jobs.held_out_rows import HeldOutRows
    from jobs.release import Release
    from pipelines.config import Config, Task

__all__ = ["Calibration", "calibrate", "command", "track", "write_calibration"]

FIGURES, PAGE, SKETCHES = "calibration.json", "calibration.html", "sketches.parquet"


@dataclass(frozen=True)
class Calibration:
    """What a run has found.

    Attributes
    ----------
    release : Release
        The one that was calibrated anew.
    snapshot : str
    as_of, since : int
        ms; ``since`` is where the window begins.
    rule : CalibrationRule
    rows : dict of task to HeldOutRows
    tasks : dict of task to TaskCalibration
    skipped : dict of task to str
        Tasks without enough rows, and why.
    registered : str or None
        The new release; None where nothing was better, or nothing was to be registered.
    """

    release: Release
    snapshot: str
    as_of: int
    since: int
    rule: CalibrationRule
    rows: dict[Task, HeldOutRows]
    tasks: dict[Task, TaskCalibration]
    skipped: dict[Task, str]
    registered: str | None

    def summary(self) -> dict[str, Any]:
        """For stdout."""
        return {
            "release": self.release.name,
            "registered": self.registered,
            "tasks": {
                task: {"method": one.methods.choice, "better": one.is_better, "why": one.why}
                for task, one in self.tasks.items()
            },
            "skipped": self.skipped,
        }


def calibrate(
    spark: SparkSession,
    release: Release,
    snapshot: str,
    as_of: int,
    rule: CalibrationRule,
    *,
    window: int | None = None,
    predictions: str | None = None,
    tasks: tuple[Task, ...] = (),
    register: bool = True,
) -> Calibration:
    """Calibrate the tasks of a release; write a new release if one of them is better for it.

    Parameters
    ----------
    release : Release
    snapshot : str
        With rows that opened after the release had learned.
    as_of : int
        Only what was known then, ms.
    rule : CalibrationRule
    window : int, optional
        How far back before ``as_of`` rows count, ms; without it all that the release has not learned.
    predictions : str, optional
        See `jobs.held_out_rows.HeldOutWindow`.
    tasks : tuple of str
        All of the release if empty.
    register : bool
        Whether to write the release.

    Raises
    ------
    DataError
        If the snapshot does not fit, or no task has rows to judge it by.
    """
    from jobs.calibration_task import calibrate_task
    from jobs.held_out_rows import HeldOutWindow, held_out_rows
    from jobs.recalibrated import write_recalibrated

    since = 0 if window is None else as_of - window
    held = HeldOutWindow(since, as_of, rule.open_labels, predictions)
    rows, found, skipped = {}, {}, {}
    for task in tasks or release.tasks:
        rows[task] = held_out_rows(spark, snapshot, release, task, held)
        outcome = rows[task].why_none() or calibrate_task(release, task, rows[task], rule)
        if isinstance(outcome, str):
            skipped[task] = outcome
        else:
            found[task] = outcome
    if not found:
        raise DataError(
            f"no task of {release.name} can be calibrated on {snapshot}: "
            + "; ".join(f"{task}: {reason}" for task, reason in skipped.items()),
            hint="wait for labels, give a longer --window, or use open labels too: --labels delay_model",
        )
    better = {task: one.chain for task, one in found.items() if one.is_better}
    registered = None
    if better and register:
        told = {
            "calibrated": {
                "snapshot": str(snapshot),
                "as_of": as_of,
                "labels": {task: rows[task].labels.state() for task in better},
            }
        }
        registered = write_recalibrated(release, better, told).name
    return Calibration(release, snapshot, as_of, since, rule, rows, found, skipped, registered)


def write_calibration(found: Calibration, out: Path) -> list[Path]:
    """Write sketches, figures and page into a folder, each in one piece."""
    from calibration.sketch_book import SketchBook
    from jobs.calibration_page import render

    book = SketchBook()
    for one in found.tasks.values():
        book.merge(one.book)
    contents = {
        SKETCHES: book.to_bytes(),
        FIGURES: json.dumps(_record(found), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n",
        PAGE: render(found).encode(),
    }
    for name, content in contents.items():
        part = out / f".{name}.part"
        with replacing(out / name, part):
            part.write_bytes(content)
    return [out / name for name in contents]


def _record(found: Calibration) -> dict[str, Any]:
    tasks = {
        task: {
            "rows": found.rows[task].counts,
            "first": found.rows[task].first,
            "last": found.rows[task].last,
            "cut": one.cut,
            "method": one.methods.choice,
            "methods": [asdict(method) for method in one.methods.methods],
            "figures": one.figures,
            "paired": asdict(one.loss),
            "days": [asdict(day) for day in one.days],
            "segments": {stage: [asdict(worst) for worst in found] for stage, found in one.segments.items()},
            "better": one.is_better,
            "why": one.why,
            "calibrator": one.chain.digest(),
        }
        for task, one in found.tasks.items()
    }
    return {
        "release": found.release.name,
        "release_digest": found.release.digest(),
        "snapshot": str(found.snapshot),
        "as_of": found.as_of,
        "since": found.since,
        "rule": asdict(found.rule),
        "tasks": tasks,
        "skipped": found.skipped,
        "registered": found.registered,
    }


def track(config: Config, found: Calibration, files: list[Path]) -> None:
    """One run with the figures before and after, the page, and the new release in the registry."""
    from jobs.tracking import Tracking

    name = f"calibrate {found.release.name}"
    key = f"calibrate/{found.release.name}/{Path(found.snapshot).name}/{found.as_of}"
    tracking = Tracking(config.tracking.uri, config.tracking.experiment, config.tracking.registered_model)
    run = tracking.run(name, {"job": "calibrate", "release": found.release.name}, key=key)
    run.log_params({"rule": asdict(found.rule), "snapshot": str(found.snapshot), "as_of": found.as_of})
    run.log_metrics(
        [
            (f"calibration/{task}/{stage}/{figure}", value, 0, found.as_of)
            for task, one in found.tasks.items()
            for stage, figures in one.figures.items()
            for figure, value in figures.items()
            if isinstance(value, float)
        ]
    )
    for path in files:
        run.log_artifact(path)
    if found.registered is not None:
        run.register(found.release.path.parent / found.registered)
    run.finish()


@click.command()
@click.option(
    "--release",
    "release_path",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Folder of the release; the new one gets a folder beside it.",
)
@location_option("--snapshot", "A snapshot with rows that the release has not learned.", use="read")
@click.option(
    "--predictions",
    metavar="PATH|URI",
    help="Recorded predictions (Parquet) instead of scoring: for a student that has learned the rows since.",
)
@as_of_option(required=True)
@click.option("--window", type=Duration(), help="How far back before --as-of.  [default: all not learned]")
@click.option(
    "--task",
    "tasks",
    type=click.Choice(["click", "conversion", "view_through"]),
    multiple=True,
    help="Only this task. Repeatable.",
)
@click.option(
    "--labels",
    type=click.Choice(["matured", "delay_model"]),
    default="matured",
    show_default=True,
    help="Rows of closed windows, or also soft labels of open ones.",
)
@click.option(
    "--folds", type=click.IntRange(2, 20), default=5, show_default=True, help="Of cross-validation."
)
@click.option(
    "--test-share",
    type=click.FloatRange(0.05, 0.9),
    default=0.25,
    show_default=True,
    help="Part of the window's time, its end, that nothing is fitted to.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 1.0, max_open=True),
    default=0.95,
    show_default=True,
    help="Of the paired test that a new calibration must pass.",
)
@click.option("--register/--no-register", default=True, help="Write a release if it is better.")
@output_option(help="Folder for calibration.html, calibration.json and sketches.parquet.")
@spark_options
@config_options
def command(
    release_path: Path,
    snapshot: str,
    as_of: int,
    predictions: str | None,
    window: int | None,
    tasks: tuple[Task, ...],
    labels: str,
    register: bool,
    out: Path,
    master: str,
    spark_conf: tuple[str, ...],
    config: Config,
    **settings: Any,
) -> None:
    """Calibrate a release anew on held-out rows, and register the result if it is better.

    All methods are compared by cross-validation; the one taken is judged on the last part of the window
    against the release's own calibration. The weights stay as they are. A summary goes to stdout.
    """
    from calibration.segment_levels import levels_over, segment_columns
    from jobs.calibration_task import CalibrationRule
    from jobs.held_out_rows import HeldOutWindow, check_fits
    from jobs.release import Release

    release = Release.load(release_path)
    since = 0 if window is None else as_of - window
    held = HeldOutWindow(since, as_of, labels == "delay_model", predictions)
    for task in tasks or release.tasks:  # before Spark starts
        check_fits(snapshot, release, task, held)
    levels = levels_over(config.calibration.segments, release.segments)
    rule = CalibrationRule(
        config.calibration.method,
        open_labels=held.open_labels,
        segments=levels if segment_columns(levels) == release.segments else (),
        **settings,
    )
    with spark_for("calibrate", master, spark_conf) as spark:
        found = calibrate(
            spark,
            release,
            snapshot,
            as_of,
            rule,
            window=window,
            predictions=predictions,
            tasks=tasks,
            register=register,
        )
    files = write_calibration(found, out)
    if config.tracking.uri:
        track(config, found, files)
    click.echo(json.dumps(found.summary(), indent=1))
