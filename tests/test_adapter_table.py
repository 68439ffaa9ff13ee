"""A mapping gives any table's columns their meaning, and says what does not fit."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.adapter_mapping import LongMapping, WideMapping, load_options
from pipelines.adapters import load_adapter
from pipelines.errors import ConfigError, DataError
from tests.test_adapters import hashed, read

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# 2026-01-05T09:00:00Z
NINE = 1_767_603_600_000

WIDE = """
[input]
separator = ";"
null_values = ["", "-"]
[time]
pattern = "%d.%m.%Y %H:%M:%S"
zone = "Europe/Berlin"
[impression]
event_id = "nr"
event_time = "shown"
user_id = "who"
item_id = "ad"
position = "slot"
exclude = ["note;"]
[types]
price = "number"
stock = "integer"
tags = "list"
[click]
flag = "clicked"
[conversion]
delay = "sold after"
delay_unit = "s"
value = "paid"
credit = "share"
"""
HEADER = 'nr;shown;who;"ad";slot;clicked;sold after;paid;share;price;stock;tags;place;"note;"'


def test_wide_csv(spark: SparkSession, tmp_path: Path) -> None:
    lines = [
        HEADER,
        'a;05.01.2026 10:00:00;u1;t1;2;1;90.5;3.5;0.25;1.50;7;x|y;"Köln; ""Mitte""";!',
        "b;05.01.2026 10:00:01;u2;t1;-;0;-;-;-;-;-;-;-;!",
        "c;05.01.2026 10:00:02;u2;t1;0;0;-;-;-;-;-;-;-;!",
        "d;2026-01-05 10:00;u2;t1;1;0;-;-;-;-;-;-;-;!",
        "e;05.01.2026 10:00:02;u2;t1;1;0;-5;-;-;-;-;-;-;!",
        "f;05.01.2026 10:00:02;u2;t1;1;0;-;-;-;cheap;-;-;-;!",
        "g;05.01.2026 10:00:02;u2;t1;1;1;soon;-;-;-;-;-;-;!",
        'h;05.01.2026 10:00:02;u2;t1;1;1;-;-;-;-;-;-;"open;!',
    ]
    # As a spreadsheet writes it, with a mark at its begin.
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    found = read(spark, "table", tmp_path, WIDE)
    first, second = found["impression"]
    assert first.pop("features") == ('{"place":"Köln; \\"Mitte\\"","price":1.5,"stock":7,"tags":["x","y"]}')
    place = {"source": "log.csv", "partition": 0, "offset": 1, "row": 0, "impression_id": "a"}
    assert first == {
        **place,
        **{"event_id": "a", "event_time": NINE, "arrival_time": NINE},
        **{"user_id": "u1", "item_id": "t1", "position": 2},
    }
    assert (second["features"], second.get("position")) == ("{}", None)
    assert found["click"] == [
        {**place, "event_id": "a-click", "event_time": NINE + 10_000, "arrival_time": NINE + 10_000}
    ]
    sold = NINE + 10_000 + 90_500
    assert found["conversion"] == [
        {
            **place,
            **{"event_id": "a-conversion", "event_time": sold, "arrival_time": sold},
            **{"value": 3.5, "credit": 0.25, "op": "assert"},
        }
    ]
    reasons = {letter["offset"]: letter["reason"] for letter in found["dead_letter"]}
    assert reasons == {
        3: "impressions: position must be at least 1. Received: '0'.",
        4: "impressions: shown must be a time of the form %d.%m.%Y %H:%M:%S. Received: '2026-01-05 10:00'.",
        5: f"impressions: the conversion must not be before the impression. "
        f"Received: {NINE - 3_000} < {NINE + 2_000} (ms).",
        6: "impressions: feature price must be a finite number. Received: 'cheap'.",
        7: "impressions: sold after must be a number of s. Received: 'soon'.",
        8: "impressions: expected 14 cells. Received: another number of them, or an open quotation mark.",
    }


def test_click_and_conversion_have_times_of_their_own(spark: SparkSession, tmp_path: Path) -> None:
    lines = [
        "t,click,clicked,sale,sold,gone",
        "0,1,4,1,2026-01-01T00:00:09Z,x",
        "0,1,4,1,2026-01-01T00:00:03Z,x",
        "0,1,,0,2026-01-01T00:00:09Z,x",
        "0,1,-4,0,,x",
        "0,0,-1,1,2026-01-01T00:00:09Z,",
        "0,yes,1,0,,x",
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    mapping = """
        [input]
        quote = ""
        [time]
        unit = "s"
        [impression]
        event_time = "t"
        features = ["gone"]
        [click]
        flag = "click"
        time = "clicked"
        [conversion]
        flag = "sale"
        time = "sold"
        time_format = { unit = "iso" }
    """
    origin = 1_767_225_600_000
    found = read(spark, "table", tmp_path, mapping, origin)
    assert [(row["offset"], row["event_id"], row["user_id"]) for row in found["impression"]] == [
        (1, hashed(lines[1]), "none"),
        (5, hashed(lines[5]), "none"),
    ]
    assert [row["features"] for row in found["impression"]] == ['{"gone":"x"}', "{}"]
    assert [(row["offset"], row["event_time"] - origin) for row in found["click"]] == [(1, 4_000)]
    assert [(row["offset"], row["event_time"] - origin) for row in found["conversion"]] == [
        (1, 9_000),
        (5, 9_000),
    ]
    assert [(row["offset"], row["reason"].partition(". R")[0]) for row in found["dead_letter"]] == [
        (2, "impressions: the conversion must not be before the click"),
        (3, "impressions: clicked must be a number of s"),
        (4, "impressions: the click must not be before the impression"),
        (6, "impressions: click must be 0 or 1"),
    ]


def test_rows_are_known_when_they_arrive(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"1000,1,6000\r\n2000,0,1999\r\n")
    mapping = """
        [input]
        header = false
        columns = ["t", "click", "seen"]
        [impression]
        event_time = "t"
        arrival_time = "seen"
        [click]
        flag = "click"
        assumed_delay = "2s"
    """
    found = read(spark, "table", tmp_path, mapping)
    # An outcome that stands in the same row is known no sooner than the row.
    assert [(row["event_time"], row["arrival_time"]) for row in found["impression"]] == [(1_000, 6_000)]
    assert [(row["event_time"], row["arrival_time"]) for row in found["click"]] == [(3_000, 6_000)]
    (letter,) = found["dead_letter"]
    assert letter["reason"].endswith(
        "arrival_time must not be before event_time. Received: 1999 < 2000 (ms)."
    )


def test_parquet_keeps_its_types(spark: SparkSession, tmp_path: Path) -> None:
    moment = datetime(2026, 1, 5, 9, tzinfo=UTC)
    table = pa.table(
        {
            "id": pa.array([11, 12, 13]),
            "at": pa.array([moment] * 3, pa.timestamp("us", "UTC")),
            "bought": pa.array([None, moment.replace(hour=10), None], pa.timestamp("us", "UTC")),
            "Click": pa.array([True, True, False]),
            "price": pa.array([0.1, float("nan"), 2.0], pa.float32()),
            "price.net": pa.array([1, None, 3], pa.int16()),
            "tags": pa.array([["a", "b"], None, []]),
            "day": pa.array([date(2026, 1, 5)] * 3),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    mapping = """
        [impression]
        event_id = "id"
        event_time = "at"
        [click]
        flag = "Click"
        [conversion]
        time = "bought"
    """
    found = read(spark, "table", tmp_path, mapping)
    first, third = found["impression"]
    # As float64, a float32 of 0.1 has these digits.
    assert (
        first["features"] == '{"day":"2026-01-05","price":0.10000000149011612,"price.net":1,"tags":["a","b"]}'
    )
    assert third["features"] == '{"day":"2026-01-05","price":2,"price.net":3,"tags":[]}'
    assert (first["event_id"], first["event_time"], first["offset"]) == ("11", NINE, 0)
    assert [row["event_id"] for row in found["click"]] == ["11-click"]
    (letter,) = found["dead_letter"]
    assert (letter["offset"], letter["source"]) == (1, "log.parquet")
    assert letter["reason"] == "impressions: feature price must be a finite number. Received: 'NaN'."
    assert json.loads(letter["payload"])["id"] == 12
    assert "conversion" not in found


def test_long_files(spark: SparkSession, tmp_path: Path) -> None:
    files = {
        "shown.csv": ["id,ms,user,item,color", "a,5000,u,t,red", "b,6000,u,t,blue"],
        "clicks.csv": ["imp,ms", "a,5500", "a,5500", ",5501"],
        "sales.csv": [
            "key,imp,s,eur,part,what",
            "s1,a,7,9.99,0.5,assert",
            "s1r,a,8,,,retract",
            "s2,a,9,1,2,assert",
            "s3,a,9,1,,undo",
        ],
    }
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    mapping = """
        layout = "long"
        [input]
        files = ["shown.csv"]
        [impression]
        event_id = "id"
        event_time = "ms"
        user_id = "user"
        item_id = "item"
        [click]
        files = ["clicks*.csv"]
        impression_id = "imp"
        event_time = "ms"
        [conversion]
        files = ["sales.csv"]
        event_id = "key"
        impression_id = "imp"
        event_time = "s"
        time_format = { unit = "s" }
        value = "eur"
        credit = "part"
        op = "what"
    """
    found = read(spark, "table", tmp_path, mapping)
    assert [(row["event_id"], row["features"]) for row in found["impression"]] == [
        ("a", '{"color":"red"}'),
        ("b", '{"color":"blue"}'),
    ]
    # The same line twice is the same event, delivered twice.
    assert [row["event_id"] for row in found["click"]] == [hashed("a,5500")] * 2
    sale = {"source": "sales.csv", "partition": 0, "row": 0, "impression_id": "a"}
    assert found["conversion"] == [
        {
            **sale,
            **{"offset": 1, "event_id": "s1", "event_time": 7_000, "arrival_time": 7_000},
            **{"value": 9.99, "credit": 0.5, "op": "assert"},
        },
        {
            **sale,
            **{"offset": 2, "event_id": "s1r", "event_time": 8_000, "arrival_time": 8_000, "op": "retract"},
        },
    ]
    assert [(row["source"], row["offset"], row["reason"]) for row in found["dead_letter"]] == [
        ("clicks.csv", 3, "clicks: impression_id must be a string that is not empty. Received: nothing."),
        ("sales.csv", 3, "conversions: credit must lie in (0, 1]. Received: '2.0'."),
        ("sales.csv", 4, "conversions: op must be one of assert, retract, restate. Received: 'undo'."),
    ]


MINIMAL = '[impression]\nevent_time = "t"\n'


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[impression]\nevent_tme = "t"', "impression.event_time: Field required", None),
        (MINIMAL + 'user_ids = "u"', "unknown mapping key impression.user_ids", "impression.user_id?"),
        (MINIMAL + '[clik]\nflag = "c"', "unknown mapping key clik", "did you mean click?"),
        (MINIMAL + '[click]\nflg = "c"', "unknown mapping key click.flg", "did you mean click.flag?"),
        (MINIMAL + '[click]\nvalue = "c"', "name a flag, a time or a delay", None),
        (MINIMAL + '[click]\ntime = "c"\ndelay = "d"', "a time or a delay, not both", None),
        (MINIMAL + '[conversion]\nflag = "c"', "conversion needs a time, a delay or an assumed_delay", None),
        (MINIMAL + '[types]\nx = "float"', "types.x", None),
        (MINIMAL + "[input]\nheader = false", "columns belong to files without a header", None),
        (MINIMAL + '[input]\nseparator = "ab"', "input.separator", None),
        (MINIMAL + '[time]\npattern = "%Y"', "zone of its clock", None),
        (MINIMAL + '[click]\nflag = "c"\nassumed_delay = "soon"', "expected a duration", None),
        ("[impression", "is not valid TOML", None),
        ('layout = "long"\n' + MINIMAL + '[click]\nflag = "c"', "click.files: Field required", None),
    ],
)
def test_mapping_that_does_not_fit_is_refused(
    tmp_path: Path, text: str, message: str, hint: str | None
) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_adapter("table", path)
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[impression]\nevent_time = "tme"', "has no column tme", "did you mean time?"),
        ('[impression]\nevent_time = "time"\nfeatures = ["colour"]', "has no column colour", "mean color?"),
        (
            '[impression]\nevent_time = "time"\nitem_id = "item_id"\n[types]\ncolr = "number"',
            "types.colr names no feature",
            "color?",
        ),
        ('[impression]\nevent_time = "time"', "feature item_id bears the name", "exclude"),
    ],
)
def test_mapping_that_does_not_fit_the_file_is_refused(
    spark: SparkSession, tmp_path: Path, text: str, message: str, hint: str
) -> None:
    (tmp_path / "log.csv").write_text("time,color,item_id\n1,red,7\n")
    with pytest.raises(ConfigError) as caught:
        read(spark, "table", tmp_path, text)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("header", ["a,b,a", "a,,b"])
def test_header_must_name_each_column_once(spark: SparkSession, tmp_path: Path, header: str) -> None:
    (tmp_path / "log.csv").write_text(f"{header}\n1,2,3\n")
    with pytest.raises(DataError, match="must name each column once"):
        read(spark, "table", tmp_path, MINIMAL)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([b"x"], pa.binary()), "column extra of .* is of type binary"),
        (pa.array([{"a": 1}]), "column extra of .* is of type struct<a:bigint>"),
    ],
)
def test_parquet_column_that_is_no_feature_is_refused(
    spark: SparkSession, tmp_path: Path, column: Any, message: str
) -> None:
    pq.write_table(pa.table({"t": [1], "extra": column}), tmp_path / "log.parquet")
    with pytest.raises(ConfigError, match=message):
        read(spark, "table", tmp_path, MINIMAL)


def test_parquet_clock_times_need_a_zone(spark: SparkSession, tmp_path: Path) -> None:
    clock = pa.array([datetime(2026, 1, 5, 10)], pa.timestamp("us"))  # noqa: DTZ001
    pq.write_table(pa.table({"t": clock}), tmp_path / "log.parquet")
    with pytest.raises(ConfigError, match="a column of timestamps without one"):
        read(spark, "table", tmp_path, MINIMAL)
    zone = MINIMAL + '[time]\nunit = "iso"\nzone = "Europe/Berlin"'
    assert [row["event_time"] for row in read(spark, "table", tmp_path, zone)["impression"]] == [NINE]


def test_options_are_read_back_as_they_were_meant(tmp_path: Path) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text(WIDE)
    options = load_options(WideMapping, path)
    assert WideMapping.model_validate(options.model_dump(mode="json")) == options
    path.write_text('layout = "long"\n[time]\norigin = 2026-01-01T00:00:00Z\n' + MINIMAL)
    assert isinstance(load_options(WideMapping, path), LongMapping)
    assert load_options(WideMapping, path).time.origin == 1_767_225_600_000


def test_exclude_beside_a_list_of_features_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text(MINIMAL.replace("[impression]", '[impression]\nfeatures = ["a"]\nexclude = ["b"]', 1))
    with pytest.raises(ConfigError, match="exclude takes columns"):
        load_options(WideMapping, path)
