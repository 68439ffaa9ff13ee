"""What a snapshot says of itself: counts, rates, settings, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipelines.config import Task
from pipelines.duration import format_duration

__all__ = [
    "FORMAT_VERSION",
    "LabelChanges",
    "PartitionSummary",
    "SnapshotFile",
    "SnapshotManifest",
    "TaskSummary",
    "content_digest",
    "snapshot_id",
]

FORMAT_VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SnapshotFile(_Part):
    """One file: size in bytes and SHA-256 (hex); ``rows`` for data files."""

    bytes: int
    sha256: str
    rows: int = 0


class PartitionSummary(_Part):
    """A day or an hour of one task.

    Attributes
    ----------
    partition : str
        ``2026-01-05``, or ``2026-01-05T13``: when the windows opened.
    closed : bool
        Whether nothing can change it any more.
    origin : str
        Snapshot, beside this one, whose folder has the files.
    rows, mature : int
    positives, naive_positives, mature_positives : float
        Sums of labels: as of the snapshot; as known when the partition's own time was over, which is what
        a job says that labels once and never looks back; and over mature rows.
    weight, positive_weight, mature_weight, mature_positive_weight : float
        Sums of weights.
    oldest : int
        When its first window opened, ms.
    content_digest : str
        Of the files in order: equal content, equal digest.
    files : dict of str to SnapshotFile
        By name relative to the origin's folder.
    """

    task: Task
    partition: str
    closed: bool
    origin: str
    rows: int
    mature: int
    positives: float
    naive_positives: float
    mature_positives: float
    weight: float
    positive_weight: float
    mature_weight: float
    mature_positive_weight: float
    oldest: int
    content_digest: str
    files: dict[str, SnapshotFile]


class TaskSummary(_Part):
    """What a snapshot holds of one task.

    Attributes
    ----------
    rows, mature : int
    positives : float
        Sum of the labels.
    label_rate : float
        Share of positives, each row counted with its weight.
    mature_label_rate : float or None
        The same over mature rows; None where there is none.
    kinds : dict of str to int
        Rows by kind.
    misfits : int
        Rows left out, in the partitions that this build made, because their impression does not fit the
        feature spec.
    content_digest : str
        Of all its partitions: equal content, equal digest.
    delay_curve : dict
        State of the `pipelines.delay.DelayCurve` behind ``observed_share``.
    largest_follow_up : int
        Age (ms) of the oldest window: where the delay curve is normalised.
    """

    rows: int
    positives: float
    mature: int
    label_rate: float
    mature_label_rate: float | None
    kinds: dict[str, int]
    misfits: int
    content_digest: str
    delay_curve: dict[str, Any]
    largest_follow_up: int


class LabelChanges(_Part):
    """How the labels of one task differ from those of the base, over rows that both have.

    ``raised`` had label 0 and have more, ``lowered`` have 0 now, ``restated`` another credit. ``late``
    rows are windows opened before the base's ``as_of`` that it did not have.
    """

    raised: int
    lowered: int
    restated: int
    late: int


class SnapshotManifest(_Part):
    """All that is known about a snapshot; times and windows in ms.

    Attributes
    ----------
    since, as_of : int
        Rows are windows opened in ``[since, as_of)``; ``since`` is where ``window`` before ``as_of`` begins,
        moved back to the start of a partition.
    events : dict
        What became of every event that was read, by kind and class; the classes of a kind add up to
        ``read``. A relabelling reads those around its open partitions only.
    base : str or None
        Snapshot whose closed partitions this one refers to.
    changes : dict of task to LabelChanges
        Against the base.
    lake_batches : tuple of str
        The lake's batches that were read.
    settings_digest : str
        Of all settings that decide a row, but for ``as_of`` and ``window``.
    extra_files : dict of str to SnapshotFile
        Files of the snapshot that are no data: feature spec, delays, label differences.
    """

    format_version: Literal[2] = 2
    snapshot_id: str
    as_of: int
    window: int
    since: int
    granularity: Literal["day", "hour"]
    slices: int
    tasks: dict[Task, TaskSummary]
    partitions: tuple[PartitionSummary, ...]
    events: dict[str, dict[str, int]]
    base: str | None = None
    changes: dict[Task, LabelChanges] = {}
    negative_sampling_rate: float
    positive_copies: int
    exploration_copies: int
    feature_spec_digest: str
    feature_spec_inferred: bool
    sample_columns: dict[str, str]
    segments: tuple[str, ...]
    config: dict[str, Any]
    settings_digest: str
    lake_version: str
    lake_batches: tuple[str, ...]
    code_version: str
    extra_files: dict[str, SnapshotFile]

    def of_task(self, task: Task) -> list[PartitionSummary]:
        """Partitions of a task, oldest first."""
        return sorted((part for part in self.partitions if part.task == task), key=lambda p: p.partition)


def content_digest(parts: list[str]) -> str:
    """SHA-256 (hex) of digests in order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def snapshot_id(as_of: int, window: int, inputs: Mapping[str, Any]) -> str:
    """Name of the snapshot of ``window`` ms up to ``as_of``; ``inputs`` is all else that decides its rows.

    Examples
    --------
    >>> snapshot_id(1_767_571_200_000, 604_800_000, {"negative_sampling_rate": 1.0})[:20]
    '20260105T000000Z-7d-'
    """
    moment = datetime.fromtimestamp(as_of / 1000, UTC)
    text = moment.strftime("%Y%m%dT%H%M%S") + (f".{as_of % 1000:03d}" if as_of % 1000 else "")
    body = canonical({"format": FORMAT_VERSION, "as_of": as_of, "window": window, **inputs})
    return f"{text}Z-{format_duration(window)}-{hashlib.sha256(body).hexdigest()[:12]}"


def canonical(value: Mapping[str, Any]) -> bytes:
    """JSON of equal values is equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
