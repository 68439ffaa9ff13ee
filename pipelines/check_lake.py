"""Whether the lake behind a snapshot, and the snapshot itself, have a hole in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from pipelines.check_findings import Finding, at_most, told
from pipelines.config_sections import ChecksConfig
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.events import KINDS
from pipelines.lake import LakeBatch
from pipelines.lake_rows import DEAD_LETTER_KIND
from pipelines.snapshot_manifest import SnapshotManifest
from pipelines.snapshot_partitions import PartitionGrid

__all__ = ["lake_findings", "partition_findings", "thin_periods"]

Ints = NDArray[np.int64]

# Chance at which fewer rows than usual are put down to chance: 1 in 10,000.
_SURPRISE = float(np.log(10_000))
_SHOWN = 3


def thin_periods(counts: Ints, per_cycle: int, ratio: float) -> list[tuple[int, float]]:
    """Periods with far fewer rows than the same period of other cycles.

    A period is thin if it has fewer than ``ratio`` times the usual number m: the median of the same period of
    the other cycles, those with rows. So few must not be chance either. Of a Poisson number with mean m,
    ``P(X <= x) <= exp(x - m - x log(x / m))`` (Chernoff), which must be below 1 in 10,000: m of 10 for an
    empty period, of 20 for one with a fifth.

    Parameters
    ----------
    counts : ndarray of int64, shape (n,)
        Rows of successive periods.
    per_cycle : int
        Periods in a cycle: 24 for hours, 1 for days.
    ratio : float

    Returns
    -------
    list of (int, float)
        Place of each thin period, and its usual number of rows.

    Examples
    --------
    >>> thin_periods(np.array([100, 98, 3, 101]), 1, 0.2)
    [(2, 100.0)]
    """
    found = []
    phase = np.arange(len(counts)) % per_cycle
    for place, rows in enumerate(counts.tolist()):
        others = counts[(phase == phase[place]) & (np.arange(len(counts)) != place) & (counts > 0)]
        if len(others) == 0:
            continue
        usual = float(np.median(others))
        if rows < ratio * usual and usual - rows + rows * np.log(max(rows, 1) / usual) > _SURPRISE:
            found.append((place, usual))
    return found


def lake_findings(
    manifest: SnapshotManifest, batches: Sequence[LakeBatch], limits: ChecksConfig
) -> list[Finding]:
    """Hours of the snapshot's window with too few events in the lake, dead letters, and other batches.

    Parameters
    ----------
    manifest : SnapshotManifest
    batches : sequence of LakeBatch
        All that are in the lake; those that the snapshot was built from are looked at.
    limits : ChecksConfig
    """
    wanted = set(manifest.lake_batches)
    own = [batch for batch in batches if batch.batch in wanted]
    missing = sorted(wanted - {batch.batch for batch in own})
    check = "batches of the snapshot that the lake lacks"
    findings = [at_most("lake", check, "lake", len(missing), 0, "count", ", ".join(missing[:_SHOWN]))]
    younger = len(batches) - len(own)
    findings.append(told("lake", "batches ingested since", "lake", younger))
    rows = Counter(
        {kind: sum(batch.rows.get(kind, 0) for batch in own) for kind in (*KINDS, DEAD_LETTER_KIND)}
    )
    dead, total = rows[DEAD_LETTER_KIND], rows.total()
    findings.append(
        at_most(
            "lake",
            "dead letters",
            "lake",
            dead / max(total, 1),
            limits.dead_letter_rate,
            "share",
            f"{dead:,} of {total:,}",
        )
    )
    return findings + _hour_findings(manifest, own, limits)


def _hour_findings(
    manifest: SnapshotManifest, batches: Sequence[LakeBatch], limits: ChecksConfig
) -> list[Finding]:
    first, last = -(-manifest.since // HOUR_MS), manifest.as_of // HOUR_MS
    findings = []
    for kind in KINDS:
        by_hour = _rows_by_hour(batches, kind)
        counts = np.array([by_hour[hour] for hour in range(first, last)], np.int64)
        if not counts.any():
            check = f"hours without {kind}s" if kind == KINDS[0] else f"no {kind}s in the window"
            empty = len(counts) if kind == KINDS[0] else 0
            findings.append(at_most("lake", check, kind, empty, 0, "count", "the whole window"))
            continue
        thin = thin_periods(counts, 24, limits.completeness)
        words = [f"{_hour(first + place)} {counts[place]:,} of {usual:,.0f}" for place, usual in thin]
        check = f"hours below {100 * limits.completeness:g} % of the usual {kind}s"
        findings.append(at_most("lake", check, kind, len(thin), 0, "count", _first(words)))
    if last - first <= 24:
        note = "the window has no two days to compare"
        findings.append(told("lake", "hours without another day to compare", "lake", last - first, note=note))
    return findings


def _rows_by_hour(batches: Sequence[LakeBatch], kind: str) -> Mapping[int, int]:
    rows: Counter[int] = Counter()
    for batch in batches:
        for part in batch.partitions:
            if part.kind == kind:
                day = datetime.strptime(part.event_date, "%Y-%m-%d").replace(tzinfo=UTC)
                rows[round(day.timestamp()) // 3600 + part.event_hour] += part.rows
    return rows


def partition_findings(manifest: SnapshotManifest, limits: ChecksConfig) -> list[Finding]:
    """Partitions that a snapshot should have and has not, or that have far fewer rows than the others.

    Negatives that sampling left out count: weights stand for them. The last partition is left out if
    ``as_of`` cuts it.
    """
    grid = PartitionGrid(manifest.granularity)
    every = list(grid.between(manifest.since, manifest.as_of))
    if every and grid.start(every[-1] + 1) > manifest.as_of:
        every.pop()
    per_cycle = 1 if manifest.granularity == "day" else DAY_MS // HOUR_MS
    findings = []
    for task in manifest.tasks:
        weight = {grid.index_of(part.partition): round(part.weight) for part in manifest.of_task(task)}
        counts = np.array([weight.get(index, 0) for index in every], np.int64)
        thin = thin_periods(counts, per_cycle, limits.completeness)
        words = [f"{grid.name(every[place])} {counts[place]:,} of {usual:,.0f}" for place, usual in thin]
        check = f"partitions below {100 * limits.completeness:g} % of the usual rows"
        findings.append(at_most("partitions", check, task, len(thin), 0, "count", _first(words)))
        outside = len(set(weight) - set(grid.between(manifest.since, manifest.as_of)))
        findings.append(at_most("partitions", "partitions outside the window", task, outside, 0, "count"))
    return findings


def _hour(hour: int) -> str:
    return datetime.fromtimestamp(hour * 3600, UTC).strftime("%Y-%m-%dT%H")


def _first(items: list[str]) -> str:
    more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
