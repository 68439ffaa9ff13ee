"""The event contract: three kinds of events, their columns, and a block of them in arrival order.

Events are kept as Arrow tables, one for each kind. Times are int64 milliseconds since the epoch,
UTC. Every further column of the impressions table is a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    "SERVED_COLUMNS",
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
    CONVERSION: pa.schema(
        [
            *_COMMON,
            pa.field("value", pa.float64()),
            pa.field("op", pa.string()),
            pa.field("credit", pa.float64()),
        ]
    ),
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
    produced_at : ndarray of int64, shape (n,), optional
        Wall-clock time at which the broker received each row, ms.
    event_hash : ndarray of uint64, shape (n,), optional
        Hash of each row's event id, the last part of its place in the order.
    """

    tables: tuple[pa.Table, pa.Table, pa.Table]
    kind: NDArray[np.int8]
    arrival_time: NDArray[np.int64]
    partition: NDArray[np.int32]
    offset: NDArray[np.int64]
    row: NDArray[np.int32]
    dead_letters: list[DeadLetter] = field(default_factory=list)
    produced_at: NDArray[np.int64] | None = None
    event_hash: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.kind)

    def slice(self, start: int, stop: int) -> EventBlock:
        """Rows ``[start, stop)``, without copying."""
        if start == 0 and stop == len(self):
            return self
        first = [int((self.kind[:start] == kind).sum()) for kind in range(4)]
        count = [int((self.kind[start:stop] == kind).sum()) for kind in range(4)]
        impressions, clicks, conversions = (
            table.slice(first[kind], count[kind]) for kind, table in enumerate(self.tables)
        )
        return replace(
            self,
            tables=(impressions, clicks, conversions),
            dead_letters=self.dead_letters[first[3] : first[3] + count[3]],
            **{name: values[start:stop] for name, values in self._columns().items()},
        )

    @classmethod
    def concat(cls, blocks: Sequence[EventBlock]) -> EventBlock:
        """One block of several, in order; a feature that a block lacks is null there."""
        from pipelines.feature_columns import concat_events  # it builds on this module

        impressions, clicks, conversions = (
            concat_events(kind, [block.tables[kind] for block in blocks]) for kind in range(3)
        )
        columns = [block._columns() for block in blocks]
        shared = [name for name in columns[0] if all(name in own for own in columns)]
        return cls(
            tables=(impressions, clicks, conversions),
            dead_letters=[letter for block in blocks for letter in block.dead_letters],
            **{name: np.concatenate([own[name] for own in columns]) for name in shared},
        )

    def _columns(self) -> dict[str, NDArray[Any]]:
        names = ("kind", "arrival_time", "partition", "offset", "row", "produced_at", "event_hash")
        found = {name: getattr(self, name) for name in names}
        return {name: values for name, values in found.items() if values is not None}
