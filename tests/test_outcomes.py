"""Labels of a whole log at once: exactly what the attribution rule says, however the events lie."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.attribution import Event, rows
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.outcomes import NO_OUTCOME, Tables, latest_arrival, outcomes_as_of
from pipelines.simulator import SimulationConfig, simulate

WINDOWS = AttributionConfig(
    click_window=40, attribution_window=100, observation_window=15, allowed_lateness=20
)


def tables_of(events: list[Event]) -> Tables:
    def table(kind: int) -> pa.Table:
        chosen = [event for event in events if event.kind == kind]
        columns = {
            "event_id": pa.array([event.event_id for event in chosen], pa.string()),
            "impression_id": pa.array([event.impression_id for event in chosen], pa.string()),
            "event_time": pa.array([event.event_time for event in chosen], pa.int64()),
            "arrival_time": pa.array([event.arrival_time for event in chosen], pa.int64()),
        }
        if kind == CONVERSION:
            columns["op"] = pa.array([event.op for event in chosen], pa.string())
        return pa.table(columns)

    return table(IMPRESSION), table(CLICK), table(CONVERSION)


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    events = []
    for n in range(draw(st.integers(0, 4))):
        name = f"i{n}"
        start = draw(st.integers(0, 60))
        events.append(Event(IMPRESSION, name, name, start, start + draw(st.integers(0, 70))))
        for m in range(draw(st.integers(0, 4))):
            # Few distinct delays, so that several clicks arrive at one instant.
            time = start + draw(st.integers(-5, 50))
            arrival = max(time, start + draw(st.sampled_from([10, 40, 59, 60, 61, 90])))
            events.append(Event(CLICK, f"c{draw(st.integers(0, 9))}.{n}.{m}", name, time, arrival))
        for m in range(draw(st.integers(0, 4))):
            time = start + draw(st.sampled_from([-1, 0, 5, 20, 20, 40, 99, 150]))
            op = draw(st.sampled_from(["assert", "assert", "retract", "restate"]))
            events.append(Event(CONVERSION, f"v{n}.{m}", name, time, time + draw(st.integers(0, 80)), op))
    if events:
        for event in draw(st.lists(st.sampled_from(events), max_size=3)):
            events.append(event._replace(arrival_time=event.arrival_time + draw(st.integers(0, 60))))
    return draw(st.permutations(events))


@settings(max_examples=600, deadline=None)
@given(events=logs(), as_of=st.integers(0, 400))
def test_labels_are_those_of_the_rule_for_any_order_duplicates_and_moment(
    events: list[Event], as_of: int
) -> None:
    said = [
        (impression_id, task, label, opened, mature)
        for task, outcome in outcomes_as_of(tables_of(events), WINDOWS, as_of).items()
        for impression_id, label, opened, mature in zip(
            outcome.impression_id.to_pylist(),
            outcome.label.tolist(),
            outcome.opened.tolist(),
            outcome.mature.tolist(),
            strict=True,
        )
    ]
    expected = [
        (row.impression_id, row.task, row.label, row.event_time, row.mature)
        for row in rows(events, as_of, WINDOWS, "relabel")
    ]
    assert sorted(said) == sorted(expected)


@settings(max_examples=300, deadline=None)
@given(events=logs(), as_of=st.integers(0, 400))
def test_a_positive_is_told_by_an_event_that_was_known_and_inside_its_window(
    events: list[Event], as_of: int
) -> None:
    for task, outcome in outcomes_as_of(tables_of(events), WINDOWS, as_of).items():
        width = WINDOWS.click_window if task == "click" else WINDOWS.attribution_window
        positive = outcome.label == 1
        assert ((outcome.outcome_delay == NO_OUTCOME) == ~positive).all()
        assert ((outcome.outcome_known == NO_OUTCOME) == ~positive).all()
        assert (outcome.outcome_delay[positive] >= 0).all()
        assert (outcome.outcome_delay[positive] <= width).all()
        assert (outcome.outcome_known[positive] >= outcome.known[positive]).all()
        assert (outcome.outcome_known <= as_of).all()
        assert (outcome.mature == (as_of > outcome.closes)).all()


def test_of_clicks_that_arrive_together_the_least_event_id_opens_the_conversion_window() -> None:
    log = [
        Event(IMPRESSION, "i", "i", 0, 0),
        Event(CLICK, "c3", "i", 3, 10),
        Event(CLICK, "c1", "i", 7, 10),
        Event(CLICK, "c2", "i", 5, 10),
    ]
    conversion = outcomes_as_of(tables_of(log), WINDOWS, 20)["conversion"]
    assert conversion.opened.tolist() == [7]


def test_a_retraction_takes_the_outcome_back_and_a_later_conversion_restores_the_label() -> None:
    log = [
        Event(IMPRESSION, "i", "i", 0, 0),
        Event(CLICK, "c", "i", 5, 5),
        Event(CONVERSION, "v1", "i", 10, 12),
        Event(CONVERSION, "v2", "i", 20, 22, "retract"),
        Event(CONVERSION, "v3", "i", 30, 32),
    ]
    labels = {
        as_of: outcomes_as_of(tables_of(log), WINDOWS, as_of)["conversion"].label.tolist()
        for as_of in (11, 12, 22, 32)
    }
    assert labels == {11: [0], 12: [1], 22: [0], 32: [1]}
    final = outcomes_as_of(tables_of(log), WINDOWS, 99)["conversion"]
    assert (final.outcome_delay.tolist(), final.outcome_known.tolist()) == ([5], [12])


def test_a_log_without_events_has_no_windows() -> None:
    empty = tables_of([])
    assert latest_arrival(empty) == 0
    assert [len(outcome) for outcome in outcomes_as_of(empty, WINDOWS, 1).values()] == [0, 0]


@pytest.fixture(scope="module")
def simulated() -> tuple[SimulationConfig, Tables, pa.Table]:
    config = SimulationConfig(impressions=20_000, days=2, seed=3, faults=0.0)
    log = simulate(config)
    return config, (log.impressions, log.clicks, log.conversions), log.truth


def test_without_faults_each_label_is_the_outcome_that_the_simulator_drew_inside_the_window(
    simulated: tuple[SimulationConfig, Tables, pa.Table],
) -> None:
    config, tables, truth = simulated
    windows = AttributionConfig(
        click_window=config.click_window, attribution_window=config.attribution_window
    )
    found = outcomes_as_of(tables, windows, latest_arrival(tables))["click"]
    drawn = dict(zip(truth["impression_id"].to_pylist(), truth["click_time"].to_pylist(), strict=True))
    ids = found.impression_id.to_pylist()
    for row in np.flatnonzero(found.mature).tolist():
        time = drawn[ids[row]]
        delay = NO_OUTCOME if time is None else time - found.opened[row]
        assert found.outcome_delay[row] == (delay if delay <= config.click_window else NO_OUTCOME)
