"""Sums by segment: bounded, exact, slowly forgetting, quick to look up by the batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from calibration.fixed_point import CAPACITY, DECAY_BITS, scaled
from calibration.link import FloatArray
from calibration.sketch_layout import IntArray
from calibration.state import expect_fields, finite
from pipelines.errors import DataError, StaleStateError

__all__ = ["SUMS", "UNITS", "SegmentTable"]

# Observed positives, expected positives, rows, variance; and the unit of their fixed point, as in sketches.
SUMS = ("positives", "expected", "rows", "variance")
UNITS = np.array([[2.0**-24], [2.0**-32], [2.0**-24], [2.0**-32]])
_SUPPORT = SUMS.index("rows")
# Sums are kept at the scale of a while ago: new rows weigh 2**half_lives instead of all old ones being
# multiplied down. They are when this much has come together.
_SETTLED_EVERY = 1.0 / 16.0
# Room is made by an eighth at a time: evicting one by one would sort the table for each new segment.
_KEPT_SHARE = 0.875


class SegmentTable:
    """Four sums for each segment of each level, in fixed point, so that no order of additions matters.

    A segment is found once by its key (:meth:`find`, :meth:`insert`) and then read and added to by its slot.
    Of a level of several columns the columns' values are kept, too: its key alone would not tell them.

    Parameters
    ----------
    widths : sequence of int
        Columns of each level; each level has segments of its own.
    maximum : int
        Most segments that a level keeps when it is told to :meth:`evict`: the least supported go, of equals
        the larger keys.

    Examples
    --------
    >>> table = SegmentTable(widths=[1], maximum=100)
    >>> slots = table.insert(0, np.array([7, 8, 7]), np.array([[7, 8, 7]]))
    >>> table.add(slots, np.array([np.ones(3), np.zeros(3), np.ones(3), np.zeros(3)]))
    >>> table.advance(half_lives=1.0)
    >>> key, sums = table.by_key(0)
    >>> key.tolist(), sums[0].tolist()
    ([7, 8], [1.0, 0.5])
    """

    def __init__(self, widths: Sequence[int], maximum: int) -> None:
        self.widths, self.maximum = tuple(widths), maximum
        self._half_lives = 0.0
        # Of each level: its keys, increasing, and where in the one array of sums each of them is.
        self._keys = [np.zeros(0, np.int64) for _ in widths]
        self._slots = [np.zeros(0, np.int64) for _ in widths]
        self._sums = np.zeros((len(SUMS), 256), np.int64)
        self._parts = np.zeros((max([0, *(width for width in widths if width > 1)]), 256), np.int64)
        self._used = 0
        self._free = np.zeros(0, np.int64)
        # No sum is above it, in units.
        self._bound = 0.0

    # -- segments ---------------------------------------------------------------------------------------

    def find(self, level: int, keys: IntArray) -> IntArray:
        """Slot of each key of a level, -1 where it is unknown, shape (n,)."""
        known = self._keys[level]
        if not len(known):
            return np.full(len(keys), -1, np.int64)
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[place] == keys, self._slots[level][place], -1)

    def insert(self, level: int, keys: IntArray, parts: IntArray) -> IntArray:
        """Slot of each key; unknown keys get one. ``parts``: values of the level's columns, (width, n)."""
        found = self.find(level, keys)
        unknown = np.flatnonzero(found < 0)
        if len(unknown):
            new = np.unique(keys[unknown])
            slots, before = self._take(len(new)), np.searchsorted(self._keys[level], new)
            self._keys[level] = np.insert(self._keys[level], before, new)
            self._slots[level] = np.insert(self._slots[level], before, slots)
            found[unknown] = slots[np.searchsorted(new, keys[unknown])]
            if self.widths[level] > 1:
                self._parts[: self.widths[level], found[unknown]] = parts[:, unknown]
        return found

    def evict(self) -> None:
        """Where a level is over its bound, keep the best supported seven eighths of the bound."""
        for level, (key, slot) in enumerate(zip(self._keys, self._slots, strict=True)):
            if len(key) <= self.maximum:
                continue
            from_best = np.lexsort((key, -self._sums[_SUPPORT, slot]))
            stays = np.zeros(len(key), np.bool_)
            stays[from_best[: int(_KEPT_SHARE * self.maximum)]] = True
            self._sums[:, slot[~stays]] = 0
            self._free = np.concatenate([self._free, slot[~stays]])
            self._keys[level], self._slots[level] = key[stays], slot[stays]

    # -- sums -------------------------------------------------------------------------------------------

    def read(self, slots: IntArray) -> FloatArray:
        """The sums as of now, shape (4, *slots.shape); 0 where the slot is -1."""
        # Slot -1 would read some other segment's sums.
        sums: FloatArray = np.where(
            slots >= 0, self._as_of_now(self._sums[:, slots.ravel()], slots.shape), 0.0
        )
        return sums

    def check_room(self, weight: float) -> None:
        """``DataError`` if rows of so much Σ weight might be too much for a sum."""
        more = weight * 2.0**self._half_lives / float(UNITS.min())
        if self._bound + more >= CAPACITY:
            self._bound = float(self._sums.max())
        if self._bound + more >= CAPACITY:
            raise DataError(
                "a segment is full: it holds at most Σ weight 2e9.",
                hint="shorten the half-life, or divide all weights by a common factor",
            )

    def add(self, slots: IntArray, amounts: FloatArray) -> None:
        """Add one amount a row to each of the four sums, shape (4, n); :meth:`check_room` first."""
        whole = np.rint(amounts * (2.0**self._half_lives / UNITS)).astype(np.int64)
        for sums, amount in zip(self._sums, whole, strict=True):
            np.add.at(sums, slots, amount)
        self._bound += float(whole.max(axis=0).sum())

    def advance(self, half_lives: float) -> None:
        """Let all sums fall to ``0.5 ** half_lives`` of themselves."""
        self._half_lives += half_lives
        if self._half_lives >= _SETTLED_EVERY:
            factor = round(2.0 ** (DECAY_BITS - min(self._half_lives, 64.0)))
            self._scale(factor)
            # What rounding the factor has left over.
            self._half_lives = self._half_lives + math.log2(factor) - DECAY_BITS if factor else 0.0

    def decay(self, factor: float) -> None:
        """Forget at once: as :meth:`calibration.sketch.LogitSketch.decay`, rounding down."""
        self._scale(round(factor * 2**DECAY_BITS))

    def merge(self, other: SegmentTable) -> None:
        """Add the other's sums as of now to this one's as of now; exact, so that no order matters."""
        mine, theirs = (table._scaled_to_now() for table in (self, other))
        if float(mine.max()) + float(theirs.max()) >= CAPACITY:
            raise DataError("a segment is full: it holds at most Σ weight 2e9.", hint="merge fewer days")
        self._sums, self._half_lives = mine, 0.0
        for level in range(len(self.widths)):
            slot = other._slots[level]
            # May make room, and so another array of sums.
            place = self.insert(level, other._keys[level], other.parts(level))
            self._sums[:, place] += theirs[:, slot]
        self._bound = float(self._sums.max())

    def by_key(self, level: int) -> tuple[IntArray, FloatArray]:
        """Keys of a level in increasing order, and their sums as of now, shape (4, segments)."""
        slot = self._slots[level]
        return self._keys[level], self._as_of_now(self._sums[:, slot], slot.shape)

    def parts(self, level: int) -> IntArray:
        """Values of the level's columns, in the order of :meth:`by_key`, shape (width, segments)."""
        width = self.widths[level]
        return self._parts[:width, self._slots[level]] if width > 1 else self._keys[level][None]

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain JSON data: for each level keys, increasing, four lists of sums in units, and values."""
        levels = []
        for level, width in enumerate(self.widths):
            sums = dict(zip(SUMS, self._sums[:, self._slots[level]].tolist(), strict=True))
            parts = self.parts(level).tolist() if width > 1 else []
            levels.append({"key": self._keys[level].tolist(), "parts": parts, **sums})
        return {"kind": "segment_table", "half_lives": self._half_lives, "levels": levels}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], widths: Sequence[int], maximum: int) -> Self:
        """The table that :meth:`state` described; ``StaleStateError`` if it is none, or of other levels."""
        expect_fields(state, "segment_table", ("half_lives", "levels"))
        table = cls(widths, maximum)
        table._half_lives = finite(state, "half_lives")
        if len(state["levels"]) != len(table.widths):
            raise StaleStateError(f"expected {len(table.widths)} segment levels; got {len(state['levels'])}.")
        for level, columns in enumerate(state["levels"]):
            width = table.widths[level]
            key, sums, parts = _checked_columns(columns, width if width > 1 else 0)
            slot = table.insert(level, key, parts)
            table._sums[:, slot] = sums
        table._bound = float(table._sums.max())
        return table

    # -- internals --------------------------------------------------------------------------------------

    def _as_of_now(self, sums: IntArray, shape: tuple[int, ...]) -> FloatArray:
        now: FloatArray = (sums * (UNITS * 0.5**self._half_lives)).reshape(len(SUMS), *shape)
        return now

    def _scaled_to_now(self) -> IntArray:
        return scaled(self._sums, round(2.0 ** (DECAY_BITS - max(0.0, self._half_lives))))

    def _scale(self, factor: int) -> None:
        self._sums[:, : self._used] = scaled(self._sums[:, : self._used], factor)

    def _take(self, count: int) -> IntArray:
        """Slots that are nobody's, their sums 0; those that were given back first."""
        again, self._free = self._free[:count], self._free[count:]
        fresh = np.arange(self._used, self._used + count - len(again))
        self._used += len(fresh)
        more = max(0, self._used - self._sums.shape[1])
        if more:
            room = ((0, 0), (0, max(more, self._sums.shape[1])))
            self._sums, self._parts = np.pad(self._sums, room), np.pad(self._parts, room)
        return np.concatenate([again, fresh])


def _checked_columns(columns: Any, width: int) -> tuple[IntArray, IntArray, IntArray]:
    if not isinstance(columns, Mapping) or set(columns) != {"key", "parts", *SUMS}:
        raise StaleStateError(f"a level of a segment table must hold key, parts and {', '.join(SUMS)}.")
    key, parts, sums = columns["key"], columns["parts"], [columns[name] for name in SUMS]
    lists = [key, *parts, *sums]
    if len(parts) != width or any(not isinstance(one, list) or len(one) != len(key) for one in lists):
        raise StaleStateError("a level of a segment table must be lists of one length.")
    if not all(isinstance(value, int) and -(2**63) <= value < 2**63 for one in lists for value in one):
        raise StaleStateError("a segment table must hold 64-bit integers.")
    if any(a >= b for a, b in itertools.pairwise(key)) or any(value < 0 for one in sums for value in one):
        raise StaleStateError("the keys of a segment table must increase, and its sums be at least 0.")
    shape = (width, len(key))
    return (
        np.array(key, dtype=np.int64),
        np.array(sums, dtype=np.int64).reshape(len(SUMS), len(key)),
        np.array(parts, dtype=np.int64).reshape(shape),
    )
