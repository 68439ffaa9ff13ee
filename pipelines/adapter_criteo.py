"""Two logs of Criteo: attribution modeling for bidding (2017) and conversion logs (2014).

Layouts as published: https://huggingface.co/datasets/criteo/criteo-attribution-dataset (Diemert, Meynet,
Galland, Lefortier: Attribution Modeling Increases Efficiency of Bidding in Display Advertising, AdKDD 2017)
and the data behind Chapelle: Modeling Delayed Feedback in Display Advertising, KDD 2014.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pyspark.sql import functions as F

from pipelines.adapter_events import (
    NO_ID,
    assumed_click_time,
    checked,
    impression_rows,
    row_hash,
    union,
)
from pipelines.adapter_features import Check, feature_check, feature_value, finite_number, flag_check
from pipelines.adapter_json import json_object
from pipelines.adapter_text import LogTable, TextLayout, cells_of, text_tables
from pipelines.adapter_times import Instant, scaled
from pipelines.config_sections import Duration, Section

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = [
    "ATTRIBUTION_COLUMNS",
    "ATTRIBUTION_FEATURES",
    "CONVERSION_LOG_FEATURES",
    "CriteoAttributionOptions",
    "CriteoConversionsOptions",
    "criteo_attribution",
    "criteo_conversions",
]

# 2026-01-01T00:00:00Z. Neither log tells when it began.
_ORIGIN = 1_767_225_600_000
_CATEGORIES = tuple(f"cat{k}" for k in range(1, 10))
ATTRIBUTION_COLUMNS = (
    *("timestamp", "uid", "campaign", "conversion", "conversion_timestamp", "conversion_id", "attribution"),
    *("click", "click_pos", "click_nb", "cost", "cpo", "time_since_last_click"),
    *_CATEGORIES,
)
# What is known when the impression is shown: not its price, nor what only a later conversion tells.
ATTRIBUTION_FEATURES = ("campaign_id", *_CATEGORIES, "time_since_last_click")
_INTEGERS = tuple(f"int{k}" for k in range(1, 9))
CONVERSION_LOG_FEATURES = (*_INTEGERS, *_CATEGORIES)


class CriteoAttributionOptions(Section):
    """How the attribution log is read.

    Attributes
    ----------
    files : tuple of str
        Patterns of the log's files.
    origin : int
        What second 0 stands for, ms since the epoch.
    click_delay : int
        Assumed time from an impression to its click, ms.
    credit : {"any", "last", "linear"}
        ``any``: every impression that a conversion followed has it, as the log's own label; ``last``: the
        last click before an attributed conversion; ``linear``: each click before an attributed conversion
        has an equal share of it.
    """

    files: tuple[str, ...] = ("*.tsv", "*.tsv.gz")
    origin: Instant = _ORIGIN
    click_delay: Duration = 10_000
    credit: Literal["any", "last", "linear"] = "any"


class CriteoConversionsOptions(Section):
    """How the conversion log is read.

    Attributes
    ----------
    files : tuple of str
        Patterns of the log's files.
    origin : int
        What second 0 stands for, ms since the epoch.
    """

    files: tuple[str, ...] = ("data.txt", "data.txt.gz", "*.tsv", "*.tsv.gz")
    origin: Instant = _ORIGIN


def criteo_attribution(
    spark: SparkSession, paths: Mapping[str, Sequence[str]], options: CriteoAttributionOptions
) -> dict[str, DataFrame]:
    """Rows of the lake from the attribution log."""
    tables = text_tables(spark, paths["log"], TextLayout(separator="\t"))
    return {"log": union([impression_rows(_attribution(table, options)) for table in tables])}


def _attribution(table: LogTable, options: CriteoAttributionOptions) -> DataFrame:
    cell = cells_of(table, ATTRIBUTION_COLUMNS)
    shown = scaled(cell["timestamp"], "s") + F.lit(options.origin)
    happened = scaled(cell["conversion_timestamp"], "s") + F.lit(options.origin)
    clicks, place = cell["click_nb"].try_cast("int"), cell["click_pos"].try_cast("int")
    has_conversion, is_clicked, is_attributed = (
        cell[name] == "1" for name in ("conversion", "click", "attribution")
    )
    is_credited, credit = has_conversion, F.lit(None)
    if options.credit != "any":
        is_credited &= is_clicked & is_attributed
    if options.credit == "last":
        is_credited &= place == clicks - 1
    elif options.credit == "linear":
        credit = F.when(is_credited & (clicks > 0), 1 / clicks)
    last_click = F.when(cell["time_since_last_click"] != "-1", cell["time_since_last_click"])
    features = {name: cell[name] for name in _CATEGORIES} | {"campaign_id": cell["campaign"]}
    features["time_since_last_click"] = feature_value(last_click, "integer")
    rows = table.rows.withColumns({"event_time": shown, "happened": F.when(has_conversion, happened)})
    rows = rows.withColumns(
        {
            "impression_id": row_hash(F.col("payload")),
            "user_id": cell["uid"],
            "item_id": cell["campaign"],
            "features": json_object(features),
            "click_time": F.when(
                is_clicked, assumed_click_time(F.col("event_time"), options.click_delay, F.col("happened"))
            ),
            "conversion_time": F.when(is_credited, F.col("happened")),
            "value": F.when(is_credited & is_attributed, finite_number(cell["cpo"])),
            "credit": credit,
        }
    )
    flags = [flag_check(name, cell[name]) for name in ("click", "conversion", "attribution")]
    no_place = is_attributed & F.coalesce((place < 0) | (place >= clicks), F.lit(True))
    return checked(
        rows,
        [
            *flags,
            Check(
                has_conversion & F.col("happened").isNull(),
                "conversion_timestamp must be a number of seconds",
                cell["conversion_timestamp"],
            ),
            Check(F.col("event_time").isNull(), "timestamp must be a number of seconds", cell["timestamp"]),
            Check(
                is_clicked & no_place,
                "click_pos of an attributed click must lie between 0 and click_nb",
                F.concat_ws(" of ", cell["click_pos"], cell["click_nb"]),
            ),
            Check(
                is_attributed & finite_number(cell["cpo"]).isNull(),
                "cpo must be a finite number",
                cell["cpo"],
            ),
            feature_check("time_since_last_click", last_click, "integer"),
        ],
    )


def criteo_conversions(
    spark: SparkSession, paths: Mapping[str, Sequence[str]], options: CriteoConversionsOptions
) -> dict[str, DataFrame]:
    """Rows of the lake from the conversion log: each line is an impression that was clicked at once."""
    layout = TextLayout(separator="\t", columns=("click", "conversion", *CONVERSION_LOG_FEATURES))
    tables = text_tables(spark, paths["log"], layout)
    return {"log": union([impression_rows(_conversion_log(table, options)) for table in tables])}


def _conversion_log(table: LogTable, options: CriteoConversionsOptions) -> DataFrame:
    cell = table.cells
    features = {name: cell[name] for name in _CATEGORIES}
    features |= {name: feature_value(cell[name], "integer") for name in _INTEGERS}
    rows = table.rows.withColumns(
        {
            "impression_id": row_hash(F.col("payload")),
            "event_time": scaled(cell["click"], "s") + F.lit(options.origin),
            "user_id": F.lit(NO_ID),
            "item_id": F.lit(NO_ID),
            "features": json_object(features),
            "conversion_time": scaled(cell["conversion"], "s") + F.lit(options.origin),
        }
    ).withColumn("click_time", F.col("event_time"))
    return checked(
        rows,
        [
            Check(
                F.col("event_time").isNull(), "the click timestamp must be a number of seconds", cell["click"]
            ),
            Check(
                cell["conversion"].isNotNull() & F.col("conversion_time").isNull(),
                "the conversion timestamp must be a number of seconds, or empty",
                cell["conversion"],
            ),
            *[feature_check(name, cell[name], "integer") for name in _INTEGERS],
        ],
    )
