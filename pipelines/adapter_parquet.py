"""Parquet files as tables of a log: native types, each row with its number in its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pyspark.errors import PySparkException
from pyspark.sql import functions as F

from pipelines.adapter_features import Check, FeatureType
from pipelines.adapter_text import LogTable
from pipelines.errors import DataError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["native_feature", "native_type", "parquet_tables"]

_CATEGORIES = ("string", "boolean", "date")
_INTEGERS = ("tinyint", "smallint", "int", "bigint")


def parquet_tables(spark: SparkSession, paths: Sequence[str]) -> Iterator[LogTable]:
    """Read files, those of one schema together; a row's payload is its JSON.

    Raises
    ------
    DataError
        If a file cannot be read.
    """
    by_schema: dict[str, list[str]] = {}
    for path in paths:
        by_schema.setdefault(_read(spark, [path]).schema.json(), []).append(path)
    for group in by_schema.values():
        frame = _read(spark, group)
        whole = F.to_json(F.struct(*[_column(name) for name in frame.columns]), {"ignoreNullFields": "false"})
        rows = frame.select(
            F.col("_metadata.file_name").alias("source"),
            F.col("_metadata.row_index").alias("offset"),
            whole.alias("payload"),
            F.lit(None).cast("string").alias("fault"),
            *[_column(name).alias(f"c{index}") for index, name in enumerate(frame.columns)],
        )
        cells = {name: F.col(f"c{index}") for index, name in enumerate(frame.columns)}
        types = {column.name: column.dataType.simpleString() for column in frame.schema}
        yield LogTable(group[0], rows, cells, types)


def native_type(kind: str) -> FeatureType | None:
    """What a column of a Spark type is as a feature; None where it cannot be one.

    Examples
    --------
    >>> native_type("bigint"), native_type("decimal(9,2)"), native_type("array<int>"), native_type("binary")
    ('integer', 'number', 'list', None)
    """
    if kind in _CATEGORIES:
        return "category"
    if kind in _INTEGERS:
        return "integer"
    if kind in ("float", "double") or kind.startswith("decimal"):
        return "number"
    inner = kind.removeprefix("array<").removesuffix(">")
    return "list" if kind.startswith("array<") and inner in (*_CATEGORIES, *_INTEGERS) else None


def native_feature(name: str, cell: Column, kind: FeatureType) -> tuple[Column, Check | None]:
    """A cell as a value for `pipelines.adapter_json.json_object`, and what may be wrong with it."""
    if kind == "integer":
        return cell.cast("bigint"), None
    if kind == "list":
        texts = cell.cast("array<string>")
        hole = F.exists(texts, lambda text: text.isNull())
        return texts, Check(hole, f"feature {name} must be a list of strings", cell.cast("string"))
    if kind == "number":
        number = cell.cast("double")
        infinite = F.isnan(number) | (F.abs(number) == float("inf"))
        return number, Check(infinite, f"feature {name} must be a finite number", number)
    return cell.cast("string"), None


def _read(spark: SparkSession, paths: Sequence[str]) -> DataFrame:
    try:
        return spark.read.parquet(*paths)
    except PySparkException as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{', '.join(paths)} cannot be read as Parquet: {first}") from error


def _column(name: str) -> Column:
    return F.col("`" + name.replace("`", "``") + "`")
