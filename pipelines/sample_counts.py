"""What became of every event that a build has read: each is in exactly one class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from pipelines.sample_outcomes import RETRACT
from pipelines.sample_window import SampleWindow, within

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["add_counts", "count_sums", "event_counts", "with_counts"]

_COUNT = "n_"


def count_sums(facts: DataFrame) -> list[Column]:
    """Sums for `event_counts`, to be observed while facts are written: no pass of their own."""
    return [F.sum(name).alias(name) for name in facts.columns if name.startswith(_COUNT)]


def event_counts(sums: Mapping[str, int | None]) -> dict[str, dict[str, int]]:
    """What became of every event that was read: ``{kind: {class: rows}}``; classes of a kind sum to ``read``.

    Classes: ``duplicate`` (same event again), ``credited``, ``superseded`` (another was first), ``late``
    (arrived after its window had closed, or longer before what it belongs to than events are kept),
    ``out_of_window`` (happened after it), ``negative_delay`` (happened before what it belongs to),
    ``retraction``, ``view_through`` (conversion without a click that counts for its impression),
    ``unclicked`` (conversion without a credited click), ``before_window`` (belongs to an impression outside
    the window), ``orphan`` (no such impression known); of impressions ``used``, ``late``, ``duplicate``,
    ``before_window``.

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


def add_counts(
    left: Mapping[str, Mapping[str, int]], right: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """Two counts of different events, as one."""
    kinds = {**left, **right}
    return {
        kind: {
            name: left.get(kind, {}).get(name, 0) + right.get(kind, {}).get(name, 0)
            for name in {**left.get(kind, {}), **right.get(kind, {})}
        }
        for kind in kinds
    }


def with_counts(joined: DataFrame, window: SampleWindow) -> DataFrame:
    """Add a column ``n_<kind>_<class>`` for each class of event; drop the arrays of events."""
    counted = {**_of_impressions(window), **_of_clicks(window), **_of_conversions(window)}
    accepted = ("accepted_clicks", "accepted_conversions", "accepted_views")
    arrays = ("all_clicks", "all_conversions", "clicks", "conversions", *accepted)
    columns = [F.col(name) for name in joined.columns if name not in arrays]
    return joined.select(*columns, *[column.cast("long").alias(name) for name, column in counted.items()])


def _n(condition: Column, value: Column | str) -> Column:
    return F.when(condition, F.col(value) if isinstance(value, str) else value).otherwise(0)


def _size(events: str) -> Column:
    return F.when(F.size(events) > 0, F.size(events)).otherwise(0)


def _is_shown(window: SampleWindow) -> tuple[Column, Column]:
    """Whether the impression is known at all, and whether it was shown when the window's were."""
    inside = F.coalesce(within("event_time", window.shown(), by_date=False), F.lit(False))
    return F.col("event_time").isNotNull(), inside


def _outside(events: str, opened: str, width: int) -> tuple[Column, Column]:
    """How many happened before a window and after it."""
    before = F.filter(events, lambda event: event["event_time"] < F.col(opened))
    after = F.filter(events, lambda event: event["event_time"] > F.col(opened) + width)
    return _n(F.size(events) > 0, F.size(before)), _n(F.size(events) > 0, F.size(after))


def _of_impressions(window: SampleWindow) -> dict[str, Column]:
    is_known, is_shown = _is_shown(window)
    opens = F.lit(False)
    for task in window.tasks:
        if task != "conversion":
            opens = opens | within("event_time", window.opened(task), by_date=False)
    used = F.col("is_used") & F.coalesce(opens, F.lit(False))
    return {
        "n_impression_duplicate": _n(is_known, F.col("copies") - 1),
        "n_impression_used": _n(used, F.lit(1)),
        "n_impression_late": _n(is_shown & ~F.col("is_used"), F.lit(1)),
        "n_impression_before_window": _n(is_known & ~used & ~(is_shown & ~F.col("is_used")), F.lit(1)),
    }


def _of_clicks(window: SampleWindow) -> dict[str, Column]:
    is_known, is_shown = _is_shown(window)
    before, after = _outside("clicks", "event_time", window.attribution.click_window)
    accepted, clicks = _size("accepted_clicks"), _size("clicks")
    return {
        "n_click_duplicate": _size("all_clicks") - clicks,
        "n_click_credited": _n(F.col("click_time").isNotNull(), F.lit(1)),
        "n_click_superseded": _n(accepted > 1, accepted - 1),
        "n_click_late": _n(is_shown, clicks - before - after - accepted),
        "n_click_out_of_window": _n(is_shown, after),
        "n_click_negative_delay": _n(is_shown, before),
        "n_click_before_window": _n(is_known & ~is_shown, clicks),
        "n_click_orphan": _n(~is_known, clicks),
    }


def _of_conversions(window: SampleWindow) -> dict[str, Column]:
    is_known, is_shown = _is_shown(window)
    is_clicked = F.col("click_time").isNotNull()
    before, after = _outside("conversions", "click_time", window.attribution.attribution_window)
    accepted, conversions = _size("accepted_conversions"), _size("conversions")
    retractions = F.size(F.filter("accepted_conversions", lambda event: event["op"] == RETRACT))
    positives = _n(accepted > 0, accepted - retractions)
    seen = F.lit(0)
    if window.attribution.view_through_window is not None:
        seen = _n(is_shown & ~is_clicked, _size("accepted_views"))
    return {
        "n_conversion_duplicate": _size("all_conversions") - conversions,
        "n_conversion_credited": _n(positives > 0, F.lit(1)),
        "n_conversion_superseded": _n(positives > 1, positives - 1),
        "n_conversion_retraction": accepted - positives,
        "n_conversion_late": _n(is_clicked, conversions - before - after - accepted),
        "n_conversion_out_of_window": _n(is_clicked, after),
        "n_conversion_negative_delay": _n(is_clicked, before),
        "n_conversion_view_through": seen,
        "n_conversion_unclicked": _n(is_shown & ~is_clicked, conversions - seen),
        "n_conversion_before_window": _n(is_known & ~is_shown, conversions),
        "n_conversion_orphan": _n(~is_known, conversions),
    }
