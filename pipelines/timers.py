"""A timer wheel over numpy arrays: set many, pop all that are due, in a fixed order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["TimerWheel"]

_NEVER = np.iinfo(np.int64).max
# Many small arrays cost more than what is in them: a bucket with more than this many is made one.
_LARGEST_BUCKET = 32
Slots = NDArray[np.int64]
Entry = tuple[NDArray[np.int32], NDArray[np.int64]]


class TimerWheel:
    """Timers of integer slots, in coarse buckets of time.

    Parameters
    ----------
    width : int
        Width of a bucket, ms. Any width is correct; about a thousandth of the typical delay is fast.

    Examples
    --------
    >>> wheel = TimerWheel(width=10)
    >>> wheel.set(np.array([7, 8]), np.array([25, 12]))
    >>> wheel.pop(clock=24)[0].tolist(), wheel.pop(clock=25)[0].tolist()
    ([8], [7])
    """

    def __init__(self, width: int) -> None:
        self.width = max(1, width)
        self._buckets: dict[int, list[Entry]] = {}
        self._next_due = _NEVER

    def __len__(self) -> int:
        return sum(len(slots) for entries in self._buckets.values() for slots, _ in entries)

    def set(self, slots: Slots, due: Slots) -> None:
        """Set a timer for each slot at ``due`` (ms)."""
        if len(slots) == 0:
            return
        self._next_due = min(self._next_due, int(due.min()))
        bucket = due // self.width
        first = int(bucket[0])
        if (bucket == first).all():
            self._put(first, slots, due)
            return
        order = np.argsort(bucket, kind="stable")
        cuts = np.flatnonzero(np.diff(bucket[order])) + 1
        for part in np.split(order, cuts):
            self._put(int(bucket[part[0]]), slots[part], due[part])

    def pop(self, clock: int) -> tuple[Slots, Slots]:
        """Slots and due times of all timers with ``due <= clock``, ordered by due time, then by setting."""
        if clock < self._next_due:
            empty = np.zeros(0, np.int64)
            return empty, empty
        last = clock // self.width
        ripe = sorted(bucket for bucket in self._buckets if bucket <= last)
        found = [self._merged(self._buckets.pop(bucket)) for bucket in ripe]
        slots = np.concatenate([slots for slots, _ in found])
        due = np.concatenate([due for _, due in found])
        late = due > clock
        if late.any():
            # Only the last bucket can hold timers that are not due yet.
            self._buckets[last] = [(slots[late], due[late])]
            slots, due = slots[~late], due[~late]
        self._next_due = self._earliest()
        order = np.argsort(due, kind="stable")
        return slots[order].astype(np.int64), due[order]

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All timers in the order of their buckets and of setting."""
        found = [self._merged(self._buckets[bucket]) for bucket in sorted(self._buckets)]
        if not found:
            return {"slots": np.zeros(0, np.int32), "due": np.zeros(0, np.int64)}
        return {
            "slots": np.concatenate([slots for slots, _ in found]),
            "due": np.concatenate([due for _, due in found]),
        }

    @classmethod
    def from_state(cls, width: int, state: dict[str, NDArray[np.generic]]) -> TimerWheel:
        wheel = cls(width)
        wheel.set(np.array(state["slots"], np.int64), np.array(state["due"], np.int64))
        return wheel

    def _put(self, bucket: int, slots: Slots, due: Slots) -> None:
        entries = self._buckets.setdefault(bucket, [])
        entries.append((slots.astype(np.int32), due))
        if len(entries) > _LARGEST_BUCKET:
            self._buckets[bucket] = [self._merged(entries)]

    @staticmethod
    def _merged(entries: list[Entry]) -> Entry:
        if len(entries) == 1:
            return entries[0]
        return np.concatenate([slots for slots, _ in entries]), np.concatenate([due for _, due in entries])

    def _earliest(self) -> int:
        if not self._buckets:
            return _NEVER
        return min(int(due.min()) for _, due in self._buckets[min(self._buckets)])
