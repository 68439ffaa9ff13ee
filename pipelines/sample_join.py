"""The attribution rule in Spark: native DataFrame expressions, one row an impression, no Python a row.

The rule itself is `pipelines.attribution.rows` with policy ``relabel``; this is its fast implementation for
a lake, and tests hold the two against each other. The plan is

1. keep what had arrived by ``as_of``; of each event the copy that arrived first;
2. collect the few clicks and conversions of an impression into arrays, in order of arrival;
3. full outer join by ``impression_id``;
4. credit and label by expressions over those arrays.

Clicks and conversions travel as three or four numbers; the features pass through one shuffle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark.sql import Window
from pyspark.sql import functions as F

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.delay import DelayGrid

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["JoinWindow", "event_counts", "join_samples", "outcome_delays", "sampled"]

_POSITION = ("source", "partition", "offset", "row")
_COUNT = "n_"
_TRAVEL = ("user_id", "item_id", "position", "features")


@dataclass(frozen=True)
class JoinWindow:
    """Which rows are made: windows opened in ``[since, as_of)``, labelled by what had arrived by ``as_of``.

    Times in ms since the epoch.
    """

    since: int
    as_of: int
    attribution: AttributionConfig

    @property
    def impressions_since(self) -> int:
        """An impression from here on may have its click, which opens a window, inside."""
        return self.since - self.attribution.click_window

    @property
    def lookback_since(self) -> int:
        """An impression from here on may still have a conversion inside: it is no orphan."""
        return self.impressions_since - self.attribution.attribution_window


def join_samples(events: DataFrame, window: JoinWindow) -> DataFrame:
    """Join and label the events of a lake.

    Parameters
    ----------
    events : DataFrame
        Rows of `pipelines.lake.read_lake`.
    window : JoinWindow

    Returns
    -------
    DataFrame
        One row for each impression, and for each id that only clicks or conversions name:
        ``impression_id, event_time, user_id, item_id, position, features`` of the impression; for each task
        ``<task>_opened`` (ms; null: no row), ``<task>_label`` (int), ``<task>_known`` (ms, when the label
        became 1; null for 0), ``<task>_mature``; and ``n_<kind>_<class>`` for `count_sums`.
    """
    joined = _impressions(events, window).join(_outcomes(events, window), "impression_id", "full_outer")
    return _with_counts(_with_conversions(_with_clicks(joined, window), window), window)


def count_sums(samples: DataFrame) -> list[Column]:
    """Sums for `event_counts`, to be observed while the samples are written: no pass of their own."""
    return [F.sum(name).alias(name) for name in samples.columns if name.startswith(_COUNT)]


def with_rows(samples: DataFrame) -> DataFrame:
    """Only impressions that make a row of either task, without the counts."""
    counts = [name for name in samples.columns if name.startswith(_COUNT)]
    return samples.where(F.coalesce("click_opened", "conversion_opened").isNotNull()).drop(*counts)


def event_counts(sums: Mapping[str, int | None]) -> dict[str, dict[str, int]]:
    """What became of every event that was read: ``{kind: {class: rows}}``; classes of a kind sum to ``read``.

    Classes: ``duplicate`` (same event again), ``credited``, ``superseded`` (another was first), ``late``
    (arrived after its window had closed), ``out_of_window`` (happened after it), ``negative_delay``
    (happened before what it belongs to), ``retraction``, ``unclicked`` (conversion without a credited
    click), ``before_window`` (belongs to an impression before the window), ``orphan`` (no such impression
    known); of impressions ``used``, ``late``, ``duplicate``, ``before_window``.

    Parameters
    ----------
    sums : mapping of str to int
        Values of `count_sums`.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, value in sums.items():
        kind, event_class = name.removeprefix(_COUNT).split("_", 1)
        counts.setdefault(kind, {})[event_class] = int(value or 0)
    for classes in counts.values():
        classes["read"] = sum(classes.values())
    return counts


def outcome_delays(samples: DataFrame, as_of: int, grids: Mapping[Task, DelayGrid]) -> DataFrame:
    """Counts of positives by delay and follow-up: columns ``task, delay_bin, follow_up_bin, count``.

    At most ``bins ** 2 / 2`` rows a task, whatever the size of the lake. The delay runs from the opening of
    a window until its outcome was known, the follow-up until ``as_of``.
    """
    tasks = [
        samples.where(F.col(f"{task}_opened").isNotNull() & (F.col(f"{task}_label") == 1)).select(
            F.lit(task).alias("task"),
            _bin_of(F.col(f"{task}_known") - F.col(f"{task}_opened"), grid).alias("delay_bin"),
            _bin_of(F.lit(as_of) - F.col(f"{task}_opened"), grid).alias("follow_up_bin"),
        )
        for task, grid in grids.items()
    ]
    both = tasks[0]
    for other in tasks[1:]:
        both = both.union(other)
    return both.groupBy("task", "delay_bin", "follow_up_bin").count()


def _bin_of(duration: Column, grid: DelayGrid) -> Column:
    """`DelayGrid.bin_of` in Spark."""
    x = F.least(F.greatest(duration, F.lit(0)), F.lit(grid.horizon)).cast("double")
    k = F.ceil(F.log1p(x / F.lit(grid.unit)) * F.lit(grid.scale) - F.lit(1e-9))
    return F.least(k, F.lit(grid.bins - 1)).cast("int")


def sampled(label: Column, sample_id: Column, negative_rate: float) -> Column:
    """Whether a row is kept: all positives, and of the negatives the share ``negative_rate`` by stable hash.

    The hash is XXH64 with seed 42 of the id's UTF-8 bytes, its upper 53 bits read as a fraction: the same
    rows are kept by every run, on every machine and in every language.
    """
    if negative_rate >= 1:
        return F.lit(True)
    fraction = F.shiftrightunsigned(F.xxhash64(sample_id), 11)
    return (label == 1) | (fraction < F.lit(int(negative_rate * 2**53)))


def _first_copy(rows: DataFrame, *key: str) -> DataFrame:
    """Of the copies of an event the one that arrived first; ``copies`` says how many there were."""
    # One shuffle and one sort serve this, the grouping and the join: all are by impression.
    order = Window.partitionBy(*key).orderBy("arrival_time", *_POSITION)
    whole = order.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    return (
        rows.repartition("impression_id")
        .select("*", F.row_number().over(order).alias("copy"), F.count(F.lit(1)).over(whole).alias("copies"))
        .where(F.col("copy") == 1)
        .drop("copy", *_POSITION)
    )


def _known(window: JoinWindow, kind: str, since: int, before: int | None = None) -> Column:
    """Events of a kind that happened in ``[since, before)`` and had arrived by ``as_of``."""

    def date(moment: int) -> Column:
        return F.date_format(F.timestamp_millis(F.lit(moment)), "yyyy-MM-dd")

    last = window.as_of if before is None else before - 1
    return (
        (F.col("kind") == kind)
        # Redundant, but these alone spare the files of other days.
        & (F.col("event_date") >= date(since))
        & (F.col("event_date") <= date(last))
        & (F.col("event_time") >= since)
        & (F.col("event_time") <= last)
        & (F.col("arrival_time") <= window.as_of)
    )


def _impressions(events: DataFrame, window: JoinWindow) -> DataFrame:
    columns = ("impression_id", "event_time", "arrival_time", *_POSITION)
    recent = events.where(_known(window, "impression", window.impressions_since, window.as_of))
    # Their ids alone are read, to tell conversions of older clicks from orphans.
    older = events.where(_known(window, "impression", window.lookback_since, window.impressions_since))
    both = recent.select(*columns, *_TRAVEL).unionByName(older.select(*columns), allowMissingColumns=True)
    return _first_copy(both, "impression_id").withColumnRenamed("copies", "impression_copies")


def _outcomes(events: DataFrame, window: JoinWindow) -> DataFrame:
    """Clicks and conversions of each impression, as two arrays of structs in order of arrival."""
    is_click = F.col("kind") == "click"
    rows = events.where(
        _known(window, "click", window.impressions_since) | _known(window, "conversion", window.since)
    ).select(
        "impression_id", "kind", "event_id", "event_time", "arrival_time", "op", *_POSITION
    )  # fmt: skip
    is_positive = F.coalesce(F.col("op") != "retract", F.lit(True))
    # The first field decides the order of the array, the second ties.
    item = F.struct("arrival_time", "event_id", "event_time", is_positive.alias("positive"))
    repeats = F.col("copies") - 1
    return (
        _first_copy(rows, "impression_id", "kind", "event_id")
        .groupBy("impression_id")
        .agg(
            F.sort_array(F.collect_list(F.when(is_click, item))).alias("clicks"),
            F.sort_array(F.collect_list(F.when(~is_click, item))).alias("conversions"),
            F.sum(F.when(is_click, repeats)).alias("n_click_duplicate"),
            F.sum(F.when(~is_click, repeats)).alias("n_conversion_duplicate"),
        )
    )


def _accepted(
    outcomes: str, opened: Column, width: int, closes: Column, known: Column, patience: int
) -> Column:
    """The outcomes that happened in ``[opened, opened + width]`` and arrived neither too late nor too early.

    ``patience``: how long an outcome waits for what it belongs to, known since ``known``.
    """

    def fits(outcome: Column) -> Column:
        return (
            (outcome["event_time"] >= opened)
            & (outcome["event_time"] <= opened + width)
            & (outcome["arrival_time"] <= closes)
            & (known - outcome["arrival_time"] <= patience)
        )

    return F.filter(F.coalesce(F.col(outcomes), F.array()), fits)


def _with_clicks(joined: DataFrame, window: JoinWindow) -> DataFrame:
    rule = window.attribution
    patience = rule.click_window + rule.allowed_lateness
    opened, known = F.col("event_time"), F.col("arrival_time")
    closes = opened + patience
    is_used = (opened >= window.impressions_since) & (known <= closes)
    accepted = _accepted("clicks", opened, rule.click_window, closes, known, patience)
    return (
        joined.withColumn("is_used", F.coalesce(is_used, F.lit(False)))
        .withColumn("accepted_clicks", F.when(F.col("is_used"), accepted))
        .withColumn("click", F.get("accepted_clicks", F.lit(0)))
        .withColumn("click_opened", F.when(F.col("is_used") & (opened >= window.since), opened))
        .withColumn("click_label", F.col("click").isNotNull().cast("int"))
        .withColumn(
            "click_known", F.greatest("click.arrival_time", F.when(F.col("click").isNotNull(), known))
        )
        .withColumn("click_mature", F.lit(window.as_of) > closes)
    )


def _with_conversions(joined: DataFrame, window: JoinWindow) -> DataFrame:
    rule = window.attribution
    opened, known = F.col("click.event_time"), F.col("click_known")
    closes = opened + (rule.attribution_window + rule.allowed_lateness)
    patience = rule.click_window + rule.allowed_lateness
    accepted = _accepted("conversions", opened, rule.attribution_window, closes, known, patience)
    is_row = (opened >= window.since) & (opened < window.as_of)

    last = F.array_max(F.transform("accepted_conversions", lambda outcome: outcome["event_time"]))
    # The last in event time decides; of several at one instant a retraction wins.
    label = (F.size("accepted_conversions") > 0) & F.forall(
        "accepted_conversions", lambda outcome: (outcome["event_time"] < F.col("last")) | outcome["positive"]
    )
    positive = F.filter("accepted_conversions", lambda outcome: outcome["positive"])
    first_known = F.greatest(
        F.array_min(F.transform(positive, lambda outcome: outcome["arrival_time"])), known
    )
    return (
        joined.withColumn("accepted_conversions", F.when(opened.isNotNull(), accepted))
        .withColumn("last", last)
        .withColumn("conversion_opened", F.when(is_row, opened))
        .withColumn("conversion_label", F.coalesce(label.cast("int"), F.lit(0)))
        .withColumn("conversion_known", F.when(F.col("conversion_label") == 1, first_known))
        .withColumn("conversion_mature", F.lit(window.as_of) > closes)
    )


def _with_counts(joined: DataFrame, window: JoinWindow) -> DataFrame:
    """Classify every event; drop the arrays."""
    rule = window.attribution
    is_known = F.col("event_time").isNotNull()
    is_recent = F.col("event_time") >= window.impressions_since
    clicks = F.when(F.size("clicks") > 0, F.size("clicks")).otherwise(0)
    conversions = F.when(F.size("conversions") > 0, F.size("conversions")).otherwise(0)
    clicked = F.col("click").isNotNull()

    def n(condition: Column, value: Column) -> Column:
        return F.when(condition, value).otherwise(0)

    def outside(outcomes: str, opened: Column, width: int) -> tuple[Column, Column]:
        items = F.coalesce(F.col(outcomes), F.array())
        before = F.size(F.filter(items, lambda outcome: outcome["event_time"] < opened))
        after = F.size(F.filter(items, lambda outcome: outcome["event_time"] > opened + width))
        return before, after

    before_click, after_click = outside("clicks", F.col("event_time"), rule.click_window)
    before_conversion, after_conversion = outside(
        "conversions", F.col("click.event_time"), rule.attribution_window
    )
    accepted_clicks = n(F.size("accepted_clicks") > 0, F.size("accepted_clicks"))
    accepted = n(F.size("accepted_conversions") > 0, F.size("accepted_conversions"))
    positives = n(accepted > 0, F.size(F.filter("accepted_conversions", lambda outcome: outcome["positive"])))
    classes = {
        "impression": {
            "duplicate": n(is_known, F.col("impression_copies") - 1),
            "used": n(F.col("is_used") & (F.col("event_time") >= window.since), F.lit(1)),
            "late": n(is_recent & ~F.col("is_used"), F.lit(1)),
            "before_window": n(
                ~is_recent | (F.col("is_used") & (F.col("event_time") < window.since)), F.lit(1)
            ),
        },
        "click": {
            "duplicate": F.coalesce("n_click_duplicate", F.lit(0)),
            "credited": n(clicked, F.lit(1)),
            "superseded": n(accepted_clicks > 1, accepted_clicks - 1),
            "late": n(is_recent, clicks - before_click - after_click - accepted_clicks),
            "out_of_window": n(is_recent, after_click),
            "negative_delay": n(is_recent, before_click),
            "before_window": n(is_known & ~is_recent, clicks),
            "orphan": n(~is_known, clicks),
        },
        "conversion": {
            "duplicate": F.coalesce("n_conversion_duplicate", F.lit(0)),
            "credited": n(positives > 0, F.lit(1)),
            "superseded": n(positives > 1, positives - 1),
            "retraction": accepted - positives,
            "late": n(clicked, conversions - before_conversion - after_conversion - accepted),
            "out_of_window": n(clicked, after_conversion),
            "negative_delay": n(clicked, before_conversion),
            "unclicked": n(is_recent & ~clicked, conversions),
            "before_window": n(is_known & ~is_recent, conversions),
            "orphan": n(~is_known, conversions),
        },
    }
    counted = {
        f"n_{kind}_{name}": column.cast("long")
        for kind, members in classes.items()
        for name, column in members.items()
    }
    kept = ["impression_id", "event_time", *_TRAVEL]
    kept += [
        f"{task}_{name}"
        for task in ("click", "conversion")
        for name in ("opened", "label", "known", "mature")
    ]
    return joined.select(*kept, *[column.alias(name) for name, column in counted.items()])
