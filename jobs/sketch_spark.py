"""Logit sketches by Spark SQL: the sums of :mod:`calibration.sketch`, to the bit, without Python a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from calibration.base import MAXIMUM_WEIGHT
from calibration.fixed_point import CAPACITY
from calibration.link import LOGIT_LIMIT
from calibration.sketch_book import SketchBook, SketchKey
from calibration.sketch_layout import BINS, BINS_PER_LOGIT, CELLS, FIRST_CELL, SUMS, UNITS, Taylor, taylor
from pipelines.spark_session import worker_errors

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["sketch_book", "sketch_table"]


def sketch_table(rows: DataFrame, weight: str | None = None) -> DataFrame:
    """Sums by key and bin, the columns of :data:`calibration.sketch_book.SKETCH_SCHEMA`.

    Parameters
    ----------
    rows : DataFrame
        Columns ``logit`` (double), ``label`` (in [0, 1]) and those of
        :class:`calibration.sketch_book.SketchKey`.
    weight : str, optional
        Column of weights; 1 for every row without.

    Notes
    -----
    A row that is not fit to be counted ends the query with the message that
    :meth:`calibration.sketch.LogitSketch.update` would give; :func:`sketch_book` makes a ``DataError`` of it.
    """
    from pyspark.sql import functions as F

    w = F.lit(1.0) if weight is None else _checked(F.col(weight).cast("double"), "weight", MAXIMUM_WEIGHT)
    named = [F.col(name).cast("string").alias(name) for name in SketchKey._fields]
    checked = rows.select(
        *named,
        _clipped(F.col("logit").cast("double")).alias("_z"),
        _checked(F.col("label").cast("double"), "label", 1.0).alias("_y"),
        w.alias("_w"),
    )
    q = (F.col("_z") + LOGIT_LIMIT) * BINS_PER_LOGIT
    placed = checked.withColumn("_q", q).withColumn(
        "_cell", F.least(F.floor("_q").cast("int"), F.lit(CELLS - 1)).cast("int")
    )
    offset = (F.col("_q") - F.col("_cell").cast("double") - 0.5) / BINS_PER_LOGIT
    table = rows.sparkSession.createDataFrame(_cells().to_pandas())
    joined = placed.withColumn("_d", offset).join(F.broadcast(table), "_cell")
    p = F.col("t3")
    for term in ("t2", "t1", "t0"):
        p = p * F.col("_d") + F.col(term)
    place = F.greatest(F.least(F.col("_cell") - FIRST_CELL, F.lit(BINS - 1)), F.lit(0)).cast("smallint")
    y, w = F.col("_y"), F.col("_w")
    amounts = dict(zip(SUMS, (w, w * y, w * p, w * w, w * w * y), strict=True))
    units = [F.rint(amounts[name] / unit).alias(name) for name, unit in zip(SUMS, UNITS, strict=True)]
    counted = joined.where("_w > 0").select(*SketchKey._fields, place.alias("bin"), *units)
    return counted.groupBy(*SketchKey._fields, "bin").agg(*(_total(name).alias(name) for name in SUMS))


def sketch_book(rows: DataFrame, weight: str | None = None) -> SketchBook:
    """The sketches of :func:`sketch_table`, on the driver: at most 4096 short rows a key.

    Raises
    ------
    DataError
        A row that is not fit to be counted.
    """
    with worker_errors():
        return SketchBook.from_table(sketch_table(rows, weight).toArrow())


def _cells() -> pa.Table:
    columns: dict[str, Any] = dict(zip(Taylor._fields, taylor(), strict=True))
    return pa.table({"_cell": pa.array(range(CELLS), pa.int32()), **columns})


def _clipped(logit: Column) -> Column:
    from pyspark.sql import functions as F

    message = _error("logit must not be NaN.", "a NaN logit means that the model or its features are broken")
    clipped = F.least(F.greatest(logit, F.lit(-LOGIT_LIMIT)), F.lit(LOGIT_LIMIT))
    return F.when(logit.isNull() | F.isnan(logit), F.raise_error(message)).otherwise(clipped)


def _checked(value: Column, name: str, largest: float) -> Column:
    from pyspark.sql import functions as F

    message = _error(f"{name} must be at least 0 and at most {largest:.0f}.", f"look at the column {name}")
    # NaN is above all numbers in Spark.
    good = value.isNotNull() & (value >= 0.0) & (value <= largest)
    return F.when(good, value).otherwise(F.raise_error(message).cast("double"))


def _error(message: str, hint: str) -> Column:
    """A line written as a `DataError` of a Python worker would be, so that it is read as one."""
    from pyspark.sql import functions as F

    return F.lit(f"\npipelines.errors.DataError: {message}\nhint: {hint}\n")


def _total(name: str) -> Column:
    """The sum, in whole numbers; an error where it does not fit."""
    from pyspark.sql import functions as F

    message = _error("the sketch is full: too much weight in one bin.", "sketch fewer days at a time")
    total = F.try_sum(F.col(name).cast("bigint"))
    fits = total.isNotNull() & (total < int(CAPACITY))
    return F.when(fits, total).otherwise(F.raise_error(message).cast("bigint"))
