"""Clicks and conversions that arrived before what they belong to."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

__all__ = ["Orphan", "Orphans"]


class Orphan(NamedTuple):
    """A held event; times in ms, ``position`` is (partition, offset, row) at the source."""

    event_time: int
    arrival_time: int
    event_hash: int
    positive: bool
    position: tuple[int, int, int]


class Orphans:
    """Held events by impression, each for ``patience`` ms from its arrival.

    Examples
    --------
    >>> orphans = Orphans(patience=100)
    >>> orphans.hold("i1", Orphan(5, 10, 77, True, (0, 0, 0)))
    True
    >>> orphans.expire(clock=111), len(orphans)
    (1, 0)
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._held: dict[str, list[Orphan]] = {}
        self._queue: deque[tuple[int, str]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, impression_id: str, orphan: Orphan) -> bool:
        """Hold an event; False if the same one is held already."""
        held = self._held.setdefault(impression_id, [])
        if any(other.event_hash == orphan.event_hash for other in held):
            return False
        held.append(orphan)
        self._queue.append((orphan.arrival_time, impression_id))
        return True

    def take(self, impression_id: str) -> list[Orphan]:
        """What was held for an impression, in order of arrival; it is held no longer."""
        return self._held.pop(impression_id, [])

    def expire(self, clock: int) -> int:
        """Give up on events that have waited longer than the patience; returns how many."""
        expired = 0
        while self._queue and self._queue[0][0] + self.patience < clock:
            arrival_time, impression_id = self._queue.popleft()
            held = self._held.get(impression_id)
            if held and held[0].arrival_time == arrival_time:
                held.pop(0)
                expired += 1
                if not held:
                    del self._held[impression_id]
        return expired

    def state(self) -> list[list[object]]:
        """Plain rows ``[impression_id, event_time, arrival_time, hash, positive, position]`` by arrival."""
        rows = [(orphan, name) for name, held in self._held.items() for orphan in held]
        # Stable: equal arrival times keep the order in which they were held.
        rows.sort(key=lambda row: row[0].arrival_time)
        return [
            [
                name,
                item.event_time,
                item.arrival_time,
                str(item.event_hash),
                item.positive,
                list(item.position),
            ]
            for item, name in rows
        ]

    @classmethod
    def from_state(cls, patience: int, state: list[list[object]]) -> Orphans:
        orphans = cls(patience)
        for name, event_time, arrival_time, event_hash, positive, position in state:
            place = tuple(int(part) for part in position)  # type: ignore[attr-defined]
            orphans.hold(
                str(name),
                Orphan(
                    int(str(event_time)),
                    int(str(arrival_time)),
                    int(str(event_hash)),
                    bool(positive),
                    (place[0], place[1], place[2]),
                ),
            )
        return orphans
