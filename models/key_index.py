"""Slots by 64-bit key: a hash table over numpy arrays, many keys at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.hash_cells import EMPTY, fill_cells, find_cells

__all__ = ["KeyIndex"]

Ints = NDArray[np.int64]


_LEAST_CELLS = 2048
# Cells for each slot after a rebuild, and the load that makes the next one due.
_CELLS_PER_KEY = 4
_LARGEST_LOAD = 0.5


class KeyIndex:
    """Finds the slot of a key. Equal keys are one key: nothing is shared by a collision of hashes.

    Only `keys` is state; the cells through which keys are found are made from them. Keys are taken to be
    hashes already, so their low bits choose the cell.

    Attributes
    ----------
    keys : ndarray of int64, shape (slots,)
        Key of each slot; 0 for one that is free.

    Examples
    --------
    >>> index = KeyIndex(np.zeros(4, np.int64))
    >>> index.put(np.array([2, 0]), np.array([77, -5]))
    >>> index.find(np.array([-5, 77, 8, 0])).tolist()
    [0, 2, -1, -1]
    >>> index.remove(np.array([2]))
    >>> index.find(np.array([-5, 77])).tolist()
    [0, -1]
    """

    def __init__(self, keys: Ints) -> None:
        self.keys = keys
        self._rebuild()

    def find(self, keys: Ints) -> Ints:
        """Slot of each key, -1 where there is none; of any shape."""
        flat = keys.reshape(-1)
        cell = find_cells(self._cells, flat & self._mask, lambda slot, row: self.keys[slot] == flat[row])
        return np.where(cell >= 0, self._cells[cell], -1).astype(np.int64).reshape(keys.shape)

    def put(self, slots: Ints, keys: Ints) -> None:
        """Give free slots to keys that have none; each is named once."""
        self.keys[slots] = keys
        if self._filled + len(slots) > _LARGEST_LOAD * len(self._cells):
            self._rebuild()
        else:
            self._fill(slots)

    def remove(self, slots: Ints) -> None:
        """Free slots. Costs as much as there are slots, so they are freed many at a time."""
        self.keys[slots] = 0
        self._rebuild()

    def resize(self, slots: int) -> None:
        """As many slots; those beyond are gone, new ones are free."""
        keys = np.zeros(slots, np.int64)
        kept = min(slots, len(self.keys))
        keys[:kept] = self.keys[:kept]
        is_smaller = slots < len(self.keys)
        self.keys = keys
        if is_smaller:
            self._rebuild()

    def _rebuild(self) -> None:
        slots = np.flatnonzero(self.keys)
        size = _LEAST_CELLS
        while size < _CELLS_PER_KEY * len(slots):
            size *= 2
        self._cells = np.full(size, EMPTY, np.int32)
        self._mask = size - 1
        self._filled = 0
        self._fill(slots)

    def _fill(self, slots: Ints) -> None:
        self._filled += len(slots)
        fill_cells(self._cells, slots, self.keys[slots] & self._mask)
