"""One task of a release calibrated anew on held-out rows, and compared with what the release has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from calibration.chain import CalibrationChain
from calibration.online import OnlinePlatt, information_centre
from calibration.segments import SegmentConfig
from calibration.selection import fit_method
from calibration.sketch import LogitSketch
from calibration.sketch_book import SketchBook, SketchKey
from jobs.calibration_figures import calibration_figures
from jobs.calibration_folds import MATURITY, Folds, fold_sketches_of, segment_sketches
from jobs.calibration_methods import Methods, compare_methods
from jobs.calibration_paired import DayLevel, PairedLoss, day_levels, paired_loss
from jobs.chain_spark import calibrated
from jobs.held_out import too_few
from jobs.held_out_rows import SERVED, HeldOutRows
from jobs.open_labels_spark import seen_logit, with_soft_labels
from jobs.release import Release
from jobs.release_segments import segment_counts
from jobs.segment_fit_spark import fit_segments
from monitoring.segment_report import SegmentFinding, worst_segments
from pipelines.config import Task

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["STAGES", "CalibrationRule", "TaskCalibration", "calibrate_task"]

# What is judged on the last part: the model's own logits, the release's calibration, the new one.
STAGES = ("raw", "before", "after")


@dataclass(frozen=True)
class CalibrationRule:
    """How a calibration is fitted, and when it is better.

    Attributes
    ----------
    method : str
        ``auto`` or a method of `calibration.selection.METHODS`.
    folds : int
        Of cross-validation.
    test_share : float
        Part of the window's time, its end, that nothing is fitted to.
    confidence : float
        Of the one-sided paired test there.
    open_labels : bool
        Whether rows whose label may still change take part, as soft labels of the delay model.
    segments : tuple of str
        Levels of segments to correct (`calibration.segment_config.SegmentConfig`).
    """

    method: str = "auto"
    folds: int = 5
    test_share: float = 0.25
    confidence: float = 0.95
    open_labels: bool = False
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskCalibration:
    """What was found for one task.

    Attributes
    ----------
    chain : CalibrationChain
        The new one: exactly what was judged.
    methods : Methods
    figures : dict of str to dict
        By stage, `jobs.calibration_figures.calibration_figures` on the last part.
    sketches : dict of str to LogitSketch
        By stage, of the last part.
    loss : PairedLoss
        The new calibration against the release's, on the last part.
    days : list of DayLevel
        Of the last part, by stage.
    segments : dict of str to list of SegmentFinding
        Of the last part, by stage, the most certainly wrong ones first; empty without segments.
    cut : int
        Where the last part begins, ms.
    is_better : bool
    why : str
        The rule, applied.
    book : SketchBook
        All sketches that were made, for the record.
    """

    chain: CalibrationChain
    methods: Methods
    figures: dict[str, dict[str, Any]]
    sketches: dict[str, LogitSketch]
    loss: PairedLoss
    days: list[DayLevel]
    segments: dict[str, list[SegmentFinding]]
    cut: int
    is_better: bool
    why: str
    book: SketchBook


def calibrate_task(
    release: Release, task: Task, rows: HeldOutRows, rule: CalibrationRule
) -> TaskCalibration | str:
    """Fit to the earlier rows, judge on the later ones; or say why there are too few.

    1. The logits are freed of the sampling that the model was trained with.
    2. Rows before the cut are dealt to folds, sketched, and every method is judged by cross-validation.
    3. The method taken is fitted to all of them; that chain is judged on the rows from the cut on, beside the
       release's own. What is registered is what was judged: it is not fitted again to the last part.
    """
    from pyspark.sql import functions as F

    old = release.calibrators[task]
    sampling = CalibrationChain(negative_sampling_rate=old.sampling.negative_sampling_rate)
    cut = rows.last - round(rule.test_share * (rows.last - rows.first))
    is_fitted = F.col("event_time") < cut
    corrected = calibrated(rows.frame.where(is_fitted), {"corrected": sampling})
    earlier = corrected.withColumn("logit", F.col("corrected")).drop("corrected").persist()
    try:
        if rule.open_labels:
            earlier = with_soft_labels(earlier, release.name, task)
        folds = fold_sketches_of(earlier, release.name, task, rule.folds)
        reason = _too_few(sum(folds.sketches, LogitSketch()))
        if reason is not None:
            return f"before the last part of the window: {reason}"
        methods = compare_methods(folds.sketches, rule.method)
        chain = _chain(earlier, folds, methods.choice, old, rule)
        # Of a line that learns online the state says what that hears.
        chain.labels = rows.labels if old.online is None else old.labels
        later = rows.frame.where(~is_fitted)
        if SERVED in later.columns:
            judged = calibrated(later, {"raw": sampling, "after": chain}).withColumnRenamed(SERVED, "before")
        else:
            judged = calibrated(later, {"raw": sampling, "before": old, "after": chain})
        judged = _seen(judged).persist()
        return _judged(judged, release.name, task, chain, methods, folds.book, cut, rule)
    finally:
        earlier.unpersist()


def _chain(
    earlier: DataFrame, folds: Folds, method: str, old: CalibrationChain, rule: CalibrationRule
) -> CalibrationChain:
    """Base, online line and segments, fitted to the earlier rows; their logits are free of the sampling."""
    base = fit_method(method, sum(folds.sketches, LogitSketch()))
    chain = CalibrationChain(base, negative_sampling_rate=old.sampling.negative_sampling_rate)
    if rule.segments:
        based = calibrated(earlier, {"based": CalibrationChain(base)})
        chain.segments = fit_segments(based, "based", SegmentConfig(rule.segments))
    if old.online is not None:
        logit, rows, _, _ = sum(folds.sketches, LogitSketch()).bins()
        # The base has what the old line began with.
        config = replace(old.online.config, intercept=0.0, slope=1.0)
        chain.online = OnlinePlatt(config, information_centre(base.transform_logit(logit), rows))
    return chain


def _judged(
    judged: DataFrame,
    release: str,
    task: Task,
    chain: CalibrationChain,
    methods: Methods,
    book: SketchBook,
    cut: int,
    rule: CalibrationRule,
) -> TaskCalibration | str:
    from pyspark.sql import functions as F

    try:
        long = judged.select(
            F.explode(
                F.array(*(F.struct(F.lit(s).alias("stage"), F.col(s).alias("z")) for s in STAGES))
            ).alias("one"),
            "label",
            "weight",
        ).select("one.stage", "one.z", "label", "weight")
        last = segment_sketches(long, release, task, F.col("stage"), "z")
        sketches = {stage: last[SketchKey(release, task, stage, MATURITY)] for stage in STAGES}
        reason = _too_few(sketches["raw"])
        if reason is not None:
            return f"in the last part of the window: {reason}"
        loss, days = paired_loss(judged, "after", "before"), day_levels(judged, STAGES)
        segments = {stage: _worst(judged, stage, rule.segments) for stage in STAGES if rule.segments}
    finally:
        judged.unpersist()
    figures = {stage: calibration_figures(sketch) for stage, sketch in sketches.items()}
    is_better, why = _better(loss, rule.confidence)
    return TaskCalibration(
        chain, methods, figures, sketches, loss, days, segments, cut, is_better, why, book + last
    )


def _worst(judged: DataFrame, stage: str, levels: tuple[str, ...]) -> list[SegmentFinding]:
    return worst_segments(segment_counts(fit_segments(judged, stage, SegmentConfig(levels))))


def _seen(rows: DataFrame) -> DataFrame:
    from pyspark.sql import functions as F

    return rows.withColumns({stage: seen_logit(F.col(stage), F.col("share")) for stage in STAGES})


def _too_few(sketch: LogitSketch) -> str | None:
    return too_few(round(sketch.positives), round(sketch.rows))


def _better(loss: PairedLoss, confidence: float) -> tuple[bool, str]:
    limit = -NormalDist().inv_cdf(confidence)
    change = f"{1e3 * loss.difference:+.3f} nats a thousand rows"
    if loss.z is None:
        return False, "both calibrations give every row the same probability"
    found = f"log loss {change}, z = {loss.z:.2f} over {loss.users:,} users"
    if loss.z < limit:
        return True, f"{found}: below {limit:.2f}, so it is better with {confidence:.0%} confidence"
    return False, f"{found}: not below {limit:.2f}, so it is not shown to be better"
