"""Slots of open impressions, found by the hash of their id: a hash table over numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipelines.hash_cells import EMPTY, fill_cells, find_cells
from pipelines.table_rows import Array, RowLog, TableRows

__all__ = ["Keys", "SlotTable", "hash_ids"]

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
# (n, 2): 128 bits an id. Of a billion open ids two share a hash with a chance of one in 10^20.
Keys = NDArray[np.uint64]

_REMOVED = -2
_FIRST_CAPACITY = 1024
# Slots grow by a quarter: columns that are copied now and then cost less than memory that lies idle.
_GROWTH = 1.25
# Cells for each slot after a rebuild, and the load (removed ones included) that makes the next one due.
_CELLS_PER_SLOT = 3
_LARGEST_LOAD = 0.5


def hash_ids(ids: Iterable[str]) -> Keys:
    """XXH3 of each id's UTF-8 bytes, 128 bits as two numbers, shape (n, 2).

    Examples
    --------
    >>> keys = hash_ids(["a", "b", "a"])
    >>> keys.shape, bool((keys[0] == keys[2]).all()), bool((keys[0] == keys[1]).any())
    ((3, 2), True, False)
    """
    digest = xxhash.xxh3_128_digest
    return np.frombuffer(b"".join([digest(name.encode()) for name in ids]), "<u8").reshape(-1, 2)


class SlotTable:
    """Slots ``0 .. capacity - 1`` by key; freed slots are used again.

    Only `keys` and the order of free slots are state; the cells through which keys are found are made from
    them.

    Attributes
    ----------
    capacity : int
    keys : ndarray of uint64, shape (capacity, 2)
        Key of each slot in use.

    Examples
    --------
    >>> table = SlotTable()
    >>> keys = hash_ids(["a", "b", "a"])
    >>> table.add(keys)
    (array([0, 1, 0]), array([ True,  True, False]))
    >>> table.remove(np.array([0]))
    >>> table.find(keys).tolist(), len(table)
    ([-1, 1, -1], 1)
    """

    def __init__(self) -> None:
        self.keys: Keys = np.zeros((_FIRST_CAPACITY, 2), np.uint64)
        self._used = np.zeros(_FIRST_CAPACITY, np.bool_)
        # A stack: the last one is the next to be used.
        self._free = np.arange(_FIRST_CAPACITY - 1, -1, -1, dtype=np.int32)
        self._n_free = _FIRST_CAPACITY
        self._log = RowLog()
        self._make_cells(0)

    @property
    def capacity(self) -> int:
        return len(self.keys)

    def __len__(self) -> int:
        return self.capacity - self._n_free

    def find(self, keys: Keys) -> Ints:
        """Slot of each key, shape (n,); -1 where there is none."""
        cells = self._cell_of(keys)
        return np.where(cells >= 0, self._cells[cells], -1).astype(np.int64)

    def add(self, keys: Keys) -> tuple[Ints, Flags]:
        """A slot for each key, and whether it is new; of equal keys the first is."""
        slots = self.find(keys)
        is_new = slots < 0
        new = np.flatnonzero(is_new)
        if len(new) == 0:
            return slots, is_new
        again = ~_is_first(keys[new])
        is_new[new[again]] = False
        new = new[~again]
        slots[new] = self._take(len(new))
        self.keys[slots[new]] = keys[new]
        self._log.add(slots[new], {"keys": keys[new]})
        self._used[slots[new]] = True
        if self._filled + len(new) > _LARGEST_LOAD * len(self._cells):
            self._make_cells(len(self))
            self._fill(np.flatnonzero(self._used))
        else:
            self._fill(slots[new])
        if again.any():
            rest = np.flatnonzero(slots < 0)
            slots[rest] = self.find(keys[rest])
        return slots, is_new

    def remove(self, slots: Ints) -> None:
        """Free slots in use, each named once."""
        self._cells[self._cell_of(self.keys[slots])] = _REMOVED
        self._used[slots] = False
        self._free[self._n_free : self._n_free + len(slots)] = slots
        self._n_free += len(slots)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {"keys": self.keys, "free": self._free[: self._n_free]}

    def take_changes(self) -> tuple[dict[str, Array], dict[str, list[TableRows]]]:
        """What ``state`` gives, of the keys only those that are new since the last call."""
        rows = self._log.take() or {"keys": [TableRows(None, self.keys.copy())]}
        return {"free": self._free[: self._n_free].copy()}, rows

    def load_state(self, arrays: dict[str, NDArray[np.generic]]) -> None:
        """Continue from a `state`."""
        free = np.array(arrays["free"], np.int32)
        self.keys = np.array(arrays["keys"], np.uint64)
        self._used = np.ones(self.capacity, np.bool_)
        self._used[free] = False
        self._log.forget()
        self._free = np.zeros(self.capacity, np.int32)
        self._free[: len(free)], self._n_free = free, len(free)
        self._make_cells(len(self))
        self._fill(np.flatnonzero(self._used))

    def _take(self, n: int) -> Ints:
        while self._n_free < n:
            old = self.capacity
            new = int(old * _GROWTH)
            keys, used = np.zeros((new, 2), np.uint64), np.zeros(new, np.bool_)
            keys[:old], used[:old] = self.keys, self._used
            free = np.zeros(new, np.int32)
            added = np.arange(new - 1, old - 1, -1, dtype=np.int32)
            free[: len(added) + self._n_free] = np.concatenate([added, self._free[: self._n_free]])
            self.keys, self._used, self._free = keys, used, free
            self._log.forget()
            self._n_free += len(added)
        taken = self._free[self._n_free - n : self._n_free][::-1]
        self._n_free -= n
        return taken.astype(np.int64)

    # Cells: open addressing, triangular probing, many keys at a time ---------------------------------------

    def _make_cells(self, slots: int) -> None:
        size = 2 * _FIRST_CAPACITY
        while size < _CELLS_PER_SLOT * slots:
            size *= 2
        self._cells = np.full(size, EMPTY, np.int32)
        self._filled = 0

    def _fill(self, slots: Ints) -> None:
        self._filled += len(slots)
        mask = np.uint64(len(self._cells) - 1)
        fill_cells(self._cells, slots, (self.keys[slots, 0] & mask).astype(np.int64))

    def _cell_of(self, keys: Keys) -> Ints:
        def is_hit(slot: NDArray[np.int32], row: Ints) -> Flags:
            # What was removed has no slot; the row of keys that -2 names is another's.
            return np.asarray((self.keys[slot] == keys[row]).all(1) & (slot >= 0), np.bool_)

        mask = np.uint64(len(self._cells) - 1)
        return find_cells(self._cells, (keys[:, 0] & mask).astype(np.int64), is_hit)


def _is_first(keys: Keys) -> Flags:
    """Whether no key before it is equal."""
    first = np.ones(len(keys), np.bool_)
    if len(np.unique(keys[:, 0])) == len(keys):
        return first
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    same = (keys[order[1:]] == keys[order[:-1]]).all(1)
    first[order[1:][same]] = False
    return first
