"""Columns of a sample stream: what a file must have, lists as matrices, and the step from Arrow to numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.errors import ConfigError, DataError
from pipelines.training_set import TrainingSet

__all__ = [
    "TIME_KEYS",
    "TRAINING_COLUMNS",
    "Bounds",
    "as_matrix",
    "conform",
    "row_bytes",
    "to_training_set",
    "with_widths",
]

# What a `TrainingSet` is made of, as a snapshot stores it.
TRAINING_COLUMNS = pa.schema(
    [
        pa.field("buckets", pa.list_(pa.int32())),
        pa.field("numbers", pa.list_(pa.float32())),
        pa.field("user_key", pa.int64()),
        pa.field("segment_key", pa.list_(pa.int64())),
        pa.field("label", pa.float32()),
        pa.field("weight", pa.float32()),
        pa.field("event_time", pa.int64()),
        pa.field("mature", pa.bool_()),
        pa.field("observed_share", pa.float32()),
    ]
)
# The order of a snapshot's rows; no two have the same.
TIME_KEYS = pa.schema([pa.field("event_time", pa.int64()), pa.field("sample_id", pa.string())])
# For sizing reads only: a string or another column of no fixed width.
_USUAL_BYTES = 32


@dataclass(frozen=True)
class Bounds:
    """Rows with ``low <= column < high``; None is no bound. A null is outside.

    Examples
    --------
    >>> Bounds("x", 2, None).mask(pa.record_batch({"x": [1, 2, None, 3]})).to_pylist()
    [False, True, False, True]
    """

    column: str
    low: Any
    high: Any

    def mask(self, batch: pa.RecordBatch) -> pa.Array:
        """True for the rows inside, shape (n,), without nulls."""
        column = batch.column(self.column)
        inside = pc.is_valid(column)
        if self.low is not None:
            inside = pc.and_(
                inside, pc.fill_null(pc.greater_equal(column, pa.scalar(self.low, column.type)), False)
            )
        if self.high is not None:
            inside = pc.and_(inside, pc.fill_null(pc.less(column, pa.scalar(self.high, column.type)), False))
        return inside

    def holds_all(self, lowest: Any, highest: Any) -> bool:
        """Whether every value between ``lowest`` and ``highest`` is inside."""
        return (self.low is None or lowest >= self.low) and (self.high is None or highest < self.high)

    def holds_none(self, lowest: Any, highest: Any) -> bool:
        """Whether no value between ``lowest`` and ``highest`` is inside."""
        return (self.low is not None and highest < self.low) or (
            self.high is not None and lowest >= self.high
        )


def with_widths(columns: pa.Schema, matrices: Mapping[str, int]) -> pa.Schema:
    """The schema with every list column that is a matrix as lists of a fixed size.

    Raises
    ------
    ConfigError
        If a matrix is not a list column, or its width is negative.

    Examples
    --------
    >>> with_widths(pa.schema([("buckets", pa.list_(pa.int32()))]), {"buckets": 3}).field(0).type.list_size
    3
    """
    for name, width in matrices.items():
        if name not in columns.names or not _is_list(columns.field(name).type) or width < 0:
            raise ConfigError(
                f"expected a list column and its width, 0 or more. Received: {name!r} = {width}; "
                f"columns: {', '.join(columns.names)}."
            )
    return pa.schema(
        [
            pa.field(field.name, pa.list_(field.type.value_type, matrices[field.name]))
            if field.name in matrices
            else field
            for field in columns
        ]
    )


def check_type(name: str, expected: pa.DataType, received: pa.DataType) -> str | None:
    """None, or what is wrong with a file's column; lists of a fixed size are lists."""
    if pa.types.is_fixed_size_list(expected):
        if _is_list(received) and received.value_type == expected.value_type:
            return None
        return f"column {name}: expected a list of {expected.value_type}. Received: {received}."
    return None if received == expected else f"column {name}: expected {expected}. Received: {received}."


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of ``schema``, in its order; list columns become matrices without copying.

    Raises
    ------
    DataError
        If a row of a matrix is null, holds a null, or has another width.
    """
    columns = []
    for field in schema:
        column = batch.column(field.name)
        if pa.types.is_fixed_size_list(field.type):
            column = as_matrix(column, field.type.list_size, field.name)
        columns.append(column)
    return pa.record_batch(columns, schema=schema)


def as_matrix(column: pa.Array, width: int, name: str = "matrix") -> pa.FixedSizeListArray:
    """A list column all of whose rows have ``width`` values, as lists of that fixed size; nothing is copied.

    Raises
    ------
    DataError
        If a row is null, holds a null, or has another width.

    Examples
    --------
    >>> as_matrix(pa.array([[1, 2], [3, 4]]), 2).type.list_size
    2
    """
    if column.null_count:
        raise DataError(f"column {name}: expected {width} values in each row. Received a null.")
    found: NDArray[Any] = np.empty(0, np.int64)
    if pa.types.is_fixed_size_list(column.type):
        found = np.full(min(len(column), 1), column.type.list_size)
    elif len(column):
        found = np.diff(column.offsets.to_numpy())
    wrong = np.flatnonzero(found != width)
    if len(wrong):
        raise DataError(
            f"column {name}: expected {width} values in each row. Received {found[wrong[0]]} in one."
        )
    values = column.flatten()
    if values.null_count:
        raise DataError(f"column {name}: expected {width} values in each row. Received a null among them.")
    if width == 0:
        # From values alone the number of rows would be lost.
        return pa.Array.from_buffers(pa.list_(values.type, 0), len(column), [None], children=[values])
    return pa.FixedSizeListArray.from_arrays(values, width)


def row_bytes(schema: pa.Schema) -> int:
    """About how much memory a row takes."""
    return sum(_value_bytes(field.type) for field in schema)


def to_training_set(batch: pa.RecordBatch) -> TrainingSet:
    """A batch of `TRAINING_COLUMNS` as numpy arrays.

    Nothing is copied but ``mature``, which Arrow keeps in bits: the arrays are read-only views.

    Raises
    ------
    DataError
        If a value is null.
    """
    return TrainingSet(
        **{name: _as_numpy(batch.column(name), name) for name in TRAINING_COLUMNS.names},
    )


def _as_numpy(column: pa.Array, name: str) -> NDArray[Any]:
    if column.null_count:
        raise DataError(f"column {name}: expected a value in each row. Received a null.")
    if pa.types.is_fixed_size_list(column.type):
        values = column.flatten().to_numpy()
        return np.asarray(values).reshape(len(column), column.type.list_size)
    return np.asarray(column.to_numpy(zero_copy_only=not pa.types.is_boolean(column.type)))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _value_bytes(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return _value_bytes(kind.value_type) * int(kind.list_size)
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return _USUAL_BYTES
