"""What can be wrong with one event as it stands in JSON."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any

import orjson
import pyarrow as pa

from pipelines.events import IMPRESSION, SERVED_COLUMNS, contract_schema

__all__ = [
    "RESERVED_NAMES",
    "SERVED_TYPES",
    "VALUE_TYPES",
    "faults",
    "is_list_of_strings",
    "is_plain",
    "shown",
]

# Python types of a feature's value.
VALUE_TYPES = frozenset((str, int, float, list, NoneType))
# Names that no feature may bear.
RESERVED_NAMES = frozenset(contract_schema(IMPRESSION).names) | frozenset(SERVED_COLUMNS)
# Keys of an impression's ``served`` object.
SERVED_TYPES = {
    "release": pa.string(),
    "logit": pa.float64(),
    "probability": pa.float64(),
    "position": pa.int32(),
}


def _plain_types(field: pa.Field) -> tuple[str, frozenset[type], int]:
    """Name of a field, the types that need no second look, and the limit of whole numbers (0: none)."""
    if pa.types.is_integer(field.type):
        return field.name, frozenset((int, NoneType)), 1 << (field.type.bit_width - 1)
    plain = str if pa.types.is_string(field.type) else float
    return field.name, frozenset((plain, NoneType)), 0


_PLAIN = [[_plain_types(field) for field in contract_schema(kind)] for kind in range(3)]


def is_list_of_strings(value: list[Any]) -> bool:
    """Whether all elements of a list are strings."""
    return set(map(type, value)) <= {str}


def faults(kind: int, event: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one parsed event: expected and received, for each fault.

    Examples
    --------
    >>> next(faults(1, {"event_id": "c1", "impression_id": 7}))
    'impression_id must be a string. Received: 7.'
    """
    if event.get("version") not in (None, 1):
        yield f"version of an event must be 1. Received: {shown(event['version'])}."
    for field in contract_schema(kind):
        yield from _type_fault(field.name, event.get(field.name), field.type)
    if kind == IMPRESSION:
        yield from _served_faults(event.get("served"))
        yield from _feature_faults(event.get("features"))


def is_plain(kind: int, event: dict[str, Any]) -> bool:
    """Whether an event is certainly without fault; a quick look for the many beside the few.

    Examples
    --------
    >>> is_plain(1, {"event_id": "c1", "impression_id": "i1", "event_time": 5}), is_plain(1, {"event_id": 7})
    (True, False)
    """
    for name, types, limit in _PLAIN[kind]:
        value = event.get(name)
        if type(value) not in types or (limit and value is not None and not -limit <= value < limit):
            return False
    if event.get("version") is not None or event.get("served") is not None:
        return False
    features = event.get("features") if kind == IMPRESSION else None
    if features is None:
        return True
    if type(features) is not dict or not RESERVED_NAMES.isdisjoint(features):
        return False
    return all(
        type(value) in VALUE_TYPES and (type(value) is not list or is_list_of_strings(value))
        for value in features.values()
    )


def _served_faults(served: Any) -> Iterator[str]:
    if served is None:
        return
    if not isinstance(served, dict):
        yield f"served must be an object. Received: {shown(served)}."
        return
    for key, wanted in SERVED_TYPES.items():
        yield from _type_fault(f"served.{key}", served.get(key), wanted)


def _feature_faults(bag: Any) -> Iterator[str]:
    if bag is None:
        return
    if not isinstance(bag, dict):
        yield f"features must be an object. Received: {shown(bag)}."
        return
    for name, value in bag.items():
        if name in RESERVED_NAMES:
            yield f"feature {name} bears the name of a field of the contract: rename it."
        elif type(value) not in VALUE_TYPES or (type(value) is list and not is_list_of_strings(value)):
            yield (
                f"feature {name} must be a string, a number or a list of strings. Received: {shown(value)}."
            )


def _type_fault(name: str, value: Any, wanted: pa.DataType) -> Iterator[str]:
    if value is None:
        return
    if pa.types.is_string(wanted):
        if type(value) is not str:
            yield f"{name} must be a string. Received: {shown(value)}."
    elif pa.types.is_integer(wanted):
        largest = 1 << (wanted.bit_width - 1)
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        if not whole or not -largest <= value < largest:
            yield f"{name} must be a whole number. Received: {shown(value)}."
    elif not _is_number(value):
        yield f"{name} must be a number. Received: {shown(value)}."


def _is_number(value: Any) -> bool:
    # As Arrow has it: a whole number beyond 2**53 is refused where a float64 is wanted.
    return type(value) is float or (type(value) is int and abs(value) <= 1 << 53)


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= 120 else f"{text[:120]}..."
