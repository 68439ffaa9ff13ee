"""The stream joiner says what the rule says, however the events arrive and are cut into steps."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.attribution import Event, labels_as_of, rows
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.joined import Closed
from pipelines.joiner import Joiner
from tests.label_logs import (
    END,
    POLICIES,
    Rule,
    Run,
    arrivals_of,
    begins_of,
    in_arrival_order,
    logs,
    outcomes_of,
    process,
    rules,
    run,
)

CUTS = st.lists(st.integers(0, 100), max_size=8)
Labels = Counter[tuple[str, str, float]]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120)
@given(data=st.data(), cuts=CUTS, end=st.integers(0, END))
def test_joiner_says_the_rows_of_the_rule_for_any_order_cuts_and_moment(
    policy: str, data: st.DataObject, cuts: list[int], end: int
) -> None:
    rule = data.draw(rules(policy))
    events, as_of = data.draw(logs(rule.tick)), end * rule.tick
    found = run(rule, events, cuts, as_of)
    expected = rows(events, as_of, rule.attribution, policy, confirm_window=rule.confirm_window)
    assert Counter(found.said) == Counter(begins_of(expected))
    arrived = Counter(event.kind for event in events if event.arrival_time <= as_of)
    for kind in (IMPRESSION, CLICK, CONVERSION):
        assert sum(n for (k, _), n in found.totals.items() if k == kind) == arrived[kind]
    if end >= END - 10:
        assert all(found.totals[kind, "pending"] == 0 for kind in (IMPRESSION, CLICK, CONVERSION))
        assert len(found.joiner) == 0


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(data=st.data(), cuts=CUTS, end=st.integers(0, END))
def test_joiner_restored_at_any_point_continues_identically(
    policy: str, data: st.DataObject, cuts: list[int], end: int
) -> None:
    rule = data.draw(rules(policy))
    events, as_of = data.draw(logs(rule.tick)), end * rule.tick
    straight = run(rule, events, cuts, as_of)
    restored = run(rule, events, cuts, as_of, restart=True)
    assert straight.said == restored.said
    assert straight.totals == restored.totals
    (arrays, plain), (arrays_again, plain_again) = straight.joiner.state(), restored.joiner.state()
    assert plain == plain_again
    assert arrays.keys() == arrays_again.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, arrays_again[name], err_msg=name)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(data=st.data(), cuts=CUTS, taken=st.lists(st.booleans(), min_size=10, max_size=10))
def test_changes_put_together_are_the_state(
    policy: str, data: st.DataObject, cuts: list[int], taken: list[bool]
) -> None:
    rule = data.draw(rules(policy))
    ordered = in_arrival_order(data.draw(logs(rule.tick)))
    found, kept = Run(rule.joiner()), dict[str, NDArray[Any]]()
    bounds = sorted({0, len(ordered), *(cut % (len(ordered) + 1) for cut in cuts)})
    for number, (start, stop) in enumerate(pairwise(bounds)):
        found.step(ordered[start:stop], ordered[stop - 1].arrival_time)
        if taken[number % 10] or stop == len(ordered):
            plain = put_together(kept, found.joiner)
            arrays, expected = found.joiner.state()
            assert plain == expected and kept.keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(kept[name], array, err_msg=name)


def put_together(kept: dict[str, NDArray[Any]], joiner: Joiner) -> dict[str, Any]:
    """Bring arrays up to date by what a joiner says has changed; its plain data."""
    whole, columns, plain = joiner.take_changes()
    kept.update(
        {
            name: np.concatenate(part) if isinstance(part, list) else part.copy()
            for name, part in whole.items()
        }
    )
    for name, parts in columns.items():
        for part in parts:
            if part.rows is None:
                kept[name] = part.values.copy()
            else:
                kept[name][part.rows] = part.values
    return plain


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(data=st.data())
def test_no_row_says_what_was_not_known_at_its_known_at(policy: str, data: st.DataObject) -> None:
    rule = data.draw(rules(policy))
    events = data.draw(logs(rule.tick))
    attribution, confirm = rule.attribution, rule.confirm_window
    for row in rows(events, END * rule.tick, attribution, policy, confirm_window=confirm):
        known = [event for event in events if event.arrival_time <= row.known_at]
        assert row in rows(known, row.known_at, attribution, policy, confirm_window=confirm)
        assert row not in rows(events, row.known_at - 1, attribution, policy, confirm_window=confirm)


@pytest.mark.parametrize("view_through", [None, 25, 60])
@settings(max_examples=80)
@given(events=logs(), as_of=st.integers(0, END))
def test_open_and_closed_windows_carry_the_labels_known_as_of_a_moment(
    view_through: int | None, events: list[Event], as_of: int
) -> None:
    rule = Rule("fnw", view_through)
    joiner, found = rule.joiner(), Labels()
    for event in [event for event in in_arrival_order(events) if event.arrival_time <= as_of]:
        joined = process(joiner, [event], event.arrival_time)
        collect(joiner, joined.closed, found)
        joiner.release(joined)
    collect(joiner, tuple(joiner.open_windows(task) for task in range(len(joiner.tasks))), found)
    expected = labels_as_of(events, as_of, rule.attribution)
    assert found == Counter((row.impression_id, row.task, row.label) for row in expected)


def collect(joiner: Joiner, windows: tuple[Closed, ...], found: Labels) -> None:
    for task, part in zip(joiner.tasks, windows, strict=True):
        names = joiner.features["name"][part.slot].tolist() if len(part) else []
        for name, label in zip(names, part.label.tolist(), strict=True):
            found[name, task, label] += 1


def test_duplicate_and_second_click_are_told_apart() -> None:
    events = [
        Event(IMPRESSION, "i", "i", 0, 0),
        Event(CLICK, "c1", "i", 5, 5),
        Event(CLICK, "c1", "i", 5, 6),
        Event(CLICK, "c2", "i", 7, 7),
    ]
    totals = run(Rule(), events, [], 10).totals
    assert totals[CLICK, "trained"] == 1
    assert totals[CLICK, "duplicate"] == 1
    assert totals[CLICK, "superseded"] == 1


def test_click_that_happened_before_its_impression_is_reported_with_its_position() -> None:
    joiner = Rule().joiner()
    events = [Event(IMPRESSION, "i", "i", 10, 10), Event(CLICK, "c", "i", 4, 12)]
    clicks = outcomes_of(events, CLICK)
    clicks.position[0] = (1, 99, 3)
    joined = joiner.process(arrivals_of(events), clicks, outcomes_of(events, CONVERSION), 12)
    (found,) = joined.negative_delays
    assert (found.kind, found.event_time, found.opened, found.position) == (CLICK, 4, 10, (1, 99, 3))
    assert joined.counts[CLICK, "dead_lettered"] == 1
