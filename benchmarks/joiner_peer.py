"""A joiner as one would write it at first: a dict of objects, event by event; policy ``fnw``.

It is the peer of the benchmark and says the same rows: that is checked there.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

from pipelines.config_sections import AttributionConfig
from pipelines.joined import Arrivals, Outcomes

__all__ = ["DictJoiner"]

Row = tuple[str, str, str, float, int, int]
# Event time, arrival time, hash of the event id; of conversions operation and credit too.
Click = tuple[int, int, int]
Conversion = tuple[int, int, int, int, float]


@dataclass
class _Window:
    opened: int
    known: int
    closes: int
    credit: float = 0.0
    time: int = -1
    seen: set[int] = field(default_factory=set)
    positive_said: bool = False


@dataclass
class _Impression:
    features: Any
    click: _Window
    conversion: _Window | None = None


class DictJoiner:
    """Joins impressions, clicks and conversions; rows are tuples."""

    def __init__(self, attribution: AttributionConfig) -> None:
        self.attribution = attribution
        self.patience = attribution.click_window + attribution.allowed_lateness
        self.open: dict[str, _Impression] = {}
        self.orphans: tuple[dict[str, list[Click]], dict[str, list[Conversion]]] = ({}, {})
        self.timers: list[tuple[int, str]] = []
        self.orphan_timers: list[tuple[int, int, str]] = []

    def process(
        self, impressions: Arrivals, clicks: Outcomes, conversions: Outcomes, clock: int
    ) -> list[Row]:
        """The rows that one step says."""
        said: list[Row] = []
        buckets = impressions.features["buckets"]
        for row, name in enumerate(impressions.impression_id):
            self._impression(
                name, int(impressions.event_time[row]), int(impressions.arrival_time[row]), buckets[row], said
            )
        for row, name in enumerate(clicks.impression_id):
            self._click(
                name,
                (
                    int(clicks.event_time[row]),
                    int(clicks.arrival_time[row]),
                    int(clicks.event_hash[row]),
                ),
                said,
            )
        for row, name in enumerate(conversions.impression_id):
            self._conversion(
                name,
                (
                    int(conversions.event_time[row]),
                    int(conversions.arrival_time[row]),
                    int(conversions.event_hash[row]),
                    int(conversions.op[row]),
                    float(conversions.credit[row]),
                ),
                said,
            )
        self._expire(clock)
        return said

    def _impression(self, name: str, time: int, arrival: int, features: Any, said: list[Row]) -> None:
        if name in self.open or arrival > time + self.patience:
            return
        closes = time + self.patience
        self.open[name] = _Impression(features.copy(), _Window(time, arrival, closes))
        heapq.heappush(self.timers, (max(closes, arrival), name))
        said.append((name, "click", "first", 0.0, time, arrival))
        for event in self.orphans[0].pop(name, ()):
            self._click(name, event, said)

    def _click(self, name: str, event: Click, said: list[Row]) -> None:
        time, arrival, event_hash = event
        found = self.open.get(name)
        if found is None:
            self.orphans[0].setdefault(name, []).append(event)
            heapq.heappush(self.orphan_timers, (arrival + self.patience, 0, name))
            return
        window = found.click
        if event_hash in window.seen or window.credit > 0 or arrival > window.closes:
            return
        if not window.opened <= time <= window.opened + self.attribution.click_window:
            return
        window.seen.add(event_hash)
        window.credit, window.positive_said = 1.0, True
        known = max(arrival, window.known)
        said.append((name, "click", "delayed_positive", 1.0, window.opened, known))
        closes = time + self.attribution.attribution_window + self.attribution.allowed_lateness
        found.conversion = _Window(time, known, closes)
        heapq.heappush(self.timers, (max(closes, known), name))
        said.append((name, "conversion", "first", 0.0, time, known))
        for held in self.orphans[1].pop(name, ()):
            self._conversion(name, held, said)

    def _conversion(self, name: str, event: Conversion, said: list[Row]) -> None:
        time, arrival, event_hash, op, credit = event
        found = self.open.get(name)
        if found is None or found.conversion is None:
            self.orphans[1].setdefault(name, []).append(event)
            heapq.heappush(self.orphan_timers, (arrival + self.patience, 1, name))
            return
        window = found.conversion
        if event_hash in window.seen or arrival > window.closes:
            return
        if not window.opened <= time <= window.opened + self.attribution.attribution_window:
            return
        window.seen.add(event_hash)
        if op == 0 and time > window.time:
            window.credit, window.time = window.credit or credit, time
        elif op == 1 and time >= window.time:
            window.credit, window.time = 0.0, time
        if window.credit > 0 and not window.positive_said:
            window.positive_said = True
            known = max(arrival, window.known)
            said.append((name, "conversion", "delayed_positive", 1.0, window.opened, known))

    def _expire(self, clock: int) -> None:
        while self.timers and self.timers[0][0] < clock:
            _, name = heapq.heappop(self.timers)
            found = self.open.get(name)
            if found is not None and max(found.click.closes, found.click.known) < clock:
                window = found.conversion
                if window is None or max(window.closes, window.known) < clock:
                    del self.open[name]
        while self.orphan_timers and self.orphan_timers[0][0] < clock:
            _, kind, name = heapq.heappop(self.orphan_timers)
            self.orphans[kind].pop(name, None)
