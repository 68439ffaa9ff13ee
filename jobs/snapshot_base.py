"""The snapshot that a relabelling starts from: what of it still holds, and what must be built again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import Task
from pipelines.errors import ConfigError, DataError
from pipelines.events import KINDS
from pipelines.feature_spec import FeatureSpec
from pipelines.lake import LakeBatch, read_lake
from pipelines.sample_window import SampleWindow
from pipelines.snapshot import read_manifest, read_spec, split_location
from pipelines.snapshot_manifest import PartitionSummary, SnapshotManifest, canonical
from pipelines.snapshot_partitions import reach
from pipelines.storage import open_folder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Base", "open_base"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A snapshot to start from.

    ``kept`` are the partitions that still hold; ``window`` is what must be built: all others of the new
    snapshot. ``reopened`` of these had been closed, but events have come in since that belong to them.
    """

    location: str
    manifest: SnapshotManifest
    spec: FeatureSpec
    kept: tuple[PartitionSummary, ...]
    window: SampleWindow
    reopened: int

    def files_of(self, task: Task, partitions: Sequence[str]) -> list[str]:
        """Locations of the base's data files of some partitions."""
        parent, own = split_location(self.location)
        wanted = set(partitions)
        return [
            f"{parent}/{own if part.origin == self.manifest.snapshot_id else part.origin}/{name}"
            for part in self.manifest.of_task(task)
            if part.partition in wanted
            for name in sorted(part.files)
        ]


def open_base(
    spark: SparkSession,
    location: str | Path,
    lake: str | Path,
    whole: SampleWindow,
    settings: dict[str, Any],
    batches: Sequence[LakeBatch],
) -> Base:
    """Read a base, and see which of its partitions hold for a later moment.

    A closed partition holds unless events have come into the lake since that arrived by the base's
    ``as_of`` and may touch it: a batch ingested late.

    Raises
    ------
    ConfigError
        If the base has other settings, or is younger than the new snapshot.
    DataError
        If it is no snapshot, or the lake is not the one that it was built from.
    """
    folder = open_folder(location, spark)
    manifest = read_manifest(location, folder)
    if manifest.as_of > whole.as_of:
        raise ConfigError(
            f"{location} is labelled as of a later time than --as-of.", hint="start from an older snapshot"
        )
    if manifest.settings_digest != hashlib.sha256(canonical(settings)).hexdigest():
        raise ConfigError(
            f"{location} was built with other settings: its closed partitions would not fit.",
            hint="use the configuration that it was built with, or `ctrstream samples build`",
        )
    present = {batch.batch for batch in batches}
    missing = sorted(set(manifest.lake_batches) - present)
    if missing:
        raise DataError(
            f"{location} was built from another lake: its batch {missing[0]} is not in {lake}.",
            hint="name the lake that it was built from",
        )
    fresh = [batch for batch in batches if batch.batch not in set(manifest.lake_batches)]
    touched = _touched(spark, lake, whole, manifest, fresh)
    names = {task: {whole.grid.name(i): i for i in whole.partitions[task]} for task in whole.tasks}
    held = [part for part in manifest.partitions if part.closed and part.partition in names[part.task]]
    kept = tuple(part for part in held if names[part.task][part.partition] not in touched[part.task])
    done = {task: _settled(whole, manifest, task) - touched[task] for task in whole.tasks}
    rest = {
        task: tuple(index for index in whole.partitions[task] if index not in done[task])
        for task in whole.tasks
    }
    if len(kept) < len(held):
        logger.warning(
            "%d closed partitions are built again: events that belong to them were ingested since",
            len(held) - len(kept),
        )
    return Base(
        str(location),
        manifest,
        read_spec(location, folder),
        kept,
        replace(whole, partitions=rest),
        len(held) - len(kept),
    )


def _settled(whole: SampleWindow, manifest: SnapshotManifest, task: Task) -> set[int]:
    """Partitions that were closed and inside the base's window, whether they had rows or not."""
    from pipelines.snapshot_partitions import closes_after

    grid = whole.grid
    until = manifest.as_of - closes_after(whole.attribution, task)
    return {
        index
        for index in whole.partitions[task]
        if manifest.since <= grid.start(index) and grid.start(index + 1) <= until
    }


def _touched(
    spark: SparkSession,
    lake: str | Path,
    whole: SampleWindow,
    manifest: SnapshotManifest,
    fresh: Sequence[LakeBatch],
) -> dict[Task, set[int]]:
    """Partitions in which windows open that events ingested since, but arrived before, may change."""
    from pyspark.sql import functions as F

    late = [batch.batch for batch in fresh if _has_early(batch, manifest.as_of)]
    found: dict[Task, set[int]] = {task: set() for task in whole.tasks}
    if not late:
        return found
    hour = 3_600_000
    rows = (
        read_lake(spark, lake, batches=late)
        .where(F.col("kind").isin(*KINDS) & (F.col("arrival_time") <= manifest.as_of))
        .select("kind", F.floor(F.col("event_time") / hour).alias("hour"))
        .distinct()
    )
    # As many rows as there are hours at most.
    for row in rows.collect():
        for task, partitions in found.items():
            around = reach(whole.attribution, task, row["kind"])
            if around is not None:
                first, last = row["hour"] * hour - around[0], (row["hour"] + 1) * hour + around[1]
                partitions |= set(whole.grid.between(max(first, 0), last))
    return found


def _has_early(batch: LakeBatch, as_of: int) -> bool:
    times = [times.arrival_time for kind, times in batch.times.items() if kind in KINDS]
    return any(arrival is not None and arrival[0] <= as_of for arrival in times)
