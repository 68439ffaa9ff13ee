"""Inputs of trees, made from training rows when LightGBM asks for them: the matrix is never in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightgbm
import numpy as np
from numpy.typing import NDArray

from models.encoding_in_time import CHUNK_ROWS
from models.target_encoding import Floats

__all__ = ["EncodedRows"]


class EncodedRows(lightgbm.Sequence):
    """Rows for a `lightgbm.Dataset`, chunk by chunk.

    LightGBM asks twice, each time from the first row to the last: for single rows, a sample from which it
    cuts the bins, and for all rows, of which it keeps the bins, one byte each.

    Parameters
    ----------
    rows : int
        Number of rows.
    chunks : callable
        Gives all rows from the first on, `CHUNK_ROWS` at a time, each chunk (n, inputs).
    """

    batch_size = CHUNK_ROWS

    def __init__(self, rows: int, chunks: Callable[[], Iterator[Floats]]) -> None:
        self._rows = rows
        self._chunks = chunks
        self._reader: Iterator[Floats] | None = None
        self._begin = self._end = 0
        self._chunk: Floats | None = None

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int | slice | list[int]) -> NDArray[np.floating]:
        if isinstance(index, list):
            return np.stack([self[row] for row in index])
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._rows)
            return self._at(start)[start - self._begin : stop - self._begin]
        # The sample has to be of double precision.
        return np.asarray(self._at(index)[index - self._begin], np.float64)

    def _at(self, row: int) -> Floats:
        """The chunk that holds a row."""
        if self._reader is None or row < self._begin:
            self._reader, self._begin, self._end = self._chunks(), 0, 0
        while self._chunk is None or row >= self._end:
            self._chunk = next(self._reader)
            self._begin, self._end = self._end, self._end + len(self._chunk)
        return self._chunk
