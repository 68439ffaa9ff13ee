"""Checks of a snapshot that need a join or a shuffle, by native Spark: no row leaves it."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from pipelines.check_delays import DELAY_STEPS, Arrivals
from pipelines.check_overlap import Overlap, RowSet
from pipelines.config_sections import AttributionConfig
from pipelines.duration import parse_duration
from pipelines.lake import read_lake
from pipelines.sample_facts import known_events
from pipelines.sample_outcomes import accepted, first_copies, tie_break
from pipelines.sample_window import SampleWindow
from pipelines.snapshot import data_files, read_manifest
from pipelines.snapshot_manifest import SnapshotManifest
from pipelines.snapshot_partitions import PartitionGrid

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["lake_arrivals", "overlap", "repeated_samples"]

_EVENTS = "array<struct<arrival_time:bigint,tie:bigint,event_time:bigint>>"


def repeated_samples(spark: SparkSession, location: str) -> int:
    """Rows of a snapshot whose sample another row has been said for."""
    rows = _rows(spark, RowSet(location)).groupBy("sample_id").count()
    return int(rows.selectExpr("sum(count - 1)").first()[0] or 0)  # type: ignore[index]


def overlap(spark: SparkSession, train: RowSet, test: RowSet) -> Overlap:
    """`pipelines.check_overlap.find_overlap` on executors."""
    from pyspark.sql import functions as F

    tested, trained = _rows(spark, test), _rows(spark, train)
    first = tested.agg(F.count(F.lit(1)), F.min("event_time")).first()
    test_rows, begins = (0, None) if first is None else (int(first[0]), first[1])
    after = F.col("known_at") > (0 if begins is None else begins)
    late = after & (F.col("outcome_known_at") > (0 if begins is None else begins))
    counted = trained.agg(F.count(F.lit(1)), F.count(F.when(after, 1)), F.count(F.when(late, 1))).first()
    train_rows, reaching, late_labels = (0, 0, 0) if counted is None else tuple(map(int, counted))

    def shared(key: str) -> int:
        return tested.join(trained.select(key).distinct(), key, "left_semi").count()

    return Overlap(
        train_rows,
        test_rows,
        shared("sample_id"),
        shared("impression_id"),
        None if begins is None else int(begins),
        reaching if begins is not None else 0,
        late_labels if begins is not None else 0,
    )


def _rows(spark: SparkSession, rows: RowSet) -> DataFrame:
    from pyspark.sql import functions as F

    manifest = read_manifest(rows.location)
    files = [file.location for task in manifest.tasks for file in data_files(rows.location, task, manifest)]
    columns = ("sample_id", "impression_id", "event_time", "known_at", "outcome_known_at")
    found = spark.read.parquet(*files).select(*columns)
    if rows.span is None:
        return found
    return found.where((F.col("event_time") >= rows.span[0]) & (F.col("event_time") < rows.span[1]))


def lake_arrivals(spark: SparkSession, lake: str, manifest: SnapshotManifest) -> list[Arrivals]:
    """Delays of all clicks and conversions that the snapshot could have known, credited or not.

    Clicks are counted from the impression, conversions from the credited click; both once, when they first
    arrived. Not counted are those whose impression, or click, is not known: see the manifest's ``events``.
    """
    from pyspark.sql import functions as F

    rule = AttributionConfig.model_validate(manifest.config["attribution"])
    grid = PartitionGrid(manifest.granularity)
    window = SampleWindow.whole(manifest.since, manifest.as_of, rule, tuple(manifest.tasks), grid)
    joined = _by_impression(read_lake(spark, lake, batches=manifest.lake_batches), window)
    nothing = F.array().cast(_EVENTS)
    patience = rule.click_window + rule.allowed_lateness
    clicks = first_copies(F.coalesce("clicks", nothing))
    found = (
        joined.where(F.col("shown").isNotNull())
        .select(
            F.col("shown.event_time").alias("opened"),
            F.col("shown.arrival_time").alias("known"),
            clicks.alias("clicks"),
            first_copies(F.coalesce("conversions", nothing)).alias("conversions"),
        )
        .withColumn(
            "credited",
            F.get(
                accepted(
                    F.col("clicks"),
                    F.col("opened"),
                    rule.click_window,
                    rule.allowed_lateness,
                    F.col("known"),
                    patience,
                ),
                F.lit(0),
            )["event_time"],
        )
        .select(
            _delays("clicks", F.col("opened")).alias("clicks"),
            F.when(F.col("credited").isNotNull(), _delays("conversions", F.col("credited"))).alias(
                "conversions"
            ),
        )
    )
    return [_counted(found, name) for name in ("clicks", "conversions")]


def _by_impression(events: DataFrame, window: SampleWindow) -> DataFrame:
    """Of each impression its first copy, and its clicks and conversions in order of arrival."""
    from pyspark.sql import functions as F

    reach = {
        "impression": window.shown(),
        "click": window.happened(),
        "conversion": window.happened(),
    }
    item = F.struct("arrival_time", tie_break("event_id").alias("tie"), "event_time")
    frames = [
        known_events(events, kind, intervals, window.as_of).select(
            "impression_id", F.lit(kind).alias("kind"), item.alias("event")
        )
        for kind, intervals in reach.items()
    ]
    both = reduce(lambda left, right: left.unionByName(right), frames)

    def own(kind: str) -> Column:
        return F.when(F.col("kind") == kind, F.col("event"))

    return both.groupBy("impression_id").agg(
        F.min(own("impression")).alias("shown"),
        F.sort_array(F.collect_list(own("click"))).alias("clicks"),
        F.sort_array(F.collect_list(own("conversion"))).alias("conversions"),
    )


def _delays(events: str, opened: Column) -> Column:
    from pyspark.sql import functions as F

    return F.transform(events, lambda event: event["arrival_time"] - opened)


def _counted(delays: DataFrame, name: str) -> Arrivals:
    from pyspark.sql import functions as F

    each = delays.select(F.explode(name).alias("delay"))
    within = [F.count(F.when(F.col("delay") <= parse_duration(step), 1)) for step in DELAY_STEPS]
    row = each.agg(F.count(F.lit(1)), *within).first()
    total, *counts = (0,) if row is None else tuple(map(int, row))
    of = f"all {name} of the lake"
    if not total:
        return Arrivals(of, 0, (None,) * len(DELAY_STEPS))
    return Arrivals(of, total, tuple(count / total for count in counts))
