"""What a build reads and what it makes: partitions of each task, and the stretches of time behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.duration import DAY_MS
from pipelines.snapshot_partitions import Interval, PartitionGrid, merged

if TYPE_CHECKING:
    from pyspark.sql import Column

__all__ = ["SampleWindow", "within"]


@dataclass(frozen=True)
class SampleWindow:
    """Which rows are made, labelled by what had arrived by ``as_of``. Times in ms since the epoch.

    Attributes
    ----------
    since, as_of : int
        Rows are windows opened in ``[since, as_of)``.
    attribution : AttributionConfig
    grid : PartitionGrid
    partitions : mapping of task to tuple of int
        What is made of each task: numbers of ``grid``.
    """

    since: int
    as_of: int
    attribution: AttributionConfig
    grid: PartitionGrid
    partitions: Mapping[Task, tuple[int, ...]]

    @classmethod
    def whole(
        cls,
        since: int,
        as_of: int,
        attribution: AttributionConfig,
        tasks: tuple[Task, ...] = ("click", "conversion"),
        grid: PartitionGrid | None = None,
    ) -> SampleWindow:
        """All partitions of the window, for all tasks."""
        used = grid or PartitionGrid()
        every = tuple(used.between(since, as_of))
        return cls(since, as_of, attribution, used, dict.fromkeys(tasks, every))

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(self.partitions)

    def opened(self, task: Task) -> list[Interval]:
        """When the windows of a task open that are made."""
        own = list(merged([self.grid.interval(index) for index in self.partitions[task]]))
        return [(max(low, self.since), min(high, self.as_of)) for low, high in own]

    def shown(self) -> list[Interval]:
        """When the impressions were shown that such windows hang on."""
        stretches = []
        for task in self.tasks:
            before = self.attribution.click_window if task == "conversion" else 0
            stretches += [(low - before, high) for low, high in self.opened(task)]
        return list(merged(stretches))

    def happened(self) -> list[Interval]:
        """When clicks and conversions happened that may count for those impressions."""
        rule = self.attribution
        after = rule.click_window + rule.attribution_window
        after = max(after, rule.view_through_window or 0)
        return list(merged([(low, min(high + after, self.as_of + 1)) for low, high in self.shown()]))

    def lookback(self) -> list[Interval]:
        """When impressions were shown whose conversions may fall among the above: no orphans."""
        rule = self.attribution
        before = rule.click_window + rule.attribution_window
        return list(merged([(low - before, high) for low, high in self.shown()]))


def within(time: str, intervals: list[Interval], *, by_date: bool = True) -> Column:
    """Whether a time lies in one of the stretches; ``by_date`` also spares the files of other days."""
    from pyspark.sql import functions as F

    def date(moment: int) -> Column:
        return F.date_format(F.timestamp_millis(F.lit(moment)), "yyyy-MM-dd")

    inside = F.lit(False)
    for low, high in intervals:
        stretch = (F.col(time) >= low) & (F.col(time) < high)
        if by_date:
            low_date, high_date = date(max(low, 0)), date(max(high, DAY_MS))
            stretch = (F.col("event_date") >= low_date) & (F.col("event_date") <= high_date) & stretch
        inside = inside | stretch
    return inside
