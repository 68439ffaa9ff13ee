"""Tables beside a log: properties of its users or items, joined to its impressions by Spark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from pipelines.adapter_events import checked, dead_letters, union
from pipelines.adapter_features import Check, FeatureType, feature_check, feature_value
from pipelines.adapter_text import TextLayout, cells_of, text_tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["Lookup", "read_lookup"]


@dataclass(frozen=True)
class Lookup:
    """A table as features by key.

    Attributes
    ----------
    features : DataFrame
        ``key``, and a struct ``bag`` with the values (`pipelines.adapter_features.feature_value`); each key
        once.
    unusable : DataFrame
        Lines that cannot be used, as dead letters; later lines of a key among them.
    """

    features: DataFrame
    unusable: DataFrame


def read_lookup(
    spark: SparkSession,
    what: str,
    paths: Sequence[str],
    layout: TextLayout,
    key: str,
    columns: Mapping[str, FeatureType],
) -> Lookup:
    """Read a table that describes users or items.

    Parameters
    ----------
    spark : SparkSession
    what : str
        The table's role, with which the reasons of its dead letters begin.
    paths : sequence of str
        At least one file.
    layout : TextLayout
    key : str
        Column that names the user or item.
    columns : mapping of str to {"category", "integer", "number", "list"}
        The other columns that are features. Lists are separated by commas.

    Raises
    ------
    DataError
        If a column is missing.
    """
    parts = []
    for table in text_tables(spark, paths, layout):
        cell = cells_of(table, [key, *columns])
        checks = [Check(F.coalesce(cell[key] == "", F.lit(True)), f"{key} must not be empty", cell[key])]
        checks += [
            found for name, kind in columns.items() if (found := feature_check(name, cell[name], kind))
        ]
        bag = F.struct(*[feature_value(cell[name], kind, ",").alias(name) for name, kind in columns.items()])
        rows = checked(table.rows, checks)
        parts.append(
            rows.select("source", "offset", "payload", "fault", cell[key].alias("key"), bag.alias("bag"))
        )
    rows = union(parts)
    # The first line of a key by file and line: whatever the order in which Spark reads them.
    good = rows.where(F.col("fault").isNull())
    place = F.struct("source", "offset")
    features = good.groupBy("key").agg(F.min_by("bag", place).alias("bag"))
    repeated = (
        good.groupBy("key").agg(F.min(place).alias("first"), F.count(F.lit(1)).alias("n")).where("n > 1")
    )
    twice = good.join(repeated, "key").where(place != F.col("first"))
    said = F.concat(F.lit("each key may occur once. Received again: '"), F.col("key"), F.lit("'."))
    unusable = rows.select("source", "offset", "payload", "fault").unionByName(
        twice.select("source", "offset", "payload", said.alias("fault"))
    )
    return Lookup(features, dead_letters(unusable, what))
