"""The event contract, enforced: conforming tables, finding rows that break it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import DataError
from pipelines.events import CLICK, CONVERSION, IMPRESSION, contract_schema
from pipelines.validation import LATEST_TIME, conform, validate

NOW = 1_767_571_200_000


def impression(**changes: Any) -> dict[str, Any]:
    good = {
        "event_id": "i1",
        "impression_id": "i1",
        "event_time": NOW,
        "arrival_time": NOW + 5,
        "user_id": "u1",
        "item_id": "a1",
        "position": 3,
        "propensity": 0.5,
        "price": 2.5,
        "tags": ["x"],
    }
    return good | changes


def table_of(*rows: dict[str, Any]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


BREACHES: list[tuple[dict[str, Any], str]] = [
    ({"event_id": None}, "event_id must be a string that is not empty. Received: nothing."),
    ({"event_id": ""}, "event_id must be a string that is not empty. Received: ''."),
    ({"impression_id": ""}, "impression_id must be a string that is not empty. Received: ''."),
    ({"event_id": "i2"}, "must equal its impression_id. Received: 'i2' and 'i1'."),
    ({"user_id": None}, "user_id must be a string that is not empty. Received: nothing."),
    ({"item_id": ""}, "item_id must be a string that is not empty."),
    ({"event_time": None, "arrival_time": NOW}, "event_time must be ms since the epoch"),
    ({"event_time": 0}, "Received: 0."),
    ({"event_time": -5}, "Received: -5."),
    ({"event_time": NOW * 1000, "arrival_time": NOW * 1000}, "before 2100"),
    ({"arrival_time": NOW - 1}, f"arrival_time must not be before event_time. Received: {NOW - 1} < {NOW}."),
    ({"arrival_time": LATEST_TIME + 1}, "arrival_time must be ms since the epoch, before 2100."),
    ({"position": 0}, "position must be at least 1. Received: 0."),
    ({"propensity": 0.0}, "propensity must lie in (0, 1]. Received: 0.0."),
    ({"propensity": 1.5}, "propensity must lie in (0, 1]."),
    ({"propensity": math.nan}, "propensity must lie in (0, 1]. Received: nan."),
    ({"price": math.nan}, "feature price must be a finite number. Received: nan."),
    ({"price": -math.inf}, "feature price must be a finite number. Received: -inf."),
    ({"tags": ["x", None]}, "feature tags must be a list of strings. Received: ['x', None]."),
    ({"served_logit": math.inf}, "served_logit must be a finite number."),
]


@pytest.mark.parametrize(("changes", "reason"), BREACHES)
def test_an_impression_that_breaks_the_contract_is_found_with_what_was_expected_and_received(
    changes: dict[str, Any], reason: str
) -> None:
    # First and last rows are good, so that the row number is checked too.
    table = conform(IMPRESSION, table_of(impression(), impression(**changes), impression()))
    ok, reasons = validate(IMPRESSION, table)
    assert ok.tolist() == [True, False, True]
    assert list(reasons) == [1] and reason in reasons[1]


def test_each_bad_row_has_one_reason_and_good_rows_none() -> None:
    rows = [impression(event_id="", position=0), impression(), impression(position=0)]
    ok, reasons = validate(IMPRESSION, conform(IMPRESSION, table_of(*rows)))
    assert ok.tolist() == [False, True, False]
    assert sorted(reasons) == [0, 2]


def test_a_good_impression_needs_neither_position_nor_propensity_nor_features() -> None:
    bare = {key: value for key, value in impression().items() if key.endswith(("_id", "event_time"))}
    table = conform(IMPRESSION, table_of(bare))
    assert table.schema.names == contract_schema(IMPRESSION).names
    assert validate(IMPRESSION, table)[0].tolist() == [True]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": math.nan}, "value must be a finite number. Received: nan."),
        ({"value": math.inf}, "value must be a finite number. Received: inf."),
        ({"op": "refund"}, "op must be one of assert, retract, restate. Received: 'refund'."),
        ({"event_time": 0}, "event_time must be ms since the epoch"),
    ],
)
def test_a_conversion_that_breaks_the_contract_is_found(changes: dict[str, Any], reason: str) -> None:
    good = {"event_id": "v1", "impression_id": "i1", "event_time": NOW, "value": 1.0, "op": "retract"}
    table = conform(CONVERSION, table_of(good | {"value": None, "op": None}, good | changes))
    ok, reasons = validate(CONVERSION, table)
    assert ok.tolist() == [True, False] and reason in reasons[1]


def test_rows_of_chunked_and_sliced_tables_are_counted_from_the_start() -> None:
    part = table_of(impression(), impression(tags=[None]), impression())
    table = conform(IMPRESSION, pa.concat_tables([part, part.slice(1), part]))
    ok, reasons = validate(IMPRESSION, table)
    assert np.flatnonzero(~ok).tolist() == sorted(reasons) == [1, 3, 6]


def test_conform_puts_contract_columns_first_then_served_then_features_by_name() -> None:
    table = table_of({"zeta": 1, "served_logit": 0.5, "alpha": 2} | impression())
    expected = [*contract_schema(IMPRESSION).names, "served_logit", "alpha", "price", "tags", "zeta"]
    assert conform(IMPRESSION, table).schema.names == expected


def test_conform_fills_arrival_time_and_op() -> None:
    rows = [
        {"event_id": "v1", "impression_id": "i1", "event_time": 7, "arrival_time": None},
        {"event_id": "v2", "impression_id": "i1", "event_time": 7, "arrival_time": 9, "op": "restate"},
    ]
    table = conform(CONVERSION, table_of(*rows))
    assert table.column("arrival_time").to_pylist() == [7, 9]
    assert table.column("op").to_pylist() == ["assert", "restate"]
    assert table.column("value").to_pylist() == [None, None]
    assert table.schema == contract_schema(CONVERSION)


@pytest.mark.parametrize(
    ("column", "type_", "values"),
    [
        (pa.array(["a", "b"], pa.large_string()), pa.string(), ["a", "b"]),
        (pa.array(["a", "b"]).dictionary_encode(), pa.string(), ["a", "b"]),
        (pa.array([1, 2], pa.int8()), pa.int64(), [1, 2]),
        (pa.array([2**64 - 1, 2], pa.uint64()), pa.string(), [str(2**64 - 1), "2"]),
        (pa.array([1.5, None], pa.float32()), pa.float64(), [1.5, None]),
        (pa.array([True, False]), pa.string(), ["true", "false"]),
        (pa.array([[1, 2], None]), pa.list_(pa.string()), [["1", "2"], None]),
        (pa.array([["a"], []], pa.large_list(pa.large_string())), pa.list_(pa.string()), [["a"], []]),
    ],
)
def test_features_become_strings_whole_numbers_numbers_or_lists_of_strings(
    column: pa.Array, type_: pa.DataType, values: list[Any]
) -> None:
    table = table_of(impression(), impression()).append_column("x", column)
    feature = conform(IMPRESSION, table).column("x")
    assert feature.type == type_ and feature.to_pylist() == values


def test_a_feature_without_a_value_is_no_column() -> None:
    table = table_of(impression(), impression()).append_column("x", pa.array([None, None], pa.int64()))
    assert "x" not in conform(IMPRESSION, table).column_names


def test_times_with_a_time_zone_become_milliseconds() -> None:
    microseconds = pa.array([NOW * 1000 + 999], pa.timestamp("us", "Europe/Paris"))
    table = table_of({"event_id": "c", "impression_id": "i"}).append_column("event_time", microseconds)
    assert conform(CLICK, table).column("event_time").to_pylist() == [NOW]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("event_time", pa.array(["2026-01-05"])),
        ("event_time", pa.array([NOW * 1000], pa.timestamp("us"))),
        ("event_time", pa.array([1.5])),
        ("user_id", pa.array([17])),
        ("position", pa.array([1 << 40])),
        ("price", pa.array([{"currency": "EUR"}])),
        ("price", pa.array([NOW], pa.timestamp("ms", "UTC"))),
    ],
)
def test_a_column_that_cannot_be_cast_is_an_error_that_names_file_and_column(
    column: str, values: pa.Array
) -> None:
    table = table_of(impression())
    table = table.set_column(table.column_names.index(column), column, values)
    with pytest.raises(DataError, match=rf"log/impressions\.parquet: .*{column} must"):
        conform(IMPRESSION, table, "log/impressions.parquet")


def test_a_missing_required_column_is_an_error_that_lists_what_was_found() -> None:
    with pytest.raises(DataError, match="Missing: impression_id") as caught:
        conform(CLICK, pa.table({"event_id": ["c"], "event_time": [1]}), "clicks.parquet")
    assert caught.value.hint == "found the columns event_id, event_time"


def test_other_columns_of_clicks_and_conversions_are_dropped() -> None:
    rows = table_of({"event_id": "c", "impression_id": "i", "event_time": 1, "user_id": "u"})
    assert conform(CLICK, rows).schema == contract_schema(CLICK)
