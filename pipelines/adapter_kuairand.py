"""KuaiRand: a video feed in which some impressions were drawn at random.

Layout as published: https://kuairand.com (Gao et al.: KuaiRand, an Unbiased Sequential Recommendation Dataset
with Randomly Exposed Videos, CIKM 2022, arXiv 2208.08696); versions Pure, 1K and 27K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field
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

__all__ = ["KUAIRAND_COLUMNS", "KUAIRAND_USER", "KUAIRAND_VIDEO", "KuaiRandOptions", "kuairand"]

Feedback = Literal[
    "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter"
]

KUAIRAND_COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time"),
    *("comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
KUAIRAND_USER: dict[str, FeatureType] = {
    "user_active_degree": "category",
    "is_lowactive_period": "category",
    "is_live_streamer": "category",
    "is_video_author": "category",
    "follow_user_num": "number",
    "follow_user_num_range": "category",
    "fans_user_num": "number",
    "fans_user_num_range": "category",
    "friend_user_num": "number",
    "friend_user_num_range": "category",
    "register_days": "number",
    "register_days_range": "category",
    **{f"onehot_feat{k}": "category" for k in range(18)},
}
# Not visible_status, which tells of the time when the data set was made.
KUAIRAND_VIDEO: dict[str, FeatureType] = {
    "author_id": "category",
    "video_type": "category",
    "upload_dt": "category",
    "upload_type": "category",
    "video_duration": "number",
    "server_width": "number",
    "server_height": "number",
    "music_id": "category",
    "music_type": "category",
    "tag": "list",
}
_NUMBERS = {name for name, kind in (KUAIRAND_USER | KUAIRAND_VIDEO).items() if kind == "number"}
# Ranges such as (0,10] and lists of tags are quoted.
_TABLE = TextLayout(quote='"')


class KuaiRandOptions(Section):
    """How the log is read.

    Attributes
    ----------
    files, users, videos : tuple of str
        Patterns of the files of impressions, of users and of videos.
    conversion : str
        The feedback that is the conversion.
    click_delay : int
        Assumed time from an impression to its click, ms.
    random_pool : int
        How many videos the random ones were drawn from, each with the same probability.
    """

    files: tuple[str, ...] = ("log_standard_*.csv", "log_random_*.csv")
    users: tuple[str, ...] = ("user_features_*.csv",)
    videos: tuple[str, ...] = ("video_features_basic_*.csv",)
    conversion: Feedback = "long_view"
    click_delay: Duration = 1_000
    random_pool: int = Field(default=7_583, ge=1)


def kuairand(
    spark: SparkSession, paths: Mapping[str, Sequence[str]], options: KuaiRandOptions
) -> dict[str, DataFrame]:
    """Rows of the lake from the log; users and videos that their tables lack have no such features."""
    users = read_lookup(spark, "users", paths["users"], _TABLE, "user_id", KUAIRAND_USER)
    videos = read_lookup(spark, "videos", paths["videos"], _TABLE, "video_id", KUAIRAND_VIDEO)
    parts = []
    for table in text_tables(spark, paths["log"], TextLayout()):
        rows = _impressions(table, options)
        user = users.features.select(F.col("key").alias("user_id"), F.col("bag").alias("user"))
        video = videos.features.select(F.col("key").alias("item_id"), F.col("bag").alias("video"))
        rows = rows.join(user, "user_id", "left").join(video, "item_id", "left")
        bag = {name: F.col("user")[name] for name in KUAIRAND_USER}
        bag |= {name: F.col("video")[name] for name in KUAIRAND_VIDEO}
        features = json_object({**bag, "tab": F.col("tab")}, numbers=_NUMBERS)
        parts.append(impression_rows(rows.withColumn("features", features)))
    return {"log": union(parts), "users": users.unusable, "videos": videos.unusable}


def _impressions(table: LogTable, options: KuaiRandOptions) -> DataFrame:
    cell = cells_of(table, KUAIRAND_COLUMNS)
    rows = table.rows.withColumns(
        {"event_time": scaled(cell["time_ms"], "ms"), "played": scaled(cell["play_time_ms"], "ms")}
    )
    shown = F.col("event_time")
    clicked = F.when(cell["is_click"] == "1", assumed_click_time(shown, options.click_delay))
    # By the end of play all feedback is known; when within it came, the log does not tell.
    ended = F.coalesce(clicked, shown) + F.col("played")
    rows = checked(
        rows,
        [
            *[flag_check(name, cell[name]) for name in ("is_click", options.conversion, "is_rand")],
            Check(shown.isNull(), "time_ms must be a number of ms", cell["time_ms"]),
            Check(
                F.coalesce(F.col("played") < 0, F.lit(True)),
                "play_time_ms must be a number of ms, not below 0",
                cell["play_time_ms"],
            ),
        ],
    )
    return rows.select(
        *("source", "offset", "payload", "fault", "event_time"),
        row_hash(F.col("payload")).alias("impression_id"),
        cell["user_id"].alias("user_id"),
        cell["video_id"].alias("item_id"),
        cell["tab"].alias("tab"),
        F.when(cell["is_rand"] == "1", 1 / options.random_pool).alias("propensity"),
        clicked.alias("click_time"),
        F.when(cell[options.conversion] == "1", ended).alias("conversion_time"),
    )
