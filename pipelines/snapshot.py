"""Sample snapshots: immutable folders of labelled, encoded rows, visible only when complete.

::

    <out>/20260112T000000Z-7d-4be1c0a95d7e/
        MANIFEST.json           counts, rates, settings, digests of every file; written last: the commit
        feature_spec.toml
        delays.parquet          counts of outcomes by delay, behind the delay curves
        data-<build>/of_task=click/date=2026-01-11/slice=0/*.parquet
        diff-<build>/           label changes against the base, where there is one

A relabelled snapshot has files of its own for partitions that were open, and refers to those of the others
in the folders beside it that made them. So a folder is kept as long as a younger one refers to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from pipelines.config import Task
from pipelines.errors import DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.snapshot_manifest import FORMAT_VERSION, SnapshotFile, SnapshotManifest
from pipelines.storage import Folder, is_uri, open_folder, open_for_arrow
from pipelines.stream_files import DataFile
from pipelines.training_set import TrainingSet

__all__ = [
    "MANIFEST_NAME",
    "SAMPLE_SCHEMA",
    "SPEC_NAME",
    "data_files",
    "expected_files",
    "read_manifest",
    "read_rows",
    "read_snapshot",
    "read_spec",
    "split_location",
    "verify_file",
    "verify_files",
]

MANIFEST_NAME = "MANIFEST.json"
SPEC_NAME = "feature_spec.toml"
DELAYS_NAME = "delays.parquet"
_BLOCK = 1 << 20

# Times and durations in ms. `outcome_known_at` is when the label rose from 0, null for label 0;
# `label_version` how often it has changed; of `copies` equal rows each has its share of the weight.
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("impression_id", pa.string()),
        pa.field("task", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("label", pa.float32()),
        pa.field("label_version", pa.int32()),
        pa.field("event_time", pa.int64()),
        pa.field("known_at", pa.int64()),
        pa.field("outcome_known_at", pa.int64()),
        pa.field("elapsed", pa.int64()),
        pa.field("mature", pa.bool_()),
        pa.field("weight", pa.float32()),
        pa.field("negative_sampling_rate", pa.float32()),
        pa.field("copies", pa.int32()),
        pa.field("observed_share", pa.float32()),
        pa.field("user_key", pa.int64()),
        pa.field("segment_key", pa.list_(pa.int64())),
        pa.field("buckets", pa.list_(pa.int32())),
        pa.field("numbers", pa.list_(pa.float32())),
        pa.field("user_id", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("position", pa.int32()),
    ]
)


def split_location(location: str | Path) -> tuple[str, str]:
    """Folder of snapshots, and name of the snapshot in it.

    Examples
    --------
    >>> split_location("hdfs://host/samples/20260112T000000Z-7d-4be1c0a95d7e/")
    ('hdfs://host/samples', '20260112T000000Z-7d-4be1c0a95d7e')
    """
    parent, _, name = str(location).rstrip("/").rpartition("/")
    return parent or ".", name


def read_manifest(location: str | Path, folder: Folder | None = None) -> SnapshotManifest:
    """The manifest of a snapshot; ``folder`` where it is open already.

    Raises
    ------
    DataError
        If there is none, or it is not of this version.
    """
    place = f"{str(location).rstrip('/')}/{MANIFEST_NAME}"
    try:
        content = (folder or open_folder(location)).read(MANIFEST_NAME)
    except OSError as error:
        raise DataError(
            f"expected a sample snapshot with a {MANIFEST_NAME} in {location}. There is none.",
            hint="name the folder that `ctrstream samples build` printed; without it a build was cut off",
        ) from error
    try:
        return SnapshotManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{place} is not a manifest of version {FORMAT_VERSION}: {'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}.",
            hint="build the snapshot again",
        ) from error


def data_files(location: str | Path, task: Task, manifest: SnapshotManifest | None = None) -> list[DataFile]:
    """Data files of a task, oldest partition first, wherever they lie.

    Raises
    ------
    DataError
        If there is no readable manifest, or the snapshot has no samples of the task.
    """
    known = manifest or read_manifest(location)
    if task not in known.tasks:
        raise DataError(f"{location} has no samples of the task {task}. It has: {', '.join(known.tasks)}.")
    parent, own = split_location(location)
    return [
        DataFile(f"{parent}/{own if part.origin == known.snapshot_id else part.origin}/{name}", file.rows)
        for part in known.of_task(task)
        for name, file in sorted(part.files.items())
    ]


def verify_files(location: str | Path, manifest: SnapshotManifest, task: Task | None = None) -> None:
    """Check size and digest of the files of one task, or of all.

    Raises
    ------
    DataError
        If a file is missing or altered.
    """
    for place, file in expected_files(location, manifest, task).items():
        verify_file(place, file)
    spec = read_spec(location)
    if spec.digest() != manifest.feature_spec_digest:
        raise DataError(
            f"{location}/{SPEC_NAME}: expected the feature spec with digest {manifest.feature_spec_digest}. "
            f"Received {spec.digest()}."
        )


def expected_files(
    location: str | Path, manifest: SnapshotManifest, task: Task | None = None
) -> dict[str, SnapshotFile]:
    """Files that are no data, and the data files of one task or of all, by location."""
    parent, own = split_location(location)
    expected = {f"{parent}/{own}/{name}": file for name, file in manifest.extra_files.items()}
    for part in manifest.partitions:
        if task in (None, part.task):
            folder = own if part.origin == manifest.snapshot_id else part.origin
            expected |= {f"{parent}/{folder}/{name}": file for name, file in part.files.items()}
    return expected


def verify_file(place: str, expected: SnapshotFile) -> None:
    """Check size and digest of one file; it is read in small blocks.

    Raises
    ------
    DataError
        If it is missing or altered.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with _opened(place) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise DataError(
            f"{place} is in the manifest but not there.",
            hint="build the snapshot again; one that others refer to must stay where it is",
        ) from error
    if (size, digest.hexdigest()) != (expected.bytes, expected.sha256):
        raise DataError(
            f"{place} was altered: expected sha256 {expected.sha256} ({expected.bytes} bytes). "
            f"Received {digest.hexdigest()} ({size} bytes).",
            hint="snapshots are immutable: build it again",
        )


def _opened(place: str) -> Any:
    if not is_uri(place):
        return Path(place).open("rb")
    system, path = open_for_arrow(place)
    return system.open_input_file(path)


def read_spec(location: str | Path, folder: Folder | None = None) -> FeatureSpec:
    """The feature spec that a snapshot was encoded with; ``folder`` where it is open already."""
    try:
        content = (folder or open_folder(location)).read(SPEC_NAME)
    except OSError as error:
        raise DataError(f"{location}: {SPEC_NAME} is not there.", hint="build the snapshot again") from error
    return FeatureSpec.from_toml(content.decode(), f"{location}/{SPEC_NAME}")


def read_rows(
    location: str | Path, task: Task, columns: Sequence[str] | None = None, *, verify: bool = True
) -> pa.Table:
    """Rows of one task, ordered by ``(event_time, sample_id)``.

    Parameters
    ----------
    location : str or Path
        A snapshot.
    task : {"click", "conversion", "view_through"}
    columns : sequence of str, optional
        Columns of `SAMPLE_SCHEMA`; all by default.
    verify : bool
        Check the digests first.

    Raises
    ------
    DataError
        If the snapshot is incomplete or altered, or has no rows of the task.
    """
    manifest = read_manifest(location)
    files = data_files(location, task, manifest)
    if verify:
        verify_files(location, manifest, task)
    wanted = SAMPLE_SCHEMA.names if columns is None else list(columns)
    needed = [name for name in SAMPLE_SCHEMA.names if name in {*wanted, "event_time", "sample_id"}]
    schema = pa.schema([SAMPLE_SCHEMA.field(name) for name in needed])
    tables = []
    for file in files:
        with _opened(file.location) as stream:
            tables.append(pq.read_table(stream, columns=needed).cast(schema))
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return table.sort_by([("event_time", "ascending"), ("sample_id", "ascending")]).select(wanted)


def read_snapshot(location: str | Path, task: Task, *, verify: bool = True) -> TrainingSet:
    """Training rows of one task, ordered by ``(event_time, sample_id)``.

    Parameters
    ----------
    location : str or Path
        A snapshot.
    task : {"click", "conversion", "view_through"}
    verify : bool
        Check the digests first.

    Raises
    ------
    DataError
        If the snapshot is incomplete or altered, or has no rows of the task.
    """
    columns = ["buckets", "numbers", "user_key", "segment_key", "label", "weight", "event_time", "mature"]
    table = read_rows(location, task, [*columns, "observed_share"], verify=verify)
    spec = read_spec(location)
    widths = {
        "buckets": len(spec.column_field),
        "numbers": len(spec.numeric),
        "segment_key": len(read_manifest(location).segments),
    }
    matrices = {name: _matrix(table.column(name), width) for name, width in widths.items()}

    def column(name: str) -> NDArray[Any]:
        return np.asarray(table.column(name).to_numpy())

    return TrainingSet(
        buckets=matrices["buckets"],
        numbers=matrices["numbers"],
        segment_key=matrices["segment_key"],
        user_key=column("user_key"),
        label=column("label"),
        weight=column("weight"),
        event_time=column("event_time"),
        mature=column("mature"),
        observed_share=column("observed_share"),
    )


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False)
    if len(values) != len(array) * width:
        raise DataError(f"expected {width} values in each row. Received {len(values)} in {len(array)} rows.")
    return np.asarray(values).reshape(len(array), width)
