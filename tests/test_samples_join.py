"""The Spark join gives the rows of the rule, for duplicates, late events, retractions and orphans alike."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from pipelines.attribution import Event, rows
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION, KINDS
from pipelines.sample_join import JoinWindow, count_sums, event_counts, join_samples

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

WINDOWS = AttributionConfig(
    click_window=40, attribution_window=100, observation_window=15, allowed_lateness=20
)
SCHEMA = (
    "event_id string, impression_id string, event_time long, arrival_time long, op string, user_id string, "
    "item_id string, position int, features string, source string, partition int, offset long, row int, "
    "kind string, event_date string"
)


def random_log(impressions: int, seed: int) -> list[Event]:
    """Independent impressions that go wrong in every way; times in ms from 1,000."""
    draw = random.Random(seed)
    events = []
    for n in range(impressions):
        name, start = f"i{n}", 1_000 + draw.randint(0, 400)
        if draw.random() < 0.95:  # else orphans
            events.append(Event(IMPRESSION, name, name, start, start + draw.choice([0, 3, 30, 70])))
        for m in range(draw.choice([0, 1, 1, 2, 3])):
            time = start + draw.randint(-5, 55)
            events.append(Event(CLICK, f"c{n}.{m}", name, time, time + draw.choice([0, 1, 20, 60])))
        for m in range(draw.choice([0, 1, 2, 4])):
            time = start + draw.randint(-5, 160)
            op = draw.choice(["assert", "assert", "retract", "restate"])
            events.append(Event(CONVERSION, f"v{n}.{m}", name, time, time + draw.choice([0, 1, 20, 60]), op))
    repeated = draw.choices(events, k=len(events) // 5)
    events += [event._replace(arrival_time=event.arrival_time + draw.randint(1, 60)) for event in repeated]
    draw.shuffle(events)
    return events


def lake_of(spark: SparkSession, events: list[Event]) -> DataFrame:
    data = [
        (
            event.event_id,
            event.impression_id,
            event.event_time,
            event.arrival_time,
            event.op if event.kind == CONVERSION else None,
            *(("u", "i", 1, "{}") if event.kind == IMPRESSION else (None, None, None, None)),
            "test",
            0,
            n,
            0,
            KINDS[event.kind],
            "1970-01-01",
        )
        for n, event in enumerate(events)
    ]
    return spark.createDataFrame(data, SCHEMA)


def spark_rows(joined: DataFrame) -> set[tuple[object, ...]]:
    said: set[tuple[object, ...]] = set()
    for row in joined.collect():
        for task in ("click", "conversion"):
            if row[f"{task}_opened"] is not None:
                label, mature = row[f"{task}_label"], row[f"{task}_mature"]
                said.add((row.impression_id, task, label, row[f"{task}_opened"], mature))
    return said


def expected_rows(events: list[Event], window: JoinWindow) -> set[tuple[object, ...]]:
    return {
        (row.impression_id, row.task, row.label, row.event_time, row.mature)
        for row in rows(events, window.as_of, window.attribution)
        if window.since <= row.event_time < window.as_of
    }


@pytest.mark.parametrize("as_of", [1_050, 1_300, 1_450, 2_000])
@pytest.mark.parametrize("width", [700, 10_000])
def test_spark_join_gives_the_rows_of_the_rule_as_of_any_moment(
    spark: SparkSession, as_of: int, width: int
) -> None:
    events = random_log(600, seed=as_of)
    window = JoinWindow(max(as_of - width, 0), as_of, WINDOWS)
    said = spark_rows(join_samples(lake_of(spark, events), window))
    expected = expected_rows(events, window)
    assert said == expected
    assert len(expected) > 30


def counted(joined: DataFrame) -> dict[str, dict[str, int]]:
    (sums,) = joined.agg(*count_sums(joined)).collect()
    return event_counts(sums.asDict())


def test_every_event_read_is_counted_in_exactly_one_class(spark: SparkSession) -> None:
    events = random_log(400, seed=5)
    joined = join_samples(lake_of(spark, events), JoinWindow(0, 1_400, WINDOWS))
    counts = counted(joined)
    for kind, name in enumerate(KINDS):
        read = [event for event in events if event.kind == kind and event.arrival_time <= 1_400]
        if kind == IMPRESSION:
            read = [event for event in read if event.event_time < 1_400]
        assert counts[name]["read"] == len(read)
        assert counts[name]["duplicate"] == len(read) - len({event.event_id for event in read})
        assert all(value >= 0 for value in counts[name].values())
    shown = {
        event.impression_id for event in events if event.kind == IMPRESSION and event.arrival_time <= 1_400
    }
    lost = {
        event.event_id
        for event in events
        if event.kind == CLICK and event.arrival_time <= 1_400 and event.impression_id not in shown
    }
    assert counts["click"]["orphan"] == len(lost) > 0


def test_conversion_of_a_click_before_the_window_is_no_orphan(spark: SparkSession) -> None:
    events = [
        Event(IMPRESSION, "i", "i", 1_000, 1_000),
        Event(CLICK, "c", "i", 1_010, 1_010),
        Event(CONVERSION, "v", "i", 1_090, 1_090),
    ]
    joined = join_samples(lake_of(spark, events), JoinWindow(1_080, 1_200, WINDOWS))
    counts = counted(joined)
    assert counts["conversion"]["before_window"] == 1
    assert spark_rows(joined) == set()
