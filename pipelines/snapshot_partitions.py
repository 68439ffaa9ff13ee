"""Partitions of a snapshot: days or hours of a window's opening, open while something can change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.duration import DAY_MS, HOUR_MS

__all__ = ["PartitionGrid", "closes_after", "merged", "reach"]

Granularity = Literal["day", "hour"]
# Half-open stretch of time, ms.
Interval = tuple[int, int]


@dataclass(frozen=True)
class PartitionGrid:
    """Days or hours (UTC), numbered from the epoch.

    Examples
    --------
    >>> grid = PartitionGrid("hour")
    >>> grid.name(grid.index(1_767_614_400_000)), grid.start(1)
    ('2026-01-05T12', 3600000)
    """

    granularity: Granularity = "day"

    @property
    def width(self) -> int:
        """Length of a partition, ms."""
        return DAY_MS if self.granularity == "day" else HOUR_MS

    def index(self, time: int) -> int:
        """Number of the partition that a time (ms) lies in."""
        return time // self.width

    def start(self, index: int) -> int:
        """First moment of a partition, ms."""
        return index * self.width

    def interval(self, index: int) -> Interval:
        """First moment of a partition and of the next, ms."""
        return index * self.width, (index + 1) * self.width

    def name(self, index: int) -> str:
        """As it is written in manifests: ``2026-01-05`` or ``2026-01-05T12``."""
        moment = datetime.fromtimestamp(self.start(index) / 1000, UTC)
        return moment.strftime("%Y-%m-%d" if self.granularity == "day" else "%Y-%m-%dT%H")

    def index_of(self, name: str) -> int:
        """The inverse of `name`."""
        pattern = "%Y-%m-%d" if self.granularity == "day" else "%Y-%m-%dT%H"
        return self.index(int(datetime.strptime(name, pattern).replace(tzinfo=UTC).timestamp()) * 1000)

    def between(self, since: int, until: int) -> range:
        """Numbers of the partitions that hold times in ``[since, until)``."""
        return range(self.index(since), self.index(until - 1) + 1) if since < until else range(0)


def closes_after(attribution: AttributionConfig, task: Task) -> int:
    """How long (ms) after its opening a window may still change, or still become known.

    A conversion window can become known as late as its click does.

    Examples
    --------
    >>> closes_after(AttributionConfig(), "click")
    2100000
    """
    width = attribution.width(task)
    if task == "conversion":
        width = max(width, attribution.click_window)
    return width + attribution.allowed_lateness


def reach(attribution: AttributionConfig, task: Task, kind: str) -> tuple[int, int] | None:
    """How long before and after an event (ms) the windows open that it may touch; None if none does.

    An impression opens its own windows and, by its click, one up to a click window later. A click is the
    label of windows before it and opens one; where it takes the credit from a later one, that one's goes.
    A conversion is the label of windows before it.
    """
    click_window = attribution.click_window
    if kind == "impression":
        return 0, click_window if task == "conversion" else 0
    if kind == "click":
        return click_window, click_window if task == "conversion" else 0
    return None if task == "click" else (attribution.width(task), 0)


def merged(intervals: Sequence[Interval]) -> Iterator[Interval]:
    """The union of stretches of time, in order, without overlap.

    Examples
    --------
    >>> list(merged([(5, 7), (0, 2), (2, 3), (6, 9)]))
    [(0, 3), (5, 9)]
    """
    start = end = None
    for low, high in sorted(intervals):
        if end is None or start is None:
            start, end = low, high
        elif low <= end:
            end = max(end, high)
        else:
            yield start, end
            start, end = low, high
    if start is not None and end is not None:
        yield start, end
