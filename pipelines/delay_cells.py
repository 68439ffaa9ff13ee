"""Counts of outcomes by group, delay and follow-up, in Spark by native expressions: no row leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING

from pyspark.sql import Window
from pyspark.sql import functions as F

from pipelines.config import Task
from pipelines.delay import DelayGrid
from pipelines.delay_groups import MINIMUM_SUPPORT
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["LARGEST_TABLE", "delay_sample", "group_delays"]

# Groups a task and level: with 30 bins and closed windows at most 122,880 cells.
LARGEST_TABLE = 4096
_COLUMNS = ("user_id", "item_id", "position")


def group_delays(
    samples: DataFrame,
    as_of: int,
    grids: Mapping[Task, DelayGrid],
    fields: tuple[str, ...],
    *,
    open_windows: bool = False,
    minimum_support: float = MINIMUM_SUPPORT,
    largest: int = LARGEST_TABLE,
) -> DataFrame:
    """Counts of positives by the values of fields, delay and follow-up, for `DelayCounts.from_table`.

    Of each level (the first field, the first two, ...) the ``largest`` best supported groups with at least
    ``minimum_support`` outcomes are counted apart; the others' outcomes stand one level higher, at the top
    under no value at all. So the result is bounded, whatever the size of the lake, and loses no outcome.

    Parameters
    ----------
    samples : DataFrame
        Rows of `pipelines.sample_join.join_samples`.
    as_of : int
        ms since the epoch.
    grids : mapping of task to DelayGrid
    fields : tuple of str
        Names of features, or ``user_id, item_id, position``. Of a feature in JSON a whole number written
        with a fraction (``3.0``) is the value ``3``, as in `pipelines.feature_columns.as_text`.
    open_windows : bool
        Count open windows, too.
    minimum_support : float
    largest : int
        Groups a task and level.

    Returns
    -------
    DataFrame
        ``task, level, value_0, value_1, ..., delay_bin, follow_up_bin, count``; ``level`` is how many of the
        values count, the others are null.

    Raises
    ------
    ConfigError
        If the name of a field has a quote in it.
    """
    values = [f"value_{place}" for place in range(len(fields))]
    tasks = [_positives(samples, as_of, task, grid, fields, open_windows) for task, grid in grids.items()]
    rows = reduce(lambda left, right: left.union(right), tasks)
    cells = rows.groupBy("task", *values, "delay_bin", "follow_up_bin").agg(F.count(F.lit(1)).alias("count"))
    for depth in range(1, len(fields) + 1):
        names = ["task", *values[:depth]]
        # Names of their own: both sides come from the same rows.
        kept = _kept(cells, names, minimum_support, largest).toDF(*[f"kept_{name}" for name in names])
        same = [F.col(name).eqNullSafe(F.col(f"kept_{name}")) for name in names]
        cells = (
            cells.join(F.broadcast(kept), reduce(lambda a, b: a & b, same), "left")
            .withColumn(f"is_kept_{depth}", F.col("kept_task").isNotNull())
            .drop(*kept.columns)
        )
    level: Column = F.lit(0)
    for depth in range(1, len(fields) + 1):
        # A group counts only inside one that counts.
        level = F.when((level == depth - 1) & F.col(f"is_kept_{depth}"), depth).otherwise(level)
    placed = cells.withColumn("level", level)
    for place, name in enumerate(values):
        placed = placed.withColumn(name, F.when(F.col("level") > place, F.col(name)))
    keys = ["task", "level", *values, "delay_bin", "follow_up_bin"]
    return placed.groupBy(*keys).agg(F.sum("count").alias("count"))


def delay_sample(
    samples: DataFrame,
    as_of: int,
    task: Task,
    horizon: int,
    *,
    open_windows: bool = False,
    largest: int = 200_000,
) -> DataFrame:
    """Outcomes of one task with their impressions, at most ``largest``, for `DelayRows.from_table`.

    Which ones is decided by a stable hash of the impression's id: the same sample every time, wherever it
    runs. Columns ``user_id, item_id, position, event_time, features, opened, delay, follow_up``.

    Parameters
    ----------
    samples : DataFrame
        Rows of `pipelines.sample_join.join_samples`.
    as_of : int
        ms since the epoch.
    task : str
    horizon : int
        Age (ms) from which a window has closed.
    open_windows : bool
        Take outcomes of open windows, too.
    largest : int
        They go to the driver, a few hundred bytes each.
    """
    opened, mature = F.col(f"{task}_opened"), F.col(f"{task}_mature")
    used = opened.isNotNull() & (F.col(f"{task}_label") == 1)
    follow_up = F.when(mature, F.lit(horizon)).otherwise(F.least(F.lit(as_of) - opened, F.lit(horizon)))
    delay = F.least(F.greatest(F.col(f"{task}_known") - opened, F.lit(0)), follow_up)
    return (
        samples.where(used if open_windows else used & mature)
        .orderBy(F.xxhash64("impression_id"), "impression_id")
        .limit(largest)
        .select(
            *_COLUMNS,
            "event_time",
            "features",
            opened.cast("long").alias("opened"),
            delay.cast("long").alias("delay"),
            follow_up.cast("long").alias("follow_up"),
        )
    )


def _positives(
    samples: DataFrame,
    as_of: int,
    task: Task,
    grid: DelayGrid,
    fields: tuple[str, ...],
    open_windows: bool,
) -> DataFrame:
    opened, label = F.col(f"{task}_opened"), F.col(f"{task}_label")
    used = opened.isNotNull() & (label == 1)
    mature = F.col(f"{task}_mature")
    if not open_windows:
        used = used & mature
    follow_up = _whole_bins(F.lit(as_of) - opened, grid)
    return samples.where(used).select(
        F.lit(task).alias("task"),
        *[_value(name).alias(f"value_{place}") for place, name in enumerate(fields)],
        _bin_of(F.col(f"{task}_known") - opened, grid).alias("delay_bin"),
        F.when(mature, grid.bins - 1).otherwise(follow_up).cast("int").alias("follow_up_bin"),
    )


def _kept(cells: DataFrame, names: list[str], minimum: float, largest: int) -> DataFrame:
    groups = cells.groupBy(*names).agg(F.sum("count").alias("support"))
    rank = F.row_number().over(Window.partitionBy("task").orderBy(F.desc("support"), *names[1:]))
    supported = groups.where(F.col("support") >= minimum).withColumn("rank", rank)
    return supported.where(F.col("rank") <= largest).select(*names)


def _value(name: str) -> Column:
    """Text of a feature, as `pipelines.feature_columns.as_text` has it; null where there is none."""
    if name in _COLUMNS:
        return F.col(name).cast("string")
    if "'" in name:
        raise ConfigError(f"expected the name of a feature without a quote. Received: {name!r}.")
    text = F.get_json_object("features", f"$['{name}']")
    return F.regexp_replace(text, r"^(-?\d+)\.0$", "$1")


def _scaled(duration: Column, grid: DelayGrid) -> Column:
    x = F.least(F.greatest(duration, F.lit(0)), F.lit(grid.horizon)).cast("double")
    return F.log1p(x / F.lit(grid.unit)) * F.lit(grid.scale)


def _bin_of(duration: Column, grid: DelayGrid) -> Column:
    """`DelayGrid.bin_of` in Spark."""
    return F.least(F.ceil(_scaled(duration, grid) - F.lit(1e-9)), F.lit(grid.bins - 1)).cast("int")


def _whole_bins(duration: Column, grid: DelayGrid) -> Column:
    """`DelayGrid.whole_bins` in Spark."""
    return F.least(F.floor(_scaled(duration, grid) + F.lit(1e-9)), F.lit(grid.bins - 1)).cast("int")
