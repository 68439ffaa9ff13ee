"""From the rows of a log to rows of the lake: an impression with what came of it, or a dead letter.

An adapter gives a frame with a row for each line of its log. The columns that it must have are ``source``,
``offset``, ``payload`` and ``fault`` (null where the line is fine), and for impressions those of
`IMPRESSION_COLUMNS`; others may be missing. All that every log has to obey is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.adapter_features import Check
from pipelines.events import CLICK, CONVERSION, DEAD_LETTER, IMPRESSION, OPERATIONS, TOPICS
from pipelines.lake_rows import ALL_KINDS, LAKE_SCHEMA
from pipelines.validation import LATEST_TIME

if TYPE_CHECKING:
    from pyspark.sql import Column

__all__ = [
    "IMPRESSION_COLUMNS",
    "NO_ID",
    "assumed_click_time",
    "checked",
    "dead_letters",
    "impression_rows",
    "outcome_rows",
    "row_hash",
    "union",
]

IMPRESSION_COLUMNS = ("impression_id", "event_time", "user_id", "item_id", "features")
_OPTIONAL_OF_IMPRESSIONS = {
    "arrival_time": "bigint",
    "position": "int",
    "propensity": "double",
    "click_time": "bigint",
    "conversion_time": "bigint",
    "value": "double",
    "credit": "double",
}
_OPTIONAL_OF_OUTCOMES = {"arrival_time": "bigint", "value": "double", "credit": "double", "op": "string"}
_LONGEST_SHOWN = 120
# The user or item of a log that names none: the contract wants an id.
NO_ID = "none"


def impression_rows(rows: DataFrame) -> DataFrame:
    """Rows of the lake from a log with a row for each impression.

    Parameters
    ----------
    rows : DataFrame
        `IMPRESSION_COLUMNS`; optionally ``arrival_time``, ``position``, ``propensity``; ``click_time`` and
        ``conversion_time`` (ms, null: there was none), ``value`` and ``credit`` of the conversion.

    Returns
    -------
    DataFrame
        Columns of `LAKE_SCHEMA`. Each row gives an impression, the click ``ID-click`` and the conversion
        ``ID-conversion`` where there was one, or else a dead letter.
    """
    rows = _with_optional(rows, _OPTIONAL_OF_IMPRESSIONS)
    rows = rows.withColumn("fault", F.coalesce("fault", *_impression_faults()))
    happened = [
        F.lit(IMPRESSION),
        F.when(F.col("click_time").isNotNull(), CLICK),
        F.when(F.col("conversion_time").isNotNull(), CONVERSION),
    ]
    letter = F.col("fault").isNotNull()
    kinds = F.when(letter, F.array(F.lit(DEAD_LETTER))).otherwise(F.array_compact(F.array(*happened)))
    return _as_lake(rows.select("*", F.explode(kinds).alias("kind")), _impression_values())


def _impression_values() -> dict[str, Column]:
    """Columns of the lake by the ``kind`` (a number) that a row is to be."""
    is_impression, is_click, is_conversion = (
        F.col("kind") == kind for kind in (IMPRESSION, CLICK, CONVERSION)
    )
    of_impression = ("user_id", "item_id", "position", "propensity", "features")
    of_conversion = ("value", "credit")
    is_event = F.col("kind") != DEAD_LETTER
    time = F.when(is_impression, F.col("event_time")).when(is_click, F.col("click_time"))
    time = time.when(is_conversion, F.col("conversion_time"))
    suffix = F.when(is_click, "-click").when(is_conversion, "-conversion").otherwise("")
    return {
        "event_id": F.when(is_event, F.concat("impression_id", suffix)),
        "impression_id": F.when(is_event, F.col("impression_id")),
        "event_time": time,
        # An outcome is not known before the row that tells of it.
        "arrival_time": F.when(is_event, F.greatest(time, F.coalesce("arrival_time", "event_time"))),
        **{name: F.when(is_impression, F.col(name)) for name in of_impression},
        **{name: F.when(is_conversion, F.col(name)) for name in of_conversion},
        "op": F.when(is_conversion, OPERATIONS[0]),
        **_letter_values(TOPICS[IMPRESSION]),
    }


def outcome_rows(kind: int, rows: DataFrame) -> DataFrame:
    """Rows of the lake from a log with a row for each click or each conversion.

    Parameters
    ----------
    kind : int
        CLICK or CONVERSION.
    rows : DataFrame
        ``event_id``, ``impression_id``, ``event_time``; optionally ``arrival_time``, ``value``, ``credit``,
        ``op``.
    """
    rows = _with_optional(rows, _OPTIONAL_OF_OUTCOMES)
    checks = [*_id_faults("event_id", "impression_id"), *_time_faults(), *_share_faults("credit")]
    checks.append(_finite_fault("value"))
    unknown_op = F.col("op").isNotNull() & ~F.col("op").isin(*OPERATIONS)
    checks.append(F.when(unknown_op, _received(f"op must be one of {', '.join(OPERATIONS)}", F.col("op"))))
    rows = rows.withColumn("fault", F.coalesce("fault", *checks))
    rows = rows.withColumn("kind", F.when(F.col("fault").isNull(), kind).otherwise(DEAD_LETTER))
    is_event = F.col("kind") != DEAD_LETTER
    values = {name: F.when(is_event, F.col(name)) for name in ("event_id", "impression_id", "event_time")}
    values["arrival_time"] = F.when(is_event, F.coalesce("arrival_time", "event_time"))
    if kind == CONVERSION:
        values |= {name: F.when(is_event, F.col(name)) for name in ("value", "credit")}
        values["op"] = F.when(is_event, F.coalesce("op", F.lit(OPERATIONS[0])))
    return _as_lake(rows, {**values, **_letter_values(TOPICS[kind])})


def dead_letters(rows: DataFrame, what: str) -> DataFrame:
    """The rows that have a ``fault``, as dead letters whose reasons begin with ``what``."""
    letters = rows.where(F.col("fault").isNotNull()).withColumn("kind", F.lit(DEAD_LETTER))
    return _as_lake(letters, _letter_values(what))


def checked(rows: DataFrame, checks: Iterable[Check | None]) -> DataFrame:
    """Set ``fault`` where a row is wrong; the first thing that is wrong is told."""
    faults = [F.when(check.bad, _received(check.expected, check.received)) for check in checks if check]
    return rows.withColumn("fault", F.coalesce("fault", *faults))


def assumed_click_time(shown: Column, delay: int, converted: Column | None = None) -> Column:
    """When a click happened that a log tells without its time: ``delay`` ms after the impression.

    A conversion is known to come after the click, so where it comes sooner, the click is as old.
    """
    assumed = shown + F.lit(delay)
    return assumed if converted is None else F.least(assumed, converted)


def _received(expected: str, value: Column) -> Column:
    """``expected. Received: 'value'.``"""
    text = value.cast("string")
    shown = F.when(
        F.length(text) > _LONGEST_SHOWN, F.concat(F.left(text, F.lit(_LONGEST_SHOWN)), F.lit("..."))
    )
    quoted = F.concat(F.lit("'"), F.coalesce(shown, text), F.lit("'"))
    return F.concat(F.lit(f"{expected}. Received: "), F.coalesce(quoted, F.lit("nothing")), F.lit("."))


def union(frames: Sequence[DataFrame]) -> DataFrame:
    """Rows of all frames; at least one."""
    return reduce(DataFrame.unionByName, frames)


def row_hash(payload: Column) -> Column:
    """128 bits of a row's text as 32 hex digits: XXH64 with seed 42, then with that hash as its seed.

    The same row has the same hash wherever it stands, so rows that agree to the last letter are one event
    that was delivered twice.
    """
    halves = (F.xxhash64(payload), F.xxhash64(payload, payload))
    return F.concat(*[F.lpad(F.lower(F.hex(half)), 16, "0") for half in halves])


def _with_optional(rows: DataFrame, optional: Mapping[str, str]) -> DataFrame:
    absent = {name: F.lit(None).cast(kind) for name, kind in optional.items() if name not in rows.columns}
    return rows.withColumns(absent) if absent else rows


def _letter_values(what: str) -> dict[str, Column]:
    is_letter = F.col("kind") == DEAD_LETTER
    reason = F.concat(F.lit(f"{what}: "), F.col("fault"))
    return {"reason": F.when(is_letter, reason), "payload": F.when(is_letter, F.col("payload"))}


def _as_lake(rows: DataFrame, values: Mapping[str, Column]) -> DataFrame:
    """Columns of `LAKE_SCHEMA`; ``rows`` has ``kind`` as a number, ``source`` and ``offset``."""
    filled = {
        "kind": F.element_at(F.array(*map(F.lit, ALL_KINDS)), F.col("kind") + 1),
        "source": F.col("source"),
        "partition": F.lit(0),
        "offset": F.col("offset"),
        "row": F.lit(0),
        **values,
    }
    absent = F.lit(None)
    return rows.select(
        *[
            filled.get(field.name, absent).cast(field.dataType).alias(field.name)
            for field in from_arrow_schema(LAKE_SCHEMA)
        ]
    )


def _impression_faults() -> Iterator[Column]:
    yield from _id_faults("impression_id", "user_id", "item_id")
    yield from _time_faults()
    position = F.col("position")
    yield F.when(position < 1, _received("position must be at least 1", position))
    yield from _share_faults("propensity", "credit")
    yield _finite_fault("value")
    opened, clicked, converted = F.col("event_time"), F.col("click_time"), F.col("conversion_time")
    yield F.when(converted < opened, _before("the conversion", converted, "the impression", opened))
    yield F.when(clicked < opened, _before("the click", clicked, "the impression", opened))
    yield F.when(converted < clicked, _before("the conversion", converted, "the click", clicked))
    latest = F.greatest(clicked, converted)
    yield F.when(latest > LATEST_TIME, _received("outcomes must have happened before 2100 (ms)", latest))


def _id_faults(*names: str) -> Iterator[Column]:
    for name in names:
        value = F.col(name)
        yield F.when(
            F.coalesce(value == "", F.lit(True)),
            _received(f"{name} must be a string that is not empty", value),
        )


def _time_faults() -> Iterator[Column]:
    time, arrival = F.col("event_time"), F.col("arrival_time")
    yield F.when(
        F.coalesce((time <= 0) | (time > LATEST_TIME), F.lit(True)),
        _received("event_time must be ms since the epoch, after 1970 and before 2100", time),
    )
    yield F.when(arrival < time, _before("arrival_time", arrival, "event_time", time))
    yield F.when(
        arrival > LATEST_TIME, _received("arrival_time must be ms since the epoch, before 2100", arrival)
    )


def _share_faults(*names: str) -> Iterator[Column]:
    for name in names:
        share = F.col(name)
        # NaN is greater than any number to Spark.
        yield F.when((share <= 0) | (share > 1), _received(f"{name} must lie in (0, 1]", share))


def _finite_fault(name: str) -> Column:
    value = F.col(name)
    infinite = F.isnan(value) | (F.abs(value) == float("inf"))
    return F.when(infinite, _received(f"{name} must be a finite number", value))


def _before(what: str, time: Column, other: str, limit: Column) -> Column:
    said = F.concat(F.lit(f"{what} must not be before {other}. Received: "), time.cast("string"))
    return F.concat(said, F.lit(" < "), limit.cast("string"), F.lit(" (ms)."))
