"""Spark counts and samples delays by group as the rows themselves would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest

from pipelines.attribution import labels_as_of
from pipelines.config import Task
from pipelines.delay import DelayGrid
from pipelines.delay_cells import delay_outcomes, delay_sample, group_delays
from pipelines.delay_counts import DelayCounts, Path, combined_keys, path_keys
from pipelines.delay_rows import DelayRows
from pipelines.duration import DAY_MS
from pipelines.errors import ConfigError
from pipelines.feature_spec import Categorical, FeatureSpec
from pipelines.features import encode_rows
from pipelines.sample_facts import contradictions, find_facts
from pipelines.sample_join import fact_columns
from tests.test_samples_join import WITH_VIEWS, lake_of, random_log, window_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

WINDOW = 2 * DAY_MS
AS_OF = 1_767_571_200_000
GRIDS: dict[Task, DelayGrid] = {"click": DelayGrid(WINDOW // 4, 32), "conversion": DelayGrid(WINDOW, 32)}
GRID = GRIDS["conversion"]
TASKS: tuple[Task, ...] = ("click", "conversion")
SCHEMA = (
    "task string, partition bigint, impression_id string, event_time bigint, user_id string, item_id string, "
    "position int, features string, opened bigint, rose bigint"
)
Rows = list[dict[str, Any]]


def outcome_rows(seed: int, n: int = 500) -> Rows:
    """Outcomes with their impressions as `delay_outcomes` gives them, of campaigns from common to rare."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    while len(rows) < n:
        task = TASKS[int(rng.integers(2))]
        horizon = GRIDS[task].horizon
        age, delay = int(rng.integers(0, 2 * horizon)), int(rng.exponential(0.1 * horizon))
        if delay > min(age, horizon):
            continue
        campaign = int(rng.choice(8, p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.05, 0.04, 0.01]))
        features: dict[str, Any] = {"campaign_id": campaign, "device": str(rng.choice(["phone", "pc"]))}
        if rng.random() < 0.1:
            features["device"] = None
        opened = AS_OF - age
        place = len(rows)
        row: dict[str, Any] = {"task": task, "partition": opened // DAY_MS, "impression_id": f"x{place}"}
        row |= {"event_time": opened, "user_id": f"u{place % 50}", "item_id": f"i{place % 3}", "position": 1}
        row |= {"features": orjson.dumps(features).decode(), "opened": opened, "rose": opened + delay}
        rows.append(row)
    return rows


def frame(spark: SparkSession, rows: Rows) -> DataFrame:
    names = [part.split()[0] for part in SCHEMA.split(", ")]
    return spark.createDataFrame([tuple(row[name] for name in names) for row in rows], SCHEMA)


def by_hand(rows: Rows, task: Task, fields: tuple[str, ...], *, every: bool) -> DelayCounts:
    values: list[Path] = []
    delay, age = [], []
    for row in rows:
        if row["task"] != task or not (every or AS_OF - row["opened"] >= GRIDS[task].horizon):
            continue
        found = orjson.loads(row["features"]) | {"item_id": row["item_id"]}
        values.append(tuple(None if found[name] is None else str(found[name]) for name in fields))
        delay.append(row["rose"] - row["opened"])
        age.append(AS_OF - row["opened"])
    return DelayCounts.of(GRIDS[task], fields, values, delay, age)


def assert_equal(found: DelayCounts, expected: DelayCounts) -> None:
    assert found.paths == expected.paths
    for name in ("group", "delay_bin", "follow_up_bin", "count"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def counts(cells: DataFrame, task: Task, fields: tuple[str, ...]) -> DelayCounts:
    return DelayCounts.from_table(cells.where(cells["task"] == task).toArrow(), GRIDS[task], fields)


@pytest.mark.parametrize(
    ("fields", "open_windows"), [(("item_id",), False), (("campaign_id", "device"), True)]
)
def test_counts_of_all_groups_are_those_of_the_rows(
    spark: SparkSession, fields: tuple[str, ...], open_windows: bool
) -> None:
    rows = outcome_rows(1)
    cells = group_delays(
        frame(spark, rows), AS_OF, GRIDS, fields, open_windows=open_windows, minimum_support=1
    ).localCheckpoint()
    for task in GRIDS:
        assert_equal(counts(cells, task, fields), by_hand(rows, task, fields, every=open_windows))
    # Of a partition the counts are those of its own rows: they can be kept and put beside others.
    (partition,) = {row["partition"] for row in rows[:1]}
    part = [row for row in rows if row["partition"] == partition]
    own = counts(cells.where(cells["partition"] == partition), "conversion", fields)
    assert own.count.sum() == by_hand(part, "conversion", fields, every=open_windows).count.sum()


def test_rare_groups_stand_under_their_parent_and_no_outcome_is_lost(spark: SparkSession) -> None:
    rows = outcome_rows(2)
    fields = ("campaign_id", "device")
    cells = group_delays(
        frame(spark, rows), AS_OF, {"click": GRIDS["click"]}, fields, open_windows=True, minimum_support=15
    )
    found, every = counts(cells, "click", fields), by_hand(rows, "click", fields, every=True)
    support = {path: every.count[every.group == place].sum() for place, path in enumerate(every.paths)}
    by_campaign: dict[Path, float] = {}
    for path, number in support.items():
        by_campaign[path[:1]] = by_campaign.get(path[:1], 0) + number
    expected: dict[Path, float] = {}
    for path, number in support.items():
        depth = 0 if by_campaign[path[:1]] < 15 else (1 if number < 15 else 2)
        expected[path[:depth]] = expected.get(path[:depth], 0) + number
    sums = {path: found.count[found.group == place].sum() for place, path in enumerate(found.paths)}
    assert sums == expected
    assert {len(path) for path in expected} == {0, 1, 2}
    # One level up all outcomes of a campaign that counts are together again.
    level = found.level(1)
    together = {path: level.count[level.group == place].sum() for place, path in enumerate(level.paths)}
    assert together == {path: number for path, number in by_campaign.items() if number >= 15}


def test_only_the_best_supported_groups_are_counted_apart(spark: SparkSession) -> None:
    rows = outcome_rows(3)
    cells = group_delays(
        frame(spark, rows), AS_OF, GRIDS, ("campaign_id",), open_windows=True, minimum_support=1, largest=2
    )
    found = counts(cells, "conversion", ("campaign_id",))
    every = by_hand(rows, "conversion", ("campaign_id",), every=True)
    support = {path: every.count[every.group == place].sum() for place, path in enumerate(every.paths)}
    most = sorted(support, key=lambda path: (-support[path], path))[:2]
    assert set(found.paths) == {(), *most}
    assert found.count.sum() == every.count.sum()


def test_values_are_written_as_the_feature_encoding_hashes_them(spark: SparkSession) -> None:
    written: list[Any] = ["a b", "ü", 7, 7.0, True, None, "", "[1]", -3]
    rows = outcome_rows(4, len(written))
    for row, value in zip(rows, written, strict=True):
        row |= {"task": "click", "opened": AS_OF - 2 * WINDOW, "rose": AS_OF - 2 * WINDOW + 5}
        row["features"] = orjson.dumps({"campaign id": value}).decode()
    cells = group_delays(frame(spark, rows), AS_OF, GRIDS, ("campaign id",), minimum_support=1)
    found = counts(cells, "click", ("campaign id",))
    spec = FeatureSpec(categorical=(Categorical(name="campaign id", buckets=8),))
    impressions = [
        {"user_id": "u", "item_id": "i", "position": 1, "event_time": 0, "features": {"campaign id": value}}
        for value in written
    ]
    encoded = [encode_rows([row], spec, ("campaign id",)).segment_key for row in impressions]
    expected = combined_keys(np.concatenate(encoded), 1)
    assert sorted(path_keys(found.paths).tolist()) == sorted(set(expected.tolist()))
    assert found.count.sum() == len(written)


def test_name_with_a_quote_is_refused(spark: SparkSession) -> None:
    with pytest.raises(ConfigError, match="without a quote"):
        group_delays(frame(spark, outcome_rows(5, 2)), AS_OF, GRIDS, ("it's",))


def test_sample_is_bounded_stable_and_encoded_as_the_rows_are(spark: SparkSession) -> None:
    rows = outcome_rows(6)
    samples = frame(spark, rows)
    spec = FeatureSpec(categorical=(Categorical(name="campaign_id", buckets=32),))

    def sample(outcomes: DataFrame, *, every: bool, largest: int = 1_000) -> DelayRows:
        own = delay_sample(outcomes, AS_OF, "conversion", WINDOW, open_windows=every, largest=largest)
        return DelayRows.from_table(own.toArrow(), spec, ("campaign_id",))

    for every in (False, True):
        found = sample(samples, every=every).counts(GRID, ("campaign_id",))
        expected = by_hand(rows, "conversion", ("campaign_id",), every=every)
        assert sorted(path_keys(found.paths).tolist()) == sorted(path_keys(expected.paths).tolist())
        np.testing.assert_array_equal(totals(found), totals(expected))
    some = sample(samples, every=True, largest=50)
    again = sample(samples.repartition(7), every=True, largest=50)
    assert len(some) == 50
    for name in ("buckets", "segment_key", "opened", "delay", "follow_up"):
        np.testing.assert_array_equal(getattr(some, name), getattr(again, name))


def totals(found: DelayCounts) -> Any:
    cells = np.zeros((GRID.bins, GRID.bins))
    np.add.at(cells, (found.delay_bin, found.follow_up_bin), found.count)
    return cells


def test_outcomes_are_those_of_the_attribution_rule_each_once(spark: SparkSession) -> None:
    log, window = random_log(150, seed=7), window_of(1_050, 1_400, WITH_VIEWS)
    lake = lake_of(spark, log)
    losers = contradictions(lake, window)
    facts = find_facts(lake, window, losers).where("has_fact").select(*fact_columns(window.tasks))
    found = sorted(
        (row.impression_id, row.task, row.opened, row.rose)
        for row in delay_outcomes(lake, facts, window, losers).collect()
    )
    inside = {str(task): window.opened(task) for task in window.tasks}
    expected = sorted(
        (row.impression_id, row.task, row.event_time, row.outcome_known_at)
        for row in labels_as_of(log, window.as_of, window.attribution)
        if row.label > 0 and any(low <= row.event_time < high for low, high in inside[row.task])
    )
    assert found == expected
    assert {task for _, task, *_ in found} == set(window.tasks)
