"""``samples check``: is a snapshot what its manifest says, and does it say only what was known?

Files are read once for their digests and once for their rows, in chunks of a few MiB. What grows with the
rows is on disk: the hashes of their ids, 8 bytes a row (`pipelines.check_ids`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipelines.check_features import SAMPLED_COLUMNS, FeatureSample, SampleCollector
from pipelines.check_findings import Finding, at_most, failed
from pipelines.check_ids import IdHashes
from pipelines.check_rows import CHECKED_COLUMNS, CheckedRows, RowRules
from pipelines.check_sums import PartitionSums, manifest_findings, sum_findings
from pipelines.config import Task
from pipelines.errors import ConfigError, DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.hashing import hash_column
from pipelines.snapshot import (
    SAMPLE_SCHEMA,
    SPEC_NAME,
    expected_files,
    read_manifest,
    read_spec,
    split_location,
    verify_file,
)
from pipelines.snapshot_manifest import PartitionSummary, SnapshotManifest
from pipelines.snapshot_partitions import PartitionGrid
from pipelines.stream_columns import with_widths
from pipelines.stream_files import DataFile, ParquetFiles

__all__ = ["SnapshotScan", "check_snapshot", "repeated_finding", "scan_snapshot"]

# Files hashed at once: hashing runs outside Python's lock.
_READERS = 4
_NAMED = 20


@dataclass(frozen=True)
class SnapshotScan:
    """What reading a whole snapshot has found, and a sample of its rows by task."""

    findings: list[Finding]
    samples: dict[Task, FeatureSample | None]


def check_snapshot(location: str | Path) -> list[str]:
    """Check a snapshot against its manifest; returns what is wrong with it in words, empty if nothing is.

    Raises
    ------
    DataError
        If there is no readable manifest.
    """
    return [finding.text for finding in failed(scan_snapshot(location).findings)]


def scan_snapshot(location: str | Path, *, leak_rows: int = 0, count_ids: bool = True) -> SnapshotScan:
    """Read all files of a snapshot and check them.

    1. Every file of the manifest is there with its size and digest, and the feature spec has its digest.
    2. Rows and sums of every partition are those of the manifest, and its totals those of the partitions.
    3. Every row says only what was known: `pipelines.check_rows.RowRules`.
    4. No sample appears twice.

    Parameters
    ----------
    location : str or Path
    leak_rows : int
        Rows of each task to sample for `pipelines.check_features`, about; 0 for none.
    count_ids : bool
        Whether to look for samples that appear twice.

    Raises
    ------
    DataError
        If there is no readable manifest.
    """
    manifest = read_manifest(location)
    findings, unreadable = _file_findings(location, manifest)
    spec, found = _spec_findings(location, manifest)
    findings += [*found, *manifest_findings(manifest)]
    total = sum(summary.rows for summary in manifest.tasks.values())
    with IdHashes(total) as ids:
        scan = _Scan(location, manifest, spec, ids if count_ids else None, leak_rows)
        for part in manifest.partitions:
            scan.read(part, unreadable)
        findings += [*scan.findings, *sum_findings(manifest, scan.sums)]
        for rules in scan.rules.values():
            findings += rules.findings()
        findings += _kind_findings(manifest, scan.rules)
        if count_ids:
            findings.append(repeated_finding(ids.repeated()))
    return SnapshotScan(findings, {task: collector.sample() for task, collector in scan.collectors.items()})


def repeated_finding(repeated: int) -> Finding:
    """Of rows whose sample another row has been said for."""
    return at_most("rows", "sample_id appears more than once", "all tasks", repeated, 0, "count")


@dataclass
class _Scan:
    """One pass over the rows, partition by partition."""

    location: str | Path
    manifest: SnapshotManifest
    spec: FeatureSpec | None
    ids: IdHashes | None
    leak_rows: int
    findings: list[Finding] = field(default_factory=list)
    sums: dict[tuple[Task, str], PartitionSums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grid = PartitionGrid(self.manifest.granularity)
        self.rules = {task: RowRules(self.manifest, task) for task in self.manifest.tasks}
        self.collectors: dict[Task, SampleCollector] = {}
        if self.spec is not None and self.leak_rows:
            self.collectors = {
                task: SampleCollector(min(1.0, self.leak_rows / max(1, summary.rows)))
                for task, summary in self.manifest.tasks.items()
            }
        self.schema = _schema(self.spec if self.collectors else None)

    def read(self, part: PartitionSummary, unreadable: set[str]) -> None:
        """Read the files of a partition, but for those that are known to be missing or altered."""
        parent, own = split_location(self.location)
        origin = own if part.origin == self.manifest.snapshot_id else part.origin
        sums, whole = PartitionSums(), True
        for name, file in sorted(part.files.items()):
            place = f"{parent}/{origin}/{name}"
            if place in unreadable:
                whole = False
                continue
            try:
                for chunk in self._chunks(DataFile(place, file.rows)):
                    self._take(chunk, part, sums)
            except DataError as error:
                whole = False
                check = "files that cannot be read as rows"
                self.findings.append(at_most("files", check, part.task, 1, 0, "count", error.message))
        if whole:
            self.sums[part.task, part.partition] = sums

    def _chunks(self, file: DataFile) -> Iterator[pa.RecordBatch]:
        files = ParquetFiles((file,), self.schema)
        with closing(files.read(files.pieces)) as chunks:
            yield from chunks

    def _take(self, chunk: pa.RecordBatch, part: PartitionSummary, sums: PartitionSums) -> None:
        rows = CheckedRows.of(chunk, part.task)
        self.rules[part.task].update(rows, self.grid.interval(self.grid.index_of(part.partition)))
        sums.update(rows, self.grid)
        if self.ids is not None:
            self.ids.add(hash_column(chunk.column("sample_id")))
        if part.task in self.collectors:
            # By impression: copies of a row must not tell on each other.
            self.collectors[part.task].update(chunk, hash_column(chunk.column("impression_id")))


def _schema(spec: FeatureSpec | None) -> pa.Schema:
    wanted = {*CHECKED_COLUMNS, *(() if spec is None else SAMPLED_COLUMNS)}
    schema = pa.schema([column for column in SAMPLE_SCHEMA if column.name in wanted])
    if spec is None:
        return schema
    return with_widths(schema, {"buckets": len(spec.column_field), "numbers": len(spec.numeric)})


def _file_findings(location: str | Path, manifest: SnapshotManifest) -> tuple[list[Finding], set[str]]:
    """Missing and altered files."""
    expected = expected_files(location, manifest)

    def told(item: str) -> str | None:
        try:
            verify_file(item, expected[item])
        except DataError as error:
            return error.message
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        messages = dict(zip(expected, pool.map(told, expected), strict=True))
    wrong = {place: message for place, message in messages.items() if message is not None}
    note = " ".join(list(wrong.values())[:_NAMED]) if wrong else f"of {len(expected):,} files"
    check = "files missing or altered"
    return [at_most("files", check, "all tasks", len(wrong), 0, "count", note)], set(wrong)


def _spec_findings(
    location: str | Path, manifest: SnapshotManifest
) -> tuple[FeatureSpec | None, list[Finding]]:
    check = "feature spec not that of the manifest"
    try:
        spec = read_spec(location)
    except (DataError, ConfigError) as error:
        return None, [at_most("files", check, SPEC_NAME, 1, 0, "count", error.message)]
    differs = spec.digest() != manifest.feature_spec_digest
    return spec, [at_most("files", check, SPEC_NAME, int(differs), 0, "count")]


def _kind_findings(manifest: SnapshotManifest, rules: dict[Task, RowRules]) -> list[Finding]:
    """Rows by kind: a snapshot says every window once."""
    findings = []
    for task, summary in manifest.tasks.items():
        found = {kind: count for kind, count in rules[task].kinds.items() if count}
        told = {kind: count for kind, count in summary.kinds.items() if count}
        note = "" if found == told or not found else f"{told} in the manifest, {found} found"
        check = "kinds of rows not as in the manifest"
        others = sum(count for kind, count in found.items() if kind != "first")
        excess = sum(max(0, count - told.get(kind, 0)) for kind, count in found.items())
        findings.append(at_most("rows", check, task, max(others, excess), 0, "count", note))
    return findings
