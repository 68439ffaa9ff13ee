"""Traffic for the joiner's benchmark: ready arrays, in order of arrival, with the usual accidents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.duration import DAY_MS, MINUTE_MS
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.hashing import hash_text
from pipelines.joined import Arrivals, Outcomes

__all__ = ["Traffic", "make_traffic"]

CLICKED, CONVERTED = 0.3, 0.05
# Shares of events that arrive late (some before what they belong to), twice, or are retracted.
LATE, REPEATED, RETRACTED = 0.02, 0.01, 0.02
FEATURES = 24
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """Events of three kinds in one order of arrival.

    ``kind`` (n,) is the kind of each event, ``arrival_time`` (n,) when it became known, ms; the tables hold
    the events of a kind in that order.
    """

    kind: NDArray[np.int8]
    arrival_time: Ints
    impressions: Arrivals
    clicks: Outcomes
    conversions: Outcomes

    def __len__(self) -> int:
        return len(self.kind)

    def steps(self, size: int) -> list[tuple[Arrivals, Outcomes, Outcomes, int]]:
        """Steps of ``size`` events, and the clock of each."""
        before = np.zeros((len(self) + 1, 3), np.int64)
        for kind in range(3):
            np.cumsum(self.kind == kind, out=before[1:, kind])
        found: list[tuple[Arrivals, Outcomes, Outcomes, int]] = []
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            first, last = before[start].tolist(), before[stop].tolist()
            found.append(
                (
                    self.impressions.slice(first[0], last[0]),
                    self.clicks.slice(first[1], last[1]),
                    self.conversions.slice(first[2], last[2]),
                    int(self.arrival_time[stop - 1]),
                )
            )
        return found


def make_traffic(impressions: int, days: float, seed: int = 1) -> Traffic:
    """Impressions spread over some days, and what becomes known of them within these days."""
    rng = np.random.default_rng(seed)
    span = int(days * DAY_MS)
    opened = np.sort(rng.integers(0, span, impressions))
    clicked = np.flatnonzero(rng.random(impressions) < CLICKED)
    click_time = opened[clicked] + rng.exponential(MINUTE_MS, len(clicked)).astype(np.int64)
    bought = np.flatnonzero(rng.random(len(clicked)) < CONVERTED)
    bought_time = click_time[bought] + rng.exponential(DAY_MS, len(bought)).astype(np.int64)
    retracted = np.flatnonzero(rng.random(len(bought)) < RETRACTED)
    owner = [np.arange(impressions), clicked, np.concatenate([clicked[bought], clicked[bought[retracted]]])]
    time = [opened, click_time, np.concatenate([bought_time, bought_time[retracted] + MINUTE_MS])]
    op = np.concatenate([np.zeros(len(bought), np.int8), np.ones(len(retracted), np.int8)])
    columns = {
        "kind": np.repeat(np.arange(3), [len(part) for part in owner]).astype(np.int8),
        "number": np.concatenate([np.arange(len(part)) for part in owner]),
        "owner": np.concatenate(owner),
        "time": np.concatenate(time),
        "op": np.concatenate([np.zeros(impressions + len(clicked), np.int8), op]),
    }
    # Most events arrive within seconds; a late one within minutes.
    n = len(columns["kind"])
    delay = rng.exponential(2_000.0, n) + np.where(
        rng.random(n) < LATE, rng.exponential(3.0 * MINUTE_MS, n), 0
    )
    columns["arrival"] = columns["time"] + delay.astype(np.int64)
    again = np.flatnonzero(rng.random(n) < REPEATED)
    columns = {name: np.concatenate([values, values[again]]) for name, values in columns.items()}
    columns["arrival"][n:] += rng.exponential(MINUTE_MS, len(again)).astype(np.int64)
    order = np.lexsort((columns["number"], columns["kind"], columns["arrival"]))
    order = order[columns["arrival"][order] <= span]
    return _as_tables({name: values[order] for name, values in columns.items()}, rng)


def _as_tables(columns: dict[str, NDArray[Any]], rng: np.random.Generator) -> Traffic:
    kind = columns["kind"]
    own = {name: [values[kind == each] for each in range(3)] for name, values in columns.items()}
    shown = len(own["owner"][IMPRESSION])
    # As long as a UUID, and as random.
    ids = [
        [f"{int(number) * 0x9E3779B97F4A7C15 & (1 << 64) - 1:036x}" for number in part]
        for part in own["owner"]
    ]
    features = {"buckets": rng.integers(0, 1 << 20, (shown, FEATURES)).astype(np.int32)}
    arrivals = Arrivals(ids[IMPRESSION], own["time"][IMPRESSION], own["arrival"][IMPRESSION], features)
    clicks, conversions = (
        Outcomes(
            ids[each],
            own["time"][each],
            own["arrival"][each],
            np.array([hash_text(f"{each}.{number}") for number in own["number"][each].tolist()], np.uint64),
            own["op"][each],
            np.ones(len(ids[each])),
            np.zeros((len(ids[each]), 3), np.int64),
        )
        for each in (CLICK, CONVERSION)
    )
    return Traffic(kind, columns["arrival"], arrivals, clicks, conversions)
