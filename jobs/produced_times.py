"""When events reached the broker, counted by tenths of a second: what freshness is measured from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESOLUTION_MS", "Produced", "ProducedTimes", "middles"]

RESOLUTION_MS = 100
# Bucket of `RESOLUTION_MS` since the epoch, and how many events reached the broker in it; sorted.
Produced = list[tuple[int, int]]


def middles(
    produced: Sequence[Sequence[int]], resolution_ms: int = RESOLUTION_MS
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """When the events of each bucket, of which there is at least one, are taken to have come, ms; and count.

    A bucket holds events from its start to its end: its middle is what they waited from.

    Examples
    --------
    >>> [part.tolist() for part in middles([(10, 2), (11, 1)])]
    [[1050.0, 1150.0], [2, 1]]
    """
    bucket, count = np.array(produced, np.int64).T
    return (bucket + 0.5) * resolution_ms, count


class ProducedTimes:
    """Counts the events of steps, or of several commits, until somebody takes them.

    Parameters
    ----------
    most : int, optional
        So many buckets at most: what came before is counted in the oldest of them.

    Examples
    --------
    >>> times = ProducedTimes(most=2)
    >>> times.add(np.array([1_000, 1_099, 1_100]))
    >>> times.merge([(12, 5)])
    >>> times.value()
    [(11, 3), (12, 5)]
    >>> times.take(), times.take()
    ([(11, 3), (12, 5)], [])
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._counts: dict[int, int] = {}

    def add(self, produced_at: NDArray[np.int64]) -> None:
        """Count events that reached the broker at these times, ms."""
        buckets, counts = np.unique(produced_at // RESOLUTION_MS, return_counts=True)
        self.merge(zip(buckets.tolist(), counts.tolist(), strict=True))

    def merge(self, produced: Iterable[Sequence[int]]) -> None:
        """Count what others have counted."""
        for bucket, count in produced:
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        excess = 0 if self._most is None else len(self._counts) - self._most
        if excess > 0:
            counts = sum(self._counts.pop(bucket) for bucket in sorted(self._counts)[:excess])
            self._counts[min(self._counts)] += counts

    def value(self) -> Produced:
        """What was counted since the last `take`."""
        return sorted(self._counts.items())

    def take(self) -> Produced:
        """The same; begins anew."""
        produced, self._counts = self.value(), {}
        return produced
