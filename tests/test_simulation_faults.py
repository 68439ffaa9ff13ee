"""Faults of simulated logs: late, repeated, orphaned, retracted and malformed events."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from pipelines.duration import HOUR_MS, MINUTE_MS
from pipelines.events import TOPICS
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_malformed import MALFORMATIONS
from pipelines.simulator import Simulation, simulate


@pytest.fixture(scope="module")
def perfect() -> Simulation:
    return simulate(SimulationConfig(impressions=60_000, seed=11, faults=0))


@pytest.fixture(scope="module")
def faulty() -> Simulation:
    return simulate(SimulationConfig(impressions=60_000, seed=5, faults=0.02))


def tables_of(simulation: Simulation) -> tuple[pa.Table, pa.Table, pa.Table]:
    return simulation.impressions, simulation.clicks, simulation.conversions


def test_a_perfect_log_has_no_faults(perfect: Simulation) -> None:
    faults = ("late", "duplicates", "retractions", "orphans", "malformed")
    assert {name: perfect.counts[name] for name in faults} == dict.fromkeys(faults, 0)
    for table in tables_of(perfect):
        assert len(table["event_id"].unique()) == table.num_rows
        behind = table["arrival_time"].to_numpy() - table["event_time"].to_numpy()
        assert behind.max() < 1_000
    assert set(perfect.conversions["op"].to_pylist()) == {"assert"}


def test_in_a_perfect_log_no_event_arrives_before_the_one_that_it_refers_to(perfect: Simulation) -> None:
    for table, cause in ((perfect.clicks, perfect.impressions), (perfect.conversions, perfect.clicks)):
        known = dict(zip(cause["impression_id"].to_pylist(), cause["arrival_time"].to_pylist(), strict=True))
        for name, time in zip(
            table["impression_id"].to_pylist(), table["arrival_time"].to_pylist(), strict=True
        ):
            assert known[name] < time


@pytest.mark.parametrize("fault", ["late", "duplicates", "malformed"])
def test_faults_come_at_the_rate_of_the_config(faulty: Simulation, fault: str) -> None:
    events = sum(faulty.counts[topic] for topic in TOPICS)
    expected = faulty.config.faults * events
    assert abs(faulty.counts[fault] - expected) < 4 * np.sqrt(expected) + 0.05 * expected


def test_counts_are_what_the_tables_hold(faulty: Simulation) -> None:
    counts = faulty.counts
    tables = tables_of(faulty)
    assert [counts[topic] for topic in TOPICS] == [table.num_rows for table in tables]
    assert counts["duplicates"] == sum(table.num_rows - len(table["event_id"].unique()) for table in tables)
    retract = faulty.conversions.to_pandas().query("op == 'retract'")
    assert counts["retractions"] == retract.event_id.nunique() > 0
    assert counts["malformed"] == len(faulty.malformed)
    assert counts["late"] > 0
    shown = faulty.impressions.to_pandas().drop_duplicates("event_id").set_index("event_id").arrival_time
    clicks = faulty.clicks.to_pandas().drop_duplicates("event_id")
    orphans = ~(clicks.impression_id.map(shown) <= clicks.arrival_time)
    assert counts["orphans"] == orphans.sum() >= 0.5 * faulty.config.faults * len(clicks)


def test_duplicates_repeat_the_event_and_arrive_later(faulty: Simulation) -> None:
    for table in tables_of(faulty):
        frame = table.to_pandas()
        again = frame[frame.event_id.duplicated()].set_index("event_id")
        first = frame[~frame.event_id.duplicated()].set_index("event_id").loc[again.index]
        assert len(again) > 0
        assert np.all(again.arrival_time > first.arrival_time)
        assert (
            again.drop(columns="arrival_time")
            .astype(str)
            .equals(first.drop(columns="arrival_time").astype(str))
        )


def test_late_events_are_late_by_minutes_to_hours(faulty: Simulation) -> None:
    impressions = faulty.impressions.to_pandas().drop_duplicates("event_id")
    behind = impressions.arrival_time - impressions.event_time
    late = behind[behind > MINUTE_MS]
    assert late.median() > 5 * MINUTE_MS
    assert late.max() > HOUR_MS


def test_retraction_has_its_own_id_and_takes_back_a_conversion_that_never_was(faulty: Simulation) -> None:
    truth = faulty.truth.to_pandas().set_index("impression_id")
    conversions = faulty.conversions.to_pandas().drop_duplicates("event_id")
    retract = conversions[conversions.op == "retract"].set_index("impression_id")
    asserted = conversions[conversions.op == "assert"].set_index("impression_id")
    assert truth.loc[retract.index].conversion_time.isna().all()
    assert truth.loc[retract.index].click_time.notna().all()
    known = retract.index.intersection(asserted.index)
    assert len(known) > 0
    assert np.all(retract.loc[known].event_time > asserted.loc[known].event_time)
    assert set(retract.event_id).isdisjoint(asserted.event_id)
    assert retract.value.isna().all()


def test_once_all_is_known_the_labels_are_those_of_the_truth(faulty: Simulation) -> None:
    # Conversions less the retracted ones, each event once, of those that had to be known by the end.
    conversions = faulty.conversions.to_pandas().drop_duplicates("event_id")
    retracted = set(conversions[conversions.op == "retract"].impression_id)
    credited = set(conversions[conversions.op == "assert"].impression_id) - retracted
    truth = faulty.truth.to_pandas()
    # Late by at most 12 hours, and a retraction follows within hours.
    settled = truth[truth.event_time < faulty.config.start + 24 * HOUR_MS]
    due = settled[settled.conversion_time < faulty.config.end - 13 * HOUR_MS]
    assert set(due.impression_id) <= credited
    never = set(settled[settled.conversion_time.isna()].impression_id)
    early = set(conversions[conversions.event_time < faulty.config.end - 48 * HOUR_MS].impression_id)
    assert not credited & never & early


def test_malformed_messages_name_their_fault_and_none_is_a_good_event() -> None:
    malformed = simulate(SimulationConfig(impressions=20_000, seed=9, faults=0.1)).malformed
    assert {message.fault for message in malformed} == set(MALFORMATIONS)
    for message in malformed:
        assert message.topic in TOPICS
        if message.fault in ("truncated", "empty"):
            with pytest.raises(json.JSONDecodeError):
                json.loads(message.value)
        elif message.fault == "no_impression_id":
            assert "impression_id" not in json.loads(message.value)
        elif message.fault == "value_is_nan":
            assert np.isnan(json.loads(message.value)["value"])


def test_malformed_events_never_share_an_id_with_a_good_one(faulty: Simulation) -> None:
    good = {name for table in tables_of(faulty) for name in table["event_id"].to_pylist()}
    for message in faulty.malformed:
        if message.fault not in ("truncated", "empty", "not_an_object"):
            assert json.loads(message.value)["event_id"] not in good


def test_negative_delay_lies_before_the_impression(faulty: Simulation) -> None:
    shown = dict(
        zip(faulty.truth["impression_id"].to_pylist(), faulty.truth["event_time"].to_pylist(), strict=True)
    )
    events = [json.loads(m.value) for m in faulty.malformed if m.fault == "negative_delay"]
    assert events
    assert all(event["event_time"] < shown[event["impression_id"]] for event in events)
