"""Which ids have a table row of their own: admission, expiry, and the map from id to row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.key_index import KeyIndex
from models.sighting_filter import SightingFilter
from pipelines.config_sections import TablesConfig
from pipelines.duration import HOUR_MS
from pipelines.errors import StaleStateError
from pipelines.table_rows import ChangedRows, TableRows

__all__ = ["IdTable", "SlotChanges"]

Ints = NDArray[np.int64]

_FIRST_SLOTS = 1024
# Share of the capacity that goes at once when it is exceeded: looking for the oldest ids looks at all.
_EVICTED_SHARE = 16


@dataclass(frozen=True)
class SlotChanges:
    """What one look at ids has changed: first ``freed`` is done, then ``new``.

    Attributes
    ----------
    freed : ndarray of int64
        Slots whose ids have gone, ascending; some may be among ``new``.
    new : ndarray of int64, shape (m,)
        Slots given to ids, in the order in which the ids came.
    place : ndarray of int64, shape (m,)
        Where in the flattened ids each of them came first.
    """

    freed: Ints
    new: Ints
    place: Ints


class IdTable:
    """Slots of ids, each id's its own; which id has one follows from the ids that came and from their times.

    - An id is *admitted* when it has been seen ``admit_after`` times, as a filter of a fixed size counts.
    - It *expires* when it has not been seen for ``ttl``: at the first call of each full hour of event time
      all such ids go.
    - When more than ``capacity`` ids would be admitted, those seen least recently go, a sixteenth of the
      capacity at a time. Ids seen at the same time stay; new ones that find no room are not admitted.
    - New ids take the lowest free slots in the order in which they came.

    Slots are made as they are needed, twice as many each time.

    Parameters
    ----------
    config : TablesConfig
    seed : int
        Of the filter.

    Attributes
    ----------
    clock : int
        Event time of the last call, ms; -1 before the first. It never goes back.

    Examples
    --------
    >>> table = IdTable(TablesConfig(admit_after=2, ttl="2h"), seed=1)
    >>> table.see(np.array([[7, 8], [7, 9]]), now=0).new.tolist()
    [0]
    >>> table.see(np.array([[9, 8]]), now=HOUR_MS).new.tolist(), table.find(np.array([7, 8, 9])).tolist()
    ([1, 2], [0, 2, 1])
    >>> table.see(np.array([[4, 4]]), now=2 * HOUR_MS)
    SlotChanges(freed=array([0]), new=array([0]), place=array([0]))
    >>> table.find(np.array([7, 4])).tolist()
    [-1, 0]
    """

    def __init__(self, config: TablesConfig, seed: int) -> None:
        self._config = config
        self._index = KeyIndex(np.zeros(0, np.int64))
        self._last_seen: Ints = np.zeros(0, np.int64)
        self._filter = SightingFilter(config.filter_cells, seed) if config.admit_after > 1 else None
        self.clock = -1
        self._swept_hour = -1
        self._free: Ints = np.zeros(0, np.int64)
        self._touched = ChangedRows(0)

    def __len__(self) -> int:
        """Ids that have a slot."""
        return self.slots - len(self._free)

    @property
    def slots(self) -> int:
        """Slots there are, free ones included."""
        return len(self._index.keys)

    @property
    def keys(self) -> Ints:
        """Id of each slot, 0 for a free one: not to be written to."""
        return self._index.keys

    @property
    def free(self) -> Ints:
        """Free slots, ascending."""
        return self._free

    def find(self, ids: Ints) -> Ints:
        """Slot of each id, -1 where it has none; 0 is no id."""
        return self._index.find(ids)

    def see(self, ids: Ints, now: int) -> SlotChanges:
        """Take note of ids that came; 0 is no id.

        1. Ids that have not been seen for too long expire, if an hour has begun since the last call.
        2. Those that have a slot are seen now.
        3. The others are counted, and admitted if they have been seen often enough.

        Parameters
        ----------
        ids : ndarray of int64, any shape
            One that is there twice has been seen twice.
        now : int
            Event time, ms.
        """
        self.clock = max(self.clock, now)
        expired = self._sweep()  # 1
        flat = ids.reshape(-1)
        slots = self.find(flat)
        self._stamp(slots[slots >= 0])  # 2
        place = np.flatnonzero((slots < 0) & (flat != 0))
        if len(place) == 0:
            return SlotChanges(expired, slots[:0], place)
        keys, first, sightings = np.unique(flat[place], return_index=True, return_counts=True)  # 3
        order = np.argsort(first)
        keys, place, sightings = keys[order], place[first[order]], sightings[order]
        if self._filter is not None:
            wanted = self._filter.add(keys, sightings) >= self._config.admit_after
            keys, place = keys[wanted], place[wanted]
        evicted = self._make_room(len(keys))
        new, self._free = np.split(self._free, [min(len(keys), len(self._free))])
        self._index.put(new, keys[: len(new)])
        self._stamp(new)
        return SlotChanges(np.union1d(expired, evicted), new, place[: len(new)])

    def reset(self) -> None:
        """Forget everything; there are no slots then."""
        self._resize(0)
        if self._filter is not None:
            self._filter.reset()
        self.clock = self._swept_hour = -1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state: copies. ``weights/ids`` is what finds the rows, all else decides how they change."""
        arrays: dict[str, NDArray[Any]] = {"weights/ids": self.keys.copy(), **self._plain_arrays()}
        arrays["ids/last_seen"] = self._last_seen.copy()
        if self._filter is not None:
            arrays["ids/sightings"] = self._filter.counts.copy()
        return arrays

    def shapes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of ``arrays`` with so many slots."""
        filters = {} if self._filter is None else {"ids/sightings": self._filter.counts.shape}
        return {"weights/ids": (slots,), "ids/last_seen": (slots,), "ids/clock": (3,), **filters}

    def take_changes(self) -> tuple[dict[str, NDArray[Any]], dict[str, list[TableRows]]]:
        """What ``arrays`` gives, of the larger ones only what has changed since the last call."""
        slots = self._touched.take()
        tables = {
            "weights/ids": [TableRows.copied(self.keys, slots)],
            "ids/last_seen": [TableRows.copied(self._last_seen, slots)],
        }
        if self._filter is not None:
            counts = TableRows.copied(self._filter.counts, self._filter.take_touched())
            tables["ids/sightings"] = [counts]
        return self._plain_arrays(), tables

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Continue from ``arrays``; with ``weights/ids`` alone ids are found and that is all.

        Raises
        ------
        StaleStateError
            If there are more slots than the capacity.
        """
        keys = np.array(arrays["weights/ids"], np.int64)
        if len(keys) > self._config.capacity:
            raise StaleStateError(
                f"expected at most {self._config.capacity} rows of ids. Received: {len(keys)}.",
                hint="it belongs to a student with another student.tables.capacity",
            )
        self._index = KeyIndex(keys)
        self._last_seen = np.array(arrays.get("ids/last_seen", np.zeros(len(keys))), np.int64)
        self._free = np.flatnonzero(keys == 0)
        self._touched = ChangedRows(len(keys))
        if "ids/clock" not in arrays:
            return
        self.clock, self._swept_hour, counted = (int(value) for value in arrays["ids/clock"])
        if self._filter is not None:
            self._filter.load(arrays["ids/sightings"], counted)

    def _plain_arrays(self) -> dict[str, NDArray[Any]]:
        counted = 0 if self._filter is None else self._filter.counted
        return {"ids/clock": np.array([self.clock, self._swept_hour, counted], np.int64)}

    def _sweep(self) -> Ints:
        hour = self.clock // HOUR_MS
        if hour == self._swept_hour:
            return np.zeros(0, np.int64)
        self._swept_hour = hour
        too_old = self._last_seen <= self.clock - self._config.ttl
        return self._remove(np.flatnonzero(too_old & (self.keys != 0)))

    def _make_room(self, wanted: int) -> Ints:
        """Free as many slots as can be; returns those that had an id."""
        capacity = self._config.capacity
        if wanted > len(self._free) and self.slots < capacity:
            needed = self.slots + wanted - len(self._free)
            self._resize(min(capacity, max(_FIRST_SLOTS, 2 * self.slots, needed)))
        if wanted <= len(self._free):
            return np.zeros(0, np.int64)
        old = np.flatnonzero((self._last_seen < self.clock) & (self.keys != 0))
        order = np.argsort(self._last_seen[old], kind="stable")
        count = max(wanted - len(self._free), capacity // _EVICTED_SHARE)
        return self._remove(np.sort(old[order[:count]]))

    def _remove(self, slots: Ints) -> Ints:
        if len(slots):
            self._index.remove(slots)
            self._last_seen[slots] = 0
            self._touched.add(slots)
            self._free = np.flatnonzero(self.keys == 0)
        return slots

    def _stamp(self, slots: Ints) -> None:
        self._last_seen[slots] = self.clock
        self._touched.add(slots)

    def _resize(self, slots: int) -> None:
        self._index.resize(slots)
        last_seen = np.zeros(slots, np.int64)
        kept = min(slots, len(self._last_seen))
        last_seen[:kept] = self._last_seen[:kept]
        self._last_seen = last_seen
        self._free = np.flatnonzero(self.keys == 0)
        self._touched = ChangedRows(slots)
