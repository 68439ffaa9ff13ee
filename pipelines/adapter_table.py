"""Any CSV or Parquet files, by a mapping of their columns."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from pipelines.adapter_events import NO_ID, checked, impression_rows, outcome_rows, row_hash, union
from pipelines.adapter_features import Check, FeatureType, feature_check, feature_value, flag_check
from pipelines.adapter_json import json_object
from pipelines.adapter_mapping import (
    GENERATE,
    REST,
    ImpressionColumns,
    InputFiles,
    LongMapping,
    OutcomeColumns,
    OutcomeFile,
    WideMapping,
)
from pipelines.adapter_parquet import native_feature, native_type, parquet_tables
from pipelines.adapter_text import LogTable, TextLayout, text_tables
from pipelines.adapter_times import TimeFormat, milliseconds, scaled, timestamp_milliseconds
from pipelines.errors import ConfigError
from pipelines.events import CLICK, CONVERSION
from pipelines.json_faults import RESERVED_NAMES

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["long_table", "wide_table"]

_NUMBERS: dict[str, tuple[FeatureType, str]] = {
    "position": ("integer", "a whole number"),
    "propensity": ("number", "a finite number"),
    "value": ("number", "a finite number"),
    "credit": ("number", "a finite number"),
}


def wide_table(
    spark: SparkSession, paths: Mapping[str, Sequence[str]], options: WideMapping
) -> dict[str, DataFrame]:
    """Rows of the lake from files with a row for each impression."""
    tables = [_Table(table) for table in _tables(spark, paths["log"], options.input)]
    return {"log": union([impression_rows(_wide(table, options)) for table in tables])}


def long_table(
    spark: SparkSession, paths: Mapping[str, Sequence[str]], options: LongMapping
) -> dict[str, DataFrame]:
    """Rows of the lake from files of impressions, of clicks and of conversions."""
    found = {}
    for role, kind, columns in (
        ("log", None, None),
        ("clicks", CLICK, options.click),
        ("conversions", CONVERSION, options.conversion),
    ):
        parts = []
        for log in _tables(spark, paths.get(role, ()), options.input):
            table = _Table(log)
            if kind is None or columns is None:
                parts.append(impression_rows(_long_impressions(table, options)))
            else:
                parts.append(outcome_rows(kind, _outcomes(table, columns, options.time)))
        if parts:
            found[role] = union(parts)
    return found


def _tables(spark: SparkSession, paths: Sequence[str], files: InputFiles) -> Iterator[LogTable]:
    parquet = [path for path in paths if path.endswith(".parquet")]
    texts = [path for path in paths if not path.endswith(".parquet")]
    layout = TextLayout(files.separator, files.quote, files.null_values, files.columns)
    yield from text_tables(spark, texts, layout)
    yield from parquet_tables(spark, parquet)


@dataclass
class _Table:
    """A table whose columns get their meaning one by one.

    Attributes
    ----------
    log : LogTable
    used : set of str
        Columns of the file that have a meaning.
    values : dict of str to Column
        Columns made from cells.
    checks : list of Check
        On those columns.
    """

    log: LogTable
    used: set[str] = field(default_factory=set)
    values: dict[str, Column] = field(default_factory=dict)
    checks: list[Check | None] = field(default_factory=list)

    def cell(self, name: str) -> Column:
        """A column by its name in the file."""
        if name not in self.log.cells:
            near = difflib.get_close_matches(name, self.log.cells, n=1, cutoff=0.4)
            raise ConfigError(
                f"{self.log.name} has no column {name}, which the mapping names.",
                hint=f"did you mean {near[0]}?" if near else f"it has {', '.join(self.log.cells)}",
            )
        self.used.add(name)
        return self.log.cells[name]

    def kind(self, name: str) -> str:
        """Spark's name of a column's type."""
        return self.log.types.get(name, "string")

    def text(self, name: str) -> Column:
        """A column as text; a truth value is 0 or 1."""
        cell = self.cell(name)
        return (cell.cast("int") if self.kind(name) == "boolean" else cell).cast("string")

    def add_id(self, target: str, name: str | None) -> None:
        if name == GENERATE:
            self.values[target] = row_hash(F.col("payload"))
        else:
            self.values[target] = F.lit(NO_ID) if name is None else self.text(name)

    def add_time(self, target: str, name: str | None, form: TimeFormat, needed: Column | None = None) -> None:
        """A time in ms, and the check that it is one where it is ``needed`` (default: where given)."""
        if name is None:
            return
        if self.kind(name).startswith("timestamp"):
            self.values[target] = timestamp_milliseconds(self.cell(name), self.kind(name), form)
        else:
            self.values[target] = milliseconds(self.text(name), form)
        self.check(target, name, form.describe(), needed)

    def add_delay(self, target: str, name: str, columns: OutcomeColumns, needed: Column) -> None:
        self.values[target] = scaled(self.text(name), columns.delay_unit)
        self.check(target, name, f"a number of {columns.delay_unit}", needed)

    def add_number(self, target: str, name: str | None) -> None:
        if name is not None:
            kind, expected = _NUMBERS[target]
            value = feature_value(self.text(name), kind)
            self.values[target] = value.try_cast("int") if kind == "integer" else value
            self.check(target, name, expected, None)

    def check(self, target: str, name: str, expected: str, needed: Column | None) -> None:
        text = self.text(name)
        bad = F.col(target).isNull() & (text.isNotNull() if needed is None else needed)
        self.checks.append(Check(bad, f"{name} must be {expected}", text))

    def rows(self, *steps: Mapping[str, Column]) -> DataFrame:
        """The table with the columns made from cells, then those of each step, made from the ones before."""
        rows = self.log.rows.withColumns(self.values)
        for step in steps:
            rows = rows.withColumns(dict(step))
        return checked(rows, self.checks)


def _wide(table: _Table, mapping: WideMapping) -> DataFrame:
    steps: list[dict[str, Column]] = []
    shown, own = F.col("event_time"), F.lit(None).cast("bigint")
    clicked = F.lit(None).cast("bigint")
    if mapping.conversion is not None:
        _add_happened(table, "conversion", mapping.conversion, mapping.time, mapping.conversion.assumed_delay)
        table.add_number("value", mapping.conversion.value)
        table.add_number("credit", mapping.conversion.credit)
        own = F.when(F.col("conversion_there"), F.col("conversion_own_time"))
    if mapping.click is not None:
        delay = mapping.click_delay
        _add_happened(table, "click", mapping.click, mapping.time, delay)
        # A conversion comes after its click: where it is known, the click is no later.
        assumed = None if delay is None else F.least(shown + F.lit(delay), own)
        steps.append({"click_time": _when("click", shown, assumed)})
        clicked = F.col("click_time")
    if mapping.conversion is not None:
        columns = mapping.conversion
        base = F.coalesce(clicked, shown) if columns.delay_from == "click" else shown
        assumed = None if columns.assumed_delay is None else base + F.lit(columns.assumed_delay)
        steps.append({"conversion_time": _when("conversion", base, assumed)})
    _add_impression(table, mapping.impression, mapping.time)
    _add_features(table, mapping)
    return table.rows(*steps)


def _add_happened(
    table: _Table, what: str, columns: OutcomeColumns, form: TimeFormat, assumed: int | None
) -> None:
    """Whether there was an outcome, its own time and its delay: ``X_there``, ``X_own_time``, ``X_delay``."""
    there, absent = f"{what}_there", F.lit(None).cast("bigint")
    name = columns.time or columns.delay
    if columns.flag is not None:
        flag = table.text(columns.flag)
        table.values[there] = F.coalesce(flag == "1", F.lit(False))
        table.checks.append(flag_check(columns.flag, flag))
    elif name is not None:
        table.values[there] = table.text(name).isNotNull()
    table.values |= {f"{what}_own_time": absent, f"{what}_delay": absent}
    needed = F.col(there)
    if assumed is not None and name is not None:
        needed &= table.text(name).isNotNull()
    if columns.time is not None:
        table.add_time(f"{what}_own_time", columns.time, columns.time_format or form, needed)
    elif columns.delay is not None:
        table.add_delay(f"{what}_delay", columns.delay, columns, needed)


def _when(what: str, base: Column, assumed: Column | None) -> Column:
    known = F.coalesce(F.col(f"{what}_own_time"), base + F.col(f"{what}_delay"))
    return F.when(F.col(f"{what}_there"), known if assumed is None else F.coalesce(known, assumed))


def _long_impressions(table: _Table, mapping: LongMapping) -> DataFrame:
    _add_impression(table, mapping.impression, mapping.time)
    _add_features(table, mapping)
    return table.rows()


def _add_impression(table: _Table, columns: ImpressionColumns, form: TimeFormat) -> None:
    form = columns.time_format or form
    table.add_id("impression_id", columns.event_id)
    table.add_time("event_time", columns.event_time, form, F.lit(True))
    table.add_time("arrival_time", columns.arrival_time, form)
    table.add_id("user_id", columns.user_id)
    table.add_id("item_id", columns.item_id)
    table.add_number("position", columns.position)
    table.add_number("propensity", columns.propensity)


def _add_features(table: _Table, mapping: WideMapping | LongMapping) -> None:
    """The JSON of the features; comes last, when it is known which columns are the rest."""
    names = _feature_names(table, mapping.impression)
    unknown = [name for name in mapping.types if name not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.4)
        raise ConfigError(
            f"mapping key types.{unknown[0]} names no feature.",
            hint=f"did you mean {near[0]}?" if near else f"features are {', '.join(names) or '(none)'}",
        )
    values, numbers = {}, set()
    for name in names:
        kind = mapping.types.get(name)
        if name in table.log.types and kind is None:
            kind = _native_type(table, name)
            values[name], check = native_feature(name, table.cell(name), kind)
        else:
            kind = kind or "category"
            values[name] = feature_value(table.text(name), kind, mapping.input.list_separator)
            check = feature_check(name, table.text(name), kind)
        table.checks.append(check)
        numbers |= {name} if kind == "number" else set()
    table.values["features"] = json_object(values, numbers) if values else F.lit("{}")


def _feature_names(table: _Table, columns: ImpressionColumns) -> list[str]:
    if columns.features != REST:
        names = list(columns.features)
    else:
        for name in columns.exclude:
            table.cell(name)
        names = [name for name in table.log.cells if name not in table.used]
    reserved = sorted(RESERVED_NAMES.intersection(names))
    if reserved:
        raise ConfigError(
            f"feature {reserved[0]} bears the name of a field of the contract.",
            hint="give the column its meaning in [impression], or exclude it",
        )
    return names


def _native_type(table: _Table, name: str) -> FeatureType:
    kind = native_type(table.kind(name))
    if kind is None:
        raise ConfigError(
            f"column {name} of {table.log.name} cannot be a feature: it is of type {table.kind(name)}.",
            hint=f'exclude = ["{name}"] in [impression], or give it a type in [types]',
        )
    return kind


def _outcomes(table: _Table, columns: OutcomeFile, form: TimeFormat) -> DataFrame:
    form = columns.time_format or form
    table.add_id("event_id", columns.event_id)
    table.add_id("impression_id", columns.impression_id)
    table.add_time("event_time", columns.event_time, form, F.lit(True))
    table.add_time("arrival_time", columns.arrival_time, form)
    table.add_number("value", columns.value)
    table.add_number("credit", columns.credit)
    if columns.op is not None:
        table.values["op"] = table.text(columns.op)
    return table.rows()
