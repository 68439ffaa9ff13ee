"""The log of Avazu's click-through rate competition (2014).

Layout as published: https://www.kaggle.com/c/avazu-ctr-prediction/data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from pipelines.adapter_events import assumed_click_time, checked, impression_rows, union
from pipelines.adapter_features import Check, flag_check
from pipelines.adapter_json import json_object
from pipelines.adapter_text import LogTable, TextLayout, cells_of, text_tables
from pipelines.adapter_times import TimeFormat, milliseconds
from pipelines.config_sections import Duration, Section

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["AVAZU_COLUMNS", "AVAZU_FEATURES", "AvazuOptions", "avazu"]

AVAZU_FEATURES = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{k}" for k in range(14, 22)),
)
AVAZU_COLUMNS = ("id", "click", "hour", *AVAZU_FEATURES)
_HOUR = TimeFormat(pattern="%y%m%d%H", zone="UTC")
# By far the most frequent device id stands for none.
_NO_DEVICE = "a99f214a"


class AvazuOptions(Section):
    """How the log is read.

    Attributes
    ----------
    files : tuple of str
        Patterns of the log's files; the published test set has no clicks.
    click_delay : int
        Assumed time from an impression to its click, ms. Impressions are known by the hour, and stand at
        its begin: all of an hour come before its clicks.
    item : str
        Column that names what was shown. Nothing is disclosed about C14, but its values behave as ids of ads.
    """

    files: tuple[str, ...] = ("train", "train*.csv", "train*.gz")
    click_delay: Duration = 10_000
    item: str = "C14"


def avazu(
    spark: SparkSession, paths: Mapping[str, Sequence[str]], options: AvazuOptions
) -> dict[str, DataFrame]:
    """Rows of the lake from the log."""
    tables = text_tables(spark, paths["log"], TextLayout())
    return {"log": union([impression_rows(_impressions(table, options)) for table in tables])}


def _impressions(table: LogTable, options: AvazuOptions) -> DataFrame:
    cell = cells_of(table, [*AVAZU_COLUMNS, options.item])
    rows = table.rows.withColumn("event_time", milliseconds(cell["hour"], _HOUR))
    assumed = assumed_click_time(F.col("event_time"), options.click_delay)
    rows = rows.withColumns(
        {
            "impression_id": cell["id"],
            "user_id": _user(cell),
            "item_id": cell[options.item],
            "features": json_object({name: cell[name] for name in AVAZU_FEATURES}),
            "click_time": F.when(cell["click"] == "1", assumed),
        }
    )
    return checked(
        rows,
        [
            flag_check("click", cell["click"]),
            Check(F.col("event_time").isNull(), "hour must be of the form YYMMDDHH", cell["hour"]),
        ],
    )


def _user(cell: Mapping[str, Column]) -> Column:
    """The device; where it has no id, its address and model, as the competition's winners had it."""
    address = F.concat(F.lit("ip-"), cell["device_ip"], F.lit("-"), cell["device_model"])
    return F.when(cell["device_id"] == _NO_DEVICE, address).otherwise(
        F.concat(F.lit("id-"), cell["device_id"])
    )
