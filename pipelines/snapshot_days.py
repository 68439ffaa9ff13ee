"""Label rates of a snapshot by day: as known when the day was over, as known now, and once final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.config import Task
from pipelines.snapshot_manifest import PartitionSummary, SnapshotManifest

__all__ = ["DayRates", "day_rates", "whole_rates"]


@dataclass(frozen=True)
class DayRates:
    """Windows of one task that opened on one day, or on all (``day`` is ``all``).

    Attributes
    ----------
    rows : int
        Rows as stored: repeated positives count as often as they are there.
    mature : int
        Those whose label is final.
    naive_rate : float or None
        Share of windows whose label was above 0 by what was known when their partition's own time was over:
        what a job says that labels once and never looks back.
    rate : float or None
        The same by what is known as of the snapshot.
    mature_rate : float or None
        The same over mature windows; None where there are none.
    missed : float or None
        Of the labels of closed partitions the share that came only when the partition's time was over; None
        where there are none.
    closed, partitions : int
        Partitions that nothing can change any more, and all.
    origins : tuple of str
        Snapshots whose folders have the files.

    Rates count each row with its weight, so that sampling does not change them.
    """

    day: str
    rows: int
    mature: int
    naive_rate: float | None
    rate: float | None
    mature_rate: float | None
    missed: float | None
    closed: int
    partitions: int
    origins: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def day_rates(manifest: SnapshotManifest, task: Task) -> list[DayRates]:
    """Rates by day of the window's opening, oldest first."""
    days: dict[str, list[PartitionSummary]] = {}
    for part in manifest.of_task(task):
        days.setdefault(part.partition[:10], []).append(part)
    return [_rates(day, parts) for day, parts in sorted(days.items())]


def whole_rates(manifest: SnapshotManifest, task: Task) -> DayRates:
    """Rates over the whole snapshot."""
    return _rates("all", manifest.of_task(task))


def _rates(day: str, parts: Sequence[PartitionSummary]) -> DayRates:
    weight = sum(part.weight for part in parts)
    mature_weight = sum(part.mature_weight for part in parts)
    final = sum(part.positives for part in parts if part.closed)
    naive = sum(part.naive_positives for part in parts if part.closed)
    # A positive's copies have the weight of one row together, so sums of labels are sums of weights.
    return DayRates(
        day,
        sum(part.rows for part in parts),
        sum(part.mature for part in parts),
        sum(part.naive_positives for part in parts) / weight if weight else None,
        sum(part.positive_weight for part in parts) / weight if weight else None,
        sum(part.mature_positive_weight for part in parts) / mature_weight if mature_weight else None,
        1.0 - naive / final if final else None,
        sum(part.closed for part in parts),
        len(parts),
        tuple(sorted({part.origin for part in parts})),
    )
