"""Files that are each sorted, merged into one sorted order: how a partition written by many tasks is read."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.stream_files import ParquetFiles, Piece
from pipelines.stream_order import skipped

__all__ = ["MergedOrder"]


@dataclass(frozen=True)
class MergedOrder:
    """Rows ordered by ``keys``; the first is an integer column. Equal rows keep the order of their files.

    Files whose ranges of the first key overlap are read side by side, a part of the memory for each; the
    others one after the other.

    Attributes
    ----------
    files : ParquetFiles
        They read the keys as well, and give each piece the range of the first one.
    pieces : tuple of Piece
    keys : tuple of str
    columns : tuple of str
        Of what is read, those that are wanted.
    """

    files: ParquetFiles
    pieces: tuple[Piece, ...]
    keys: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(map(len, self.pieces))

    def read(self, epoch: int, start: int) -> Generator[pa.RecordBatch]:
        for cluster in self._clusters:
            rows = sum(map(len, (piece for run in cluster for piece in run)))
            if start < rows:
                with closing(self._read_cluster(cluster, start)) as chunks:
                    yield from (chunk.select(list(self.columns)) for chunk in chunks)
            start = max(0, start - rows)

    @cached_property
    def _clusters(self) -> list[list[list[Piece]]]:
        """Groups of files such that each lies before the next; a file is the list of its pieces."""
        runs = [list(run) for _, run in groupby(self.pieces, key=lambda piece: piece.file)]
        clusters: list[list[list[Piece]]] = []
        last: int | None = None
        for run in sorted(runs, key=_low):
            if last is None or _low(run) > last:
                clusters.append([])
            clusters[-1].append(run)
            last = _high(run) if last is None else max(last, _high(run))
        return clusters

    def _read_cluster(self, cluster: list[list[Piece]], start: int) -> Generator[pa.RecordBatch]:
        if len(cluster) == 1:
            run = self._run(list(skipped(cluster[0], start)), 1)
            while run.extend():
                yield run.take(len(run.keys))
            return
        runs = [self._run(run, len(cluster)) for run in cluster]
        try:
            for merged in _merged(runs, self.keys):
                if start < merged.num_rows:
                    yield merged.slice(start)
                start = max(0, start - merged.num_rows)
        finally:
            for run in runs:
                run.close()

    def _run(self, pieces: list[Piece], readers: int) -> _Run:
        number = pieces[0].file
        name = self.files.files[number].location
        nothing = pa.RecordBatch.from_pylist([], self.files.schema)
        return _Run(number, name, self.keys[0], _low(pieces), self.files.read(pieces, readers), nothing)


@dataclass
class _Run:
    """One sorted file: the rows that have been read and not yet taken."""

    file: int
    name: str
    key: str
    low: int
    chunks: Generator[pa.RecordBatch]
    rest: pa.RecordBatch
    keys: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    ended: bool = False

    def extend(self) -> bool:
        """Read another chunk; False at the end."""
        chunk = next(self.chunks, None)
        if chunk is None:
            self.ended = True
            return False
        column = chunk.column(self.key)
        if column.null_count:
            raise DataError(f"{self.name}: column {self.key}: expected a value in each row. Received a null.")
        keys = np.concatenate((self.keys, column.to_numpy()))
        if len(self.keys):
            chunk = pa.concat_batches([self.rest, chunk])
        falls = np.flatnonzero(np.diff(keys) < 0)
        if len(falls):
            raise DataError(
                f"{self.name}: expected rows ordered by {self.key}. Received {keys[falls[0] + 1]} after "
                f"{keys[falls[0]]}."
            )
        self.rest, self.keys = chunk, keys
        return True

    def take(self, rows: int) -> pa.RecordBatch:
        """The next rows, off the run."""
        taken, self.rest = self.rest.slice(0, rows), self.rest.slice(rows)
        self.keys = self.keys[rows:]
        return taken

    def close(self) -> None:
        self.chunks.close()


def _merged(runs: Sequence[_Run], keys: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """What lies before everything that has not been read yet can leave, again and again."""
    waiting, active = list(runs), list[_Run]()
    while waiting or active:
        bounds = [int(run.keys[-1]) for run in active if not run.ended]
        bounds += [run.low for run in waiting[:1]]
        bound = min(bounds, default=None)
        ready = []
        for run in active:
            rows = len(run.keys) if bound is None else int(np.searchsorted(run.keys, bound, side="left"))
            if rows:
                ready.append(run.take(rows))
        if len(ready) == 1:
            yield ready[0]
        elif ready:
            together = pa.concat_batches(ready)
            yield together.take(pc.sort_indices(together, [(key, "ascending") for key in keys]))
        while waiting and bound is not None and waiting[0].low <= bound:
            active.append(waiting.pop(0))
        # Rows that are equal in all keys then keep the order of their files.
        active.sort(key=lambda run: run.file)
        for run in active:
            if not run.ended and (len(run.keys) == 0 or run.keys[-1] == bound):
                run.extend()
        active = [run for run in active if not run.ended or len(run.keys)]


def _low(run: Sequence[Piece]) -> int:
    return min(piece.low for piece in run if piece.low is not None)


def _high(run: Sequence[Piece]) -> int:
    return max(piece.high for piece in run if piece.high is not None)
