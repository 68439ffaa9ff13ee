"""Times, numbers and JSON by Spark expressions are those of Python and of the codec."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pyspark.sql import functions as F

from pipelines.adapter_features import feature_value
from pipelines.adapter_json import json_number, json_object
from pipelines.adapter_times import TimeFormat, format_instant, milliseconds, parse_instant, scaled
from pipelines.codec import features_to_json

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Each example is a Spark job over many values.
FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2099, 12, 30))  # noqa: DTZ001 (a clock's time)


def computed(spark: SparkSession, values: list[Any], expression: Column, kind: str = "string") -> list[Any]:
    table = pa.table({"n": range(len(values)), "v": pa.array(values, {"string": pa.string()}.get(kind))})
    found = spark.createDataFrame(table).orderBy("n").select(expression.alias("x")).toArrow()
    return list(found["x"].to_pylist())


def since_epoch(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(milliseconds=1)


@FEW
@given(st.lists(st.decimals(-(10**9), 10**10, places=3, allow_nan=False), min_size=1, max_size=60))
def test_numbers_of_any_unit_are_cut_to_whole_milliseconds(
    spark: SparkSession, values: list[Decimal]
) -> None:
    for unit, factor in (("s", Decimal(1000)), ("ms", Decimal(1)), ("us", Decimal("0.001"))):
        form = TimeFormat(unit=unit, origin=parse_instant("2026-01-01T00:00:00Z"))
        expected = [math.floor(value * factor) + 1_767_225_600_000 for value in values]
        texts = [format(value, "f") for value in values]
        assert computed(spark, texts, milliseconds(F.col("v"), form)) == expected


@FEW
@given(
    st.lists(MOMENTS, min_size=1, max_size=60),
    st.sampled_from(["UTC", "Europe/Paris", "America/St_Johns", "Asia/Shanghai"]),
    st.sampled_from(
        ["%Y-%m-%d %H:%M:%S.%f", "%d/%m/%Y %I:%M:%S %p", "%y%m%d%H", "'T'%Y %b %d at %H%M%%", "%j of %Y"]
    ),
)
def test_patterns_mean_what_strptime_reads(
    spark: SparkSession, moments: list[datetime], zone: str, pattern: str
) -> None:
    # strptime has another century for years without one.
    if "%y" in pattern:
        moments = [
            moment.replace(year=2000 + moment.year % 69, day=min(moment.day, 28)) for moment in moments
        ]
    texts = [moment.strftime(pattern) for moment in moments]
    expected = [
        since_epoch(datetime.strptime(text, pattern).replace(tzinfo=ZoneInfo(zone))) for text in texts
    ]
    form = TimeFormat(pattern=pattern, zone=zone)
    assert computed(spark, texts, milliseconds(F.col("v"), form)) == expected


@FEW
@given(
    st.lists(st.tuples(MOMENTS, st.integers(-14 * 60, 14 * 60)), min_size=1, max_size=60),
    st.sampled_from(["T", " "]),
)
def test_iso_times_with_offset_are_those_of_python(
    spark: SparkSession, moments: list[tuple[datetime, int]], between: str
) -> None:
    texts = []
    for moment, minutes in moments:
        sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
        texts.append(f"{moment.isoformat(sep=between)}{sign}{hours:02d}:{rest:02d}")
    expected = [since_epoch(datetime.fromisoformat(text)) for text in texts]
    assert computed(spark, texts, milliseconds(F.col("v"), TimeFormat(unit="iso"))) == expected


def test_what_is_no_time_is_null(spark: SparkSession) -> None:
    texts = ["", "abc", "1e400", "99999999999999999999", "NaN", "٣", "1_000", "12h"]
    for unit in ("s", "ms", "us"):
        assert computed(spark, texts, scaled(F.col("v"), unit)) == [None] * len(texts)
    texts = [
        *(
            "2026-02-30T10:00:00Z",
            "2026-01-05T10:00:00",
            "2026-01-05",
            "10:00",
            "T10:00Z",
            "2026-01-05T25:00Z",
        ),
        *("2026-01-05T10:00:00 Europe/Paris", "yesterday"),
    ]
    assert computed(spark, texts, milliseconds(F.col("v"), TimeFormat(unit="iso"))) == [None] * len(texts)
    texts = ["2026-13-01", "2026-1-1", "2026-01-01 ", "20260101"]
    form = TimeFormat(pattern="%Y-%m-%d", zone="UTC")
    assert computed(spark, texts, milliseconds(F.col("v"), form)) == [None] * len(texts)


def test_clock_times_around_a_change_of_clocks(spark: SparkSession) -> None:
    # In Paris 02:30 did not exist on 29 March 2026, and came twice on 25 October: at 00:30Z and 01:30Z.
    form = TimeFormat(unit="iso", zone="Europe/Paris")
    texts = ["2026-03-29T02:30:00", "2026-10-25T02:30:00", "2026-10-25T02:30:00+01:00"]
    assert [format_instant(ms) for ms in computed(spark, texts, milliseconds(F.col("v"), form))] == [
        "2026-03-29T01:30:00.000Z",
        "2026-10-25T00:30:00.000Z",
        "2026-10-25T01:30:00.000Z",
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": "%Y-%m-%d"}, "zone of its clock"),
        ({"pattern": "%Y %Q", "zone": "UTC"}, "Got %Q"),
        ({"unit": "iso", "zone": "Mars/Olympus"}, "IANA name"),
        ({"unit": "s", "zone": "UTC"}, "a zone belongs to"),
        ({"unit": "iso", "origin": "2026-01-01T00:00:00Z"}, "an origin belongs to"),
        ({"origin": "2026-01-01"}, "with an offset"),
    ],
)
def test_forms_of_time_that_say_too_little_or_too_much_are_refused(keys: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TimeFormat.model_validate(keys)


# Java before version 19 adds digits to some numbers beyond 2**53, short as they are.
SHORT_DECIMALS = (
    st.tuples(st.integers(-(10**15) + 1, 10**15 - 1), st.integers(-25, 20))
    .map(lambda pair: float(f"{pair[0]}e{pair[1]}"))
    .filter(lambda number: abs(number) <= 2**53)
)


@FEW
@given(st.lists(SHORT_DECIMALS, min_size=1, max_size=300))
@example([0.0, -0.0, 1e-6, 1e-7, 9999999999.5, 1e10, 1e15, -2.5e-7, 123456789.0, 12345678.9, 2e-3, 1e7, 0.1])
def test_numbers_are_written_as_the_codec_writes_them(spark: SparkSession, values: list[float]) -> None:
    written = pa.array(values).cast(pa.string()).to_pylist()
    assert computed(spark, values, json_number(F.col("v")), "double") == written


@FEW
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=300))
@example([4.611686019e18, 1e22, 7.6663e20])
def test_numbers_of_17_digits_keep_their_value(spark: SparkSession, values: list[float]) -> None:
    texts = computed(spark, values, json_number(F.col("v")), "double")
    assert [json.loads(text) for text in texts] == values


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
HARD_TEXTS = TEXTS | st.text(st.sampled_from('\\"\x00\x0b\x1f/u0{},é\x7f\u2028'), max_size=12)
BAGS = st.fixed_dictionaries(
    {
        "a b": st.none() | HARD_TEXTS,
        "number": st.none() | SHORT_DECIMALS,
        "whole": st.none() | st.integers(-(2**63), 2**63 - 1),
        "tags": st.none() | st.lists(HARD_TEXTS, max_size=3),
        'z"\x1f': st.none() | HARD_TEXTS,
    }
)


@settings(FEW, max_examples=12)
@given(st.lists(BAGS, min_size=1, max_size=60), st.booleans())
def test_features_are_written_as_the_codec_writes_them(
    spark: SparkSession, bags: list[dict[str, Any]], with_number: bool
) -> None:
    types = {
        "a b": pa.string(),
        "number": pa.float64(),
        "whole": pa.int64(),
        "tags": pa.list_(pa.string()),
        'z"\x1f': pa.string(),
    }
    if not with_number:
        del types["number"]
    columns = {name: pa.array([bag[name] for bag in bags], kind) for name, kind in types.items()}
    frame = spark.createDataFrame(pa.table({f"c{k}": column for k, column in enumerate(columns.values())}))
    values = {name: F.col(f"c{k}") for k, name in enumerate(columns)}
    whole = json_object(values, numbers={"number"} & set(types))
    assert (
        frame.select(whole.alias("x")).toArrow()["x"].to_pylist()
        == features_to_json(pa.table(columns)).to_pylist()
    )


def test_cells_become_values_of_their_type(spark: SparkSession) -> None:
    cells = ["12", " 7 ", "1.50", "1e3", "x|y", "NaN", "1d", "1e999", None]

    def values(kind: Any) -> list[Any]:
        return computed(spark, cells, feature_value(F.col("v"), kind))

    assert values("integer") == [12, 7, None, None, None, None, None, None, None]
    assert values("number") == [12.0, 7.0, 1.5, 1000.0, None, None, None, None, None]
    assert values("list")[4] == ["x", "y"]
    assert values("category") == cells
