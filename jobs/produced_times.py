"""When events reached the broker, counted by tenths of a second: what freshness is measured from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESOLUTION_MS", "Produced", "ProducedTimes"]

RESOLUTION_MS = 100
# Bucket of `RESOLUTION_MS` since the epoch, and how many events reached the broker in it; sorted.
Produced = list[tuple[int, int]]


class ProducedTimes:
    """Counts the events of steps until a commit takes them.

    Examples
    --------
    >>> times = ProducedTimes()
    >>> times.add(np.array([1_000, 1_099, 1_100]))
    >>> times.take()
    [(10, 2), (11, 1)]
    >>> times.take()
    []
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, produced_at: NDArray[np.int64]) -> None:
        """Count events that reached the broker at these times, ms."""
        buckets, counts = np.unique(produced_at // RESOLUTION_MS, return_counts=True)
        for bucket, count in zip(buckets.tolist(), counts.tolist(), strict=True):
            self._counts[bucket] = self._counts.get(bucket, 0) + count

    def take(self) -> Produced:
        """What was counted since the last call."""
        counts, self._counts = self._counts, {}
        return sorted(counts.items())
