"""Outcomes by group, delay and follow-up, in Spark by native expressions; what reaches the driver is bounded.

1. `delay_outcomes` joins the outcomes to the features of their impressions.
2. `group_delays` counts them by group and bins; `delay_sample` draws a sample of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

from pyspark.sql import Window
from pyspark.sql import functions as F

from pipelines.config import Task
from pipelines.delay import DelayGrid
from pipelines.delay_groups import MINIMUM_SUPPORT
from pipelines.errors import ConfigError
from pipelines.sample_facts import copy_key, known_events, without
from pipelines.sample_window import SampleWindow

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["LARGEST_TABLE", "delay_outcomes", "delay_sample", "group_delays"]

# Groups a task and level: with 30 bins and closed windows at most 122,880 cells.
LARGEST_TABLE = 4096
_COLUMNS = ("user_id", "item_id", "position")


def delay_outcomes(
    events: DataFrame, facts: DataFrame, window: SampleWindow, losers: DataFrame | None = None
) -> DataFrame:
    """Outcomes of a window with their impressions; what follows reads it more than once, so keep it.

    Parameters
    ----------
    events : DataFrame
        Rows of `pipelines.lake.read_lake`.
    facts : DataFrame
        Rows of `pipelines.sample_facts.find_facts` with the columns `pipelines.sample_join.fact_columns`.
    window : SampleWindow
    losers : DataFrame, optional
        What `pipelines.sample_facts.contradictions` found.

    Returns
    -------
    DataFrame
        ``task, partition, impression_id, event_time, user_id, item_id, position, features, opened, rose``:
        a row for each label that is above 0; ``rose`` is when it became so, ``partition`` the number of the
        partition in which the window opened.
    """
    keys = ["copies", "copy_key", "click_time"]
    own = [f"{task}_{part}" for task in window.tasks for part in ("credit", "rose")]
    any_credit = F.greatest(F.lit(0.0), *[F.col(f"{task}_credit") for task in window.tasks])
    outcomes = facts.where(any_credit > 0).select("impression_id", *keys, *own)
    rule = window.attribution
    shown = known_events(events, "impression", window.shown(), window.as_of).where(
        F.col("arrival_time") <= F.col("event_time") + (rule.click_window + rule.allowed_lateness)
    )
    travel = ("impression_id", "event_time", *_COLUMNS, "features")
    wide = without(shown.select(*travel, copy_key(window).alias("own_key")), losers)
    joined = (
        wide.join(outcomes, "impression_id")
        .where((F.col("copies") == 1) | (F.col("own_key") == F.col("copy_key")))
        .dropDuplicates(["impression_id"])
    )
    found = F.explode(F.filter(F.array(*[_outcome(window, task) for task in window.tasks]), _is_one))
    partition = F.floor(F.col("found.opened") / window.grid.width).alias("partition")
    rows = joined.select(*travel, found.alias("found"))
    return rows.select("found.task", partition, *travel, "found.opened", "found.rose")


def _outcome(window: SampleWindow, task: Task) -> Column:
    opened = F.col("click_time") if task == "conversion" else F.col("event_time")
    inside = reduce(
        lambda found, stretch: found | ((opened >= stretch[0]) & (opened < stretch[1])),
        window.opened(task),
        F.lit(False),
    )
    is_outcome = inside & (F.col(f"{task}_credit") > 0)
    return F.struct(
        F.lit(task).alias("task"),
        F.when(is_outcome, opened).alias("opened"),
        F.col(f"{task}_rose").alias("rose"),
    )


def _is_one(found: Column) -> Column:
    return found["opened"].isNotNull()


def group_delays(
    outcomes: DataFrame,
    as_of: int,
    grids: Mapping[Task, DelayGrid],
    fields: tuple[str, ...],
    *,
    open_windows: bool = False,
    minimum_support: float = MINIMUM_SUPPORT,
    largest: int = LARGEST_TABLE,
) -> DataFrame:
    """Counts of outcomes by the values of fields, delay and follow-up, for `DelayCounts.from_table`.

    Of each level (the first field, the first two, ...) the ``largest`` best supported groups with at least
    ``minimum_support`` outcomes are counted apart; the others' outcomes stand one level higher, at the top
    under no value at all. So the result is bounded, whatever the size of the lake, and loses no outcome.

    Parameters
    ----------
    outcomes : DataFrame
        Of `delay_outcomes`.
    as_of : int
        ms since the epoch.
    grids : mapping of task to DelayGrid
        Tasks without one are left out.
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
        ``task, partition, level, value_0, value_1, ..., delay_bin, follow_up_bin, count``; ``level`` is how
        many of the values count, the others are null. Counts of other partitions can be put beside them.

    Raises
    ------
    ConfigError
        If the name of a field has a quote in it.
    """
    values = [f"value_{place}" for place in range(len(fields))]
    bins = ["partition", "delay_bin", "follow_up_bin"]
    rows = _binned(outcomes, as_of, grids, open_windows).select(
        "task", *[_value(name).alias(value) for name, value in zip(fields, values, strict=True)], *bins
    )
    cells = rows.groupBy("task", *values, *bins).agg(F.count(F.lit(1)).alias("count"))
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
    keys = ["task", "partition", "level", *values, "delay_bin", "follow_up_bin"]
    return placed.groupBy(*keys).agg(F.sum("count").alias("count"))


def delay_sample(
    outcomes: DataFrame,
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
    outcomes : DataFrame
        Of `delay_outcomes`.
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
    follow_up = F.least(F.lit(as_of) - F.col("opened"), F.lit(horizon))
    delay = F.least(F.greatest(F.col("rose") - F.col("opened"), F.lit(0)), follow_up)
    own = outcomes.where((F.col("task") == task) & (F.lit(open_windows) | (follow_up >= horizon)))
    return (
        own.orderBy(F.xxhash64("impression_id"), "impression_id")
        .limit(largest)
        .select(
            *_COLUMNS,
            "event_time",
            "features",
            F.col("opened").cast("long").alias("opened"),
            delay.cast("long").alias("delay"),
            follow_up.cast("long").alias("follow_up"),
        )
    )


def _binned(
    outcomes: DataFrame, as_of: int, grids: Mapping[Task, DelayGrid], open_windows: bool
) -> DataFrame:
    age = F.lit(as_of) - F.col("opened")
    horizon = _by_task({task: grid.horizon for task, grid in grids.items()})
    used = F.col("task").isin(*grids) & (F.lit(open_windows) | (age >= horizon))
    last = _by_task({task: grid.bins - 1 for task, grid in grids.items()})
    # As `DelayGrid.bin_of` and `DelayGrid.whole_bins` do it.
    delay = F.ceil(_scaled(F.col("rose") - F.col("opened"), grids) - F.lit(1e-9))
    follow_up = F.floor(_scaled(age, grids) + F.lit(1e-9))
    return (
        outcomes.where(used)
        .withColumn("delay_bin", F.least(delay, last).cast("int"))
        .withColumn("follow_up_bin", F.least(follow_up, last).cast("int"))
    )


def _by_task(values: Mapping[Task, Any]) -> Column:
    """The value of each row's task."""
    found: Column = F.lit(None)
    for task, value in values.items():
        found = F.when(F.col("task") == task, F.lit(value)).otherwise(found)
    return found


def _scaled(duration: Column, grids: Mapping[Task, DelayGrid]) -> Column:
    unit = _by_task({task: grid.unit for task, grid in grids.items()})
    scale = _by_task({task: grid.scale for task, grid in grids.items()})
    horizon = _by_task({task: grid.horizon for task, grid in grids.items()})
    inside = F.least(F.greatest(duration, F.lit(0)), horizon).cast("double")
    return F.log1p(inside / unit) * scale


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
