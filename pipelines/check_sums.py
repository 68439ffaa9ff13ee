"""Sums over the partitions of a snapshot, taken anew from its rows and held against the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pipelines.check_findings import Finding, at_most
from pipelines.check_rows import CheckedRows
from pipelines.config import Task
from pipelines.snapshot_manifest import PartitionSummary, SnapshotManifest, content_digest
from pipelines.snapshot_partitions import PartitionGrid

__all__ = ["PartitionSums", "manifest_findings", "sum_findings"]

# Sums of float64 in another order.
_TOLERANCE = 1e-9
_SHOWN = 3


@dataclass
class PartitionSums:
    """The sums of a `PartitionSummary`, of rows given chunk by chunk."""

    sums: dict[str, float] = field(default_factory=dict)
    oldest: int | None = None

    def update(self, rows: CheckedRows, grid: PartitionGrid) -> None:
        """Add a chunk."""
        if len(rows) == 0:
            return
        label, weight, once, mature = rows.label, rows.weight, rows.is_original, rows.mature
        end = (rows.opened // grid.width + 1) * grid.width
        naive = once & rows.has_outcome & (rows.outcome < end)
        found = {
            "rows": len(rows),
            "mature": np.count_nonzero(mature),
            "positives": label[once].sum(),
            "naive_positives": label[naive].sum(),
            "mature_positives": label[once & mature].sum(),
            "weight": weight.sum(),
            "positive_weight": (weight * label).sum(),
            "mature_weight": weight[mature].sum(),
            "mature_positive_weight": (weight * label)[mature].sum(),
        }
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        oldest = int(rows.opened.min())
        self.oldest = oldest if self.oldest is None else min(self.oldest, oldest)

    def differences(self, summary: PartitionSummary) -> list[str]:
        """What the manifest says otherwise, in words."""
        found = [
            f"{name} {getattr(summary, name):g} in the manifest, {value:g} found"
            for name, value in {**dict.fromkeys(_NAMES, 0.0), **self.sums}.items()
            if not _equal(float(getattr(summary, name)), value)
        ]
        if self.oldest is not None and self.oldest != summary.oldest:
            found.append(f"oldest {summary.oldest} in the manifest, {self.oldest} found")
        return found


_NAMES = tuple(
    name
    for name, info in PartitionSummary.model_fields.items()
    if info.annotation in (int, float) and name != "oldest"
)


def _equal(left: float, right: float) -> bool:
    return abs(left - right) <= _TOLERANCE * max(1.0, abs(left), abs(right))


def sum_findings(manifest: SnapshotManifest, sums: Mapping[tuple[Task, str], PartitionSums]) -> list[Finding]:
    """Partitions, and tasks, whose rows are not as in the manifest.

    Parameters
    ----------
    manifest : SnapshotManifest
    sums : mapping of (task, partition) to PartitionSums
        Of the partitions whose files could be read.
    """
    findings = []
    for task in manifest.tasks:
        wrong = []
        for part in manifest.of_task(task):
            if (task, part.partition) in sums:
                told = sums[task, part.partition].differences(part)
                wrong += [f"{part.partition}: {', '.join(told)}"] if told else []
        check = "partitions not as in the manifest"
        findings.append(at_most("sums", check, task, len(wrong), 0, "count", _first(wrong)))
    return findings


def manifest_findings(manifest: SnapshotManifest) -> list[Finding]:
    """Whether the totals of a manifest are those of its partitions."""
    findings = []
    for task, summary in manifest.tasks.items():
        parts = manifest.of_task(task)
        totals = {
            name: sum(float(getattr(part, name)) for part in parts)
            for name in ("rows", "positives", "mature")
        }
        told = [
            f"expected {value:g} {name}, the sum of its partitions, in the totals. "
            f"Found {getattr(summary, name):g}"
            for name, value in totals.items()
            if not _equal(value, float(getattr(summary, name)))
        ]
        digests = [
            part.partition
            for part in parts
            if content_digest([file.sha256 for _, file in sorted(part.files.items())]) != part.content_digest
        ]
        told += [f"{name}: content_digest is not that of its files" for name in digests]
        whole = content_digest([f"{part.partition} {part.content_digest}" for part in parts])
        if whole != summary.content_digest:
            told.append("content_digest is not that of its partitions")
        check = "totals not as in the manifest's partitions"
        findings.append(at_most("sums", check, task, len(told), 0, "count", _first(told)))
    return findings


def _first(items: list[str]) -> str:
    more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
