"""The Spark join gives the rows of the rule, for duplicates, late events, retractions and orphans alike."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from pipelines.attribution import Event, labels_as_of
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION, KINDS
from pipelines.sample_counts import count_sums, event_counts
from pipelines.sample_facts import contradictions, find_facts
from pipelines.sample_join import JOIN_SETTINGS, fact_columns, join_samples
from pipelines.sample_window import SampleWindow

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

RULE = AttributionConfig(click_window=40, attribution_window=100, observation_window=15, allowed_lateness=20)
WITH_VIEWS = RULE.model_copy(update={"view_through_window": 70})
SCHEMA = (
    "event_id string, impression_id string, event_time long, arrival_time long, op string, credit double, "
    "user_id string, item_id string, position int, propensity double, features string, source string, "
    "partition int, offset long, row int, kind string, event_date string"
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
            credit = 1.0 if op == "retract" else draw.choice([0.25, 0.5, 1.0])
            arrival = time + draw.choice([0, 1, 20, 60])
            events.append(Event(CONVERSION, f"v{n}.{m}", name, time, arrival, op, credit))
    repeated = draw.choices(events, k=len(events) // 5)
    # Some copies arrive at the very instant of the first.
    events += [
        event._replace(arrival_time=event.arrival_time + draw.choice([0, 1, 9, 60])) for event in repeated
    ]
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
            event.credit if event.kind == CONVERSION else None,
            *(("u", "i", 1, None, "{}") if event.kind == IMPRESSION else (None, None, None, None, None)),
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


def window_of(since: int, as_of: int, rule: AttributionConfig = RULE) -> SampleWindow:
    return SampleWindow.whole(since, as_of, rule, rule.tasks)


def joined(spark: SparkSession, events: list[Event], window: SampleWindow, slices: int = 1) -> DataFrame:
    lake = lake_of(spark, events)
    losers = contradictions(lake, window)
    facts = find_facts(lake, window, losers).where("has_fact").select(*fact_columns(window.tasks))
    return join_samples(lake, facts, window, slices=slices, losers=losers)


def spark_rows(samples: DataFrame, window: SampleWindow) -> list[tuple[object, ...]]:
    """One tuple a row; equal copies that arrived at one instant are told apart by the encoder, not here."""
    said: set[tuple[object, ...]] = set()
    for row in samples.collect():
        for task in window.tasks:
            opened = row[f"{task}_opened"]
            if opened is not None:
                label = (row[f"{task}_label"], row[f"{task}_version"], row[f"{task}_rose"])
                said.add((row.impression_id, task, opened, row[f"{task}_known"] <= window.as_of, *label))
    return sorted(said, key=str)


def expected_rows(events: list[Event], window: SampleWindow) -> list[tuple[object, ...]]:
    rows = labels_as_of(events, window.as_of, window.attribution)
    said = {
        (
            row.impression_id,
            row.task,
            row.event_time,
            True,
            row.label,
            row.label_version,
            row.outcome_known_at,
        )
        for row in rows
        if window.since <= row.event_time < window.as_of
    }
    return sorted(said, key=str)


@pytest.fixture(autouse=True)
def _settings(spark: SparkSession) -> None:
    for key, value in JOIN_SETTINGS.items():
        spark.conf.set(key, value)


@pytest.mark.parametrize(
    ("as_of", "width", "rule"),
    [(1_050, 700, RULE), (1_300, 10_000, WITH_VIEWS), (1_450, 700, WITH_VIEWS), (2_000, 10_000, RULE)],
)
def test_spark_join_gives_the_rows_of_the_rule_as_of_any_moment(
    spark: SparkSession, as_of: int, width: int, rule: AttributionConfig
) -> None:
    events = random_log(500, seed=as_of)
    window = window_of(max(as_of - width, 0), as_of, rule)
    said = spark_rows(joined(spark, events, window), window)
    expected = expected_rows(events, window)
    assert said == expected
    assert len(expected) > 30


def test_slices_do_not_change_the_rows(spark: SparkSession) -> None:
    events, window = random_log(300, seed=3), window_of(0, 1_400)
    samples = joined(spark, events, window, slices=4)
    assert spark_rows(samples, window) == expected_rows(events, window)
    assert {row["slice"] for row in samples.select("slice").collect()} == {0, 1, 2, 3}


def test_copies_of_an_impression_that_name_another_time_do_not_count(spark: SparkSession) -> None:
    day = 86_400_000
    events = [
        Event(IMPRESSION, "i", "i", day + 1_000, day + 1_005),
        Event(IMPRESSION, "i", "i", 500, day + 1_009),
        Event(CLICK, "c", "i", day + 1_010, day + 1_010),
        Event(IMPRESSION, "j", "j", 600, 600),
    ]
    lake = lake_of(spark, events).drop("event_date")
    from pyspark.sql import functions as F

    lake = lake.withColumn("event_date", F.date_format(F.timestamp_millis("event_time"), "yyyy-MM-dd"))
    window = window_of(0, 2 * day, RULE.model_copy(update={"allowed_lateness": 2 * day}))
    losers = contradictions(lake, window)
    assert [tuple(row) for row in losers.collect()] == [("i", 500, 1)]
    facts = find_facts(lake, window, losers).where("has_fact").select(*fact_columns(window.tasks))
    samples = join_samples(lake, facts, window, losers=losers)
    assert spark_rows(samples, window) == expected_rows(events, window)


def counted(spark: SparkSession, events: list[Event], window: SampleWindow) -> dict[str, dict[str, int]]:
    facts = find_facts(lake_of(spark, events), window)
    (sums,) = facts.agg(*count_sums(facts)).collect()
    return event_counts(sums.asDict())


@pytest.mark.parametrize("rule", [RULE, WITH_VIEWS], ids=["clicks", "views"])
def test_every_event_read_is_counted_in_exactly_one_class(
    spark: SparkSession, rule: AttributionConfig
) -> None:
    events = random_log(400, seed=5)
    counts = counted(spark, events, window_of(0, 1_400, rule))
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
    assert (counts["conversion"]["view_through"] > 0) == (rule is WITH_VIEWS)


def test_conversion_of_a_click_before_the_window_is_no_orphan(spark: SparkSession) -> None:
    events = [
        Event(IMPRESSION, "i", "i", 1_000, 1_000),
        Event(CLICK, "c", "i", 1_010, 1_010),
        Event(CONVERSION, "v", "i", 1_090, 1_090),
    ]
    window = window_of(1_080, 1_200)
    counts = counted(spark, events, window)
    assert counts["conversion"]["before_window"] == 1
    assert spark_rows(joined(spark, events, window), window) == []
