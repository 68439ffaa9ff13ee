"""Sums by segment: bounded, slowly forgetting, quick to look up by the batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibration.link import FloatArray
from calibration.state import expect_fields, finite, finite_list
from pipelines.errors import StaleStateError

__all__ = ["SUMS", "IntArray", "SegmentTable"]

IntArray = npt.NDArray[np.int64]

# Observed positives, expected positives, rows, variance; the third is a segment's support.
SUMS = ("positives", "expected", "rows", "variance")
_SUPPORT = SUMS.index("rows")
# Sums are kept at the scale of the first row: a new row weighs 2**half_lives instead of the old ones being
# multiplied down. Every 32 half-lives all are multiplied by 2**-32, which is exact.
_RESCALE_HALF_LIVES = 32
# Room is made by an eighth at a time: evicting one by one would sort the table for each new segment.
_KEPT_SHARE = 0.875


class SegmentTable:
    """Four sums for each segment of each field.

    A segment is found once by its key (:meth:`find`, :meth:`insert`) and then read and added to by its slot.
    The order in which segments came plays no role for what is read, nor for the state.

    Parameters
    ----------
    fields : int
        Each has segments of its own.
    maximum : int
        Most segments a field may keep; beyond it the least supported go, of equals the larger keys.

    Examples
    --------
    >>> table = SegmentTable(fields=1, maximum=100)
    >>> slots = table.insert(np.array([[7, 8, 7]]))
    >>> table.add(slots[0], (np.ones(3), np.zeros(3), np.ones(3), np.zeros(3)))
    >>> table.advance(half_lives=1.0)
    >>> key, sums = table.by_key(0)
    >>> key.tolist(), sums[0].tolist()
    ([7, 8], [1.0, 0.5])
    """

    def __init__(self, fields: int, maximum: int) -> None:
        self.maximum = maximum
        self._half_lives = 0.0
        # One array for all fields; each field finds its own columns of it.
        self._slots: list[dict[int, int]] = [{} for _ in range(fields)]
        self._sums = np.zeros((len(SUMS), 256))
        self._used = 0
        self._free: list[int] = []

    def find(self, columns: IntArray) -> IntArray:
        """Slot of each key, -1 where it is unknown; keys and slots of shape (fields, n)."""
        found = np.empty(columns.shape, dtype=np.int64)
        for row, slots, column in zip(found, self._slots, columns, strict=True):
            row[:] = list(map(slots.get, column.tolist(), itertools.repeat(-1)))
        return found

    def insert(self, columns: IntArray) -> IntArray:
        """Slot of each key; unknown keys get one, in order of appearance."""
        found = self.find(columns)
        for row, slots, column in zip(found, self._slots, columns, strict=True):
            unknown = row < 0
            if not unknown.any():
                continue
            keys = column[unknown].tolist()
            for key in keys:
                if key not in slots:
                    slots[key] = self._free.pop() if self._free else self._append()
            row[unknown] = [slots[key] for key in keys]
        return found

    def read(self, slots: IntArray) -> FloatArray:
        """The sums as of now, shape (4, *slots.shape); 0 where the slot is -1."""
        # Slot -1 would read some other segment's sums.
        sums: FloatArray = np.where(slots >= 0, self._sums[:, slots] * 0.5**self._half_lives, 0.0)
        return sums

    def add(self, slots: IntArray, amounts: Sequence[FloatArray]) -> None:
        """Add one amount a row to each of the four sums; arrays of shape (n,)."""
        scale = 2.0**self._half_lives
        for sums, amount in zip(self._sums, amounts, strict=True):
            np.add.at(sums, slots, scale * amount)

    def advance(self, half_lives: float) -> None:
        """Let all sums fall to ``0.5 ** half_lives`` of themselves."""
        self._half_lives += half_lives
        times = self._half_lives // _RESCALE_HALF_LIVES
        if times > 0:
            self._half_lives -= times * _RESCALE_HALF_LIVES
            # 64 rescalings leave nothing of any float64.
            self._sums *= 2.0 ** (-_RESCALE_HALF_LIVES * min(times, 64.0) / 2)
            self._sums *= 2.0 ** (-_RESCALE_HALF_LIVES * min(times, 64.0) / 2)

    def evict(self) -> None:
        """Where a field is over its bound, keep the best supported seven eighths of the bound."""
        for field, slots in enumerate(self._slots):
            if len(slots) <= self.maximum:
                continue
            key, slot = self._pairs(field)
            from_best = np.lexsort((key, -self._sums[_SUPPORT, slot]))
            dropped = from_best[int(_KEPT_SHARE * self.maximum) :]
            self._sums[:, slot[dropped]] = 0.0
            self._free.extend(slots.pop(gone) for gone in key[dropped].tolist())

    def by_key(self, field: int) -> tuple[IntArray, FloatArray]:
        """Keys of a field in increasing order, and their sums as of now, shape (4, segments)."""
        key, sums = self._stored(field)
        return key, sums * 0.5**self._half_lives

    def state(self) -> dict[str, Any]:
        """Plain JSON data: for each field the keys, increasing, and four lists of sums."""
        stored = [self._stored(field) for field in range(len(self._slots))]
        return {
            "kind": "segment_table",
            "half_lives": self._half_lives,
            "fields": [[key.tolist(), *sums.tolist()] for key, sums in stored],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], fields: int, maximum: int) -> Self:
        """The table that :meth:`state` described; ``StaleStateError`` if it is none, or of other fields."""
        expect_fields(state, "segment_table", ("half_lives", "fields"))
        table = cls(fields, maximum)
        table._half_lives = finite(state, "half_lives")
        if len(state["fields"]) != fields:
            raise StaleStateError(f"expected segments of {fields} fields; got {len(state['fields'])}.")
        for slots, columns in zip(table._slots, state["fields"], strict=True):
            key, sums = _checked_columns(columns)
            slots.update((k, table._append()) for k in key)
            table._sums[:, table._used - len(key) : table._used] = sums
        return table

    def _append(self) -> int:
        if self._used == self._sums.shape[1]:
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)], axis=1)
        self._used += 1
        return self._used - 1

    def _stored(self, field: int) -> tuple[IntArray, FloatArray]:
        key, slot = self._pairs(field)
        order = np.argsort(key)
        return key[order], self._sums[:, slot[order]]

    def _pairs(self, field: int) -> tuple[IntArray, IntArray]:
        slots = self._slots[field]
        key = np.fromiter(slots.keys(), dtype=np.int64, count=len(slots))
        return key, np.fromiter(slots.values(), dtype=np.int64, count=len(slots))


def _checked_columns(columns: Any) -> tuple[list[int], FloatArray]:
    key, *sums = columns
    lists = [finite_list(values, "segment sums") for values in sums]
    if len(lists) != len(SUMS) or any(len(values) != len(key) for values in lists):
        raise StaleStateError("a field of a segment table must be five lists of one length.")
    whole = all(isinstance(k, int) and -(2**63) <= k < 2**63 for k in key)
    if not whole or any(a >= b for a, b in itertools.pairwise(key)):
        raise StaleStateError("the keys of a segment table must be increasing 64-bit integers.")
    return key, np.array(lists, dtype=np.float64).reshape(len(SUMS), len(key))
