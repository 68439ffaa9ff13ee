"""Events to JSON, column by column."""

from __future__ import annotations

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError
from pipelines.events import IMPRESSION, SERVED_COLUMNS, contract_schema, feature_names
from pipelines.feature_columns import map_lists

__all__ = ["encode_json", "features_to_json"]

# Control characters, quotation mark and backslash.
_NEEDS_ESCAPE = r"[\x00-\x1f\"\\]"


def encode_json(kind: int, table: pa.Table) -> list[bytes]:
    """Write rows of one kind as JSON events; nulls are left out.

    Parameters
    ----------
    kind : int
        IMPRESSION, CLICK or CONVERSION.
    table : pa.Table
        As `pipelines.conform.conform` leaves it; numbers must be finite.

    Raises
    ------
    DataError
        If a number is NaN or infinite.

    Examples
    --------
    >>> row = {"event_id": ["c1"], "impression_id": ["i1"], "event_time": [5], "arrival_time": [6]}
    >>> encode_json(1, pa.table(row))
    [b'{"event_id":"c1","impression_id":"i1","event_time":5,"arrival_time":6}']
    """
    members = [
        _member(field.name, table.column(field.name))
        for field in contract_schema(kind)
        if field.name in table.column_names
    ]
    if kind == IMPRESSION:
        served = [name for name in SERVED_COLUMNS if name in table.column_names]
        if served:
            texts = _objects([_member(name[7:], table.column(name)) for name in served], table.num_rows)
            none = pc.equal(texts, "{}")
            members.append(_prefixed("served", pc.if_else(none, pa.scalar(None, pa.string()), texts)))
        members.append(_prefixed("features", features_to_json(table)))
    return _objects(members, table.num_rows).cast(pa.binary()).to_pylist()  # type: ignore[no-any-return]


def features_to_json(table: pa.Table) -> pa.Array:
    """All features of each row as the text of one JSON object: names sorted, nulls left out.

    Examples
    --------
    >>> features_to_json(pa.table({"b": ["x", None], "a": [1.5, 2.0]})).to_pylist()
    ['{"a":1.5,"b":"x"}', '{"a":2}']
    """
    members = [_member(name, table.column(name)) for name in feature_names(table)]
    return _objects(members, table.num_rows)


def _objects(members: list[pa.Array], rows: int) -> pa.Array:
    """Join members (``"name":value,`` or null) to objects."""
    if not members:
        return pa.array(["{}"] * rows, pa.string())
    # The brace comes first because Arrow loses rows of a join in which every part is skipped.
    opened = pc.binary_join_element_wise("{", *members, "", null_handling="skip")
    return pc.binary_join_element_wise(pc.ascii_rtrim(opened, ","), "}", "")


def _member(name: str, column: pa.ChunkedArray) -> pa.Array:
    return _prefixed(name, _value_text(name, column.combine_chunks()))


def _prefixed(name: str, texts: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(orjson.dumps(name).decode() + ":", texts, ",", "")


def _value_text(name: str, column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type):
        return _quoted(column)
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type):
        if not pc.all(pc.is_finite(column), min_count=0).as_py():
            raise DataError(f"JSON holds finite numbers only. {name} has NaN or infinite ones.")
        return column.cast(pa.string())
    if pa.types.is_list(column.type):
        quoted = map_lists(column, lambda values: pc.fill_null(_quoted(values), "null"))
        return pc.binary_join_element_wise("[", pc.binary_join(quoted, ","), "]", "")
    if pa.types.is_null(column.type):
        return column.cast(pa.string())
    raise DataError(f"column {name} has a type that JSON events do not know: {column.type}.")


def _quoted(strings: pa.Array) -> pa.Array:
    if not pc.any(pc.match_substring_regex(strings, _NEEDS_ESCAPE)).as_py():
        return pc.binary_join_element_wise('"', strings, '"', "")
    encoded = strings.dictionary_encode()
    distinct = [orjson.dumps(text).decode() for text in encoded.dictionary.to_pylist()]
    return pa.array(distinct, pa.string()).take(encoded.indices)
