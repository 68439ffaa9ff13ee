"""Rows of the lake brought back into the order of the topics they came from, on disk.

In the lake rows lie by kind and hour of event time, in no order. A spool reads the files that matter twice:
once to count the rows of each partition by offset, and once to sort them into buckets of consecutive offsets,
each small enough to be put in order in memory. Memory depends on neither the rows nor their number.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.lake import LakeBatch, OffsetRange, attempt_folder
from pipelines.lake_rows import LAKE_SCHEMA
from pipelines.storage import Folder, is_uri, open_for_arrow

__all__ = ["LakeSpool"]

# Rows of a bucket, and of a read; bytes that wait to be written. They bound the memory.
_BUCKET_ROWS = 16_384
_READ_ROWS = 8_192
_WAITING_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20
# Offsets of a partition are counted in at most so many bins.
_BINS = 1 << 16
_PLACE = ("source", "partition", "offset")

Part = tuple[str, int]


@dataclass
class _Partition:
    """How the wanted rows of one partition are spread over its offsets."""

    start: int
    width: int  # offsets of a bin
    rows: NDArray[np.int64]  # of each bin

    @classmethod
    def over(cls, start: int, stop: int) -> _Partition:
        width = -(-(stop - start) // _BINS)
        return cls(start, width, np.zeros(-(-(stop - start) // width), np.int64))

    def bins(self, offset: NDArray[np.int64]) -> NDArray[np.int64]:
        return (offset - self.start) // self.width

    def buckets(self) -> NDArray[np.int64]:
        """Bucket of each bin: neighbours together, up to `_BUCKET_ROWS` rows."""
        bucket, filled, found = 0, 0, np.zeros(len(self.rows), np.int64)
        for index, rows in enumerate(self.rows.tolist()):
            if filled and filled + rows > _BUCKET_ROWS:
                bucket, filled = bucket + 1, 0
            filled += rows
            found[index] = bucket
        return found


class LakeSpool:
    """Wanted messages of a lake, partition by partition in the order of their log.

    Parameters
    ----------
    lake : Folder
    batches : sequence of LakeBatch
    held : mapping of str to sequence of OffsetRange
        What to take from which batch, each message once: see `pipelines.lake_offsets.find_offsets`.
    scratch : Path
        A folder of the spool's own, emptied first and removed by `close`. It takes the disk of the rows.

    Raises
    ------
    DataError
        If a file of the lake cannot be read, or a batch has not the rows that its manifest counts.
    """

    def __init__(
        self,
        lake: Folder,
        batches: Sequence[LakeBatch],
        held: Mapping[str, Sequence[OffsetRange]],
        scratch: Path,
    ) -> None:
        self._scratch = scratch
        self._waiting: dict[tuple[Part, int], list[pa.Table]] = {}
        self._waiting_bytes = 0
        self._numbers = count()
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        chosen = [batch for batch in batches if batch.batch in held]
        sources = [(_Files(lake, batch), held[batch.batch]) for batch in chosen]
        self._partitions = self._counted(sources)
        self._buckets = {part: each.buckets() for part, each in self._partitions.items()}
        for files, ranges in sources:
            for table in files.read(files.wanted, LAKE_SCHEMA.names):
                self._sort_in(table, ranges)
        self._flush()

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(int(each.rows.sum()) for each in self._partitions.values())

    def read(self, topic: str, partition: int) -> Iterator[pa.Table]:
        """Rows of a partition by offset and row, about 16 thousand at a time, whole messages; read once.

        Raises
        ------
        DataError
            If the lake has a row twice.
        """
        part = (topic, partition)
        if part not in self._partitions:
            return
        for bucket in range(int(self._buckets[part][-1]) + 1):
            folder = self._folder(part, bucket)
            if not folder.exists():
                continue
            table = pa.concat_tables([_load(path) for path in sorted(folder.iterdir())])
            table = table.sort_by([("offset", "ascending"), ("row", "ascending")])
            offset, row = table.column("offset").to_numpy(), table.column("row").to_numpy()
            twice = np.flatnonzero((np.diff(offset) == 0) & (np.diff(row) == 0))
            if len(twice):
                where = f"row {row[twice[0]]} of offset {offset[twice[0]]} of {topic}-{partition}"
                raise DataError(f"expected each row of the lake once. Received twice: {where}.")
            yield table
            shutil.rmtree(folder)

    def close(self) -> None:
        """Remove what is on disk."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _counted(self, sources: Sequence[tuple[_Files, Sequence[OffsetRange]]]) -> dict[Part, _Partition]:
        spans: dict[Part, tuple[int, int]] = {}
        for _, ranges in sources:
            for each in ranges:
                low, high = spans.get((each.topic, each.partition), (each.start, each.stop))
                spans[each.topic, each.partition] = min(low, each.start), max(high, each.stop)
        found = {part: _Partition.over(*span) for part, span in sorted(spans.items())}
        for files, ranges in sources:
            files.check()
            for name in files.names:
                for table in files.read([name], _PLACE):
                    for part, rows in _wanted(table, ranges):
                        offset = table.column("offset").to_numpy()[rows]
                        np.add.at(found[part].rows, found[part].bins(offset), 1)
                        files.wanted[name] = None
        return found

    def _sort_in(self, table: pa.Table, ranges: Sequence[OffsetRange]) -> None:
        for part, rows in _wanted(table, ranges):
            offset = table.column("offset").to_numpy()[rows]
            bucket = self._buckets[part][self._partitions[part].bins(offset)]
            order = np.argsort(bucket, kind="stable")
            taken, ordered = table.take(pa.array(rows[order])), bucket[order]
            self._waiting_bytes += taken.nbytes
            ends = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(ordered)]
            for start, stop in pairwise(ends):
                key = part, int(ordered[start])
                self._waiting.setdefault(key, []).append(taken.slice(start, stop - start))
        if self._waiting_bytes > _WAITING_BYTES:
            self._flush()

    def _flush(self) -> None:
        for (part, bucket), tables in self._waiting.items():
            folder = self._folder(part, bucket)
            folder.mkdir(parents=True, exist_ok=True)
            table = pa.concat_tables(tables)
            path = folder / f"{next(self._numbers):09d}.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        self._waiting, self._waiting_bytes = {}, 0

    def _folder(self, part: Part, bucket: int) -> Path:
        return self._scratch / f"{list(self._partitions).index(part)}-{bucket}"


class _Files:
    """Parquet files of one batch.

    Attributes
    ----------
    names : list of str
        ``kind=.../event_date=.../event_hour=.../*.parquet``, ordered.
    wanted : dict of str to None
        Those that have been seen to hold wanted rows, in order.
    """

    def __init__(self, lake: Folder, batch: LakeBatch) -> None:
        self._folder, self._batch = attempt_folder(lake, batch.batch, batch.attempt), batch
        self.names = [name for name in self._folder.files() if name.endswith(".parquet")]
        self.wanted: dict[str, None] = {}

    def check(self) -> None:
        """Raise DataError unless all rows are there that the manifest counts."""
        found = dict.fromkeys(self._batch.rows, 0)
        for name in self.names:
            with self._open(name) as file:
                found[_kind_of(name)] = found.get(_kind_of(name), 0) + file.metadata.num_rows
        if found != self._batch.rows:
            raise DataError(
                f"{self._folder.location}: expected the rows of the manifest, {self._batch.rows}. "
                f"Received: {found}.",
                hint="files of the lake have been removed or added; restore them",
            )

    def read(self, names: Any, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of `LAKE_SCHEMA` of some files, few rows at a time; those that a file lacks are null."""
        for name in names:
            with self._open(name) as file:
                there = [column for column in columns if column in file.schema_arrow.names]
                try:
                    for batch in file.iter_batches(_READ_ROWS, columns=there, use_threads=False):
                        yield _as_lake(pa.Table.from_batches([batch]), columns, _kind_of(name))
                except (OSError, pa.ArrowException) as error:
                    raise self._unreadable(name, error) from error

    def _open(self, name: str) -> pq.ParquetFile:
        location = f"{self._folder.location.rstrip('/')}/{name}"
        try:
            system, path = (
                open_for_arrow(location) if is_uri(location) else (pafs.LocalFileSystem(), location)
            )
            return pq.ParquetFile(path, filesystem=system, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(
            f"{self._folder.location}/{name}: expected a Parquet file of the lake. Received: {reason}",
            hint="the file was removed, cut off or altered; restore it",
        )


def _wanted(table: pa.Table, ranges: Sequence[OffsetRange]) -> Iterator[tuple[Part, NDArray[np.int64]]]:
    """Rows of each partition that lie in the ranges."""
    source, partition = table.column("source"), table.column("partition").to_numpy()
    offset = table.column("offset").to_numpy()
    topics = {topic: np.asarray(pc.equal(source, topic)) for topic in {each.topic for each in ranges}}
    for each in ranges:
        inside = topics[each.topic] & (partition == each.partition)
        rows = np.flatnonzero(inside & (offset >= each.start) & (offset < each.stop))
        if len(rows):
            yield (each.topic, each.partition), rows


def _as_lake(table: pa.Table, columns: Sequence[str], kind: str) -> pa.Table:
    """The columns with the lake's types; ``kind`` stands in the name of the folder."""
    values = []
    for name in columns:
        wanted = LAKE_SCHEMA.field(name).type
        if name == "kind":
            values.append(pa.array([kind] * table.num_rows, wanted))
        elif name in table.column_names:
            values.append(table.column(name).cast(wanted))
        else:
            values.append(pa.nulls(table.num_rows, wanted))
    return pa.table(values, names=list(columns))


def _kind_of(name: str) -> str:
    return name.partition("/")[0].removeprefix("kind=")


def _load(path: Path) -> pa.Table:
    with pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()
