"""The contract, enforced column by column: any table of events brought into the contract's form."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError
from pipelines.events import (
    CONVERSION,
    IMPRESSION,
    KINDS,
    OPERATIONS,
    SERVED_COLUMNS,
    contract_schema,
    feature_names,
)
from pipelines.feature_columns import map_lists, text_column

__all__ = ["conform"]

_SERVED_TYPES = dict(zip(SERVED_COLUMNS, (pa.string(), pa.float64(), pa.float64(), pa.int32()), strict=True))
_REQUIRED = ("event_id", "impression_id", "event_time")
_REQUIRED_OF_IMPRESSIONS = ("user_id", "item_id")
_STRINGS = pa.list_(pa.string())


def conform(kind: int, table: pa.Table, where: str = "") -> pa.Table:
    """Bring a table of one kind into the contract's form.

    Contract columns come first, in order and with the contract's types; a missing optional one is added as
    null, ``arrival_time`` defaults to ``event_time`` and ``op`` to ``assert``. Impressions keep their served
    columns and, sorted by name, their features as string, int64, float64 or list of strings; columns without
    a value are dropped, for absent means null. Other kinds keep contract columns only.

    Parameters
    ----------
    kind : int
        IMPRESSION, CLICK or CONVERSION.
    table : pa.Table
    where : str, optional
        File or message, named in errors.

    Raises
    ------
    DataError
        If a required column is missing, or a column has a type that cannot be cast.

    Examples
    --------
    >>> bare = pa.table({"event_id": ["c1"], "impression_id": ["i1"], "event_time": [5]})
    >>> conform(1, bare).to_pylist()
    [{'event_id': 'c1', 'impression_id': 'i1', 'event_time': 5, 'arrival_time': 5}]
    """
    _require_columns(kind, table, where)
    columns = {field.name: _contract_column(table, field, where) for field in contract_schema(kind)}
    columns["arrival_time"] = pc.coalesce(columns["arrival_time"], columns["event_time"])
    if kind == CONVERSION:
        columns["op"] = pc.fill_null(columns["op"], OPERATIONS[0])
    if kind == IMPRESSION:
        for name in SERVED_COLUMNS:
            if name in table.column_names and table.column(name).null_count < table.num_rows:
                columns[name] = _cast(table.column(name), _SERVED_TYPES[name], name, where)
        for name in feature_names(table):
            column = table.column(name)
            if column.null_count < table.num_rows:
                columns[name] = _feature_column(column, name, where)
    return pa.table(columns)


def _require_columns(kind: int, table: pa.Table, where: str) -> None:
    names = table.column_names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"{where or 'table'}: each column may appear once. Received twice: {', '.join(repeated)}."
        )
    required = _REQUIRED + (_REQUIRED_OF_IMPRESSIONS if kind == IMPRESSION else ())
    missing = [name for name in required if name not in names]
    if missing and table.num_rows:
        raise DataError(
            f"{where or 'table'}: {KINDS[kind]}s need the columns {', '.join(required)}. "
            f"Missing: {', '.join(missing)}.",
            hint=f"found the columns {', '.join(names) or '(none)'}",
        )


def _contract_column(table: pa.Table, field: pa.Field, where: str) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    return _cast(table.column(field.name), field.type, field.name, where)


def _cast(column: pa.ChunkedArray, wanted: pa.DataType, name: str, where: str) -> pa.ChunkedArray:
    kind = column.type
    if kind.equals(wanted):
        return column
    try:
        if pa.types.is_timestamp(kind) and kind.tz is not None and wanted.equals(pa.int64()):
            # An instant with a time zone has one meaning; finer digits than ms are cut.
            return column.cast(pa.timestamp("ms", kind.tz), safe=False).cast(wanted)
        if _is_castable(kind, wanted):
            return column.cast(wanted)
    except pa.ArrowInvalid as error:
        raise _wrong_type(where, name, wanted, kind, str(error)) from error
    raise _wrong_type(where, name, wanted, kind)


def _is_castable(kind: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_null(kind):
        return True
    if pa.types.is_dictionary(kind):
        return _is_castable(kind.value_type, wanted)
    if pa.types.is_string(wanted):
        # A number is no id: 1.0 and 1 would become different texts.
        return _is_text(kind)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _wrong_type(where: str, name: str, wanted: pa.DataType, kind: pa.DataType, detail: str = "") -> DataError:
    message = f"{where or 'table'}: column {name} must be {wanted}. Received {kind}"
    hint = "times are int64 milliseconds since the epoch, UTC" if name.endswith("_time") else None
    return DataError(f"{message}: {detail}" if detail else f"{message}.", hint=hint)


def _feature_column(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    kind = column.type
    if kind in (pa.string(), pa.int64(), pa.float64()):
        return column
    try:
        if pa.types.is_dictionary(kind):
            return _feature_column(column.cast(kind.value_type), name, where)
        if pa.types.is_integer(kind):
            return _whole_numbers(column)
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return column.cast(pa.float64())
        if _is_text(kind) or pa.types.is_boolean(kind):
            return column.cast(pa.string())
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            return _lists_of_strings(column, name, where)
    except pa.ArrowInvalid as error:
        raise _wrong_feature(where, name, kind, str(error)) from error
    raise _wrong_feature(where, name, kind)


def _whole_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.string())  # uint64 beyond int64: an id, kept exact as text


def _lists_of_strings(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    inner = column.type.value_type
    if pa.types.is_nested(inner):
        raise _wrong_feature(where, name, column.type)
    if _is_text(inner) or pa.types.is_null(inner):
        return column.cast(_STRINGS)
    chunks = [map_lists(chunk, text_column) for chunk in column.cast(pa.list_(inner)).chunks]
    return pa.chunked_array(chunks, _STRINGS)


def _wrong_feature(where: str, name: str, kind: pa.DataType, detail: str = "") -> DataError:
    message = (
        f"{where or 'table'}: feature {name} must hold strings, numbers or lists of strings. Received {kind}"
    )
    return DataError(
        f"{message}: {detail}" if detail else f"{message}.",
        hint="every column of the impressions beyond the contract's is a feature: drop it or cast it",
    )
