"""How much traffic there is now: an exponentially weighted rate of arrivals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MeanRatio", "TrafficRate", "TrafficRatio"]

# Short enough to follow the daily cycle, long enough that a minute's noise does not reach the weights.
_HORIZON_MS = 30 * 60_000


@dataclass
class TrafficRate:
    """Arrivals per millisecond, averaged with a horizon of half an hour.

    The average is divided by the weight that it has gathered, so that it is right from the first update
    on and not pulled towards zero.

    Examples
    --------
    >>> rate = TrafficRate()
    >>> for minute in range(60):
    ...     rate.update(120, 60_000 * (minute + 1))
    >>> round(rate.rate * 1000, 2)
    2.0
    """

    total: float = 0.0
    weight: float = 0.0
    clock: int = -1

    def update(self, n: int, clock: int) -> None:
        """Count ``n`` arrivals in the time since the last update; ``clock`` in ms never goes back."""
        if self.clock < 0:
            # There is no time before the first update over which its arrivals could be spread.
            self.clock = clock
            return
        elapsed = max(0, clock - self.clock)
        decay = math.exp(-elapsed / _HORIZON_MS)
        gained = _HORIZON_MS * (1.0 - decay)
        # The arrivals are taken as spread evenly over the time since the last update.
        self.total = self.total * decay + (n * gained / elapsed if elapsed else n)
        self.weight = self.weight * decay + gained
        self.clock = max(self.clock, clock)

    @property
    def rate(self) -> float:
        return self.total / self.weight if self.weight > 0 else 0.0

    def rate_at(self, clock: int) -> float:
        """The rate at ``clock`` if nothing arrived since the last update."""
        if self.clock < 0 or self.weight <= 0:
            return 0.0
        decay = math.exp(-max(0, clock - self.clock) / _HORIZON_MS)
        return self.total * decay / (self.weight * decay + _HORIZON_MS * (1.0 - decay))

    def state(self) -> list[float]:
        return [self.total, self.weight, float(self.clock)]

    @classmethod
    def from_state(cls, state: list[float]) -> TrafficRate:
        return cls(state[0], state[1], int(state[2]))


# Rows over which the mean of their ratios is taken, and how many of ratio 1 it starts from: a few days of a
# small log, some hours of a busy one.
_MEAN_HORIZON = 20_000.0
_MEAN_START = 500.0


@dataclass
class MeanRatio:
    """Mean of traffic ratios over the last rows, starting from 1.

    Examples
    --------
    >>> mean = MeanRatio()
    >>> round(mean.update(np.full(500, 3.0)), 2)
    2.01
    """

    total: float = _MEAN_START
    weight: float = _MEAN_START

    def update(self, ratio: NDArray[np.float64]) -> float:
        """Take in the ratios of new rows, shape (n,); returns the mean with them."""
        decay = math.exp(-len(ratio) / _MEAN_HORIZON)
        self.total = self.total * decay + float(ratio.sum())
        self.weight = self.weight * decay + len(ratio)
        return self.total / self.weight

    def state(self) -> list[float]:
        return [self.total, self.weight]


# Beyond this factor the ratio says more about an outage than about the daily cycle.
_LARGEST_RATIO = 8.0


class TrafficRatio:
    """Weights of rows that come again: the rate of first rows now over the rate when theirs was said.

    The mean of the ratio is divided out, separately for each kind of row: every such row is said once, so in
    the long run its weight must be 1. Where outcomes prefer busy hours the bare ratio exceeds that.

    Parameters
    ----------
    kinds : int
        Kinds of rows that come again.

    Examples
    --------
    >>> ratio = TrafficRatio(kinds=1)
    >>> then = [ratio.first_rows(1000, hour * 3_600_000) for hour in range(1, 9)][-1]
    >>> ratio.first_rows(4000, 9 * 3_600_000) > 2 * then
    True
    >>> ratio.again(0, np.array([then]), 9 * 3_600_000).round(1).tolist()
    [3.6]
    """

    def __init__(self, kinds: int) -> None:
        self.rate = TrafficRate()
        self.mean = [MeanRatio() for _ in range(kinds)]

    def first_rows(self, n: int, clock: int) -> float:
        """Count the first rows of a step; returns the rate to be kept with them."""
        self.rate.update(n, clock)
        return self.rate.rate

    def again(self, kind: int, then: NDArray[np.float64], clock: int) -> NDArray[np.float64]:
        """Weights of rows whose first rows were said at the rates ``then``, shape (n,)."""
        now = self.rate.rate_at(clock)
        # A rate of 0 means that nothing has been measured yet.
        ratio = np.divide(now, then, out=np.ones_like(then), where=(then > 0) & (now > 0))
        ratio = np.clip(ratio, 1 / _LARGEST_RATIO, _LARGEST_RATIO)
        return np.asarray(ratio / self.mean[kind].update(ratio))

    def state(self) -> list[list[float]]:
        return [self.rate.state(), *(mean.state() for mean in self.mean)]

    def load_state(self, state: list[list[float]]) -> None:
        """Continue from a `state`."""
        self.rate = TrafficRate.from_state(state[0])
        self.mean = [MeanRatio(*mean) for mean in state[1:]]
