"""Sums over the partitions of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipelines.config import Task
from pipelines.sample_window import SampleWindow
from pipelines.snapshot_manifest import PartitionSummary, TaskSummary, content_digest

__all__ = ["code_version", "summarise"]


def summarise(
    parts: Sequence[PartitionSummary],
    window: SampleWindow,
    delays: Mapping[Task, dict[str, Any]],
    misfits: Mapping[Task, int],
) -> dict[Task, TaskSummary]:
    """What a snapshot holds of each task.

    Parameters
    ----------
    parts : sequence of PartitionSummary
        Those built and those referred to.
    window : SampleWindow
    delays : mapping of task to dict
        State of each task's delay model.
    misfits : mapping of task to int
        Rows left out because they do not fit the feature spec.
    """
    found: dict[Task, TaskSummary] = {}
    for task in window.tasks:
        own = sorted((part for part in parts if part.task == task), key=lambda part: part.partition)
        rows = sum(part.rows for part in own)
        oldest = min((part.oldest for part in own), default=window.as_of)
        found[task] = TaskSummary(
            rows=rows,
            positives=sum(part.positives for part in own),
            mature=sum(part.mature for part in own),
            label_rate=_ratio(own, "positive_weight", "weight") or 0.0,
            mature_label_rate=_ratio(own, "mature_positive_weight", "mature_weight"),
            kinds={"first": rows},
            misfits=misfits.get(task, 0),
            content_digest=content_digest([f"{part.partition} {part.content_digest}" for part in own]),
            delay_curve=delays[task],
            largest_follow_up=window.as_of - oldest,
        )
    return found


def _ratio(parts: Sequence[PartitionSummary], numerator: str, denominator: str) -> float | None:
    below = sum(getattr(part, denominator) for part in parts)
    return sum(getattr(part, numerator) for part in parts) / below if below else None


def code_version() -> str:
    """Version of this package, for manifests."""
    try:
        return version("ctrstream")
    except PackageNotFoundError:
        return "unknown"
