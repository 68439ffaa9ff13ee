"""Sample snapshots: an immutable folder of labelled, encoded rows, visible only when complete.

::

    <out>/20260112T000000Z-7d-4be1c0a95d7e/
        data/click-00000.parquet, data/conversion-00000.parquet, ...
        feature_spec.toml
        MANIFEST.json           counts, rates, windows, digests of every file

A snapshot is written into a hidden folder beside it and renamed: who sees the name sees all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.config import Task
from pipelines.duration import format_duration
from pipelines.errors import DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.training_set import TrainingSet

__all__ = [
    "FORMAT_VERSION",
    "SAMPLE_SCHEMA",
    "SnapshotFile",
    "SnapshotManifest",
    "TaskSummary",
    "finish",
    "read_manifest",
    "read_rows",
    "read_snapshot",
    "snapshot_id",
    "staging",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"
SPEC_NAME = "feature_spec.toml"
DATA_NAME = "data"

# Times and durations in ms. `outcome_known_at` is when the label became 1, null for label 0.
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("impression_id", pa.string()),
        pa.field("task", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("label", pa.int8()),
        pa.field("label_version", pa.int32()),
        pa.field("event_time", pa.int64()),
        pa.field("known_at", pa.int64()),
        pa.field("outcome_known_at", pa.int64()),
        pa.field("elapsed", pa.int64()),
        pa.field("mature", pa.bool_()),
        pa.field("weight", pa.float32()),
        pa.field("negative_sampling_rate", pa.float32()),
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


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SnapshotFile(_Part):
    """One file: size in bytes and SHA-256 (hex); ``rows`` for data files."""

    bytes: int
    sha256: str
    task: Task | None = None
    rows: int = 0


class TaskSummary(_Part):
    """What a snapshot holds of one task.

    Attributes
    ----------
    rows, positives, mature : int
    label_rate : float
        Share of positives, each row counted with its weight.
    mature_label_rate : float or None
        The same over mature rows; None where there is none.
    kinds : dict of str to int
        Rows by kind.
    misfits : int
        Rows left out because their impression does not fit the feature spec.
    content_digest : str
        Of all rows in whatever order: equal content, equal digest.
    delay_curve : dict
        State of the `pipelines.delay.DelayCurve` behind ``observed_share``.
    largest_follow_up : int
        Age (ms) of the oldest window: where the delay curve is normalised.
    """

    rows: int
    positives: int
    mature: int
    label_rate: float
    mature_label_rate: float | None
    kinds: dict[str, int]
    misfits: int
    content_digest: str
    delay_curve: dict[str, Any]
    largest_follow_up: int


class SnapshotManifest(_Part):
    """All that is known about a snapshot; times and windows in ms.

    ``events`` says what became of every event that was read, by kind and class; the classes of a kind add
    up to ``read``.
    """

    format_version: Literal[1] = 1
    snapshot_id: str
    as_of: int
    window: int
    since: int
    tasks: dict[Task, TaskSummary]
    events: dict[str, dict[str, int]]
    negative_sampling_rate: float
    feature_spec_digest: str
    feature_spec_inferred: bool
    sample_columns: dict[str, str]
    segments: tuple[str, ...]
    config: dict[str, Any]
    lake_version: str
    code_version: str
    files: dict[str, SnapshotFile]


def snapshot_id(as_of: int, window: int, inputs: Mapping[str, Any]) -> str:
    """Name of the snapshot of ``window`` ms up to ``as_of``; ``inputs`` is all else that decides its rows.

    Examples
    --------
    >>> snapshot_id(1_767_571_200_000, 604_800_000, {"negative_sampling_rate": 1.0})
    '20260105T000000Z-7d-f35c6bbcaf3a'
    """
    moment = datetime.fromtimestamp(as_of / 1000, UTC)
    text = moment.strftime("%Y%m%dT%H%M%S") + (f".{as_of % 1000:03d}" if as_of % 1000 else "")
    body = _canonical({"format": FORMAT_VERSION, "as_of": as_of, "window": window, **inputs})
    return f"{text}Z-{format_duration(window)}-{hashlib.sha256(body).hexdigest()[:12]}"


@contextmanager
def staging(out: Path, name: str) -> Iterator[Path]:
    """A hidden folder beside the snapshot to be; removed at the end unless `finish` renamed it.

    What a killed build of the same snapshot on this machine left behind is swept.
    """
    out.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}.{platform.node().replace('.', '-')}"
    for left in out.glob(f"{prefix}.*"):
        if not psutil.pid_exists(int(left.name.rsplit(".", 2)[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = out / f"{prefix}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish(staged: Path, target: Path, manifest: SnapshotManifest) -> Path:
    """Publish a staged snapshot.

    1. Check that the staged files are those of the manifest; write the manifest last.
    2. Flush every file and folder to disk.
    3. Rename: the commit point.

    If another build has published the same snapshot meanwhile, that one is kept.
    """
    found = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    if found != set(manifest.files):
        raise DataError(
            f"expected the files of the manifest in {staged}. Differing: "
            f"{', '.join(sorted(found ^ set(manifest.files)))}."
        )
    (staged / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    try:
        staged.rename(target)
    except OSError:
        if not (target / MANIFEST_NAME).is_file():
            raise
    _flush(target.parent)
    return target


def describe_file(path: Path, task: Task | None = None) -> SnapshotFile:
    """Size and digest of a file; rows of a data file."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    rows = pq.read_metadata(path).num_rows if task is not None else 0
    return SnapshotFile(bytes=path.stat().st_size, sha256=digest, task=task, rows=rows)


def read_manifest(path: Path) -> SnapshotManifest:
    """The manifest of a snapshot.

    Raises
    ------
    DataError
        If there is none, or it is not of this version.
    """
    file = path / MANIFEST_NAME
    try:
        return SnapshotManifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"expected a sample snapshot with a {MANIFEST_NAME} in {path}. {error.strerror}.",
            hint="name the folder that `ctrstream samples build` printed",
        ) from error
    except ValidationError as error:
        raise DataError(
            f"{file} is not a manifest of version {FORMAT_VERSION}: {error.errors()[0]['msg']}."
        ) from error


def verify_files(path: Path, manifest: SnapshotManifest, task: Task | None = None) -> None:
    """Check size and digest of the files of one task, or of all.

    Raises
    ------
    DataError
        If a file is missing, altered, or not in the manifest.
    """
    for name, expected in manifest.files.items():
        if task is not None and expected.task not in (None, task):
            continue
        file = path / name
        if not file.is_file():
            raise DataError(
                f"{path}: {name} is in the manifest but not there.", hint="build the snapshot again"
            )
        received = describe_file(file)
        if (received.bytes, received.sha256) != (expected.bytes, expected.sha256):
            raise DataError(
                f"{file} was altered: expected sha256 {expected.sha256} ({expected.bytes} bytes). "
                f"Received {received.sha256} ({received.bytes} bytes).",
                hint="snapshots are immutable: build it again",
            )
    spec = read_spec(path)
    if spec.digest() != manifest.feature_spec_digest:
        raise DataError(
            f"{path / SPEC_NAME}: expected the feature spec with digest {manifest.feature_spec_digest}. "
            f"Received {spec.digest()}."
        )


def read_spec(path: Path) -> FeatureSpec:
    """The feature spec that a snapshot was encoded with."""
    return FeatureSpec.read(path / SPEC_NAME)


def read_rows(path: Path, task: Task, columns: list[str] | None = None, *, verify: bool = True) -> pa.Table:
    """Rows of one task, ordered by ``(event_time, sample_id)``.

    Parameters
    ----------
    path : Path
        A snapshot.
    task : {"click", "conversion"}
    columns : list of str, optional
        Columns of `SAMPLE_SCHEMA`; all by default.
    verify : bool
        Check the digests first.

    Raises
    ------
    DataError
        If the snapshot is incomplete or altered, or has no rows of the task.
    """
    manifest = read_manifest(path)
    if task not in manifest.tasks:
        raise DataError(f"{path} has no samples of the task {task}. It has: {', '.join(manifest.tasks)}.")
    if verify:
        verify_files(path, manifest, task)
    wanted = SAMPLE_SCHEMA.names if columns is None else columns
    needed = [name for name in SAMPLE_SCHEMA.names if name in {*wanted, "event_time", "sample_id"}]
    schema = pa.schema([SAMPLE_SCHEMA.field(name) for name in needed])
    files = sorted(name for name, file in manifest.files.items() if file.task == task)
    tables = [pq.read_table(path / name, columns=needed).cast(schema) for name in files]
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return table.sort_by([("event_time", "ascending"), ("sample_id", "ascending")]).select(wanted)


def read_snapshot(path: Path, task: Task, *, verify: bool = True) -> TrainingSet:
    """Training rows of one task, ordered by ``(event_time, sample_id)``.

    Parameters
    ----------
    path : Path
        A snapshot.
    task : {"click", "conversion"}
    verify : bool
        Check the digests first.

    Raises
    ------
    DataError
        If the snapshot is incomplete or altered, or has no rows of the task.
    """
    columns = ["buckets", "numbers", "user_key", "segment_key", "label", "weight", "event_time", "mature"]
    table = read_rows(path, task, [*columns, "observed_share"], verify=verify)
    spec = read_spec(path)
    widths = {
        "buckets": len(spec.column_field),
        "numbers": len(spec.numeric),
        "segment_key": len(read_manifest(path).segments),
    }
    matrices = {name: _matrix(table.column(name), width) for name, width in widths.items()}

    def column(name: str) -> NDArray[Any]:
        return np.asarray(table.column(name).to_numpy())

    return TrainingSet(
        buckets=matrices["buckets"],
        numbers=matrices["numbers"],
        segment_key=matrices["segment_key"],
        user_key=column("user_key"),
        label=column("label").astype(np.float32),
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


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
