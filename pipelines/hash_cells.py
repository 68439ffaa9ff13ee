"""Open addressing with triangular probing over numpy arrays: many entries at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMPTY", "fill_cells"]

EMPTY = -1


def fill_cells(cells: NDArray[np.int32], slots: NDArray[np.int64], home: NDArray[np.int64]) -> None:
    """Put slots into empty cells, each into the first that is empty on its way from its home.

    Parameters
    ----------
    cells : ndarray of int32
        As many as a power of two, at least one of them empty for each slot; written to.
    slots : ndarray of int64, shape (n,)
        Each once, and not in ``cells``.
    home : ndarray of int64, shape (n,)
        Cell at which the way of each begins.

    Examples
    --------
    >>> cells = np.full(4, EMPTY, np.int32)
    >>> fill_cells(cells, np.array([7, 8, 9]), np.array([1, 1, 2]))
    >>> cells.tolist()
    [7, 8, 9, -1]
    """
    mask, step = len(cells) - 1, 0
    while len(slots):
        is_empty = cells[home] == EMPTY
        cells[home[is_empty]] = slots[is_empty]
        # Of several that wrote into one cell the others go on.
        rest = (cells[home] != slots).nonzero()[0]
        step += 1
        slots, home = slots[rest], (home[rest] + step) & mask
