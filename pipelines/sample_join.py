"""Samples in Spark: the impressions of a window with their features, joined to the facts known of them.

The wide rows pass through one shuffle, and into the very groups that they are written in: partition of the
snapshot and slice. Within a group the facts are the small side of a hash join, so the wide rows are never
sorted for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from pipelines.config import Task
from pipelines.sample_facts import copy_key, known_events, without
from pipelines.sample_window import SampleWindow

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["JOIN_SETTINGS", "fact_columns", "join_samples", "sampled"]

# Both sides are spread by partition and slice, which is enough to join them: no further shuffle.
JOIN_SETTINGS = {"spark.sql.requireAllClusterKeysForCoPartition": "false"}
_TRAVEL = ("user_id", "item_id", "position", "features", "propensity")


def fact_columns(tasks: Sequence[Task]) -> list[str]:
    """Columns of `pipelines.sample_facts.find_facts` that are kept with a fact."""
    own = [f"{task}_{part}" for task in tasks for part in ("credit", "version", "rose")]
    return ["impression_id", "event_time", "copies", "copy_key", "click_time", "click_known", *own]


def join_samples(
    events: DataFrame,
    facts: DataFrame,
    window: SampleWindow,
    *,
    slices: int = 1,
    groups: int | None = None,
    losers: DataFrame | None = None,
    negative_rate: float = 1.0,
) -> DataFrame:
    """Impressions that make a row of at least one task.

    Parameters
    ----------
    events : DataFrame
        Rows of `pipelines.lake.read_lake`.
    facts : DataFrame
        Rows of `pipelines.sample_facts.find_facts` with `has_fact`.
    window : SampleWindow
    slices : int
        Groups that a partition is spread over, by a hash of the impression.
    groups : int, optional
        Spark partitions; by default one for each partition and slice.
    losers : DataFrame, optional
        What `pipelines.sample_facts.contradictions` found.
    negative_rate : float
        Share of the negatives of each task that is kept, see `sampled`.

    Returns
    -------
    DataFrame
        ``impression_id, event_time, user_id, item_id, position, features, propensity, copies``; ``home``
        and ``slice`` (number of the impression's partition, and of its group in it); for each task
        ``<task>_opened`` (ms; null: no row), ``<task>_known`` (ms, since when the window was known),
        ``<task>_label`` (double), ``<task>_version``, ``<task>_rose``.
    """
    rule, width = window.attribution, window.grid.width
    patience = rule.click_window + rule.allowed_lateness

    def spread(rows: DataFrame) -> DataFrame:
        home = F.floor(F.col("event_time") / width).cast("int")
        slice_of = F.pmod(F.xxhash64("impression_id"), F.lit(slices)).cast("int")
        placed = rows.withColumn("home", home).withColumn("slice", slice_of)
        return placed.repartition(groups or _groups(window, slices), "home", "slice")

    shown = known_events(events, "impression", window.shown(), window.as_of)
    in_time = shown.where(F.col("arrival_time") <= F.col("event_time") + patience)
    travel = ("impression_id", "event_time", "arrival_time", *_TRAVEL)
    wide = without(in_time.select(*travel, copy_key(window).alias("own_key")), losers)
    joined = (
        spread(wide)
        .join(
            spread(facts.select(*fact_columns(window.tasks))).drop("event_time").hint("shuffle_hash"),
            ["home", "slice", "impression_id"],
            "left",
        )
        .where(F.col("copies").isNull() | (F.col("copies") == 1) | (F.col("own_key") == F.col("copy_key")))
    )
    made = joined
    for task in window.tasks:
        made = _with_task(made, window, task, negative_rate)
    kept = ["impression_id", "event_time", *_TRAVEL, "copies", "home", "slice"]
    kept += [
        f"{task}_{part}" for task in window.tasks for part in ("opened", "known", "label", "version", "rose")
    ]
    any_row = F.coalesce(*[F.col(f"{task}_opened") for task in window.tasks]).isNotNull()
    return made.where(any_row).select(*kept)


def sampled(label: Column, sample_id: Column, negative_rate: float) -> Column:
    """Whether a row is kept: all positives, and of the negatives the share ``negative_rate`` by stable hash.

    The hash is XXH64 with seed 42 of the id's UTF-8 bytes, its upper 53 bits read as a fraction: the same
    rows are kept by every run, on every machine and in every language.
    """
    if negative_rate >= 1:
        return F.lit(True)
    fraction = F.shiftrightunsigned(F.xxhash64(sample_id), 11)
    return (label > 0) | (fraction < F.lit(int(negative_rate * 2**53)))


def _groups(window: SampleWindow, slices: int) -> int:
    homes = {index for low, high in window.shown() for index in window.grid.between(max(low, 0), high)}
    return max(1, len(homes) * slices)


def _with_task(joined: DataFrame, window: SampleWindow, task: Task, negative_rate: float) -> DataFrame:
    is_click = task == "conversion"
    opened = F.col("click_time") if is_click else F.col("event_time")
    known = F.col("click_known") if is_click else F.col("arrival_time")
    label = F.coalesce(F.col(f"{task}_credit"), F.lit(0.0))
    inside = reduce(
        lambda found, stretch: found | ((opened >= stretch[0]) & (opened < stretch[1])),
        window.opened(task),
        F.lit(False),
    )
    is_kept = sampled(label, F.concat("impression_id", F.lit(f":{task}")), negative_rate)
    return (
        joined.withColumn(f"{task}_opened", F.when(inside & is_kept, opened))
        .withColumn(f"{task}_label", label)
        .withColumn(f"{task}_version", F.coalesce(F.col(f"{task}_version"), F.lit(0)))
        .withColumn(f"{task}_known", known)
    )
