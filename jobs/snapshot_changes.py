"""How the labels of a relabelled snapshot differ from those of its base, as files and as messages."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from jobs.snapshot_base import Base
from jobs.snapshot_write import Workplace, is_first_copy
from pipelines.config import Task
from pipelines.snapshot_manifest import LabelChanges, PartitionSummary

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["CHANGE_COLUMNS", "as_messages", "write_changes"]

CHANGE_COLUMNS = (
    "sample_id",
    "impression_id",
    "task",
    "event_time",
    "label_before",
    "label",
    "label_version",
    "known_at",
    "outcome_known_at",
)


def write_changes(
    spark: SparkSession, place: Workplace, base: Base, parts: list[PartitionSummary]
) -> dict[Task, LabelChanges]:
    """Write the rows whose label has changed since the base, and count them.

    Compared are the partitions that were built again. ``label_before`` is null where the base did not have
    the row: it became known later, or negative sampling had left it out.
    """
    from pyspark.sql import functions as F

    rebuilt = {task: [part for part in parts if part.task == task] for task in base.window.tasks}
    frames = [_changes(spark, place, base, task, own) for task, own in rebuilt.items() if own]
    if not frames:
        return {}
    reduce(lambda left, right: left.unionByName(right), frames).coalesce(1).write.parquet(place.diff.location)
    before, after = F.col("label_before"), F.col("label")
    sums = (
        spark.read.parquet(place.diff.location)
        .groupBy("task")
        .agg(
            F.count(F.when((before == 0) & (after > 0), 1)).alias("raised"),
            F.count(F.when((before > 0) & (after == 0), 1)).alias("lowered"),
            F.count(F.when((before > 0) & (after > 0), 1)).alias("restated"),
            F.count(F.when(before.isNull(), 1)).alias("late"),
        )
        .collect()
    )
    counted = {row["task"]: LabelChanges(**{k: row[k] for k in LabelChanges.model_fields}) for row in sums}
    nothing = LabelChanges(raised=0, lowered=0, restated=0, late=0)
    return {task: counted.get(task, nothing) for task in base.window.tasks}


def _changes(
    spark: SparkSession, place: Workplace, base: Base, task: Task, own: list[PartitionSummary]
) -> DataFrame:
    from pyspark.sql import functions as F

    compared = ["sample_id", "label", "label_version"]
    names = [part.partition for part in own]
    earlier = base.files_of(task, names)
    # Windows that opened later are new rows, not changed ones.
    new = spark.read.parquet(
        *[f"{place.folder.location}/{name}" for part in own for name in part.files]
    ).where((F.col("event_time") < base.manifest.as_of) & is_first_copy())
    old = spark.read.parquet(*earlier) if earlier else new.limit(0)
    old = old.select(*compared).toDF("sample_id", "label_before", "version_before")
    joined = new.join(old, "sample_id", "left")
    changed = F.col("version_before").isNull() | (F.col("version_before") != F.col("label_version"))
    return joined.where(changed).select(*CHANGE_COLUMNS)


def as_messages(changes: DataFrame) -> DataFrame:
    """Label changes as Kafka messages: key ``impression_id``, value JSON; repeated, they say the same.

    A reader that has seen ``label_version`` of a sample or a later one leaves the message out.
    """
    from pyspark.sql import functions as F

    return changes.select(
        F.col("impression_id").cast("binary").alias("key"),
        F.to_json(F.struct(*CHANGE_COLUMNS)).cast("binary").alias("value"),
    )
