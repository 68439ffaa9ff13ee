"""An event log in files, as one sequence in the order in which its rows became known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.event_file_reading import FileRows, RejectedRow, read_event_file, read_malformed_file
from pipelines.events import (
    CLICK,
    CONVERSION,
    IMPRESSION,
    KINDS,
    TOPICS,
    DeadLetter,
    EventBlock,
    contract_schema,
)
from pipelines.feature_columns import concat_events
from pipelines.hashing import HASH_SEED, hash_column

__all__ = ["MALFORMED_FILE", "EventFiles"]

# Raw messages that are no events, kept beside a log so that replays meet them too.
MALFORMED_FILE = "malformed.jsonl"
_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class _LogFile:
    path: Path
    kind: int | None  # None: raw messages of all topics


class EventFiles:
    """A folder of event files: ``impressions*``, ``clicks*``, ``conversions*``, ``.jsonl`` or ``.parquet``.

    Rows are ordered by ``arrival_time``, then kind, then XXH64 of ``event_id`` (unsigned); rows that agree in
    all three keep the order of their files. A row that cannot be used comes with kind DEAD_LETTER when the
    good row before it in its file did, behind all other rows of that moment. The order depends on the events
    alone, so the same log sent through any number of Kafka partitions and merged comes out the same.

    Parameters
    ----------
    folder : Path

    Attributes
    ----------
    rows : int
        Number of input rows, those that cannot be used included.
    kind : ndarray of int8, shape (rows,)
        IMPRESSION, CLICK, CONVERSION or DEAD_LETTER.
    arrival_time : ndarray of int64, shape (rows,)
        When each row became known, ms; never decreases.
    tables : tuple of pa.Table
        Good impressions, clicks and conversions, each in order.
    rejected : list of RejectedRow
        The other rows, in order.

    Raises
    ------
    DataError
        If there are no impressions, a file cannot be read, or a column is missing or of a wrong type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _find_files(folder)
        parts = [part for file in self._files for part in _read(file)]
        tables = [_sorted_table(kind, parts) for kind in range(3)]
        self.tables: tuple[pa.Table, pa.Table, pa.Table] = (tables[0], tables[1], tables[2])
        if not self.impressions.num_rows:
            raise _no_good_impressions(folder, parts)
        earliest = min(int(_arrival(table)[0]) for table in tables if table.num_rows)
        self.rejected = _sorted_rejected([row for part in parts for row in part.rejected], earliest)
        arrival = [
            *(_arrival(table) for table in tables),
            np.array([row.arrival_time for row in self.rejected], np.int64),
        ]
        self.rows = sum(map(len, arrival))
        kind = np.repeat(np.arange(4, dtype=np.int8), [len(times) for times in arrival])
        times = np.concatenate(arrival)
        # Kinds lie one behind the other, so a stable sort by time is a sort by (time, kind).
        order = np.argsort(times, kind="stable")
        self.kind: NDArray[np.int8] = kind[order]
        self.arrival_time: NDArray[np.int64] = times[order]

    @property
    def impressions(self) -> pa.Table:
        return self.tables[IMPRESSION]

    @property
    def clicks(self) -> pa.Table:
        return self.tables[CLICK]

    @property
    def conversions(self) -> pa.Table:
        return self.tables[CONVERSION]

    @property
    def dead_letters(self) -> list[DeadLetter]:
        """The rows that cannot be used, in order."""
        return [row.letter for row in self.rejected]

    @property
    def impression_arrival_time(self) -> NDArray[np.int64]:
        """When each row of ``impressions`` became known, ms; never decreases."""
        return _arrival(self.impressions)

    def impressions_before(self, arrival_time: int) -> pa.Table:
        """Impressions that became known before a time (ms), without copying."""
        return self.impressions.slice(0, int(np.searchsorted(self.impression_arrival_time, arrival_time)))

    def kind_of_source(self) -> dict[str, int]:
        """Event kind of each file, or of each topic within it, that a dead letter can name as its source."""
        named = {file.path.name: file.kind for file in self._files if file.kind is not None}
        for kind, topic in enumerate(TOPICS):
            named |= {topic: kind, f"{MALFORMED_FILE}:{topic}": kind}
        return named

    @property
    def partitions(self) -> list[tuple[str, int]]:
        """What positions of rows that are set aside later refer to: the whole order, as one partition."""
        return [(TOPICS[IMPRESSION], 0)]

    def blocks(self, start: int = 0, stop: int | None = None, block_rows: int = 8192) -> Iterator[EventBlock]:
        """Rows ``[start, stop)`` in order, as slices that copy no table.

        Positions are partition 0, the row's place in the whole order as offset, and row 0.
        """
        stop = self.rows if stop is None else min(stop, self.rows)
        letters = self.dead_letters
        first = np.bincount(self.kind[:start], minlength=4)
        for begin in range(start, stop, block_rows):
            end = min(begin + block_rows, stop)
            kind = self.kind[begin:end]
            count = np.bincount(kind, minlength=4)
            impressions, clicks, conversions = (
                table.slice(first[which], count[which]) for which, table in enumerate(self.tables)
            )
            yield EventBlock(
                tables=(impressions, clicks, conversions),
                kind=kind,
                arrival_time=self.arrival_time[begin:end],
                partition=np.zeros(end - begin, np.int32),
                offset=np.arange(begin, end),
                row=np.zeros(end - begin, np.int32),
                dead_letters=letters[first[3] : first[3] + count[3]],
            )
            first += count

    def digest(self) -> str:
        """sha256 over names, sizes and contents of the files: the same digest, the same log."""
        whole = hashlib.sha256()
        for file in self._files:
            with file.path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            whole.update(f"{file.path.name}\0{file.path.stat().st_size}\0{content}\n".encode())
        return whole.hexdigest()


def _find_files(folder: Path) -> list[_LogFile]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the event folder {folder}: {error.strerror}.") from error
    files = [
        _LogFile(path, kind)
        for kind, topic in enumerate(TOPICS)
        for path in entries
        if path.name.startswith(topic) and path.suffix in _SUFFIXES and path.is_file()
    ]
    if not any(file.kind == IMPRESSION for file in files):
        names = ", ".join(path.name for path in entries[:12])
        raise DataError(
            f"expected impressions*.jsonl or impressions*.parquet in {folder}. "
            f"The folder has: {names or '(nothing)'}{', ...' if len(entries) > 12 else ''}.",
            hint="`ctrstream simulate --out DIR` writes an example",
        )
    stems = [file.path.with_suffix("") for file in files]
    twice = sorted({stem.name for stem in stems if stems.count(stem) > 1})
    if twice:
        raise DataError(
            f"{folder} holds the same events in two formats: {', '.join(twice)} as .jsonl and .parquet.",
            hint="keep one of the two, or name files that differ differently",
        )
    malformed = [_LogFile(path, None) for path in entries if path.name == MALFORMED_FILE]
    return files + malformed


def _read(file: _LogFile) -> list[FileRows]:
    return read_malformed_file(file.path) if file.kind is None else [read_event_file(file.kind, file.path)]


def _sorted_table(kind: int, parts: list[FileRows]) -> pa.Table:
    tables = [part.table for part in parts if part.kind == kind]
    filled = [table for table in tables if table.num_rows] or tables[:1]
    if not filled:
        return contract_schema(kind).empty_table()
    table = concat_events(kind, filled)
    order = _order(_arrival(table), table.column("event_id"))
    return table.combine_chunks() if order is None else table.take(pa.array(order)).combine_chunks()


def _order(arrival: NDArray[np.int64], event_id: pa.ChunkedArray) -> NDArray[np.int64] | None:
    """Rows by arrival time, then hash of the event id; None if they are in this order already."""
    order = np.argsort(arrival, kind="stable")
    times = arrival[order]
    same = times[1:] == times[:-1]
    # Hashes cost more than all the rest, and only rows of the same moment need them.
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    if len(tied):
        rows = order[tied]
        hashes = hash_column(event_id.take(pa.array(rows)), HASH_SEED)
        order[tied] = rows[np.lexsort((hashes, times[tied]))]
    return None if np.array_equal(order, np.arange(len(order))) else order


def _arrival(table: pa.Table) -> NDArray[np.int64]:
    return np.asarray(table.column("arrival_time").to_numpy(), np.int64)


def _sorted_rejected(rows: list[RejectedRow], earliest: int) -> list[RejectedRow]:
    """Rows by the time at which they became known; those that do not tell come with the first good row."""
    if not rows:
        return []
    rows = [row if row.arrival_time >= 0 else replace(row, arrival_time=earliest) for row in rows]
    hashes = hash_column(pa.array([row.payload for row in rows], pa.binary()), HASH_SEED)
    times = np.array([row.arrival_time for row in rows], np.int64)
    return [rows[index] for index in np.lexsort((hashes, times))]


def _no_good_impressions(folder: Path, parts: list[FileRows]) -> DataError:
    rejected = [row for part in parts if part.kind == IMPRESSION for row in part.rejected]
    if not rejected:
        return DataError(f"the {KINDS[IMPRESSION]}s in {folder} have no rows.")
    letter = rejected[0].letter
    return DataError(
        f"none of the {len(rejected)} {KINDS[IMPRESSION]}s in {folder} can be used. "
        f"{letter.source} row {letter.offset}: {letter.reason}"
    )
