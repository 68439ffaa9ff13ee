"""How often an id was seen lately, in memory of a fixed size: a counting filter that forgets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.hashing import mix
from pipelines.table_rows import ChangedRows

__all__ = ["SightingFilter"]

_HASHES = 4
# Sightings between two halvings, for each cell: with four hashes an id that was never seen then passes for
# one that was in at most 2.4 % of the cases, and in 0.2 % after a halving.
_SIGHTINGS_PER_CELL = 1 / 16


class SightingFilter:
    """A count-min sketch whose counts are halved now and then.

    Each key has one cell in each quarter of the cells, and its count is the least of the four: never too
    small, but for what the halvings take, and now and then too large, by what other keys have left in all
    four. Without the halvings every cell would fill up in an endless stream.

    Parameters
    ----------
    cells : int
        Four bytes each; rounded up to a power of two.
    seed : int

    Attributes
    ----------
    counts : ndarray of uint32, shape (cells,)
    counted : int
        Sightings since the last halving.

    References
    ----------
    Cormode & Muthukrishnan (2005), An improved data stream summary: the count-min sketch.
    Einziger, Friedman & Manes (2017), TinyLFU: section 3.3, the reset.

    Examples
    --------
    >>> sightings = SightingFilter(1024, seed=1)
    >>> sightings.add(np.array([5, -9]), np.array([1, 3])).tolist()
    [1, 3]
    >>> sightings.add(np.array([-9]), np.array([2])).tolist()
    [5]
    """

    def __init__(self, cells: int, seed: int) -> None:
        size = _HASHES
        while size < cells:
            size *= 2
        self.counts = np.zeros(size, np.uint32)
        self.counted = 0
        self._seed = np.uint64(seed)
        self._touched = ChangedRows(size)

    def add(self, keys: NDArray[np.int64], sightings: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count sightings of keys, each named once; returns how often each has been seen, these included."""
        cells = self._cells_of(keys)
        np.add.at(self.counts, cells, sightings.astype(np.uint32)[:, None])
        self._touched.add(cells)
        found: NDArray[np.int64] = self.counts[cells].min(axis=1).astype(np.int64)
        self.counted += int(sightings.sum())
        if self.counted >= _SIGHTINGS_PER_CELL * len(self.counts):
            self.counts >>= np.uint32(1)
            self.counted = 0
            self._touched.add_all()
        return found

    def reset(self) -> None:
        """Forget everything."""
        self.load(np.zeros_like(self.counts), 0)

    def load(self, counts: NDArray[Any], counted: int) -> None:
        """Continue from ``counts`` and ``counted`` of another."""
        self.counts[:] = counts
        self.counted = counted
        self._touched.add_all()

    def take_touched(self) -> NDArray[np.int64] | None:
        """Cells that have changed since the last call, ascending; None if all may have."""
        return self._touched.take()

    def _cells_of(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        quarter = len(self.counts) // _HASHES
        mixed = mix(keys.view(np.uint64), np.full(len(keys), self._seed))
        # Kirsch & Mitzenmacher (2008): two hashes make all the others.
        first, second = mixed & np.uint64(0xFFFFFFFF), (mixed >> np.uint64(32)) | np.uint64(1)
        place: NDArray[np.uint64] = first[:, None] + second[:, None] * np.arange(_HASHES).astype(np.uint64)
        inside: NDArray[np.int64] = (place & np.uint64(quarter - 1)).astype(np.int64)
        return np.asarray(inside + quarter * np.arange(_HASHES), np.int64)
