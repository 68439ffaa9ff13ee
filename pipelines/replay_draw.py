"""Replay offline: yesterday's rows of a snapshot from after this time of day, drawn as the worker mixes them.

The worker remembers the rows it has said by when they were known, and with each update draws, with
replacement, from those of ``(T - 24 h, midnight)``, every row as likely as any other
(`pipelines.replay.ReplayBuffer`). The same is done here with the rows of a snapshot, without holding all of
them and without a random number:

Each row i gets a Poisson process of its own, moments ``t_i1 < t_i2 < ...`` whose gaps ``-log(U)`` come from
stable hashes of its sample id, the seed and the number of the gap. In the union of the processes each next
moment belongs to any row with the same chance, independently of the others. So the N earliest moments are N
draws with replacement, in a random order. Which they are depends on the rows and the seed alone: files may be
read in any order, in parts, or in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.duration import DAY_MS
from pipelines.errors import ConfigError
from pipelines.hashing import hash_column, hash_text
from pipelines.snapshot import SAMPLE_SCHEMA, read_manifest, split_location
from pipelines.snapshot_manifest import PartitionSummary, SnapshotManifest
from pipelines.snapshot_partitions import PartitionGrid, closes_after
from pipelines.stream_files import DataFile, ParquetFiles, Piece

__all__ = ["REPLAY_SCHEMA", "Draw", "ReplayTime", "ReplayWindow", "draw_replay"]

ReplayTime = Literal["event_time", "known_at"]

# A row by reference. `file` is relative to the folder of snapshots, `row` counts from 0 within it; `draw`
# numbers the draws of a task in their order.
REPLAY_SCHEMA = pa.schema(
    [
        pa.field("task", pa.string()),
        pa.field("draw", pa.int64()),
        pa.field("sample_id", pa.string()),
        pa.field("impression_id", pa.string()),
        pa.field("partition", pa.string()),
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("weight", pa.float32()),
        pa.field("event_time", pa.int64()),
        pa.field("known_at", pa.int64()),
    ]
)
_READ = ("sample_id", "impression_id", "event_time", "known_at", "weight")
# Above how many of the wanted draws' standard deviations the first guess aims.
_MARGIN = 8.0


@dataclass(frozen=True)
class ReplayWindow:
    """Yesterday from this time of day on: ``T - 24 h < time < midnight``, and nothing known only after T.

    Attributes
    ----------
    as_of : int
        T, ms.
    by : "event_time" or "known_at"
        What lies in the window: when a row's window opened, or when the row was known. A policy that says
        rows at once (`fnw`) remembers them by about the first, one that waits (`wait`) by the second.

    Examples
    --------
    >>> hour = 3_600_000
    >>> window = ReplayWindow(as_of=10 * 24 * hour + hour)  # 01:00
    >>> (window.low // hour - 9 * 24, window.midnight // hour - 9 * 24)  # hours of the day before
    (1, 24)
    """

    as_of: int
    by: ReplayTime = "event_time"

    @property
    def low(self) -> int:
        """The moment after which rows count, ms."""
        return self.as_of - DAY_MS

    @property
    def midnight(self) -> int:
        """The moment before which rows count, ms."""
        return self.as_of // DAY_MS * DAY_MS

    def holds(self, event_time: NDArray[np.int64], known_at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether rows may be drawn, shape (n,)."""
        time = event_time if self.by == "event_time" else known_at
        return (time > self.low) & (time < self.midnight) & (known_at <= self.as_of)


@dataclass(frozen=True)
class Draw:
    """References to the rows drawn, and how many there were to draw from, by task."""

    references: pa.Table
    pool: dict[Task, int]


def draw_replay(location: str | Path, window: ReplayWindow, rows: int, seed: int = 0) -> Draw:
    """Draw rows of each task.

    Parameters
    ----------
    location : str or Path
        A snapshot.
    window : ReplayWindow
    rows : int
        How many to draw of each task, with replacement. A row's own weight goes with it.
    seed : int

    Returns
    -------
    Draw
        References with the columns of `REPLAY_SCHEMA`, by task and draw; none of a task whose pool is empty.

    Raises
    ------
    ConfigError
        If ``rows`` is below 1.
    DataError
        If a file is missing or damaged.
    """
    if rows < 1:
        raise ConfigError(f"expected at least 1 row to draw. Received: {rows}.")
    manifest = read_manifest(location)
    drawn, pool = [], {}
    for task in manifest.tasks:
        eligible = _Eligible(location, manifest, task, window)
        pool[task] = eligible.count()
        if pool[task]:
            drawn.append(_drawn(eligible, pool[task], rows, seed))
    references = pa.concat_tables(drawn) if drawn else REPLAY_SCHEMA.empty_table()
    return Draw(references, pool)


def gaps(sample_id: pa.Array, seed: int, number: int) -> NDArray[np.float64]:
    """The ``number``-th gap of each row's process, exponential of mean 1, shape (n,).

    ``-log(U)`` with ``U = (h + 1) / 2**53``, h the upper 53 bits of XXH64 of the id; the hash's seed is XXH64
    (seed 42) of the text ``SEED:NUMBER``.
    """
    hashes = hash_column(sample_id, hash_text(f"{seed}:{number}"))
    return np.asarray(-np.log(((hashes >> np.uint64(11)).astype(np.float64) + 1.0) / 2.0**53))


@dataclass(frozen=True)
class _Eligible:
    """The rows of one task that may be drawn, chunk by chunk."""

    location: str | Path
    manifest: SnapshotManifest
    task: Task
    window: ReplayWindow

    def count(self) -> int:
        return sum(
            int(np.count_nonzero(self._holds(chunk)))
            for part in self._partitions()
            for _, _, chunk in self._chunks(part, ("event_time", "known_at"))
        )

    def chunks(self) -> Iterator[pa.Table]:
        """Columns of `REPLAY_SCHEMA`, but for ``draw``."""
        for part in self._partitions():
            for file, first, chunk in self._chunks(part, _READ):
                rows = np.flatnonzero(self._holds(chunk))
                if len(rows):
                    yield self._references(part, file, first, chunk, rows)

    def _holds(self, chunk: pa.RecordBatch) -> NDArray[np.bool_]:
        return self.window.holds(chunk.column("event_time").to_numpy(), chunk.column("known_at").to_numpy())

    def _references(
        self, part: PartitionSummary, file: str, first: int, chunk: pa.RecordBatch, rows: NDArray[np.int64]
    ) -> pa.Table:
        own = chunk.take(pa.array(rows))
        constants = {"task": self.task, "partition": part.partition, "file": file}
        columns = {name: pa.array([text] * len(rows), pa.string()) for name, text in constants.items()}
        columns |= {name: own.column(name) for name in _READ}
        columns["row"] = pa.array(first + rows)
        schema = pa.schema([field for field in REPLAY_SCHEMA if field.name != "draw"])
        return pa.table([columns[field.name] for field in schema], schema=schema)

    def _partitions(self) -> Iterator[PartitionSummary]:
        grid = PartitionGrid(self.manifest.granularity)
        low = self.window.low
        if self.window.by == "known_at":
            rule = AttributionConfig.model_validate(self.manifest.config["attribution"])
            # A row is known at the latest when nothing can change its window, and one tick after.
            low -= closes_after(rule, self.task) + 1
        for part in self.manifest.of_task(self.task):
            start, end = grid.interval(grid.index_of(part.partition))
            if end > low and start < self.window.midnight:
                yield part

    def _chunks(
        self, part: PartitionSummary, columns: tuple[str, ...]
    ) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """File, number of the first row in it, and rows, of row groups that may hold some."""
        parent, own = split_location(self.location)
        origin = own if part.origin == self.manifest.snapshot_id else part.origin
        schema = pa.schema([field for field in SAMPLE_SCHEMA if field.name in columns])
        for name, file in sorted(part.files.items()):
            place = DataFile(f"{parent}/{origin}/{name}", file.rows)
            files = ParquetFiles((place,), schema, key=self.window.by)
            first = 0
            for piece in files.pieces:
                if self._may_hold(piece):
                    at = first
                    with closing(files.read([piece])) as chunks:
                        for chunk in chunks:
                            yield f"{origin}/{name}", at, chunk
                            at += chunk.num_rows
                first += len(piece)

    def _may_hold(self, piece: Piece) -> bool:
        if piece.low is None or piece.high is None:
            return True
        return piece.high > self.window.low and piece.low < self.window.midnight


def _drawn(eligible: _Eligible, pool: int, rows: int, seed: int) -> pa.Table:
    until = (rows + _MARGIN * rows**0.5 + _MARGIN) / pool
    while True:
        found = _earliest(eligible, rows, seed, until)
        if found.num_rows == rows:
            order = pa.array(np.arange(rows, dtype=np.int64))
            return found.append_column("draw", order).select(REPLAY_SCHEMA.names)
        until *= 2.0  # not once in 10**12 times


def _earliest(eligible: _Eligible, rows: int, seed: int, until: float) -> pa.Table:
    """The rows of the earliest moments up to ``until``, at most so many, in order."""
    kept: pa.Table | None = None
    for chunk in eligible.chunks():
        found = _moments(chunk, seed, until)
        kept = found if kept is None else pa.concat_tables([kept, found])
        if kept.num_rows > 2 * rows:
            kept = _first(kept, rows)
            until = min(until, float(pc.max(kept.column("moment")).as_py()))
    if kept is None:
        return REPLAY_SCHEMA.empty_table()
    return _first(kept, rows).drop_columns(["moment"])


def _first(table: pa.Table, rows: int) -> pa.Table:
    keys = [("moment", "ascending"), ("sample_id", "ascending")]
    return table.take(pc.sort_indices(table, keys)[:rows])


def _moments(chunk: pa.Table, seed: int, until: float) -> pa.Table:
    """Each row once for each of its moments up to ``until``, with the moment."""
    place = np.arange(chunk.num_rows)
    moment = np.zeros(chunk.num_rows)
    places, moments = [], []
    number = 0
    while len(place):
        moment = moment + gaps(chunk.column("sample_id").take(pa.array(place)), seed, number)
        early = moment <= until
        place, moment, number = place[early], moment[early], number + 1
        places.append(place)
        moments.append(moment)
    found = chunk.take(pa.array(np.concatenate([np.zeros(0, np.int64), *places])))
    return found.append_column("moment", pa.array(np.concatenate([np.zeros(0), *moments])))
