"""Parquet files of a sample stream: opened on any file system, laid out in pieces, read piece by piece.

A piece is a range of rows of one row group. The layout comes from the footers, and rows are read in chunks
of a few MiB, so memory depends on neither the size of a file nor that of its row groups.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.errors import DataError
from pipelines.storage import is_uri, open_for_arrow
from pipelines.stream_columns import Bounds, check_type, conform, row_bytes

__all__ = ["DataFile", "ParquetFiles", "Piece"]

_CHUNK_BYTES = 8 << 20
_LEAST_CHUNK, _LARGEST_CHUNK = 256, 65_536
_BUFFER_BYTES = 1 << 20
_LEAST_BUFFER = 16 << 10


@dataclass(frozen=True)
class DataFile:
    """One Parquet file.

    Attributes
    ----------
    location : str
        A path, or a URI that `pyarrow.fs.FileSystem.from_uri` understands.
    rows : int
        Rows that it must have.
    """

    location: str
    rows: int


@dataclass(frozen=True)
class Piece:
    """Rows ``[start, stop)`` of a row group, counted among those inside the bounds.

    ``masked`` says that rows outside the bounds have to be left out when it is read. ``low`` and ``high``
    enclose the merge key in the row group; None without a key.
    """

    file: int
    group: int
    start: int
    stop: int
    masked: bool
    low: int | None = None
    high: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ParquetFiles:
    """Files of one schema, with the columns and rows that are wanted of them.

    Attributes
    ----------
    files : tuple of DataFile
    schema : pa.Schema
        Columns to read; matrices as lists of a fixed size.
    bounds : tuple of Bounds
    key : str or None
        Integer column whose range is wanted with each piece.
    """

    files: tuple[DataFile, ...]
    schema: pa.Schema
    bounds: tuple[Bounds, ...] = ()
    key: str | None = None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The row groups that have rows inside the bounds, in the order of the files.

        Footers are read once, and the bounded columns of row groups that lie across a bound.

        Raises
        ------
        DataError
            If a file is missing or damaged, or its rows or column types are not what is expected.
        """
        return tuple(piece for number in range(len(self.files)) for piece in self._pieces_of(number))

    def chunk_rows(self, readers: int = 1) -> int:
        """Rows to read at a time where ``readers`` files are read side by side."""
        return min(max(_CHUNK_BYTES // (row_bytes(self.schema) * readers), _LEAST_CHUNK), _LARGEST_CHUNK)

    def read(self, pieces: Sequence[Piece], readers: int = 1) -> Generator[pa.RecordBatch]:
        """Rows of pieces of one file, in their order, chunk by chunk; ``readers`` as in `chunk_rows`.

        Raises
        ------
        DataError
            If the file is missing or damaged, or a matrix has rows of another width.
        """
        if not pieces:
            return
        number = pieces[0].file
        with self._opened(number, readers) as parquet:
            for piece in pieces:
                with closing(self._read_piece(parquet, piece, self.chunk_rows(readers))) as chunks:
                    yield from chunks

    def _read_piece(self, parquet: pq.ParquetFile, piece: Piece, rows: int) -> Generator[pa.RecordBatch]:
        bounds = self.bounds if piece.masked else ()
        names = list(dict.fromkeys([*self.schema.names, *(bound.column for bound in bounds)]))
        at = 0
        chunks = parquet.iter_batches(
            batch_size=rows, row_groups=[piece.group], columns=names, use_threads=False
        )
        for chunk in chunks:
            inside = _filtered(chunk, bounds)
            begin, end = max(piece.start - at, 0), min(piece.stop - at, inside.num_rows)
            at += inside.num_rows
            if begin < end:
                yield conform(inside.slice(begin, end - begin), self.schema)
            if at >= piece.stop:
                return
        raise DataError(
            f"expected {piece.stop} rows in row group {piece.group}. Received {at}.",
            hint="the file was altered: build the snapshot again",
        )

    def _pieces_of(self, number: int) -> Iterator[Piece]:
        file = self.files[number]
        with self._opened(number) as parquet:
            footer = parquet.metadata
            if footer.num_rows != file.rows:
                raise DataError(f"expected {file.rows} rows. Received {footer.num_rows}.")
            self._check_columns(parquet.schema_arrow)
            for group in range(footer.num_row_groups):
                piece = self._piece_of(parquet, number, group)
                if len(piece):
                    yield piece

    def _piece_of(self, parquet: pq.ParquetFile, number: int, group: int) -> Piece:
        about = parquet.metadata.row_group(group)
        rows, masked = about.num_rows, False
        ranges = {
            name: _statistics(about, name)
            for name in {bound.column for bound in self.bounds} | ({self.key} if self.key else set())
        }
        crossing = []
        for bound in self.bounds:
            known = ranges[bound.column]
            if known is not None and bound.holds_none(*known):
                return Piece(number, group, 0, 0, False)
            if known is None or not bound.holds_all(*known):
                crossing.append(bound)
        if crossing and rows:
            masked = True
            names = list({bound.column for bound in crossing})
            chunks = parquet.iter_batches(_LARGEST_CHUNK, [group], names, use_threads=False)
            rows = sum(_filtered(chunk, tuple(crossing)).num_rows for chunk in chunks)
        if self.key is None or not rows:
            return Piece(number, group, 0, rows, masked)
        low, high = ranges[self.key] or _range_read(parquet, group, self.key)
        return Piece(number, group, 0, rows, masked, low, high)

    def _check_columns(self, received: pa.Schema) -> None:
        wanted = [(field.name, field.type) for field in self.schema]
        for name, kind in wanted:
            if name not in received.names:
                raise DataError(f"expected a column {name}. Received: {', '.join(received.names)}.")
            wrong = check_type(name, kind, received.field(name).type)
            if wrong:
                raise DataError(wrong)
        for name in [bound.column for bound in self.bounds] + ([self.key] if self.key else []):
            if name not in received.names:
                raise DataError(f"expected a column {name}. Received: {', '.join(received.names)}.")

    @contextmanager
    def _opened(self, number: int, readers: int = 1) -> Iterator[pq.ParquetFile]:
        """The open file; whatever goes wrong with it is a `DataError` that names it."""
        location = self.files[number].location
        columns = max(1, len(self.schema))
        buffer = max(_CHUNK_BYTES * 4 // (columns * readers), _LEAST_BUFFER)
        try:
            system, path = _file_system(location)
            with (
                system.open_input_file(path) as handle,
                pq.ParquetFile(handle, pre_buffer=False, buffer_size=min(buffer, _BUFFER_BYTES)) as parquet,
            ):
                yield parquet
        except DataError as error:
            raise DataError(f"{location}: {error.message}", error.hint) from error
        except FileNotFoundError as error:
            raise DataError(
                f"{location}: expected a Parquet file with {self.files[number].rows} rows. "
                "Received: no such file.",
                hint="build the snapshot again, or name its folder as it is now",
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{location}: expected a Parquet file with {self.files[number].rows} rows. "
                f"Received: {' '.join(str(error).split())}",
                hint="the file was cut off or altered: build the snapshot again",
            ) from error


def _file_system(location: str) -> tuple[pafs.FileSystem, str]:
    return open_for_arrow(location) if is_uri(location) else (pafs.LocalFileSystem(), location)


def _filtered(batch: pa.RecordBatch, bounds: Sequence[Bounds]) -> pa.RecordBatch:
    for bound in bounds:
        batch = batch.filter(bound.mask(batch))
    return batch


def _statistics(group: Any, name: str) -> tuple[Any, Any] | None:
    """Least and largest value of a column of a row group, if the footer says so and no value is null."""
    for column in range(group.num_columns):
        about = group.column(column)
        if about.path_in_schema != name:
            continue
        found = about.statistics
        if found is None or not found.has_min_max or not found.has_null_count or found.null_count:
            return None
        return found.min, found.max
    return None


def _range_read(parquet: pq.ParquetFile, group: int, name: str) -> tuple[int, int]:
    lows, highs = [], []
    for chunk in parquet.iter_batches(_LARGEST_CHUNK, [group], [name], use_threads=False):
        if chunk.column(0).null_count:
            raise DataError(f"column {name}: expected a value in each row. Received a null.")
        found = pc.min_max(chunk.column(0))
        lows.append(found["min"].as_py())
        highs.append(found["max"].as_py())
    return min(lows), max(highs)
