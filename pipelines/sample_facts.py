"""What became of impressions: clicks and conversions joined to them by native Spark, on narrow columns only.

An impression makes a *fact* if something is known of it beyond that it was shown: a credited click, a
conversion, copies of itself. Most make none. So the wide columns, the features, take no part in this join;
`pipelines.sample_join` adds the facts to them.

1. Of each impression how many copies had arrived by ``as_of``, and which came first: one hash aggregate.
2. The few clicks and conversions of an impression, as arrays in order of arrival.
3. Full outer join by ``impression_id``; credit and label by expressions over the arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import Window
from pyspark.sql import functions as F

from pipelines.events import KINDS
from pipelines.sample_counts import with_counts
from pipelines.sample_outcomes import accepted, first_copies, label, op_code, tie_break
from pipelines.sample_window import SampleWindow, within

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["contradictions", "copy_key", "find_facts", "known_events", "without"]

_POSITION = ("source", "partition", "offset", "row")
# Of the order of copies the arrival has the upper bits; the position only tells those of one instant apart.
_TIE_BITS = 22
_NO_EVENTS = "array<struct<arrival_time:bigint,tie:bigint,event_time:bigint,op:int,credit:double>>"


def find_facts(events: DataFrame, window: SampleWindow, losers: DataFrame | None = None) -> DataFrame:
    """Facts of the impressions behind a window.

    Parameters
    ----------
    events : DataFrame
        Rows of `pipelines.lake.read_lake`.
    window : SampleWindow
    losers : DataFrame, optional
        What `contradictions` found.

    Returns
    -------
    DataFrame
        One row for each impression, and for each id that only clicks or conversions name: ``impression_id,
        event_time, copies, copy_key``; ``click_time, click_known`` of the credited click; for each task
        ``<task>_credit, <task>_version, <task>_rose`` (ms, when the label rose from 0; null for 0); and
        ``n_<kind>_<class>`` for `pipelines.sample_counts.count_sums`. Rows of which `has_fact` is false say
        nothing but their counts.
    """
    impressions = _impressions(events, window, losers)
    joined = impressions.join(_outcomes(events, window).hint("shuffle_hash"), "impression_id", "full_outer")
    credited = _with_conversions(_with_click(joined, window), window)
    counted = with_counts(credited, window)
    has_fact = (F.col("copies") > 1) | F.col("click_time").isNotNull()
    if "view_through" in window.tasks:
        has_fact = has_fact | (F.col("view_through_version") > 0)
    return counted.withColumn("has_fact", F.coalesce(F.col("is_used") & has_fact, F.lit(False)))


def known_events(events: DataFrame, kind: str, intervals: list[tuple[int, int]], as_of: int) -> DataFrame:
    """Events of a kind that happened within stretches of time and had arrived by ``as_of``."""
    return events.where(
        (F.col("kind") == kind) & within("event_time", intervals) & (F.col("arrival_time") <= as_of)
    )


def copy_key(window: SampleWindow) -> Column:
    """Orders the copies of an impression: by arrival, those of one instant by a hash of their position."""
    since = min((low for low, _ in window.lookback()), default=0)
    tie = F.xxhash64(*_POSITION).bitwiseAND(F.lit((1 << _TIE_BITS) - 1))
    return F.shiftleft(F.col("arrival_time") - F.lit(since), _TIE_BITS).bitwiseOR(tie)


def contradictions(events: DataFrame, window: SampleWindow) -> DataFrame:
    """Copies of impressions that name another time than the copy that arrived first: they do not count.

    Columns ``impression_id, event_time, copies``. There should be none: a redelivery repeats the event. But
    facts are found by the time of an impression, so that two times must not pass for one impression.
    """
    by_time = (
        known_events(events, KINDS[0], window.lookback(), window.as_of)
        .groupBy("impression_id", "event_time")
        .agg(F.count(F.lit(1)).alias("copies"), F.min(copy_key(window)).alias("copy_key"))
    )
    times = Window.partitionBy("impression_id")
    return (
        by_time.withColumn("times", F.count(F.lit(1)).over(times))
        .where(F.col("times") > 1)
        .withColumn("first", F.min("copy_key").over(times))
        .where(F.col("copy_key") > F.col("first"))
        .select("impression_id", "event_time", "copies")
    )


def without(impressions: DataFrame, losers: DataFrame | None) -> DataFrame:
    """Impressions less the copies that `contradictions` found."""
    if losers is None:
        return impressions
    keys = losers.select("impression_id", "event_time")
    return impressions.join(F.broadcast(keys), ["impression_id", "event_time"], "left_anti")


def _impressions(events: DataFrame, window: SampleWindow, losers: DataFrame | None) -> DataFrame:
    shown = known_events(events, KINDS[0], window.lookback(), window.as_of)
    narrow = without(
        shown.select("impression_id", "event_time", "arrival_time", copy_key(window).alias("copy_key")),
        losers,
    )
    return narrow.groupBy("impression_id").agg(
        F.count(F.lit(1)).alias("copies"),
        F.min("arrival_time").alias("known"),
        F.min("copy_key").alias("copy_key"),
        F.min("event_time").alias("event_time"),
        # Another time in a copy: the caller looks for `contradictions` where this is not 0.
        (F.max("event_time") - F.min("event_time")).alias("spread"),
    )


def _outcomes(events: DataFrame, window: SampleWindow) -> DataFrame:
    """Clicks and conversions of each impression, as two arrays of structs in order of arrival."""
    happened = window.happened()
    clicks = known_events(events, KINDS[1], happened, window.as_of)
    conversions = known_events(events, KINDS[2], happened, window.as_of)

    def rows(own: DataFrame, is_click: bool) -> DataFrame:
        op = F.lit(0) if is_click else op_code("op")
        credit = F.lit(None).cast("double") if is_click else F.col("credit")
        item = F.struct(
            "arrival_time",
            tie_break("event_id").alias("tie"),
            "event_time",
            op.alias("op"),
            credit.alias("credit"),
        )
        return own.select("impression_id", F.lit(is_click).alias("is_click"), item.alias("event"))

    both = rows(clicks, True).unionByName(rows(conversions, False))
    is_click = F.col("is_click")
    return both.groupBy("impression_id").agg(
        F.sort_array(F.collect_list(F.when(is_click, F.col("event")))).alias("all_clicks"),
        F.sort_array(F.collect_list(F.when(~is_click, F.col("event")))).alias("all_conversions"),
    )


def _with_click(joined: DataFrame, window: SampleWindow) -> DataFrame:
    rule = window.attribution
    patience = rule.click_window + rule.allowed_lateness
    is_used = within("event_time", window.shown(), by_date=False) & (
        F.col("known") <= F.col("event_time") + patience
    )
    credited = F.get("accepted_clicks", F.lit(0))
    return (
        joined.withColumn("is_used", F.coalesce(is_used, F.lit(False)))
        .withColumn("clicks", first_copies(F.coalesce("all_clicks", F.array().cast(_NO_EVENTS))))
        .withColumn("conversions", first_copies(F.coalesce("all_conversions", F.array().cast(_NO_EVENTS))))
        .withColumn(
            "accepted_clicks",
            F.when(
                F.col("is_used") & (F.size("clicks") > 0),
                accepted(
                    F.col("clicks"),
                    F.col("event_time"),
                    rule.click_window,
                    rule.allowed_lateness,
                    F.col("known"),
                    patience,
                ),
            ),
        )
        .withColumn("click_time", credited["event_time"])
        .withColumn(
            "click_known", F.greatest(credited["arrival_time"], F.when(credited.isNotNull(), F.col("known")))
        )
        .withColumn("click_credit", credited.isNotNull().cast("double"))
        .withColumn("click_version", credited.isNotNull().cast("int"))
        .withColumn("click_rose", F.col("click_known"))
    )


def _with_conversions(joined: DataFrame, window: SampleWindow) -> DataFrame:
    rule = window.attribution
    patience = rule.click_window + rule.allowed_lateness
    has_any = F.size("conversions") > 0

    def own(opened: str, width: int, known: str) -> Column:
        conversions = accepted(
            F.col("conversions"), F.col(opened), width, rule.allowed_lateness, F.col(known), patience
        )
        return F.when(F.col(opened).isNotNull() & has_any, conversions)

    found = joined.withColumn(
        "accepted_conversions", own("click_time", rule.attribution_window, "click_known")
    )
    tasks = {"conversion": label(F.col("accepted_conversions"), F.col("click_known"))}
    if rule.view_through_window is not None:
        seen = F.when(F.col("is_used"), own("event_time", rule.view_through_window, "known"))
        closed = F.greatest(
            F.col("event_time") + (rule.view_through_window + rule.allowed_lateness), F.col("known")
        )
        # A click that became known after the window had closed changes nothing any more.
        claims = F.col("click_known") <= F.least(closed, F.lit(window.as_of))
        unclaimed = F.filter(
            "accepted_views",
            lambda event: ~F.coalesce(claims & (event["event_time"] >= F.col("click_time")), F.lit(False)),
        )
        found = found.withColumn("accepted_views", seen)
        tasks["view_through"] = label(unclaimed, F.col("known"))
    for task, made in tasks.items():
        found = (
            found.withColumn("made", made)
            .withColumn(f"{task}_credit", F.col("made.credit"))
            .withColumn(f"{task}_version", F.col("made.version"))
            .withColumn(f"{task}_rose", F.col("made.known"))
            .drop("made")
        )
    return found
