"""Delimited text files as Spark frames: each line with its file and number, cut into cells."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyspark.sql import Window
from pyspark.sql import functions as F

from pipelines.errors import DataError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["LogTable", "TextLayout", "cells_of", "first_line", "numbered_lines", "text_tables"]

_CELLS = "cells"
_MISFIT = "misfit"


@dataclass(frozen=True)
class LogTable:
    """Rows of one or more files that have the same columns.

    Attributes
    ----------
    name : str
        One of the files, for messages.
    rows : DataFrame
        ``source`` (file name), ``offset`` (line or row, from 0), ``payload`` (the row's text, valid UTF-8),
        ``fault`` (null, or what is wrong with the row as a whole), and the columns that ``cells`` refers to.
    cells : dict of str to Column
        The file's columns by their names there; null where a cell means nothing.
    types : dict of str to str
        Spark's names for the types of columns that are not strings.
    """

    name: str
    rows: DataFrame
    cells: dict[str, Column]
    types: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TextLayout:
    """How lines are cut into cells.

    Attributes
    ----------
    separator : str
        One character.
    quote : str
        What encloses a cell that holds the separator, doubled inside it (RFC 4180); empty: nothing does,
        which is faster. No cell may hold a line break.
    nulls : tuple of str
        Cells that mean nothing.
    columns : tuple of str
        Names of the columns where the files have no header; empty: the first line names them.
    """

    separator: str = ","
    quote: str = ""
    nulls: tuple[str, ...] = ("",)
    columns: tuple[str, ...] = ()


def numbered_lines(spark: SparkSession, paths: Sequence[str]) -> DataFrame:
    """Lines of text files: columns ``source`` (file name), ``offset`` (line, counted from 0), ``payload``.

    Lines without text are left out, but counted. A file may be compressed (.gz, .bz2).
    """
    # Spark splits large files. A line's id is consecutive within the part of a file that one task reads, so
    # the number of lines before each part, which costs one cheap pass, gives every line its number.
    lines = spark.read.text(list(paths)).select(
        F.col("_metadata.file_path").alias("path"),
        F.col("_metadata.file_name").alias("source"),
        F.col("_metadata.file_block_start").alias("block"),
        F.col("value").alias("payload"),
        F.monotonically_increasing_id().alias("id"),
    )
    blocks = lines.groupBy("path", "block").agg(F.count(F.lit(1)).alias("n"), F.min("id").alias("first"))
    before = Window.partitionBy("path").orderBy("block").rowsBetween(Window.unboundedPreceding, -1)
    shift = F.coalesce(F.sum("n").over(before), F.lit(0)) - F.col("first")
    shifts = blocks.select("path", "block", shift.alias("shift"))
    return (
        lines.join(F.broadcast(shifts), ["path", "block"])
        .select("source", (F.col("id") + F.col("shift")).alias("offset"), "payload")
        .where(F.trim("payload") != "")
    )


def first_line(spark: SparkSession, path: str) -> str:
    """The first line of a file; empty if it has none."""
    row = spark.read.text(path).head()
    return "" if row is None else str(row[0])


def text_tables(spark: SparkSession, paths: Sequence[str], layout: TextLayout) -> Iterator[LogTable]:
    """Read files, those of one header together. A header is no row; spaces around its names do not count.

    Raises
    ------
    DataError
        If a header names a column twice, or not at all.
    """
    by_header: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        names = layout.columns or _header(spark, path, layout)
        by_header.setdefault(names, []).append(path)
    for names, group in by_header.items():
        lines = numbered_lines(spark, group)
        if not layout.columns:
            lines = lines.where(F.col("offset") > 0)
        # Names of our own, because to Spark `id` and `ID` are one, and so is `a.b` a part of `a`.
        cells = {name: F.col(f"c{index}") for index, name in enumerate(names)}
        yield LogTable(group[0], _cut(lines, len(names), layout), cells)


def cells_of(table: LogTable, required: Sequence[str]) -> dict[str, Column]:
    """The table's columns by name.

    Raises
    ------
    DataError
        If a required one is missing.
    """
    missing = [name for name in required if name not in table.cells]
    if missing:
        raise DataError(
            f"{table.name}: expected the columns {', '.join(required)}. Missing: {', '.join(missing)}.",
            hint=f"the header has {', '.join(table.cells)}",
        )
    return table.cells


def _header(spark: SparkSession, path: str, layout: TextLayout) -> tuple[str, ...]:
    line = first_line(spark, path)
    if layout.quote:
        cells = next(csv.reader([line], delimiter=layout.separator, quotechar=layout.quote), [])
    else:
        cells = line.split(layout.separator)
    names = tuple(cell.strip() for cell in cells)
    twice = {name for name in names if names.count(name) > 1}
    if twice or not names or not all(names):
        raise DataError(
            f"{path}: the first line must name each column once. Received: {line[:200]!r}.",
            hint="are separator and header those of the file?",
        )
    return names


def _cut(lines: DataFrame, n: int, layout: TextLayout) -> DataFrame:
    """Add the cells ``c0, c1, ...`` and what is wrong with a line as a whole."""
    payload = F.col("payload")
    if layout.quote:
        schema = ", ".join(f"c{index} string" for index in range(n))
        options = {
            "sep": layout.separator,
            "quote": layout.quote,
            "escape": layout.quote,
            "columnNameOfCorruptRecord": _MISFIT,
        }
        parsed = F.from_csv(payload, f"{schema}, {_MISFIT} string", options)
        cut = lines.withColumn(_CELLS, parsed)
        misfit = F.col(f"{_CELLS}.{_MISFIT}").isNotNull()
        found = F.lit("another number of them, or an open quotation mark")
        cells = [F.col(f"{_CELLS}.c{index}") for index in range(n)]
    else:
        # One cell more than there may be tells a line that has too many.
        cut = lines.withColumn(_CELLS, F.split(payload, _as_pattern(layout.separator), n + 1))
        misfit = F.size(_CELLS) != n
        more = F.when(F.size(_CELLS) > n, F.lit(f"more than {n}"))
        found = F.coalesce(more, F.size(_CELLS).cast("string"))
        cells = [F.get(_CELLS, F.lit(index)) for index in range(n)]
    no_text = ~F.is_valid_utf8(payload)
    fault = F.when(no_text, F.lit("expected UTF-8 text. Received bytes that are none.")).when(
        misfit, F.concat(F.lit(f"expected {n} cells. Received: "), found, F.lit("."))
    )
    return cut.select(
        "source",
        "offset",
        F.when(no_text, F.make_valid_utf8(payload)).otherwise(payload).alias("payload"),
        fault.alias("fault"),
        *[_filled(cell, layout.nulls).alias(f"c{index}") for index, cell in enumerate(cells)],
    )


def _filled(cell: Column, nulls: tuple[str, ...]) -> Column:
    return F.when(~cell.isin(*nulls), cell) if nulls else cell


def _as_pattern(separator: str) -> str:
    """The separator as a regular expression; one that Java splits by without a regex engine."""
    return separator if separator.isalnum() or separator in ",\t; :" else f"\\{separator}"
