"""Small event logs with everything that can go wrong in them, and a joiner run over them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, get_args

import numpy as np
from hypothesis import strategies as st

from pipelines.attribution import Event, Row
from pipelines.config_sections import AttributionConfig, Policy
from pipelines.events import CLICK, CONVERSION, IMPRESSION, OPERATIONS
from pipelines.hashing import hash_text
from pipelines.joined import Arrivals, Joined, Outcomes
from pipelines.joiner import Joiner
from pipelines.label_news import ROW_KINDS

POLICIES: tuple[str, ...] = get_args(Policy)
# Long enough for windows of a few dozen ticks to see some midnights.
TICK = 2_400_000
END = 400


class Said(NamedTuple):
    """What a row of the rule begins with."""

    impression_id: str
    task: str
    kind: str
    label: float
    weight: float
    label_version: int
    event_time: int
    known_at: int
    elapsed: int


@dataclass(frozen=True)
class Rule:
    """A policy and its windows."""

    policy: str = "fnw"
    view_through: int | None = None
    confirm: int | None = None

    @property
    def tick(self) -> int:
        """Unit of the log's times, ms."""
        return TICK if self.policy == "relabel" else 1

    @property
    def attribution(self) -> AttributionConfig:
        return AttributionConfig(
            click_window=40 * self.tick,
            attribution_window=100 * self.tick,
            observation_window=15 * self.tick,
            allowed_lateness=20 * self.tick,
            view_through_window=None if self.view_through is None else self.view_through * self.tick,
        )

    @property
    def confirm_window(self) -> int | None:
        return None if self.confirm is None else self.confirm * self.tick

    def joiner(self, traffic_ratio: bool = False) -> Joiner:
        return Joiner(
            self.attribution,
            self.policy,
            confirm_window=self.confirm_window,
            traffic_ratio=traffic_ratio,
        )


@st.composite
def rules(draw: st.DrawFn, policy: str) -> Rule:
    """Windows for a policy: view-through ones wider and narrower than the click window, or none."""
    confirm = st.sampled_from([None, 10, 50, 110, 150]) if policy == "defer" else st.none()
    return Rule(policy, draw(st.sampled_from([None, 25, 60])), draw(confirm))


@st.composite
def logs(draw: st.DrawFn, tick: int = 1) -> list[Event]:
    """Impressions with clicks and conversions: late, early, repeated, retracted, restated, of part credit."""
    events = []
    for n in range(draw(st.integers(1, 4))):
        name = f"i{n}"
        start = draw(st.integers(0, 60))
        events.append(Event(IMPRESSION, name, name, start, start + draw(st.integers(0, 70))))
        for m in range(draw(st.integers(0, 3))):
            time = start + draw(st.integers(-5, 60))
            events.append(Event(CLICK, f"c{n}.{m}", name, time, time + draw(st.integers(0, 60))))
        for m in range(draw(st.integers(0, 5))):
            # Few distinct times, so that outcomes meet at one instant.
            time = start + draw(st.one_of(st.integers(-5, 150), st.sampled_from([5, 10, 20, 30])))
            arrival = time + draw(st.one_of(st.integers(0, 60), st.sampled_from([0, 20])))
            op = draw(st.sampled_from(["assert", "assert", "assert", "retract", "restate"]))
            credit = draw(st.sampled_from([1.0, 1.0, 0.3, 0.5]))
            events.append(Event(CONVERSION, f"v{n}.{m}", name, time, arrival, op, credit))
    repeated = draw(st.lists(st.sampled_from(events), max_size=3))
    events += [
        event._replace(arrival_time=event.arrival_time + draw(st.integers(0, 60))) for event in repeated
    ]
    return [
        event._replace(event_time=event.event_time * tick, arrival_time=event.arrival_time * tick)
        for event in draw(st.permutations(events))
    ]


def in_arrival_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: (event.arrival_time, event.kind, hash_text(event.event_id)))


def arrivals_of(events: list[Event]) -> Arrivals:
    impressions = [event for event in events if event.kind == IMPRESSION]
    return Arrivals(
        [event.impression_id for event in impressions],
        np.array([event.event_time for event in impressions], np.int64),
        np.array([event.arrival_time for event in impressions], np.int64),
        {"name": np.array([event.impression_id for event in impressions], "U8")},
    )


def outcomes_of(events: list[Event], kind: int) -> Outcomes:
    chosen = [event for event in events if event.kind == kind]
    return Outcomes(
        [event.impression_id for event in chosen],
        np.array([event.event_time for event in chosen], np.int64),
        np.array([event.arrival_time for event in chosen], np.int64),
        np.array([hash_text(event.event_id) for event in chosen], np.uint64),
        np.array([OPERATIONS.index(event.op) for event in chosen], np.int8),
        np.array([event.credit for event in chosen], np.float64),
        np.zeros((len(chosen), 3), np.int64),
    )


def process(joiner: Joiner, events: list[Event], clock: int) -> Joined:
    return joiner.process(
        arrivals_of(events), outcomes_of(events, CLICK), outcomes_of(events, CONVERSION), clock
    )


def said_in(joiner: Joiner, joined: Joined) -> list[Said]:
    said: list[Said] = []
    for task, rows in zip(joiner.tasks, joined.examples, strict=True):
        names = joiner.features["name"][rows.slot].tolist() if len(rows) else []
        columns = (rows.label, rows.weight, rows.label_version, rows.event_time, rows.known_at, rows.elapsed)
        for name, kind, *values in zip(
            names, rows.kind.tolist(), *(c.tolist() for c in columns), strict=True
        ):
            said.append(Said(name, task, ROW_KINDS[kind], *values))
    return said


def begins_of(rows: list[Row]) -> list[Said]:
    return [Said(**{name: getattr(row, name) for name in Said._fields}) for row in rows]


@dataclass
class Run:
    """A joiner that reads a log step by step, what it has said and what it has counted."""

    joiner: Joiner
    said: list[Said] = field(default_factory=list)
    totals: Counter[tuple[int, str]] = field(default_factory=Counter)

    def step(self, events: list[Event], clock: int) -> None:
        joined = process(self.joiner, events, clock)
        self.said += said_in(self.joiner, joined)
        self.joiner.release(joined)
        self.totals.update(joined.counts)
        assert all(n >= 0 for n in self.totals.values())


def run(rule: Rule, events: list[Event], cuts: list[int], as_of: int, restart: bool = False) -> Run:
    """Run a joiner over what has arrived by a moment, cut anywhere; ``restart``: restored after each step."""
    found = Run(rule.joiner())
    ordered = [event for event in in_arrival_order(events) if event.arrival_time <= as_of]
    bounds = sorted({0, len(ordered), *(cut % (len(ordered) + 1) for cut in cuts)})
    for start, stop in pairwise(bounds):
        found.step(ordered[start:stop], ordered[stop - 1].arrival_time)
        if restart:
            arrays, plain = found.joiner.state()
            found.joiner = rule.joiner()
            copies = {name: array.copy() for name, array in arrays.items()}
            found.joiner.load_state(copies, json.loads(json.dumps(plain)))
    found.step([], as_of)
    return found
