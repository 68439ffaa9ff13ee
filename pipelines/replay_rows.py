"""From references of replayed rows back to the rows themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import Task
from pipelines.errors import DataError
from pipelines.replay_draw import REPLAY_SCHEMA, Draw, ReplayWindow
from pipelines.snapshot import read_manifest, read_spec, split_location
from pipelines.stream_columns import TRAINING_COLUMNS, to_training_set, with_widths
from pipelines.stream_files import DataFile, ParquetFiles
from pipelines.training_set import TrainingSet

__all__ = ["read_references", "replay_rows", "write_references"]

_ABOUT = b"ctrstream.replay"


def write_references(path: Path, draw: Draw, snapshot: str, window: ReplayWindow, seed: int) -> None:
    """Write references to a Parquet file, whole or not at all; its metadata says how they were drawn.

    Parameters
    ----------
    path : Path
    draw : Draw
    snapshot : str
        Id of the snapshot that they refer to.
    window : ReplayWindow
    seed : int
    """
    about = {
        "snapshot": snapshot,
        "as_of": window.as_of,
        "by": window.by,
        "seed": seed,
        "pool": draw.pool,
    }
    table = draw.references.replace_schema_metadata({_ABOUT: json.dumps(about, sort_keys=True)})
    scratch = path.with_name(f".{path.name}.part")
    try:
        pq.write_table(table, scratch, compression="zstd")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_references(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """References that `write_references` wrote, and how they were drawn.

    Raises
    ------
    DataError
        If it is no such file.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"expected references of replayed rows in {path}. There is no such file.") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}.") from error
    about = (table.schema.metadata or {}).get(_ABOUT)
    if about is None or table.schema.names != REPLAY_SCHEMA.names:
        raise DataError(
            f"expected references of replayed rows in {path}. Received: {', '.join(table.schema.names)}.",
            hint="name a file that `ctrstream samples replay` wrote",
        )
    return table.replace_schema_metadata(None), json.loads(about)


def replay_rows(location: str | Path, path: Path, task: Task) -> TrainingSet:
    """The replayed rows of one task, in the order in which they were drawn.

    Parameters
    ----------
    location : str or Path
        The snapshot that they were drawn from. The folders of those that it refers to lie beside it.
    path : Path
        File of references.
    task : {"click", "conversion", "view_through"}

    Returns
    -------
    TrainingSet
        Ordered by draw, not by time; a row drawn twice is there twice. Only row groups with drawn rows are
        read.

    Raises
    ------
    DataError
        If the references are of another snapshot, none is of the task, or a file is not what it was.
    """
    references, about = read_references(path)
    manifest = read_manifest(location)
    if about["snapshot"] != manifest.snapshot_id:
        raise DataError(
            f"expected references to rows of {manifest.snapshot_id}. Received some of {about['snapshot']}.",
            hint="name the snapshot that they were drawn from",
        )
    own = references.filter(pc.equal(references.column("task"), task))
    if own.num_rows == 0:
        raise DataError(f"{path} has no rows of the task {task}.")
    spec = read_spec(location)
    schema = with_widths(
        pa.schema([pa.field("sample_id", pa.string()), *TRAINING_COLUMNS]),
        {
            "buckets": len(spec.column_field),
            "numbers": len(spec.numeric),
            "segment_key": len(manifest.segments),
        },
    )
    sizes = {name: file.rows for part in manifest.of_task(task) for name, file in part.files.items()}
    parent, _ = split_location(location)
    parts, places = [], []
    for file in pc.unique(own.column("file")).to_pylist():
        chosen = np.flatnonzero(pc.equal(own.column("file"), file).to_numpy())
        rows = own.column("row").to_numpy()[chosen]
        wanted, back = np.unique(rows, return_inverse=True)
        name = file.partition("/")[2]
        if name not in sizes:
            raise DataError(f"{path} refers to {file}, which {manifest.snapshot_id} does not have.")
        found = _read(DataFile(f"{parent}/{file}", sizes[name]), schema, wanted).take(pa.array(back))
        expected = own.column("sample_id").take(pa.array(chosen)).combine_chunks()
        if not found.column("sample_id").combine_chunks().equals(expected):
            raise DataError(f"{parent}/{file}: expected the rows that {path} names. Received others.")
        parts.append(found)
        places.append(chosen)
    order = np.argsort(np.concatenate(places), kind="stable")
    table = pa.concat_tables(parts).take(pa.array(order)).combine_chunks()
    (batch,) = table.select(TRAINING_COLUMNS.names).to_batches()
    return to_training_set(batch)


def _read(file: DataFile, schema: pa.Schema, wanted: NDArray[np.int64]) -> pa.Table:
    """Rows of a file by their number, ascending."""
    found = [
        chunk.take(pa.array(wanted[(wanted >= first) & (wanted < first + chunk.num_rows)] - first))
        for first, chunk in _chunks(file, schema, wanted)
    ]
    return pa.Table.from_batches(found, schema)


def _chunks(
    file: DataFile, schema: pa.Schema, wanted: NDArray[np.int64]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    files = ParquetFiles((file,), schema)
    first = 0
    for piece in files.pieces:
        if np.any((wanted >= first) & (wanted < first + len(piece))):
            at = first
            with closing(files.read([piece])) as chunks:
                for chunk in chunks:
                    yield at, chunk
                    at += chunk.num_rows
        first += len(piece)
