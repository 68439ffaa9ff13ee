"""Columns of raw feature values: how JSON values become Arrow columns, and how tables are put together.

A value must mean the same in every batch. Columns may differ in type from one batch to the next (whole
numbers here, a fraction or a text there), so all that reads them goes through `as_text` or through a cast
that gives the same number for either type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.events import SERVED_COLUMNS, contract_schema, feature_names

__all__ = ["as_column", "as_lists", "as_numbers", "as_text", "concat_events", "map_lists", "text_column"]

# Beyond this a float64 no longer holds every whole number.
_LARGEST_EXACT = 1 << 53
_STRINGS = pa.list_(pa.string())


def as_column(values: list[Any]) -> pa.Array:
    """An Arrow column of JSON values: string, int64, float64 or list of strings.

    A mixture of types becomes text, as written by `as_text`; so do whole numbers that int64 cannot hold.

    Examples
    --------
    >>> as_column([1, None, 2.5]).type, as_column([1, "1"]).to_pylist()
    (DataType(double), ['1', '1'])
    """
    types = set(map(type, values)) - {NoneType}
    try:
        if not types:
            return pa.nulls(len(values))
        if types == {str}:
            return pa.array(values, pa.string())
        if types == {int}:
            return pa.array(values, pa.int64())
        if types <= {int, float}:
            return pa.array(values, pa.float64())
        if types == {list}:
            return pa.array(values, _STRINGS)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # Numbers too large for the column, or lists of something else: text holds them all.
        return pa.array([as_text(value) for value in values], pa.string())
    return pa.array([as_text(value) for value in values], pa.string())


def as_text(value: Any) -> str | None:
    """The text that is hashed for a value: whole numbers are written without a fraction, lists as JSON.

    Examples
    --------
    >>> as_text(3.0), as_text(3), as_text("3"), as_text(["a"]), as_text(None)
    ('3', '3', '3', '["a"]', None)
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, list):
        return orjson.dumps(value).decode()
    return str(value)


def as_numbers(column: pa.Array, name: str) -> NDArray[np.float64]:
    """The values of the numeric feature ``name``, shape (n,); NaN for null.

    Raises
    ------
    DataError
        If the column holds something else than numbers, or texts of them.

    Examples
    --------
    >>> as_numbers(pa.array([1, None]), "price").tolist()
    [1.0, nan]
    """
    try:
        # Unsafe as to whole numbers beyond 2**53, which a float64 rounds: a feature can bear that.
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
    # What Arrow says of a text that is no number, and of a type that it cannot make a number of.
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"feature {name} is numeric in the feature spec. "
            f"Received a column of type {column.type}: {error}.",
            hint="make it categorical in the spec, or mend the producer",
        ) from error


def text_column(column: pa.Array) -> pa.Array:
    """The column as strings, each value as `as_text` writes it."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    if pa.types.is_null(column.type):
        return column.cast(pa.string())
    if pa.types.is_integer(column.type):
        return pc.cast(column, pa.string())
    return pa.array([as_text(value) for value in column.to_pylist()], pa.string())


def as_lists(column: pa.Array) -> pa.Array:
    """The column as lists of strings: text that holds a JSON list is that list, other text a list of one."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_null(column.type):
        return column
    return pa.array([_as_list(text) for text in text_column(column).to_pylist()], _STRINGS)


def _as_list(text: str | None) -> list[str | None] | None:
    if text is None:
        return None
    if text.startswith("["):
        try:
            return [as_text(value) for value in orjson.loads(text)]
        except orjson.JSONDecodeError:
            return [text]
    return [text]


def map_lists(column: pa.Array, function: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Apply a function to the elements of a list column, all at once; lists keep their lengths.

    Examples
    --------
    >>> import pyarrow.compute as pc
    >>> map_lists(pa.array([["a"], None, ["b", "c"]]), pc.utf8_upper).to_pylist()
    [['A'], None, ['B', 'C']]
    """
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(ends, function(column.flatten()), mask=column.is_null())


def concat_events(kind: int, tables: Sequence[pa.Table]) -> pa.Table:
    """Put conformed tables of one kind together; a feature that a table lacks is null in its rows.

    Parameters
    ----------
    kind : int
        IMPRESSION, CLICK or CONVERSION.
    tables : sequence of pa.Table
        At least one; as `pipelines.validation.conform` leaves them.

    Returns
    -------
    pa.Table
        Contract columns, served columns where a table has them, features sorted by name.
    """
    if len(tables) == 1 or len({table.schema for table in tables}) == 1:
        return pa.concat_tables(tables)
    present = {name for table in tables for name in table.column_names}
    names = [
        *contract_schema(kind).names,
        *(name for name in SERVED_COLUMNS if name in present),
        *sorted({name for table in tables for name in feature_names(table)} if kind == 0 else ()),
    ]
    columns = {name: _concat_column(name, tables) for name in names}
    return pa.table(columns)


def _concat_column(name: str, tables: Sequence[pa.Table]) -> pa.ChunkedArray:
    columns = [table.column(name) if name in table.column_names else None for table in tables]
    common = _common_type([column for column in columns if column is not None])
    chunks: list[pa.Array] = []
    for table, column in zip(tables, columns, strict=True):
        if column is None:
            chunks.append(pa.nulls(table.num_rows, common))
        elif column.type.equals(common):
            chunks.extend(column.chunks)
        elif pa.types.is_string(common):
            chunks.extend(text_column(chunk) for chunk in column.chunks)
        else:
            chunks.extend(chunk.cast(common) for chunk in column.chunks)
    return pa.chunked_array(chunks, common)


def _common_type(columns: list[pa.ChunkedArray]) -> pa.DataType:
    types = {column.type for column in columns if not pa.types.is_null(column.type)}
    if len(types) <= 1:
        return types.pop() if types else pa.null()
    if types == {pa.int64(), pa.float64()} and _are_exact_floats(columns):
        return pa.float64()
    return pa.string()


def _are_exact_floats(columns: Iterable[pa.ChunkedArray]) -> bool:
    for column in columns:
        if pa.types.is_integer(column.type):
            ends = pc.min_max(column).as_py()
            if ends["min"] is not None and max(-ends["min"], ends["max"]) > _LARGEST_EXACT:
                return False
    return True
