"""Spark counts delays by group as the rows themselves would be counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest

from pipelines.delay import DelayGrid
from pipelines.delay_cells import delay_sample, group_delays
from pipelines.delay_counts import DelayCounts, Path, combined_keys, path_keys
from pipelines.delay_rows import DelayRows
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import ConfigError
from pipelines.feature_spec import Categorical, FeatureSpec
from pipelines.features import encode_rows

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

WINDOW = 2 * DAY_MS
AS_OF = 1_767_571_200_000
GRID = DelayGrid(WINDOW, 32)
SCHEMA = "user_id string, item_id string, position int, features string, " + ", ".join(
    f"{task}_opened bigint, {task}_label int, {task}_known bigint, {task}_mature boolean"
    for task in ("click", "conversion")
)


def joined_rows(seed: int, n: int = 600) -> list[dict[str, Any]]:
    """Joined impressions as `join_samples` leaves them, of campaigns from common to rare."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for place in range(n):
        age = int(rng.integers(0, 2 * WINDOW))
        delay = int(rng.exponential(5 * HOUR_MS))
        campaign = int(rng.choice(8, p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.05, 0.04, 0.01]))
        label = int(delay <= min(age, WINDOW))
        features: dict[str, Any] = {"campaign_id": campaign, "device": str(rng.choice(["phone", "pc"]))}
        if rng.random() < 0.1:
            features["device"] = None
        known = AS_OF - age + delay if label else None
        window = {"opened": AS_OF - age, "label": label, "known": known, "mature": age > WINDOW}
        nothing = {"opened": None, "label": 0, "known": None, "mature": None}
        row: dict[str, Any] = {"user_id": f"u{place % 50}", "item_id": f"i{place % 3}", "position": 1}
        row["features"] = orjson.dumps(features).decode()
        row |= {f"click_{name}": value for name, value in window.items()}
        row |= {f"conversion_{name}": value for name, value in (window if place % 2 else nothing).items()}
        rows.append(row)
    return rows


def frame(spark: SparkSession, rows: list[dict[str, Any]]) -> DataFrame:
    names = [part.split()[0] for part in SCHEMA.split(", ")]
    return spark.createDataFrame([tuple(row[name] for name in names) for row in rows], SCHEMA)


def by_hand(rows: list[dict[str, Any]], task: str, fields: tuple[str, ...], *, every: bool) -> DelayCounts:
    values: list[Path] = []
    delay, age = [], []
    for row in rows:
        if row[f"{task}_opened"] is None or not row[f"{task}_label"]:
            continue
        if not (every or row[f"{task}_mature"]):
            continue
        found = orjson.loads(row["features"]) | {"item_id": row["item_id"]}
        values.append(tuple(None if found[name] is None else str(found[name]) for name in fields))
        delay.append(row[f"{task}_known"] - row[f"{task}_opened"])
        age.append(AS_OF - row[f"{task}_opened"])
    return DelayCounts.of(GRID, fields, values, delay, age)


def assert_equal(found: DelayCounts, expected: DelayCounts) -> None:
    assert found.paths == expected.paths
    for name in ("group", "delay_bin", "follow_up_bin", "count"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def counts(cells: DataFrame, task: str, fields: tuple[str, ...]) -> DelayCounts:
    return DelayCounts.from_table(cells.where(cells["task"] == task).toArrow(), GRID, fields)


@pytest.mark.parametrize(
    ("fields", "open_windows"), [(("item_id",), False), (("campaign_id", "device"), True)]
)
def test_counts_of_all_groups_are_those_of_the_rows(
    spark: SparkSession, fields: tuple[str, ...], open_windows: bool
) -> None:
    rows = joined_rows(1)
    cells = group_delays(
        frame(spark, rows),
        AS_OF,
        {"click": GRID, "conversion": GRID},
        fields,
        open_windows=open_windows,
        minimum_support=1,
    ).cache()
    for task in ("click", "conversion"):
        assert_equal(counts(cells, task, fields), by_hand(rows, task, fields, every=open_windows))


def test_rare_groups_stand_under_their_parent_and_no_outcome_is_lost(spark: SparkSession) -> None:
    rows = joined_rows(2)
    fields = ("campaign_id", "device")
    cells = group_delays(
        frame(spark, rows), AS_OF, {"click": GRID}, fields, open_windows=True, minimum_support=20
    )
    found, every = counts(cells, "click", fields), by_hand(rows, "click", fields, every=True)
    support = {path: every.count[every.group == place].sum() for place, path in enumerate(every.paths)}
    by_campaign: dict[Path, float] = {}
    for path, number in support.items():
        by_campaign[path[:1]] = by_campaign.get(path[:1], 0) + number
    expected: dict[Path, float] = {}
    for path, number in support.items():
        depth = 0 if by_campaign[path[:1]] < 20 else (1 if number < 20 else 2)
        expected[path[:depth]] = expected.get(path[:depth], 0) + number
    sums = {path: found.count[found.group == place].sum() for place, path in enumerate(found.paths)}
    assert sums == expected
    assert {len(path) for path in expected} == {0, 1, 2}
    assert_equal(found.level(1), by_hand_level(every, by_campaign))


def by_hand_level(every: DelayCounts, by_campaign: dict[Path, float]) -> DelayCounts:
    level = every.level(1)
    kept = [place for place, path in enumerate(level.paths) if by_campaign[path] >= 20]
    cells = np.isin(level.group, kept)
    return DelayCounts(
        level.grid,
        level.fields,
        tuple(level.paths[place] for place in kept),
        np.searchsorted(kept, level.group[cells]),
        level.delay_bin[cells],
        level.follow_up_bin[cells],
        level.count[cells],
    )


def test_only_the_best_supported_groups_are_counted_apart(spark: SparkSession) -> None:
    rows = joined_rows(3)
    cells = group_delays(
        frame(spark, rows), AS_OF, {"click": GRID}, ("campaign_id",), minimum_support=1, largest=2
    )
    found = counts(cells, "click", ("campaign_id",))
    assert set(found.paths) == {(), ("0",), ("1",)}
    assert found.count.sum() == sum(bool(row["click_label"] and row["click_mature"]) for row in rows)


def test_values_are_written_as_the_feature_encoding_hashes_them(spark: SparkSession) -> None:
    written: list[Any] = ["a b", "ü", 7, 7.0, True, None, "", "[1]", -3]
    rows = joined_rows(4, len(written))
    for row, value in zip(rows, written, strict=True):
        row |= {"click_opened": AS_OF - 2 * WINDOW, "click_label": 1, "click_mature": True}
        row |= {
            "click_known": AS_OF - 2 * WINDOW + 5,
            "features": orjson.dumps({"campaign id": value}).decode(),
        }
    cells = group_delays(frame(spark, rows), AS_OF, {"click": GRID}, ("campaign id",), minimum_support=1)
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
        group_delays(frame(spark, joined_rows(5, 2)), AS_OF, {"click": GRID}, ("it's",))


def test_sample_is_bounded_stable_and_encoded_as_the_rows_are(spark: SparkSession) -> None:
    rows = joined_rows(6)
    for place, row in enumerate(rows):
        row |= {"impression_id": f"x{place}", "event_time": AS_OF - 3 * WINDOW}
    schema = f"{SCHEMA}, impression_id string, event_time bigint"
    names = [part.split()[0] for part in schema.split(", ")]
    samples = spark.createDataFrame([tuple(row[name] for name in names) for row in rows], schema)
    spec = FeatureSpec(categorical=(Categorical(name="campaign_id", buckets=32),))

    def sample(frame: DataFrame, *, every: bool, largest: int = 1_000) -> DelayRows:
        cells = delay_sample(frame, AS_OF, "click", WINDOW, open_windows=every, largest=largest)
        return DelayRows.from_table(cells.toArrow(), spec, ("campaign_id",))

    for every in (False, True):
        found = sample(samples, every=every).counts(GRID, ("campaign_id",))
        expected = by_hand(rows, "click", ("campaign_id",), every=every)
        assert sorted(path_keys(found.paths).tolist()) == sorted(path_keys(expected.paths).tolist())
        np.testing.assert_array_equal(totals(found), totals(expected))
    some = sample(samples, every=True, largest=50)
    again = sample(samples.repartition(7), every=True, largest=50)
    assert len(some) == 50
    for name in ("buckets", "segment_key", "opened", "delay", "follow_up"):
        np.testing.assert_array_equal(getattr(some, name), getattr(again, name))


def totals(counts: DelayCounts) -> Any:
    cells = np.zeros((GRID.bins, GRID.bins))
    np.add.at(cells, (counts.delay_bin, counts.follow_up_bin), counts.count)
    return cells
