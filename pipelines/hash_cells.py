"""Open addressing with triangular probing over numpy arrays: many entries at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMPTY", "fill_cells", "find_cells"]

Ints = NDArray[np.int64]

EMPTY = -1


def find_cells(
    cells: NDArray[np.int32],
    home: Ints,
    is_hit: Callable[[NDArray[np.int32], Ints], NDArray[np.bool_]],
) -> Ints:
    """The cell in which each entry is found on its way from its home, -1 where an empty one comes first.

    Parameters
    ----------
    cells : ndarray of int32
        As many as a power of two, at least one of them empty.
    home : ndarray of int64, shape (n,)
        Cell at which the way of each begins.
    is_hit : callable
        Takes slots and numbers of entries, both (m,): whether the slot is that entry's.

    Examples
    --------
    >>> slots = np.array([9, 8, 5])
    >>> cells = np.array([EMPTY, 7, 8, 9], np.int32)
    >>> find_cells(cells, np.array([2, 1, 1]), lambda slot, entry: slot == slots[entry]).tolist()
    [3, 2, -1]
    """
    mask, step = len(cells) - 1, 0
    found = np.full(len(home), -1, np.int64)
    entries, cell = np.arange(len(home)), home
    while len(entries):
        slot = cells[cell]
        taken = (slot != EMPTY).nonzero()[0]
        entries, cell, slot = entries[taken], cell[taken], slot[taken]
        hit = is_hit(slot, entries)
        found[entries[hit]] = cell[hit]
        rest = (~hit).nonzero()[0]
        step += 1
        entries, cell = entries[rest], (cell[rest] + step) & mask
    return found


def fill_cells(cells: NDArray[np.int32], slots: Ints, home: Ints) -> None:
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
