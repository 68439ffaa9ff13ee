"""Clicks and conversions that arrived before what they belong to."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

__all__ = ["Orphan", "Orphans"]


class Orphan(NamedTuple):
    """A held event; times in ms, ``position`` is (partition, offset, row) at the source.

    ``op`` is a place in `pipelines.events.OPERATIONS`.
    """

    impression_id: str
    event_time: int
    arrival_time: int
    event_hash: int
    op: int
    credit: float
    position: tuple[int, int, int]


class Orphans:
    """Held events by the key of their impression (`pipelines.slot_table`), each for ``patience`` ms.

    Examples
    --------
    >>> orphans = Orphans(patience=100)
    >>> orphans.hold(b"key", Orphan("i1", 5, 10, 77, 0, 1.0, (0, 0, 0)))
    True
    >>> orphans.expire(clock=111), len(orphans)
    (1, 0)
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._held: dict[bytes, list[Orphan]] = {}
        self._queue: deque[tuple[int, bytes]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, key: bytes, orphan: Orphan) -> bool:
        """Hold an event; False if the same one is held already."""
        held = self._held.setdefault(key, [])
        if any(other.event_hash == orphan.event_hash for other in held):
            return False
        held.append(orphan)
        self._queue.append((orphan.arrival_time, key))
        return True

    def get(self, key: bytes) -> list[Orphan]:
        """What is held for an impression, in order of arrival."""
        return self._held.get(key, [])

    def take(self, key: bytes) -> list[Orphan]:
        """What was held for an impression, in order of arrival; it is held no longer."""
        return self._held.pop(key, [])

    def take_heard(self, key: bytes, hashes: set[int]) -> list[Orphan]:
        """Of what was held for an impression the events with these hashes; the others stay."""
        held = self._held.pop(key, [])
        rest = [orphan for orphan in held if orphan.event_hash not in hashes]
        if rest:
            self._held[key] = rest
        return [orphan for orphan in held if orphan.event_hash in hashes]

    def expire(self, clock: int) -> int:
        """Give up on events that have waited longer than the patience; returns how many."""
        expired = 0
        while self._queue and self._queue[0][0] + self.patience < clock:
            arrival_time, key = self._queue.popleft()
            held = self._held.get(key)
            if held and held[0].arrival_time == arrival_time:
                held.pop(0)
                expired += 1
                if not held:
                    del self._held[key]
        return expired

    def state(self) -> list[list[Any]]:
        """Plain rows by arrival: key (hexadecimal), the fields of `Orphan`, and its hash as text."""
        rows = [(key, orphan) for key, held in self._held.items() for orphan in held]
        # Stable: what arrived for one impression at one instant keeps the order in which it was held.
        rows.sort(key=lambda row: (row[1].arrival_time, row[0]))
        return [[key.hex(), *orphan._replace(event_hash=0), str(orphan.event_hash)] for key, orphan in rows]

    @classmethod
    def from_state(cls, patience: int, state: list[list[Any]]) -> Orphans:
        orphans = cls(patience)
        for key, name, event_time, arrival_time, _, op, credit, position, event_hash in state:
            place = (int(position[0]), int(position[1]), int(position[2]))
            orphans.hold(
                bytes.fromhex(key),
                Orphan(name, event_time, arrival_time, int(event_hash), op, credit, place),
            )
        return orphans
