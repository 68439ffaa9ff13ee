"""What every row of a snapshot must obey, counted chunk by chunk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.check_findings import Finding, at_most
from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.snapshot import SAMPLE_SCHEMA
from pipelines.snapshot_manifest import SnapshotManifest
from pipelines.snapshot_partitions import Interval

__all__ = ["CHECKED_COLUMNS", "CheckedRows", "RowRules"]

Flags = NDArray[np.bool_]

CHECKED_COLUMNS = (
    "sample_id",
    "impression_id",
    "task",
    "kind",
    "label",
    "event_time",
    "known_at",
    "outcome_known_at",
    "elapsed",
    "mature",
    "weight",
    "negative_sampling_rate",
    "copies",
    "observed_share",
)
# Weights are float32.
_WEIGHT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class CheckedRows:
    """Columns of a chunk, each of shape (n,). Nulls are 0, but for ``outcome``, which is as told.

    ``is_original``: the row is no further copy of another; ``is_named``: its id is that of its impression and
    task. ``outcome`` is when the outcome became known, ms, meaningless where ``has_outcome`` is False.
    """

    label: NDArray[np.float64]
    weight: NDArray[np.float64]
    rate: NDArray[np.float64]
    copies: NDArray[np.int64]
    opened: NDArray[np.int64]
    known_at: NDArray[np.int64]
    outcome: NDArray[np.int64]
    has_outcome: Flags
    elapsed: NDArray[np.int64]
    mature: Flags
    share: NDArray[np.float64]
    kind: pa.Array
    is_original: Flags
    is_named: Flags
    is_of_task: Flags
    missing: int

    @classmethod
    def of(cls, chunk: pa.RecordBatch, task: Task) -> CheckedRows:
        """Columns of a chunk with `CHECKED_COLUMNS`."""

        def numbers(name: str, kind: Any) -> NDArray[Any]:
            column = pc.fill_null(chunk.column(name), pa.scalar(0, SAMPLE_SCHEMA.field(name).type))
            return np.asarray(column.to_numpy(zero_copy_only=False)).astype(kind)

        sample_id = chunk.column("sample_id")
        own = pc.binary_join_element_wise(chunk.column("impression_id"), chunk.column("task"), ":")
        is_original = _flags(pc.equal(sample_id, own))
        base = pc.replace_substring_regex(sample_id, r"#[1-9][0-9]*$", "")
        return cls(
            label=numbers("label", np.float64),
            weight=numbers("weight", np.float64),
            rate=numbers("negative_sampling_rate", np.float64),
            copies=numbers("copies", np.int64),
            opened=numbers("event_time", np.int64),
            known_at=numbers("known_at", np.int64),
            outcome=numbers("outcome_known_at", np.int64),
            has_outcome=_flags(chunk.column("outcome_known_at").is_valid()),
            elapsed=numbers("elapsed", np.int64),
            mature=_flags(chunk.column("mature")),
            share=numbers("observed_share", np.float64),
            kind=chunk.column("kind"),
            is_original=is_original,
            is_named=is_original | _flags(pc.equal(base, own)),
            is_of_task=_flags(pc.equal(chunk.column("task"), task)),
            missing=sum(
                chunk.column(name).null_count for name in CHECKED_COLUMNS if name != "outcome_known_at"
            ),
        )

    def __len__(self) -> int:
        return len(self.label)


def _flags(column: pa.Array) -> Flags:
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), np.bool_)


class RowRules:
    """Rows of one task that break a rule, counted by rule.

    A label must be one that was known at ``known_at``, and ``known_at`` not after the snapshot's ``as_of``;
    nothing may be mature before its window has closed; weights must be those of the sampling.
    """

    def __init__(self, manifest: SnapshotManifest, task: Task) -> None:
        rule = AttributionConfig.model_validate(manifest.config["attribution"])
        self.task, self.since, self.as_of = task, manifest.since, manifest.as_of
        self.width, self.lateness = rule.width(task), rule.allowed_lateness
        self.rate = manifest.negative_sampling_rate
        self.rows = 0
        self.broken: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self._by_copies: Counter[tuple[int, bool]] = Counter()

    def update(self, rows: CheckedRows, interval: Interval) -> None:
        """Count a chunk of the partition that holds the windows opened in ``interval`` (ms)."""
        self.rows += len(rows)
        for name, bad in self._broken(rows, interval).items():
            self.broken[name] += int(np.count_nonzero(bad))
        self.broken["a value is missing"] += rows.missing
        for item in pc.value_counts(rows.kind).to_pylist():
            self.kinds[str(item["values"])] += item["counts"]
        for copies in np.unique(rows.copies).tolist():
            own = rows.copies == copies
            originals = int(np.count_nonzero(own & rows.is_original))
            self._by_copies[copies, True] += originals
            self._by_copies[copies, False] += int(np.count_nonzero(own)) - originals

    def findings(self) -> list[Finding]:
        """One for each rule."""
        broken = dict(self.broken)
        broken["a row has not as many copies as it says"] = self._uncopied()
        return [
            at_most("rows", name, self.task, count, 0, "count", f"of {self.rows:,} rows" if count else "")
            for name, count in broken.items()
        ]

    def _uncopied(self) -> int:
        """Originals whose further copies are missing, and copies too many."""
        values = {copies for copies, _ in self._by_copies}
        return sum(
            abs(self._by_copies[copies, True] * (copies - 1) - self._by_copies[copies, False])
            for copies in values
        )

    def _broken(self, rows: CheckedRows, interval: Interval) -> dict[str, Flags]:
        low, high = interval
        expected = np.where(rows.label > 0, 1.0, 1.0 / self.rate) / np.maximum(rows.copies, 1)
        opened, outcome = rows.opened, rows.outcome
        return {
            "sample_id is not that of its impression and task": ~rows.is_named | ~rows.is_of_task,
            "label lies outside [0, 1]": ~((rows.label >= 0) & (rows.label <= 1)),
            "the window opened outside the snapshot's window": (opened < self.since) | (opened >= self.as_of),
            "the window opened outside its partition": (opened < low) | (opened >= high),
            "known_at lies after as_of": rows.known_at > self.as_of,
            "known_at lies before the window opened": rows.known_at < opened,
            "the outcome became known after known_at": rows.has_outcome & (outcome > rows.known_at),
            "the outcome became known before the window opened": rows.has_outcome & (outcome < opened),
            "a label above 0 without a known outcome, or the reverse": rows.has_outcome != (rows.label > 0),
            "elapsed is not the age of the window, at most its width": rows.elapsed
            != np.minimum(self.as_of - opened, self.width),
            "mature before its window has closed": rows.mature
            & (self.as_of <= opened + (self.width + self.lateness)),
            "mature but observed_share is not 1": rows.mature & (rows.share != 1),
            "observed_share lies outside [0, 1]": ~((rows.share >= 0) & (rows.share <= 1)),
            "weight is not above 0": ~(rows.weight > 0) | ~np.isfinite(rows.weight),
            "weight is not what sampling and copies make it": ~(
                np.abs(rows.weight - expected) <= _WEIGHT_TOLERANCE * expected
            )
            | (np.abs(rows.rate - self.rate) > _WEIGHT_TOLERANCE),
        }
