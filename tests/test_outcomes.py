"""Labels of a whole log at once: exactly what the attribution rule says, however the events lie."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.attribution import Event, labels_as_of
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.hashing import hash_text
from pipelines.outcomes import NO_OUTCOME, Tables, latest_arrival, outcomes_as_of
from pipelines.simulator import SimulationConfig, simulate
from tests.label_logs import END, Rule, logs

WINDOWS = Rule().attribution


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
            columns["credit"] = pa.array(
                [None if event.credit == 1 else event.credit for event in chosen], pa.float64()
            )
        return pa.table(columns)

    return table(IMPRESSION), table(CLICK), table(CONVERSION)


@pytest.mark.parametrize("view_through", [None, 25, 60])
@settings(max_examples=100)
@given(events=logs(), as_of=st.integers(0, END))
def test_labels_are_those_of_the_rule_for_any_order_duplicates_and_moment(
    view_through: int | None, events: list[Event], as_of: int
) -> None:
    attribution = Rule(view_through=view_through).attribution
    said = [
        (name, task, *values)
        for task, outcome in outcomes_as_of(tables_of(events), attribution, as_of).items()
        for name, *values in zip(
            outcome.impression_id.to_pylist(),
            outcome.label.tolist(),
            outcome.label_version.tolist(),
            outcome.opened.tolist(),
            outcome.mature.tolist(),
            outcome.outcome_known.tolist(),
            strict=True,
        )
    ]
    expected = [
        (
            row.impression_id,
            row.task,
            row.label,
            row.label_version,
            row.event_time,
            row.mature,
            NO_OUTCOME if row.outcome_known_at is None else row.outcome_known_at,
        )
        for row in labels_as_of(events, as_of, attribution)
    ]
    assert sorted(said) == sorted(expected)


@settings(max_examples=100)
@given(events=logs(), as_of=st.integers(0, END))
def test_a_positive_is_told_by_an_event_that_was_known_and_inside_its_window(
    events: list[Event], as_of: int
) -> None:
    for task, outcome in outcomes_as_of(tables_of(events), WINDOWS, as_of).items():
        width = WINDOWS.click_window if task == "click" else WINDOWS.attribution_window
        positive = outcome.label > 0
        assert ((outcome.outcome_delay == NO_OUTCOME) == ~positive).all()
        assert ((outcome.outcome_known == NO_OUTCOME) == ~positive).all()
        assert (outcome.outcome_delay[positive] >= 0).all()
        assert (outcome.outcome_delay[positive] <= width).all()
        assert (outcome.outcome_known[positive] >= outcome.known[positive]).all()
        assert (outcome.outcome_known <= as_of).all()
        assert (outcome.mature == (as_of > outcome.closes)).all()


def test_of_clicks_that_arrive_together_the_least_hash_opens_the_conversion_window() -> None:
    log = [
        Event(IMPRESSION, "i", "i", 0, 0),
        Event(CLICK, "c3", "i", 3, 10),
        Event(CLICK, "c1", "i", 7, 10),
        Event(CLICK, "c2", "i", 5, 10),
    ]
    conversion = outcomes_as_of(tables_of(log), WINDOWS, 20)["conversion"]
    first = min(log[1:], key=lambda event: hash_text(event.event_id))
    assert conversion.opened.tolist() == [first.event_time]


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
    assert (final.outcome_delay.tolist(), final.outcome_known.tolist()) == ([25], [32])
    assert final.label_version.tolist() == [3]


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
