"""The order in which a stream visits its rows: shards, and the plain order of the files."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Protocol

import pyarrow as pa

from pipelines.stream_files import ParquetFiles, Piece

__all__ = ["FileOrder", "RowOrder", "cut", "shard_of", "skipped"]

# A shard is put together from at least about this many pieces: row groups larger than that are cut.
_PIECES_A_SHARD = 8


class RowOrder(Protocol):
    """Rows of one epoch in an order that follows from its parameters alone."""

    @property
    def rows(self) -> int:
        """Rows of an epoch."""

    def read(self, epoch: int, start: int) -> Generator[pa.RecordBatch]:
        """Rows of an epoch from position ``start`` on, in chunks of any size."""


@dataclass(frozen=True)
class FileOrder:
    """The files one after the other, each from its begin to its end: the same in every epoch."""

    files: ParquetFiles
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(map(len, self.pieces))

    def read(self, epoch: int, start: int) -> Generator[pa.RecordBatch]:
        left = skipped(self.pieces, start)
        for _, group in groupby(left, key=lambda piece: piece.file):
            with closing(self.files.read(list(group))) as chunks:
                yield from chunks


def skipped(pieces: Sequence[Piece], rows: int) -> Iterator[Piece]:
    """The pieces without their first ``rows`` rows."""
    for piece in pieces:
        if rows < len(piece):
            yield replace(piece, start=piece.start + rows)
        rows = max(0, rows - len(piece))


def shard_of(pieces: Sequence[Piece], rank: int, world: int) -> tuple[Piece, ...]:
    """The pieces of one of ``world`` shards, in their order.

    Each piece in turn goes to the shard that has the fewest rows so far. So shards are disjoint and complete,
    go through the same times side by side, and differ by at most one piece. Pieces are row groups; those
    larger than an eighth of a shard are cut.

    Examples
    --------
    >>> pieces = [Piece(0, group, 0, 100, False) for group in range(16)]
    >>> [piece.group for piece in shard_of(pieces, 0, 2)]
    [0, 2, 4, 6, 8, 10, 12, 14]
    """
    largest = max(1, -(-sum(map(len, pieces)) // (world * _PIECES_A_SHARD)))
    loads = [(0, number) for number in range(world)]
    own = []
    for piece in chain.from_iterable(cut(piece, largest) for piece in pieces):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + len(piece), number))
        if number == rank:
            own.append(piece)
    return tuple(own)


def cut(piece: Piece, largest: int) -> Iterator[Piece]:
    """The piece in equal parts of at most ``largest`` rows.

    Whoever reads a part decodes the row group from its begin, and drops what lies before.
    """
    parts = -(-len(piece) // largest)
    for part in range(parts):
        start, stop = (piece.start + len(piece) * edge // parts for edge in (part, part + 1))
        yield replace(piece, start=start, stop=stop)
