"""The attribution rule in Spark's words: which outcomes a window accepts, and the label that they make.

Native expressions over arrays of structs ``(arrival_time, tie, event_time, op, credit)``. The reference is
`pipelines.attribution`; tests hold the two against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F

if TYPE_CHECKING:
    from pyspark.sql import Column

__all__ = ["ASSERT", "RESTATE", "RETRACT", "accepted", "first_copies", "label", "op_code", "tie_break"]

ASSERT, RETRACT, RESTATE = 0, 1, 2
_BEFORE_ALL = -(1 << 62)
_LABEL = "struct<credit:double,time:bigint,version:int,known:bigint>"


def tie_break(event_id: str) -> Column:
    """Orders events that arrived at one instant: XXH64 of the event id, as if it were unsigned."""
    return F.xxhash64(event_id).bitwiseXOR(F.lit(-(1 << 63)))


def op_code(op: str) -> Column:
    """0, 1 or 2 for an assertion (also where nothing is said), a retraction, a restatement."""
    column = F.coalesce(F.col(op), F.lit("assert"))
    return F.when(column == "retract", RETRACT).when(column == "restate", RESTATE).otherwise(ASSERT)


def first_copies(events: Column) -> Column:
    """Of each event the copy that came first; the array is ordered by arrival."""
    return F.when(F.size(events) <= 1, events).otherwise(
        F.filter(
            events,
            lambda event, place: (
                ~F.exists(F.slice(events, F.lit(1), place), lambda other: other["tie"] == event["tie"])
            ),
        )
    )


def accepted(
    events: Column, opened: Column, width: int, lateness: int, known: Column, patience: int
) -> Column:
    """The events that happened in ``[opened, opened + width]`` and arrived neither too late nor too early.

    ``patience``: how long an event waits for what it belongs to, which is known since ``known``.
    """
    return F.filter(
        events,
        lambda event: (
            (event["event_time"] >= opened)
            & (event["event_time"] <= opened + width)
            & (event["arrival_time"] <= opened + (width + lateness))
            & (known - event["arrival_time"] <= patience)
        ),
    )


def label(outcomes: Column, known: Column) -> Column:
    """Struct ``credit, time, version, known``: the fold of `pipelines.attribution.apply_outcome`.

    ``known`` of the label: since when it is above 0, null where it is 0. Null or no outcomes make 0.
    """
    nothing = F.struct(
        F.lit(0.0).alias("credit"),
        F.lit(_BEFORE_ALL).alias("time"),
        F.lit(0).alias("version"),
        F.lit(None).cast("bigint").alias("known"),
    )

    def apply(state: Column, event: Column) -> Column:
        newer, same = event["event_time"] > state["time"], event["event_time"] == state["time"]
        stands = state["credit"] > 0
        is_assert, is_retract = event["op"] == ASSERT, event["op"] == RETRACT
        credit = (
            F.when(is_retract, F.lit(0.0))
            .when(is_assert & stands, state["credit"])
            .otherwise(F.coalesce(event["credit"], F.lit(1.0)))
        )
        has_say = newer | (same & (is_retract | (~is_assert & stands)))
        since = F.when(stands, state["known"]).otherwise(F.greatest(event["arrival_time"], known))
        changed = F.struct(
            credit.alias("credit"),
            event["event_time"].alias("time"),
            (state["version"] + F.when(credit == state["credit"], 0).otherwise(1)).alias("version"),
            F.when(credit > 0, since).alias("known"),
        )
        return F.when(has_say, changed).otherwise(state).cast(_LABEL)

    folded = F.aggregate(outcomes, nothing.cast(_LABEL), apply)
    # The fold is interpreted: most windows have nothing to fold.
    return F.when(F.size(F.coalesce(outcomes, F.array())) > 0, folded).otherwise(nothing.cast(_LABEL))
