"""Shuffling with bounded memory: row groups in random order, several of them mixed in a buffer.

1. The row groups (pieces) of the epoch are put into random order. Where there are fewer than 64 they are cut
   first: the fewer there are, the more the order would keep of that of time.
2. Eight of them are read side by side, an equal part of each, until the buffer is full; one that is used up
   is followed by the next of the order.
3. The rows of the buffer are put into random order, and leave.

Which rows meet in which buffer follows from the numbers of rows alone. So the order can be entered at any row
without reading what comes before it, but for the row groups that are open there.

Random order is a sort by the raw output of Philox (Salmon et al. 2011) with seed and epoch as its key and the
number of the buffer in its counter: the same on every machine and with every version of numpy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.stream_files import ParquetFiles, Piece
from pipelines.stream_order import cut

__all__ = ["ShuffledOrder", "pieces_to_shuffle", "random_order"]

_OPEN_PIECES = 8
_ENOUGH_PIECES = 64
# A part is read by decoding its row group from the begin: sixteen parts cost eight and a half readings.
_MOST_PARTS = 16


@dataclass(frozen=True)
class ShuffledOrder:
    """A permutation of the rows, another one in each epoch.

    Attributes
    ----------
    files : ParquetFiles
    pieces : tuple of Piece
    buffer_rows : int
        Rows that are mixed at a time, > 0.
    seed : int
    """

    files: ParquetFiles
    pieces: tuple[Piece, ...]
    buffer_rows: int
    seed: int

    @property
    def rows(self) -> int:
        return sum(map(len, self.pieces))

    def read(self, epoch: int, start: int) -> Generator[pa.RecordBatch]:
        order = random_order(len(self.pieces), self.seed, epoch, 0)
        lengths = [len(self.pieces[number]) for number in order]
        readers: dict[int, _Reader] = {}
        try:
            for number, parts in enumerate(buffers(lengths, self.buffer_rows)):
                size = sum(part.stop - part.start for part in parts)
                if start >= size:
                    start -= size
                    continue
                chunks: list[pa.RecordBatch] = []
                for part in parts:
                    if part.place not in readers:
                        readers[part.place] = self._open(self.pieces[order[part.place]], part.start)
                    chunks += readers[part.place].take(part.stop - part.start)
                    if part.stop == lengths[part.place]:
                        readers.pop(part.place).close()
                mixed = random_order(size, self.seed, epoch, number + 1)[start:]
                start = 0
                yield pa.concat_batches(chunks).take(pa.array(mixed))
        finally:
            for reader in readers.values():
                reader.close()

    def _open(self, piece: Piece, start: int) -> _Reader:
        rest = replace(piece, start=piece.start + start)
        return _Reader(self.files.read([rest], _OPEN_PIECES))


def pieces_to_shuffle(pieces: Sequence[Piece], buffer_rows: int) -> tuple[Piece, ...]:
    """The pieces, cut where they are few; not if all rows fit into the buffer."""
    if not pieces or sum(map(len, pieces)) <= buffer_rows:
        return tuple(pieces)
    parts = min(_MOST_PARTS, -(-_ENOUGH_PIECES // len(pieces)))
    return tuple(part for piece in pieces for part in cut(piece, -(-len(piece) // parts)))


@dataclass(frozen=True)
class Part:
    """Rows ``[start, stop)`` of the piece at ``place`` of the order."""

    place: int
    start: int
    stop: int


def buffers(lengths: Sequence[int], buffer_rows: int, ways: int = _OPEN_PIECES) -> Iterator[list[Part]]:
    """What each buffer is filled with; ``lengths`` are those of the pieces in their random order.

    Examples
    --------
    >>> [[(part.place, part.start, part.stop) for part in parts] for parts in buffers([3, 2], 4, ways=2)]
    [[(0, 0, 2), (1, 0, 2)], [(0, 2, 3)]]
    """
    stride = max(1, buffer_rows // ways)
    following = iter(range(len(lengths)))
    turn = deque((place, 0) for place in islice(following, ways))
    while turn:
        parts: list[Part] = []
        room = buffer_rows
        while room and turn:
            place, start = turn.popleft()
            stop = min(start + min(stride, room), lengths[place])
            parts.append(Part(place, start, stop))
            room -= stop - start
            if stop < lengths[place]:
                turn.append((place, stop))
            else:
                turn.extend((new, 0) for new in islice(following, 1))
        yield parts


def random_order(n: int, seed: int, epoch: int, stage: int) -> NDArray[np.int64]:
    """A random permutation of ``n``, shape (n,): the same for the same numbers.

    Examples
    --------
    >>> random_order(5, 7, 0, 0).tolist(), random_order(5, 7, 1, 0).tolist()
    ([4, 1, 3, 2, 0], [3, 1, 2, 4, 0])
    """
    bits = np.random.Philox(
        key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stage], np.uint64)
    )
    # Equal numbers are as good as impossible, and the sort is stable.
    return np.argsort(bits.random_raw(n), kind="stable")


@dataclass
class _Reader:
    """Takes an exact number of rows at a time off a piece that is being read."""

    chunks: Generator[pa.RecordBatch]
    rest: pa.RecordBatch | None = field(default=None)

    def take(self, rows: int) -> list[pa.RecordBatch]:
        taken = []
        while rows:
            if self.rest is None:
                self.rest = next(self.chunks)
            part = self.rest.slice(0, rows)
            taken.append(part)
            rows -= part.num_rows
            self.rest = self.rest.slice(part.num_rows) if part.num_rows < self.rest.num_rows else None
        return taken

    def close(self) -> None:
        self.chunks.close()
