"""Sample files of a given layout, for the tests of streams."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from hypothesis import strategies as st

from pipelines.sample_stream import BatchStream, DataFile, SampleStream
from tests.sample_files import BEGIN, sample_rows, write_rows

# Rows in each row group of each file.
LAYOUTS = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4)


@contextmanager
def written(layout: Sequence[Sequence[int]], *, statistics: bool = True) -> Iterator[list[DataFile]]:
    """Files of a layout; their times overlap and often coincide."""
    with tempfile.TemporaryDirectory() as folder:
        yield [
            write_rows(
                Path(folder) / f"{number}.parquet",
                sample_rows(sum(groups), number, begin=BEGIN + 5 * number, span=12),
                groups,
                statistics=statistics,
            )
            for number, groups in enumerate(layout)
        ]


def tables(layout: Sequence[Sequence[int]]) -> pa.Table:
    """All rows of `written`, in the order of the files."""
    return pa.concat_tables(
        sample_rows(sum(groups), number, begin=BEGIN + 5 * number, span=12)
        for number, groups in enumerate(layout)
    )


def keys(batches: BatchStream[pa.RecordBatch]) -> list[int]:
    return [key for batch in batches for key in batch.column("user_key").to_pylist()]


def row_keys(stream: SampleStream) -> list[int]:
    return keys(stream.batch(5))
