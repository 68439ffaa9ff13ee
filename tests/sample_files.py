"""Parquet files as a snapshot has them, with row groups of given sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.stream_columns import TRAINING_COLUMNS
from pipelines.stream_files import DataFile

COLUMNS = pa.schema([pa.field("sample_id", pa.string()), *TRAINING_COLUMNS])
MATRICES = {"buckets": 3, "numbers": 2, "segment_key": 1}
BEGIN = 1_767_571_200_000


def sample_rows(
    n: int, seed: int = 0, *, begin: int = BEGIN, span: int = 86_400_000, buckets: int = 3
) -> pa.Table:
    """Rows ordered by ``(event_time, sample_id)``; ``user_key`` numbers the rows of all seeds."""
    noise = np.random.default_rng(seed)
    names = np.array([f"{seed}-{name:06d}" for name in noise.permutation(n)], dtype=object)
    opened = begin + noise.integers(0, span, n)
    order = np.lexsort((names.astype(str), opened))
    columns = {
        "sample_id": pa.array(names[order], pa.string()),
        "buckets": _lists(noise.integers(0, 99, (n, buckets)).astype(np.int32)),
        "numbers": _lists(noise.normal(size=(n, 2)).astype(np.float32)),
        "user_key": pa.array(seed * 1_000_000 + np.arange(n)),
        "segment_key": _lists(noise.integers(0, 9, (n, 1))),
        "label": pa.array(noise.integers(0, 2, n), pa.float32()),
        "weight": pa.array(noise.uniform(0.5, 2.0, n), pa.float32()),
        "event_time": pa.array(opened[order]),
        "mature": pa.array(noise.random(n) < 0.5),
        "observed_share": pa.array(noise.random(n), pa.float32()),
    }
    return pa.table(columns, schema=COLUMNS)


def _lists(matrix: NDArray[Any]) -> pa.ListArray:
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * np.int32(matrix.shape[1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.ravel()))


def write_rows(path: Path, table: pa.Table, groups: Sequence[int], *, statistics: bool = True) -> DataFile:
    """A file with row groups of these sizes, which add up to the rows of the table."""
    start = 0
    with pq.ParquetWriter(path, table.schema, write_statistics=statistics) as writer:
        for rows in groups:
            writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
            start += rows
    return DataFile(str(path), table.num_rows)
