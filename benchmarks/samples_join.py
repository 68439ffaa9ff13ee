"""The join of `ctrstream samples build` alone: what `benchmarks.samples` sets beside DuckDB's.

As there, redeliveries are dropped, clicks credited, conversions labelled, and labelled rows written with
their features as Parquet. The rest of a build, encoding above all, is left out. A process of its own.
"""

from __future__ import annotations

import argparse
import json
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config_sections import AttributionConfig, Task
from pipelines.lake import read_lake
from pipelines.sample_facts import find_facts
from pipelines.sample_join import JOIN_SETTINGS, fact_columns, join_samples
from pipelines.sample_window import SampleWindow
from pipelines.snapshot_partitions import PartitionGrid
from pipelines.spark_session import spark_session, stop_spark

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["main"]

_TASKS: tuple[Task, ...] = ("click", "conversion")


def join(spark: SparkSession, lake: Path, out: Path, window: SampleWindow) -> None:
    """Write labelled rows of both tasks to ``out``."""
    for key, value in JOIN_SETTINGS.items():
        spark.conf.set(key, value)
    events = read_lake(spark, lake)
    facts = find_facts(events, window).where("has_fact").select(*fact_columns(_TASKS))
    facts.write.parquet(f"{out}-facts")
    samples = join_samples(events, spark.read.parquet(f"{out}-facts"), window)
    _rows(samples, window.as_of, window.attribution).write.parquet(str(out))


def _rows(samples: DataFrame, as_of: int, rule: AttributionConfig) -> DataFrame:
    """A row for each task of an impression, in one pass."""
    from pyspark.sql import functions as F

    made = []
    for task in _TASKS:
        opened = F.col(f"{task}_opened")
        row = F.struct(
            F.lit(task).alias("task"),
            opened.alias("event_time"),
            F.col(f"{task}_label").alias("label"),
            F.col(f"{task}_rose").alias("known"),
            (opened + (rule.width(task) + rule.allowed_lateness) < as_of).alias("mature"),
        )
        made.append(
            F.when(opened.isNotNull(), F.array(row)).otherwise(F.array().cast("array<struct<" + _ROW))
        )
    travel = ("impression_id", "user_id", "item_id", "position", "features")
    every = reduce(lambda left, right: F.concat(left, right), made)
    return samples.select(*travel, F.explode(every).alias("row")).select(*travel, "row.*")


_ROW = "task:string,event_time:bigint,label:double,known:bigint,mature:boolean>>"


def main() -> None:
    """Join, and print rows and positives of each task as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lake", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("as-of", "since", "attribution-window", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    rule = AttributionConfig(attribution_window=options.attribution_window)
    window = SampleWindow.whole(options.since, options.as_of, rule, _TASKS, PartitionGrid("day"))
    spark = spark_session("join", master=f"local[{options.threads}]", long_running=True)
    join(spark, options.lake, options.out, window)
    counts = (
        spark.read.parquet(str(options.out)).groupBy("task").agg({"*": "count", "label": "sum"}).collect()
    )
    print(json.dumps({row["task"]: [row["count(1)"], round(row["sum(label)"])] for row in counts}))
    stop_spark(spark)


if __name__ == "__main__":
    main()
