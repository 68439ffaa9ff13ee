"""Rows of a snapshot that a release has not learned and whose labels are known, with its logits; by Spark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from calibration.label_origin import LabelOrigin
from calibration.state import digest
from jobs.held_out import LEAST_SHARE
from jobs.release import CALIBRATOR, Release, load_model, read_verified
from jobs.release_manifest import ModelKind
from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.delay import DelayCurve
from pipelines.duration import format_duration
from pipelines.errors import DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.snapshot import data_files, read_manifest
from pipelines.stream_columns import TRAINING_COLUMNS, conform, to_training_set, with_widths

if TYPE_CHECKING:
    from pyspark import Broadcast
    from pyspark.sql import Column, DataFrame, SparkSession

    from models.base import Model

__all__ = [
    "SCORED_COLUMNS",
    "SERVED",
    "HeldOutRows",
    "HeldOutWindow",
    "check_fits",
    "held_out_rows",
]

# Columns of `HeldOutRows.frame`. The logit is the model's own, nothing undone, nothing corrected; `share` is
# the part of the outcomes that is known by now, 1 for a settled row.
SCORED_COLUMNS = (
    "user_key bigint, event_time bigint, segment_key array<bigint>, logit double, label double, "
    "weight double, share double"
)
# Where logits were recorded, the calibrated logit that was served stands beside them.
SERVED = "served"
# In the place of a label policy: each window once, as a snapshot has it.
_SNAPSHOT = "snapshot"


@dataclass(frozen=True)
class HeldOutWindow:
    """Which rows are held out.

    Attributes
    ----------
    since, as_of : int
        Opened in ``[since, as_of)``, ms.
    open_labels : bool
        Also rows whose label may still change, if half of the outcomes would be known by now; else only rows
        that are settled by ``as_of``.
    predictions : str, optional
        Parquet of recorded predictions, made before their row was learned. They take the place of scoring,
        and of the question what the release has learned.
    """

    since: int
    as_of: int
    open_labels: bool = False
    predictions: str | None = None


@dataclass(frozen=True)
class HeldOutRows:
    """Scored rows of one task, and what became of all rows of the snapshot.

    Attributes
    ----------
    frame : DataFrame
        ``SCORED_COLUMNS``.
    counts : dict of str to int
        ``snapshot`` rows, of which ``learned`` (opened by the newest event that the release has learned),
        ``before_window``, ``after_as_of``, ``open`` (the label may still change), ``not_recorded`` (no
        prediction of it is there) and ``held_out``.
    first, last : int
        When the first and the last held-out window opened, ms.
    settled : int
        After how long a label is final, ms.
    labels : LabelOrigin
        What the labels are, for the state of a calibrator that learns from them.
    """

    frame: DataFrame
    counts: dict[str, int]
    first: int
    last: int
    settled: int
    labels: LabelOrigin

    def why_none(self) -> str | None:
        """None, or why no row is held out."""
        if self.counts["held_out"]:
            return None
        return (
            f"of {self.counts['snapshot']:,} rows {self.counts['learned']:,} were there to be learned, "
            f"{self.counts['before_window']:,} opened before the window, {self.counts['after_as_of']:,} "
            f"after the as-of time, of {self.counts['not_recorded']:,} no prediction is recorded, and "
            f"{self.counts['open']:,} may still change their label, which is final after "
            f"{format_duration(self.settled)}"
        )


def held_out_rows(
    spark: SparkSession, snapshot: str, release: Release, task: Task, window: HeldOutWindow
) -> HeldOutRows:
    """Score the rows of a snapshot that may judge a release.

    Each executor process loads the model once, from bytes that were verified here; trees and networks are
    applied to a batch of rows at a time, by the code that serves.

    Raises
    ------
    DataError
        If the snapshot does not fit: `check_fits`.
    """
    from pyspark.sql import functions as F

    manifest = read_manifest(snapshot)
    check_fits(snapshot, release, task, window)
    files = [file.location for file in data_files(snapshot, task, manifest)]
    rule = AttributionConfig.model_validate(manifest.config["attribution"])
    settled = rule.width(task) + rule.allowed_lateness
    rows = spark.read.parquet(*files).select("impression_id", *TRAINING_COLUMNS.names)
    if window.predictions is not None:
        rows = rows.join(_recorded(spark, window.predictions, task), "impression_id", "left")
    fate = _fate(release, window, settled)
    opened = F.col("event_time")
    fates = rows.groupBy(fate.alias("fate")).agg(F.count(F.lit(1)), F.min(opened), F.max(opened)).collect()
    counts = dict.fromkeys(_FATES, 0) | {row[0]: row[1] for row in fates}
    counts["snapshot"] = sum(row[1] for row in fates)
    ends = [(row[2], row[3]) for row in fates if row[0] == "held_out"]
    held = rows.where(fate == "held_out")
    if window.predictions is None:
        widths = {
            "buckets": len(release.spec.column_field),
            "numbers": len(release.spec.numeric),
            "segment_key": len(manifest.segments),
        }
        held = held.drop("impression_id").mapInArrow(_scorer(spark, release, task, widths), SCORED_COLUMNS)
    else:
        known = F.col("observed_share").cast("double").alias("share")
        numbers = (F.col(name).cast("double").alias(name) for name in ("label", "weight"))
        held = held.select("user_key", "event_time", "segment_key", "logit", *numbers, known, SERVED)
    first, last = ends[0] if ends else (window.as_of, window.as_of)
    labels = _labels(window, rule.width(task), settled, manifest.tasks[task].delay_curve)
    return HeldOutRows(held, counts, first, last, settled, labels)


def _labels(window: HeldOutWindow, width: int, settled: int, delay_curve: dict[str, Any]) -> LabelOrigin:
    if not window.open_labels:
        return LabelOrigin("matured", _SNAPSHOT, width, settled)
    lag = DelayCurve.from_state(delay_curve).mean(width)
    return LabelOrigin("delay_model", _SNAPSHOT, width, lag, digest(delay_curve))


_FATES = ("snapshot", "learned", "before_window", "after_as_of", "open", "not_recorded", "held_out")


def _fate(release: Release, window: HeldOutWindow, settled: int) -> Column:
    """What becomes of a row: the first class that it belongs to."""
    from pyspark.sql import functions as F

    opened = F.col("event_time")
    is_open = opened + settled >= window.as_of
    if window.open_labels:
        is_open &= F.col("observed_share") < LEAST_SHARE
    fate = F.when(opened >= window.as_of, "after_as_of")
    if window.predictions is None:
        fate = fate.when(opened <= release.last_event_time, "learned")
    fate = fate.when(opened < window.since, "before_window").when(is_open, "open")
    if window.predictions is not None:
        fate = fate.when(F.col("logit").isNull(), "not_recorded")
    return fate.otherwise("held_out")


def _recorded(spark: SparkSession, location: str, task: Task) -> DataFrame:
    """Of each impression its first recorded prediction: raw logit, and the one that was served."""
    from pyspark.errors import AnalysisException
    from pyspark.sql import functions as F

    try:
        read = spark.read.parquet(location).where(F.col("task") == task)
        chosen = F.min_by(F.struct("logit", "probability"), "predicted_at").alias("one")
        found = read.groupBy("impression_id").agg(chosen)
    except AnalysisException as error:
        raise DataError(
            f"expected recorded predictions (impression_id, task, predicted_at, logit, probability) in "
            f"{location}: {error.getMessage() or error}.",
            hint="give predictions.parquet of a backtest, or the folder predictions of a worker's state",
        ) from error
    odds = F.log(F.col("one.probability") / (1.0 - F.col("one.probability")))
    return found.select("impression_id", F.col("one.logit").alias("logit"), odds.alias(SERVED))


def check_fits(snapshot: str, release: Release, task: Task, window: HeldOutWindow) -> None:
    """Refuse a snapshot that cannot judge a release; needs no Spark.

    Raises
    ------
    DataError
        If the snapshot ends before ``as_of``, has other features or segments, lacks the task, or does not
        have all that the model needs.
    """
    manifest, as_of = read_manifest(snapshot), window.as_of
    data_files(snapshot, task, manifest)
    if manifest.as_of > as_of and window.open_labels:
        raise DataError(
            f"{snapshot} says labels as of {manifest.as_of} ms: of open windows they are not those known at "
            f"{as_of} ms.",
            hint="build a snapshot as of that time with `ctrstream samples relabel`, or keep to settled rows",
        )
    if manifest.as_of < as_of:
        raise DataError(
            f"{snapshot} is as of {manifest.as_of} ms: expected one as of {as_of} ms or later.",
            hint="bring it up to date with `ctrstream samples relabel`",
        )
    if task not in release.manifest.tasks:
        raise DataError(f"{release.name} has no model of the task {task}.")
    hashed = release.spec.model_copy(update={"dynamic": ()}).digest()
    if manifest.feature_spec_digest not in (hashed, release.spec.digest()):
        raise DataError(
            f"{snapshot} was encoded with the feature spec {manifest.feature_spec_digest}; {release.name} "
            f"expects {hashed}.",
            hint=f"build it with --spec {release.path}/feature_spec.toml",
        )
    if release.kind == "student" and release.spec.dynamic and window.predictions is None:
        raise DataError(
            f"{release.name} has rows of their own for ids ({', '.join(release.spec.dynamic)}). A snapshot "
            "does not carry ids: scored from one, it would not be the model that serves.",
            hint="give the recorded predictions of the worker with --predictions",
        )
    if manifest.segments != release.segments:
        raise DataError(
            f"{snapshot} has the segments {list(manifest.segments)}; {release.name} expects "
            f"{list(release.segments)}.",
            hint="build it with the same calibration.segments",
        )


def _scorer(spark: SparkSession, release: Release, task: Task, widths: dict[str, int]) -> Any:
    own = {
        name.partition("/")[2]: content
        for name, content in read_verified(release.path, release.manifest).items()
        if name.startswith(f"{task}/") and not name.endswith(CALIBRATOR)
    }
    files: Broadcast[dict[str, bytes]] = spark.sparkContext.broadcast(own)
    kind, spec, key = release.manifest.tasks[task].model, release.spec.to_toml(), f"{release.digest()}/{task}"
    schema = with_widths(TRAINING_COLUMNS, widths)

    def score(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        model = _loaded(key, kind, spec, files)
        for batch in batches:
            rows = to_training_set(conform(batch, schema))
            logit = model.predict_logit(rows.buckets, rows.numbers)
            yield pa.record_batch(
                {
                    "user_key": batch.column("user_key"),
                    "event_time": batch.column("event_time"),
                    "segment_key": batch.column("segment_key"),
                    "logit": pa.array(logit, pa.float64()),
                    "label": batch.column("label").cast(pa.float64()),
                    "weight": batch.column("weight").cast(pa.float64()),
                    "share": batch.column("observed_share").cast(pa.float64()),
                }
            )

    return score


@cache
def _loaded(key: str, kind: ModelKind, spec: str, files: Broadcast[dict[str, bytes]]) -> Model:
    """One model a process; ``key`` says which."""
    if kind == "student":
        from jobs.single_thread import use_one_thread

        use_one_thread()
    return load_model(kind, files.value, FeatureSpec.from_toml(spec, key))
