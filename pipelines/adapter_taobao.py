"""Taobao's display ads (Ali_Display_Ad_Click): impressions and clicks, with tables of ads and of users.

Layout as published: https://tianchi.aliyun.com/dataset/56.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from pipelines.adapter_events import assumed_click_time, checked, impression_rows, row_hash, union
from pipelines.adapter_features import Check, FeatureType, flag_check
from pipelines.adapter_json import json_object
from pipelines.adapter_lookup import read_lookup
from pipelines.adapter_text import LogTable, TextLayout, cells_of, text_tables
from pipelines.adapter_times import scaled
from pipelines.config_sections import Duration, Section

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["TAOBAO_AD", "TAOBAO_COLUMNS", "TAOBAO_USER", "TaobaoOptions", "taobao"]

TAOBAO_COLUMNS = ("user", "time_stamp", "adgroup_id", "pid", "nonclk", "clk")
TAOBAO_AD: dict[str, FeatureType] = {
    "cate_id": "category",
    "campaign_id": "category",
    "customer": "category",
    "brand": "category",
    "price": "number",
}
# The published header has a space behind the last name; names are read without.
TAOBAO_USER: dict[str, FeatureType] = dict.fromkeys(
    (
        *("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level"),
        *("shopping_level", "occupation", "new_user_class_level"),
    ),
    "category",
)
_LAYOUT = TextLayout(nulls=("", "NULL"))


class TaobaoOptions(Section):
    """How the log is read.

    Attributes
    ----------
    files, ads, users : tuple of str
        Patterns of the files of impressions, of ads and of users.
    click_delay : int
        Assumed time from an impression to its click, ms.
    """

    files: tuple[str, ...] = ("raw_sample*.csv", "raw_sample*.csv.gz")
    ads: tuple[str, ...] = ("ad_feature*.csv", "ad_feature*.csv.gz")
    users: tuple[str, ...] = ("user_profile*.csv", "user_profile*.csv.gz")
    click_delay: Duration = 10_000


def taobao(
    spark: SparkSession, paths: Mapping[str, Sequence[str]], options: TaobaoOptions
) -> dict[str, DataFrame]:
    """Rows of the lake from the log; ads and users that their tables lack have no such features."""
    ads = read_lookup(spark, "ads", paths["ads"], _LAYOUT, "adgroup_id", TAOBAO_AD)
    users = read_lookup(spark, "users", paths["users"], _LAYOUT, "userid", TAOBAO_USER)
    parts = []
    for table in text_tables(spark, paths["log"], _LAYOUT):
        rows = _impressions(table, options)
        ad = ads.features.select(F.col("key").alias("item_id"), F.col("bag").alias("ad"))
        user = users.features.select(F.col("key").alias("user_id"), F.col("bag").alias("user"))
        rows = rows.join(ad, "item_id", "left").join(user, "user_id", "left")
        bag = {name: F.col("ad")[name] for name in TAOBAO_AD} | {
            name: F.col("user")[name] for name in TAOBAO_USER
        }
        features = json_object({**bag, "pid": F.col("pid")}, numbers={"price"})
        parts.append(impression_rows(rows.withColumn("features", features)))
    return {"log": union(parts), "ads": ads.unusable, "users": users.unusable}


def _impressions(table: LogTable, options: TaobaoOptions) -> DataFrame:
    cell = cells_of(table, TAOBAO_COLUMNS)
    rows = table.rows.withColumn("event_time", scaled(cell["time_stamp"], "s"))
    assumed = assumed_click_time(F.col("event_time"), options.click_delay)
    rows = checked(
        rows,
        [
            flag_check("clk", cell["clk"]),
            flag_check("nonclk", cell["nonclk"]),
            Check(cell["clk"] == cell["nonclk"], "nonclk must be the opposite of clk", cell["nonclk"]),
            Check(F.col("event_time").isNull(), "time_stamp must be a number of seconds", cell["time_stamp"]),
        ],
    )
    return rows.select(
        *("source", "offset", "payload", "fault", "event_time"),
        row_hash(F.col("payload")).alias("impression_id"),
        cell["user"].alias("user_id"),
        cell["adgroup_id"].alias("item_id"),
        cell["pid"].alias("pid"),
        F.when(cell["clk"] == "1", assumed).alias("click_time"),
    )
