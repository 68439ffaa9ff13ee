"""Rows that are both trained on and tested on, and training labels from the time of the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.check_findings import Finding, at_most, told
from pipelines.check_ids import IdHashes
from pipelines.config_sections import ChecksConfig
from pipelines.hashing import hash_column
from pipelines.snapshot import SAMPLE_SCHEMA, data_files, read_manifest
from pipelines.stream_columns import Bounds
from pipelines.stream_files import ParquetFiles

__all__ = ["Overlap", "RowSet", "find_overlap", "overlap_findings"]

_COLUMNS = ("sample_id", "impression_id", "label", "event_time", "known_at", "outcome_known_at")


@dataclass(frozen=True)
class RowSet:
    """Rows of a snapshot whose windows opened within ``span`` (ms, half-open); all of them without."""

    location: str
    span: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """Rows of the snapshot: no fewer than in the set."""
        return sum(summary.rows for summary in read_manifest(self.location).tasks.values())

    def chunks(self) -> Iterator[pa.RecordBatch]:
        """Its rows with the columns that `find_overlap` looks at."""
        manifest = read_manifest(self.location)
        schema = pa.schema([field for field in SAMPLE_SCHEMA if field.name in _COLUMNS])
        bounds = () if self.span is None else (Bounds("event_time", *self.span),)
        for task in manifest.tasks:
            for file in data_files(self.location, task, manifest):
                files = ParquetFiles((file,), schema, bounds)
                with closing(files.read(files.pieces)) as chunks:
                    yield from chunks


@dataclass(frozen=True)
class Overlap:
    """What a training set and a test set have in common; all but ``begins`` are rows.

    Attributes
    ----------
    train_rows, test_rows : int
    shared_samples, shared_impressions : int
        Rows of the test set whose sample, whose impression, is in the training set.
    begins : int or None
        When the first window of the test set opened, ms; None without rows.
    reaching : int
        Rows of the training set known only after that.
    late_labels : int
        Positives among them whose outcome, too, was known only then.
    """

    train_rows: int
    test_rows: int
    shared_samples: int
    shared_impressions: int
    begins: int | None
    reaching: int
    late_labels: int


def find_overlap(train: RowSet, test: RowSet) -> Overlap:
    """Compare two sets of rows, which may be of one snapshot, in chunks.

    A training row says what was known at its ``known_at``. One that was known only after the test set
    begins has seen the time of the test: an open window of the training set is labelled by its ``as_of``, a
    closed one by its closing.
    """
    rows = max(train.rows, test.rows)
    with (
        IdHashes(rows) as trained,
        IdHashes(rows) as tested,
        IdHashes(rows) as trained_on,
        IdHashes(rows) as tested_on,
    ):
        begins: int | None = None
        for chunk in test.chunks():
            tested.add(hash_column(chunk.column("sample_id")))
            tested_on.add(hash_column(chunk.column("impression_id")))
            first = pc.min(chunk.column("event_time")).as_py()
            begins = first if begins is None or (first is not None and first < begins) else begins
        reaching = late = 0
        for chunk in train.chunks():
            trained.add(hash_column(chunk.column("sample_id")))
            trained_on.add(hash_column(chunk.column("impression_id")))
            if begins is not None:
                after, outcome_after = _after(chunk, begins)
                reaching += int(np.count_nonzero(after))
                late += int(np.count_nonzero(after & outcome_after))
        return Overlap(
            trained.rows,
            tested.rows,
            trained.shared_with(tested),
            trained_on.shared_with(tested_on),
            begins,
            reaching,
            late,
        )


def _after(chunk: pa.RecordBatch, moment: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows known after a moment, and rows whose outcome was."""
    known_at = chunk.column("known_at").to_numpy()
    outcome = pc.fill_null(chunk.column("outcome_known_at"), moment).to_numpy(zero_copy_only=False)
    return known_at > moment, outcome > moment


def overlap_findings(overlap: Overlap, limits: ChecksConfig) -> list[Finding]:
    """Shares beside ``limits.overlap``.

    Impressions in both sets, under another task, are a warning only: the click of an impression is one task's
    label before the split and opens the other's window after it.
    """
    subject = "train, test"
    if not overlap.train_rows or not overlap.test_rows:
        return [told("overlap", "test rows that were trained on", subject, None, "share")]
    samples = overlap.shared_samples / overlap.test_rows
    impressions = overlap.shared_impressions / overlap.test_rows
    reaching = overlap.reaching / overlap.train_rows
    limit = limits.overlap
    return [
        at_most(
            "overlap",
            "test rows that were trained on",
            subject,
            samples,
            limit,
            "share",
            f"{overlap.shared_samples:,} rows",
        ),
        at_most(
            "overlap",
            "test rows whose impression was trained on",
            subject,
            impressions,
            limit,
            "share",
            f"{overlap.shared_impressions:,} rows",
            beyond="warning",
        ),
        at_most(
            "overlap",
            "train rows known only after the test begins",
            subject,
            reaching,
            limit,
            "share",
            f"{overlap.reaching:,} rows, {overlap.late_labels:,} with an outcome from after it"
            + (
                "; leave a gap before the test, as wide as the label window and the allowed lateness"
                if reaching > limit
                else ""
            ),
        ),
    ]
