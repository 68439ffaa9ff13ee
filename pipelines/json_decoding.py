"""Events from JSON, one event a message, a whole batch at a time.

A message that cannot be used is found in a second, slower look at its batch, and does not spoil its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import NoneType
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.conform import conform
from pipelines.errors import DataError
from pipelines.events import IMPRESSION, SERVED_COLUMNS, contract_schema
from pipelines.feature_columns import as_column, concat_events
from pipelines.json_faults import (
    RESERVED_NAMES,
    SERVED_TYPES,
    VALUE_TYPES,
    faults,
    is_list_of_strings,
    is_plain,
    shown,
)

__all__ = ["Decoded", "decode_json", "with_features_from_json"]

# Python objects of a batch this small are still in the processor's cache when they are read.
_ROWS_AT_ONCE = 256
_STRINGS = pa.list_(pa.string())

Event = dict[str, Any]


@dataclass(frozen=True)
class Decoded:
    """Input rows of one kind, decoded but not yet validated.

    Attributes
    ----------
    table : pa.Table
        The rows that could be read, conformed (`pipelines.conform.conform`), in input order.
    row : ndarray of int64, shape (table rows,)
        Input row of each table row.
    rejected : dict of int to str
        For each input row that could not be read, what was expected and what was received.
    rows : int
        Number of input rows.
    """

    table: pa.Table
    row: NDArray[np.int64]
    rejected: dict[int, str]
    rows: int


class _Misfit(Exception):
    """A batch holds an event that breaks the contract: look at each of its events."""


def decode_json(kind: int, payloads: Sequence[bytes | None]) -> Decoded:
    """Decode JSON events of one kind.

    Parameters
    ----------
    kind : int
        IMPRESSION, CLICK or CONVERSION.
    payloads : sequence of bytes or None
        One event each; None (a Kafka tombstone) is rejected.

    Examples
    --------
    >>> good = b'{"event_id": "c1", "impression_id": "i1", "event_time": 5}'
    >>> decoded = decode_json(1, [good, b"{", good.replace(b"5", b"true")])
    >>> decoded.table.num_rows, decoded.row.tolist()
    (1, [0])
    >>> decoded.rejected[2]
    'event_time must be a whole number. Received: true.'
    """
    parts: list[pa.Table] = []
    kept: list[NDArray[np.int64]] = []
    rejected: dict[int, str] = {}
    for start in range(0, max(len(payloads), 1), _ROWS_AT_ONCE):
        part = payloads[start : start + _ROWS_AT_ONCE]
        try:
            parts.append(_as_table(kind, [*map(orjson.loads, part)]))  # type: ignore[arg-type]
            kept.append(np.arange(start, start + len(part)))
        except (_Misfit, orjson.JSONDecodeError):
            table, rows = _decode_one_by_one(kind, start, part, rejected)
            parts.append(table)
            kept.append(np.array(rows, np.int64))
    table = conform(kind, concat_events(kind, parts).combine_chunks())
    return Decoded(table, np.concatenate(kept), rejected, len(payloads))


def _decode_one_by_one(
    kind: int, start: int, payloads: Sequence[bytes | None], rejected: dict[int, str]
) -> tuple[pa.Table, list[int]]:
    events: dict[int, Event] = {}
    for row, payload in enumerate(payloads, start):
        event = _parse(payload)
        if isinstance(event, str):
            rejected[row] = event
        else:
            events[row] = event
    try:
        return _as_table(kind, [*events.values()]), [*events]
    except _Misfit:
        found = {
            row: fault
            for row, event in events.items()
            if not is_plain(kind, event) and (fault := next(faults(kind, event), None))
        }
        rejected |= found
        good = {row: event for row, event in events.items() if row not in found}
        return _as_table(kind, [*good.values()]), [*good]


def _parse(payload: bytes | None) -> Event | str:
    """One event, or the reason why there is none."""
    if payload is None:
        return "expected an event as a JSON object. Received: an empty message (tombstone)."
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        return f"expected an event as a JSON object. Received text that is not JSON: {error}."
    return (
        event if isinstance(event, dict) else f"expected an event as a JSON object. Received: {shown(event)}."
    )


def _as_table(kind: int, events: list[Event]) -> pa.Table:
    if set(map(type, events)) - {dict}:
        raise _Misfit
    present = set().union(*events)
    if "version" in present and any(version not in (None, 1) for version in _values(events, "version")):
        raise _Misfit
    columns = {
        field.name: _typed(_values(events, field.name), field.type)
        if field.name in present
        else pa.nulls(len(events), field.type)
        for field in contract_schema(kind)
    }
    if kind == IMPRESSION:
        if "served" in present:
            _add_served(_values(events, "served"), columns)
        if "features" in present:
            _add_features(_values(events, "features"), columns)
    return pa.table(columns)


def _values(objects: list[Event], name: str) -> list[Any]:
    try:
        return [*map(itemgetter(name), objects)]
    except KeyError:
        return [event.get(name) for event in objects]


def _typed(values: list[Any], wanted: pa.DataType) -> pa.Array:
    if pa.types.is_integer(wanted):
        types = set(map(type, values))
        if float in types:
            # Some writers know floats only: 5.0 is a whole number, 5.5 is not.
            values = [int(v) if type(v) is float and v.is_integer() else v for v in values]
            types = set(map(type, values))
        if not types <= {int, NoneType}:
            raise _Misfit
    elif pa.types.is_floating(wanted) and not set(map(type, values)) <= {int, float, NoneType}:
        raise _Misfit
    try:
        return pa.array(values, wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise _Misfit from error


def _add_served(served: list[Any], columns: dict[str, pa.Array]) -> None:
    types = set(map(type, served))
    if not types <= {dict, NoneType}:
        raise _Misfit
    bags = [bag or {} for bag in served]
    for name, (key, wanted) in zip(SERVED_COLUMNS, SERVED_TYPES.items(), strict=True):
        columns[name] = _typed([bag.get(key) for bag in bags], wanted)


def _add_features(bags: list[Any], columns: dict[str, pa.Array]) -> None:
    types = set(map(type, bags))
    if not types <= {dict, NoneType}:
        raise _Misfit
    if NoneType in types:
        bags = [bag or {} for bag in bags]
    names = set().union(*bags)
    if not RESERVED_NAMES.isdisjoint(names):
        raise _Misfit
    for name in sorted(names):
        columns[name] = _feature_column(_values(bags, name))


def _feature_column(values: list[Any]) -> pa.Array:
    types = set(map(type, values))
    if not types <= VALUE_TYPES:
        raise _Misfit
    if list in types:
        if types - {list, NoneType}:
            if not all(is_list_of_strings(value) for value in values if type(value) is list):
                raise _Misfit
        else:
            return _lists_of_strings(values)
    return as_column(values)


def _lists_of_strings(values: list[Any]) -> pa.Array:
    try:
        lists = pa.array(values, _STRINGS)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise _Misfit from error
    if lists.flatten().null_count:
        raise _Misfit
    return lists


def with_features_from_json(table: pa.Table, column: str = "features_json") -> pa.Table:
    """Replace a column of JSON objects (`pipelines.codec.features_to_json`) by a column for each feature.

    Raises
    ------
    DataError
        If a value is not a JSON object of features.

    Examples
    --------
    >>> with_features_from_json(pa.table({"features_json": ['{"a":1}', '{"a":2,"b":["x"]}']})).to_pylist()
    [{'a': 1, 'b': None}, {'a': 2, 'b': ['x']}]
    """
    texts = table.column(column).cast(pa.binary()).to_pylist()
    kept = table.drop_columns([column])
    columns = dict(zip(kept.column_names, kept.columns, strict=True))
    try:
        _add_features([None if text is None else orjson.loads(text) for text in texts], columns)
    except (orjson.JSONDecodeError, _Misfit) as error:
        raise DataError(
            f"column {column} must hold JSON objects of features (strings, numbers or lists of strings). "
            f"Received: {_first_fault(texts)}"
        ) from error
    return pa.table(columns)


def _first_fault(texts: list[bytes | None]) -> str:
    for text in texts:
        event = {} if text is None else _parse(b'{"features":%s}' % text)
        fault = event if isinstance(event, str) else next(faults(IMPRESSION, event), None)
        if fault is not None:
            return fault
    return "a value that is not an object"
