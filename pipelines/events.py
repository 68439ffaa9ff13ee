"""The event contract: three kinds of events, their columns, and a block of them in arrival order.

Events are kept as Arrow tables, one for each kind. Times are int64 milliseconds since the epoch,
UTC. Every further column of the impressions table is a feature.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = [
    "CLICK",
    "CONVERSION",
    "DEAD_LETTER",
    "IMPRESSION",
    "KINDS",
    "OPERATIONS",
    "TOPICS",
    "DeadLetter",
    "EventBlock",
    "contract_schema",
    "feature_names",
]

IMPRESSION, CLICK, CONVERSION, DEAD_LETTER = 0, 1, 2, 3
KINDS = ("impression", "click", "conversion")
TOPICS = ("impressions", "clicks", "conversions")
OPERATIONS = ("assert", "retract", "restate")

_COMMON = [
    pa.field("event_id", pa.string()),
    pa.field("impression_id", pa.string()),
    pa.field("event_time", pa.int64()),
    pa.field("arrival_time", pa.int64()),
]
_SCHEMAS = {
    IMPRESSION: pa.schema(
        [
            *_COMMON,
            pa.field("user_id", pa.string()),
            pa.field("item_id", pa.string()),
            pa.field("position", pa.int32()),
            pa.field("propensity", pa.float64()),
        ]
    ),
    CLICK: pa.schema(_COMMON),
    CONVERSION: pa.schema([*_COMMON, pa.field("value", pa.float64()), pa.field("op", pa.string())]),
}
# What the server logged of its own answer; judged by `consistency`, never a feature.
SERVED_COLUMNS = ("served_release", "served_logit", "served_probability", "served_position")
_RESERVED = frozenset(_SCHEMAS[IMPRESSION].names) | set(SERVED_COLUMNS)


def contract_schema(kind: int) -> pa.Schema:
    """Arrow schema of the contract's columns of one kind, in order.

    Examples
    --------
    >>> contract_schema(CLICK).names
    ['event_id', 'impression_id', 'event_time', 'arrival_time']
    """
    return _SCHEMAS[kind]


def feature_names(impressions: pa.Table | pa.Schema) -> list[str]:
    """Names of the columns of an impressions table that are features, sorted."""
    schema = impressions if isinstance(impressions, pa.Schema) else impressions.schema
    return sorted(name for name in schema.names if name not in _RESERVED)


@dataclass(frozen=True)
class DeadLetter:
    """An input row that could not be used, with where it was found.

    Attributes
    ----------
    source : str
        Topic or file name.
    partition, offset, row : int
        Kafka partition and offset (partition 0 and the row number for files); row inside a packed
        message, else 0.
    reason : str
        What was expected and what was received.
    payload : str
        The row as it was read, decoded with replacement characters.
    """

    source: str
    partition: int
    offset: int
    row: int
    reason: str
    payload: str


@dataclass(frozen=True)
class EventBlock:
    """A run of input rows in arrival order.

    Attributes
    ----------
    tables : tuple of pa.Table
        Impressions, clicks and conversions, each in arrival order, contract columns first.
    kind : ndarray of int8, shape (n,)
        IMPRESSION, CLICK, CONVERSION or DEAD_LETTER, in arrival order. The k-th row of a kind is
        row k of its table (of ``dead_letters`` for DEAD_LETTER).
    arrival_time : ndarray of int64, shape (n,)
        When each row became known, ms; never decreases.
    partition, offset, row : ndarray, shape (n,)
        Source position of each row; ``partition`` counts the source's own partitions of all topics.
    dead_letters : list of DeadLetter
    """

    tables: tuple[pa.Table, pa.Table, pa.Table]
    kind: NDArray[np.int8]
    arrival_time: NDArray[np.int64]
    partition: NDArray[np.int32]
    offset: NDArray[np.int64]
    row: NDArray[np.int32]
    dead_letters: list[DeadLetter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.kind)
