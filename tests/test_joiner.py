"""The stream joiner says what the rule says, however the events arrive and are cut into steps."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.attribution import Event, rows
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.hashing import hash_text
from pipelines.joined import Arrivals, Closed, Outcomes
from pipelines.joiner import TASKS, Joiner

WINDOWS = AttributionConfig(
    click_window=40, attribution_window=100, observation_window=15, allowed_lateness=20
)
POLICIES = ["wait", "vanilla", "esdfm", "fnw", "fnc"]
KIND_NAMES = {0: "first", 1: "delayed_positive"}
# What a row of the rule begins with: impression_id, task, kind, label, event_time, known_at.
Said = tuple[str, str, str, int, int, int]
Totals = Counter[tuple[int, str]]
Labels = Counter[tuple[str | None, str, int]]


class Ran(NamedTuple):
    """What a joiner has said about a log, its counts of events, and the joiner."""

    said: list[Said]
    totals: Totals
    joiner: Joiner


def in_arrival_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: (event.arrival_time, event.kind, event.event_id))


def outcomes_of(events: list[Event], kind: int) -> Outcomes:
    chosen = [event for event in events if event.kind == kind]
    return Outcomes(
        [event.impression_id for event in chosen],
        np.array([event.event_time for event in chosen], np.int64),
        np.array([event.arrival_time for event in chosen], np.int64),
        np.array([hash_text(event.event_id) for event in chosen], np.uint64),
        np.array([event.op != "retract" for event in chosen], np.bool_),
        np.zeros((len(chosen), 3), np.int64),
    )


def step(joiner: Joiner, events: list[Event], clock: int, totals: Totals) -> list[Said]:
    impressions = [event for event in events if event.kind == IMPRESSION]
    joined = joiner.process(
        Arrivals(
            [event.impression_id for event in impressions],
            np.array([event.event_time for event in impressions], np.int64),
            np.array([event.arrival_time for event in impressions], np.int64),
            {"tag": np.array([hash_text(event.impression_id) for event in impressions], np.uint64)},
        ),
        outcomes_of(events, CLICK),
        outcomes_of(events, CONVERSION),
        clock,
    )
    said: list[Said] = []
    for task, examples in zip(TASKS, joined.examples, strict=True):
        ids = joiner.ids(examples.slot)
        for n, name in enumerate(ids):
            assert name is not None
            assert joiner.features["tag"][examples.slot[n]] == hash_text(name)
            kind = KIND_NAMES[int(examples.kind[n])]
            said.append(
                (
                    name,
                    task,
                    kind,
                    int(examples.label[n]),
                    int(examples.event_time[n]),
                    int(examples.known_at[n]),
                )
            )
    joiner.release(joined)
    totals.update(joined.counts)
    return said


def run(events: list[Event], policy: str, cuts: list[int], as_of: int, restart: bool = False) -> Ran:
    joiner = Joiner(WINDOWS, policy)
    said: list[Said] = []
    totals: Totals = Counter()
    ordered = [event for event in in_arrival_order(events) if event.arrival_time <= as_of]
    bounds = sorted({0, len(ordered), *(cut % (len(ordered) + 1) for cut in cuts)})
    for start, stop in pairwise(bounds):
        part = ordered[start:stop]
        said += step(joiner, part, part[-1].arrival_time, totals)
        if restart:
            arrays, plain = joiner.state()
            joiner = Joiner(WINDOWS, policy)
            joiner.load_state(
                {name: array.copy() for name, array in arrays.items()}, json.loads(json.dumps(plain))
            )
    said += step(joiner, [], as_of, totals)
    return Ran(said, totals, joiner)


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    events = []
    for n in range(draw(st.integers(1, 5))):
        name = f"i{n}"
        start = draw(st.integers(0, 60))
        events.append(Event(IMPRESSION, name, name, start, start + draw(st.integers(0, 70))))
        for m in range(draw(st.integers(0, 3))):
            time = start + draw(st.integers(-5, 60))
            events.append(Event(CLICK, f"c{n}.{m}", name, time, time + draw(st.integers(0, 60))))
        for m in range(draw(st.integers(0, 4))):
            time = start + draw(st.integers(-5, 150))
            op = draw(st.sampled_from(["assert", "assert", "retract", "restate"]))
            events.append(Event(CONVERSION, f"v{n}.{m}", name, time, time + draw(st.integers(0, 60)), op))
    repeated = draw(st.lists(st.sampled_from(events), max_size=3))
    events += [
        event._replace(arrival_time=event.arrival_time + draw(st.integers(0, 60))) for event in repeated
    ]
    return events


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=logs(), cuts=st.lists(st.integers(0, 100), max_size=8), as_of=st.integers(0, 400))
def test_joiner_says_the_rows_of_the_rule_for_any_order_cuts_and_moment(
    policy: str, events: list[Event], cuts: list[int], as_of: int
) -> None:
    said, totals, joiner = run(events, policy, cuts, as_of)
    expected = [row[:6] for row in rows(events, as_of, WINDOWS, policy)]
    assert Counter(said) == Counter(expected)
    known = Counter(event.kind for event in events if event.arrival_time <= as_of)
    for kind in (IMPRESSION, CLICK, CONVERSION):
        assert sum(n for (k, _), n in totals.items() if k == kind) == known[kind]
        assert totals[kind, "pending"] >= 0
    if as_of >= 390:
        assert all(totals[kind, "pending"] == 0 for kind in (IMPRESSION, CLICK, CONVERSION))
        assert len(joiner) == 0


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=logs(), cuts=st.lists(st.integers(0, 100), max_size=8), as_of=st.integers(0, 400))
def test_joiner_restored_at_any_point_continues_identically(
    policy: str, events: list[Event], cuts: list[int], as_of: int
) -> None:
    straight = run(events, policy, cuts, as_of)
    restored = run(events, policy, cuts, as_of, restart=True)
    assert straight.said == restored.said
    assert straight.totals == restored.totals
    for name, array in straight.joiner.state()[0].items():
        np.testing.assert_array_equal(array, restored.joiner.state()[0][name], err_msg=name)


@settings(max_examples=300, deadline=None)
@given(events=logs(), as_of=st.integers(0, 400))
def test_open_and_closed_windows_carry_the_labels_known_as_of_a_moment(
    events: list[Event], as_of: int
) -> None:
    joiner = Joiner(WINDOWS, "fnw")
    found: Labels = Counter()
    for event in [event for event in in_arrival_order(events) if event.arrival_time <= as_of]:
        part = [event]
        joined = joiner.process(*(arrivals_and_outcomes(part)), event.arrival_time)
        collect(joiner, joined.closed, found)
        joiner.release(joined)
    collect(joiner, (joiner.open_windows(0), joiner.open_windows(1)), found)
    expected = Counter((row.impression_id, row.task, row.label) for row in rows(events, as_of, WINDOWS))
    assert found == expected


def arrivals_and_outcomes(events: list[Event]) -> tuple[Arrivals, Outcomes, Outcomes]:
    impressions = [event for event in events if event.kind == IMPRESSION]
    arrivals = Arrivals(
        [event.impression_id for event in impressions],
        np.array([event.event_time for event in impressions], np.int64),
        np.array([event.arrival_time for event in impressions], np.int64),
        {},
    )
    return arrivals, outcomes_of(events, CLICK), outcomes_of(events, CONVERSION)


def collect(joiner: Joiner, windows: tuple[Closed, Closed], found: Labels) -> None:
    for task, part in zip(TASKS, windows, strict=True):
        for name, label in zip(joiner.ids(part.slot), part.label.tolist(), strict=True):
            found[name, task, label] += 1


def test_no_row_says_what_was_not_known_at_its_known_at() -> None:
    rng = np.random.default_rng(5)
    events = []
    for n in range(100):
        start = int(rng.integers(0, 500))
        events.append(Event(IMPRESSION, f"i{n}", f"i{n}", start, start + int(rng.integers(0, 30))))
        events.append(Event(CLICK, f"c{n}", f"i{n}", start + 3, start + 3 + int(rng.integers(0, 40))))
    for policy in POLICIES:
        for row in rows(events, 10_000, WINDOWS, policy)[::25]:
            assert row not in rows(events, row.known_at - 1, WINDOWS, policy)
            assert row in rows(events, row.known_at, WINDOWS, policy)


def test_duplicate_and_second_click_are_told_apart() -> None:
    events = [
        Event(IMPRESSION, "i", "i", 0, 0),
        Event(CLICK, "c1", "i", 5, 5),
        Event(CLICK, "c1", "i", 5, 6),
        Event(CLICK, "c2", "i", 7, 7),
    ]
    _, totals, _ = run(events, "fnw", [], 10)
    assert totals[CLICK, "trained"] == 1
    assert totals[CLICK, "duplicate"] == 1
    assert totals[CLICK, "superseded"] == 1


def test_click_that_happened_before_its_impression_is_reported_with_its_position() -> None:
    joiner = Joiner(WINDOWS, "fnw")
    arrivals, clicks, conversions = arrivals_and_outcomes(
        [Event(IMPRESSION, "i", "i", 10, 10), Event(CLICK, "c", "i", 4, 12)]
    )
    clicks.position[0] = (1, 99, 3)
    joined = joiner.process(arrivals, clicks, conversions, 12)
    (found,) = joined.negative_delays
    assert (found.kind, found.event_time, found.opened, found.position) == (CLICK, 4, 10, (1, 99, 3))
    assert joined.counts[CLICK, "dead_lettered"] == 1
