"""Replay: yesterday's rows from after this time of day, to be mixed into today's updates.

At 01:00 today the rows said yesterday after 01:00 are drawn from; today's earlier rows have been trained
on already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.duration import DAY_MS, HOUR_MS

__all__ = ["ReplayBuffer"]

Columns = dict[str, NDArray[Any]]


class _Hour:
    """Rows of one hour, evenly thinned to a bound."""

    def __init__(self, seen: int = 0, stride: int = 1, parts: list[Columns] | None = None) -> None:
        self.seen, self.stride = seen, stride
        self._parts: list[Columns] = parts or []

    def add(self, columns: Columns, bound: int) -> None:
        n = len(columns["known_at"])
        # Every stride-th row since the hour began: an even thinning that needs no random numbers.
        kept = np.flatnonzero((np.arange(self.seen, self.seen + n) % self.stride) == 0)
        self.seen += n
        if len(kept):
            self._parts.append({name: values[kept] for name, values in columns.items()})
        while sum(len(part["known_at"]) for part in self._parts) > bound:
            columns = self.columns()
            self._parts = [{name: values[::2].copy() for name, values in columns.items()}]
            self.stride *= 2

    def columns(self) -> Columns:
        if len(self._parts) > 1:
            names = self._parts[0]
            self._parts = [{name: np.concatenate([part[name] for part in self._parts]) for name in names}]
        return self._parts[0] if self._parts else {}


class ReplayBuffer:
    """The last day's rows of one task by hour of ``known_at``.

    Parameters
    ----------
    rows_per_hour : int
        Bound on what is kept of an hour; busier hours are thinned evenly.
    seed : int
        Draws depend on the seed and the step only.

    Examples
    --------
    >>> buffer = ReplayBuffer(rows_per_hour=100, seed=1)
    >>> noon = 12 * 3_600_000
    >>> buffer.add({"known_at": np.array([noon]), "label": np.array([1.0])})
    >>> buffer.draw(2, clock=noon + 86_400_000 - 1, step=7)["label"].tolist()
    [1.0, 1.0]
    >>> buffer.draw(2, clock=noon + 86_400_000 + 3_600_000, step=8) is None
    True
    """

    def __init__(self, rows_per_hour: int, seed: int) -> None:
        self.rows_per_hour, self.seed = rows_per_hour, seed
        self._hours: dict[int, _Hour] = {}

    def add(self, columns: Columns) -> None:
        """Remember rows; all columns have n rows and ``known_at`` (ms) is one of them."""
        hour = columns["known_at"] // HOUR_MS
        if len(hour) == 0:
            return
        for value in np.unique(hour).tolist():
            rows = hour == value
            part = columns if rows.all() else {name: column[rows] for name, column in columns.items()}
            self._hours.setdefault(value, _Hour()).add(part, self.rows_per_hour)
        newest = max(self._hours)
        for old in [value for value in self._hours if value < newest - 25]:
            del self._hours[old]

    def draw(self, n: int, clock: int, step: int) -> Columns | None:
        """``n`` rows with replacement from yesterday after this time of day; None if there are none.

        Each row of yesterday is as likely as any other, whether its hour was thinned or not.
        """
        first, midnight = (clock - DAY_MS) // HOUR_MS, clock // DAY_MS * DAY_MS
        pool = [hour for value, hour in sorted(self._hours.items()) if first <= value < midnight // HOUR_MS]
        if n == 0 or not pool:
            return None
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        weight = np.array([hour.seen for hour in pool], np.float64)
        counts = rng.multinomial(n, weight / weight.sum())
        drawn = []
        for hour, count in zip(pool, counts.tolist(), strict=True):
            if count:
                columns = hour.columns()
                rows = rng.integers(0, len(columns["known_at"]), count)
                drawn.append({name: values[rows] for name, values in columns.items()})
        chosen = {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}
        # The hour in which yesterday's window begins is held whole; its earlier rows are not yesterday's.
        late_enough = chosen["known_at"] > clock - DAY_MS
        return {name: values[late_enough] for name, values in chosen.items()} if late_enough.any() else None

    def state(self) -> tuple[Columns, list[list[int]]]:
        """Arrays named ``<hour>/<column>``, and ``[hour, seen, stride]`` of each hour."""
        arrays = {
            f"{value}/{name}": column
            for value, hour in sorted(self._hours.items())
            for name, column in hour.columns().items()
        }
        return arrays, [[value, hour.seen, hour.stride] for value, hour in sorted(self._hours.items())]

    def load_state(self, arrays: Columns, hours: list[list[int]]) -> None:
        parts: dict[int, Columns] = {}
        for key, column in arrays.items():
            hour, _, name = key.partition("/")
            parts.setdefault(int(hour), {})[name] = np.array(column)
        self._hours = {
            value: _Hour(seen, stride, [parts[value]] if value in parts else [])
            for value, seen, stride in hours
        }
