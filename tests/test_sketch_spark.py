"""Sketches by Spark SQL are those of numpy, to the bit, however the rows are dealt to partitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from calibration.sketch_book import SketchBook, SketchKey
from jobs.sketch_spark import sketch_book
from pipelines.errors import DataError

ROWS = 60_000


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    """Logits of every kind: on edges, just beside them, outside, infinite; soft labels; odd weights."""
    rng = np.random.default_rng(3)
    logit = np.concatenate(
        [
            rng.normal(-3, 2, ROWS - 6_000),
            rng.uniform(-40, 40, 3_000),
            np.nextafter(rng.integers(-2048, 2048, 2_000) / 128.0, rng.choice([-99.0, 99.0], 2_000)),
            rng.integers(-2048, 2049, 992) / 128.0,
            [-np.inf, np.inf, -16.0, 16.0, 34.0, -34.0, 1e6, -1e6],
        ]
    )
    return pd.DataFrame(
        {
            "release": "r1",
            "task": rng.choice(["click", "conversion"], ROWS),
            "segment": rng.choice(["campaign_id=1", "campaign_id=2"], ROWS),
            "maturity": "mature",
            "logit": logit,
            "label": rng.choice([0.0, 1.0, 1 / 3], ROWS),
            "weight": rng.choice([0.0, 0.1, 1.0, 7.3, 1000.0], ROWS),
        }
    )


def by_numpy(log: pd.DataFrame, weight: str | None) -> SketchBook:
    book = SketchBook()
    for key, rows in log.groupby(list(SketchKey._fields)):
        given = None if weight is None else rows[weight].to_numpy()
        book.add(SketchKey(*key), rows["logit"].to_numpy(), rows["label"].to_numpy(), given)
    return book


@pytest.mark.parametrize("weight", [None, "weight"])
@pytest.mark.parametrize("partitions", [1, 7])
def test_spark_and_numpy_give_equal_bits(
    spark: SparkSession, log: pd.DataFrame, weight: str | None, partitions: int
) -> None:
    shuffled = log.sample(frac=1.0, random_state=partitions)
    rows = spark.createDataFrame(shuffled).repartition(partitions)
    found = sketch_book(rows, weight)
    assert found.digest() == by_numpy(log, weight).digest()
    assert len(found) == 4


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("logit", float("nan"), "logit must not be NaN"),
        ("logit", None, "logit must not be NaN"),
        ("label", 1.5, "label must be at least 0 and at most 1"),
        ("label", float("nan"), "label must"),
        ("weight", -1.0, "weight must be at least 0"),
        ("weight", 1e12, "weight must be at least 0 and at most 1048576"),
        ("weight", float("nan"), "weight must"),
    ],
)
def test_rows_that_cannot_be_counted_are_one_clear_error(
    spark: SparkSession, log: pd.DataFrame, column: str, value: Any, message: str
) -> None:
    bad = log.head(10).astype({column: object})
    bad.loc[bad.index[4], column] = value
    schema = (
        "release string, task string, segment string, maturity string, logit double, label double,"
        " weight double"
    )
    rows = spark.createDataFrame(bad.astype(object).values.tolist(), schema)
    with pytest.raises(DataError, match=message):
        sketch_book(rows, "weight")


def test_too_much_in_one_bin_is_refused_as_numpy_does(spark: SparkSession, log: pd.DataFrame) -> None:
    heavy = pd.concat([log.head(1)] * 300).assign(logit=0.0, weight=2.0**20)
    with pytest.raises(DataError, match="full"):
        sketch_book(spark.createDataFrame(heavy), "weight")
    with pytest.raises(DataError, match="full"):
        by_numpy(heavy, "weight")


def test_no_rows_make_an_empty_book(spark: SparkSession, log: pd.DataFrame) -> None:
    assert len(sketch_book(spark.createDataFrame(log.head(3)).where("logit > 1e9"))) == 0
