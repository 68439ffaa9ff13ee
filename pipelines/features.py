"""Feature extraction: from raw columns to table rows and numbers, in one piece of code for all sides.

The Spark jobs run it through ``mapInArrow``, the worker and the backtest on event blocks, serving on
requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.duration import HOUR_MS
from pipelines.feature_columns import as_column, as_lists, as_numbers, as_text, text_column
from pipelines.feature_spec import FeatureSpec, Numeric, Sequence
from pipelines.hashing import hash_column, hash_text, mix

__all__ = ["Encoded", "as_text", "encode", "encode_rows"]


@dataclass(frozen=True)
class Encoded:
    """Encoded features of n impressions.

    Attributes
    ----------
    buckets : ndarray of int32, shape (n, columns)
        Rows of the embedding table; 0 pads short sequences. Columns follow ``spec.column_field``.
    numbers : ndarray of float32, shape (n, numeric features)
        Standardised numbers; a null is 0, the mean.
    user_key : ndarray of int64, shape (n,)
        Hash of the user, for grouping.
    segment_key : ndarray of int64, shape (n, segments)
        Hash of each calibration segment's value.
    ids : ndarray of int64, shape (n, id columns)
        Hash of field and value for the columns of ``spec.id_columns``; 0 where there is no value.
    """

    buckets: NDArray[np.int32]
    numbers: NDArray[np.float32]
    user_key: NDArray[np.int64]
    segment_key: NDArray[np.int64]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.buckets)


def encode(impressions: pa.Table, spec: FeatureSpec, segments: tuple[str, ...] = ()) -> Encoded:
    """Encode a table of impressions.

    Parameters
    ----------
    impressions : pa.Table
        Contract columns and features. A feature that has no column is null in every row.
    spec : FeatureSpec
    segments : tuple of str
        Columns whose values are calibration segments.

    Raises
    ------
    DataError
        If a numeric feature holds values that are not numbers.
    """
    n = impressions.num_rows
    hashes: dict[str, NDArray[np.uint64]] = {}

    def hashed(name: str) -> NDArray[np.uint64]:
        if name not in hashes:
            hashes[name] = _hash_feature(impressions, name, spec.hash_seed)
        return hashes[name]

    columns: list[NDArray[np.int32]] = []
    numbers: list[NDArray[np.float32]] = []
    ids: list[NDArray[np.int64]] = []
    offset = dict(zip(spec.field_names, spec.offsets, strict=True))

    def add(name: str, buckets: int, hashes: NDArray[np.uint64]) -> None:
        columns.append(_bucket(hashes, offset[name], buckets))
        if name in spec.dynamic:
            ids.append(_ids(hashes, name, spec.hash_seed))

    for part in spec.categorical:
        if not part.wide_only:
            add(part.name, part.buckets, hashed(part.name))
    for number in spec.numeric:
        value = _numeric_column(impressions, number.name)
        if number.boundaries:
            columns.append(_cut(value, number, offset[number.name]))
        numbers.append(_standardise(value, number))
    if spec.hour is not None:
        hour = (_column(impressions, "event_time").to_numpy() // HOUR_MS) % 24
        columns.append((offset[spec.hour.name] + 1 + hour).astype(np.int32))
    for cross in spec.cross:
        add(cross.name, cross.buckets, _cross(hashed, cross.of))
    for sequence in spec.sequence:
        values = _Values.of(impressions, sequence, spec.hash_seed)
        columns.extend(values.spread(_bucket(values.hashes, offset[sequence.name], sequence.buckets)))
        if sequence.name in spec.dynamic:
            ids.extend(values.spread(_ids(values.hashes, sequence.name, spec.hash_seed)))
    for part in spec.categorical:
        if part.wide_only:
            add(part.name, part.buckets, hashed(part.name))
    return Encoded(
        buckets=_matrix(columns, n, np.int32),
        numbers=_matrix(numbers, n, np.float32),
        user_key=hashed("user_id").view(np.int64),
        segment_key=_matrix([hashed(name).view(np.int64) for name in segments], n, np.int64),
        ids=_matrix(ids, n, np.int64),
    )


def encode_rows(rows: list[Mapping[str, Any]], spec: FeatureSpec, segments: tuple[str, ...] = ()) -> Encoded:
    """Encode impressions given as mappings (``user_id, item_id, event_time, position, features``)."""
    table: dict[str, list[Any]] = {
        name: [row.get(name) for row in rows] for name in ("user_id", "item_id", "position")
    }
    table["event_time"] = [row.get("event_time") or 0 for row in rows]
    bags = [row.get("features") or {} for row in rows]
    for name in sorted({name for bag in bags for name in bag}):
        table[name] = [bag.get(name) for bag in bags]
    return encode(pa.table({name: as_column(values) for name, values in table.items()}), spec, segments)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _hash_feature(table: pa.Table, name: str, seed: int) -> NDArray[np.uint64]:
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.uint64)
    return hash_column(text_column(_column(table, name)), seed)


def _matrix(columns: list[NDArray[Any]], n: int, dtype: type[np.generic]) -> NDArray[Any]:
    return np.stack(columns, axis=1) if columns else np.zeros((n, 0), dtype)


def _ids(hashes: NDArray[np.uint64], field: str, seed: int) -> NDArray[np.int64]:
    """One id for each value of each field; 0, which stands for no id, for nulls."""
    ids = mix(np.full(len(hashes), hash_text(field, seed), np.uint64), hashes)
    return np.where(hashes == 0, np.uint64(0), ids).view(np.int64)


def _bucket(hashes: NDArray[np.uint64], offset: int, buckets: int) -> NDArray[np.int32]:
    # A null hashes to 0 and owns the field's first row; values share the rest.
    inside = np.where(hashes == 0, np.uint64(0), hashes % np.uint64(buckets - 1) + np.uint64(1))
    return (inside.astype(np.int64) + offset).astype(np.int32)


def _cross(hashed: Any, of: tuple[str, str]) -> NDArray[np.uint64]:
    left, right = hashed(of[0]), hashed(of[1])
    return np.where((left == 0) | (right == 0), np.uint64(0), mix(left, right))


def _numeric_column(table: pa.Table, name: str) -> NDArray[np.float64]:
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return as_numbers(_column(table, name), name)


def _transform(value: NDArray[np.float64], part: Numeric) -> NDArray[np.float64]:
    clipped = np.clip(value, part.low, part.high)
    return np.log1p(clipped - part.low) if part.transform == "log1p" else clipped


def _standardise(value: NDArray[np.float64], part: Numeric) -> NDArray[np.float32]:
    standard = (_transform(value, part) - part.mean) / part.std
    return np.nan_to_num(standard, nan=0.0).astype(np.float32)


def _cut(value: NDArray[np.float64], part: Numeric, offset: int) -> NDArray[np.int32]:
    inside = np.searchsorted(np.asarray(part.boundaries), value, side="right") + 1
    return (np.where(np.isnan(value), 0, inside) + offset).astype(np.int32)


@dataclass(frozen=True)
class _Values:
    """Hashes of the values of a sequence, and the row and place of each."""

    hashes: NDArray[np.uint64]
    row: NDArray[np.int64]
    place: NDArray[np.int64]
    shape: tuple[int, int]

    @classmethod
    def of(cls, table: pa.Table, part: Sequence, seed: int) -> _Values:
        hashes, row, place = np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
        if part.name in table.column_names:
            column = as_lists(_column(table, part.name))
            if not pa.types.is_null(column.type):
                lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
                hashes = hash_column(text_column(column.flatten()), seed)
                row = np.repeat(np.arange(table.num_rows), lengths)
                place = np.arange(len(hashes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return cls(hashes, row, place, (table.num_rows, part.max_length))

    def spread(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """A column for each place, 0 where a row has no value; those too many are left out."""
        matrix = np.zeros(self.shape, values.dtype)
        kept = self.place < self.shape[1]
        matrix[self.row[kept], self.place[kept]] = values[kept]
        return list(matrix.T)
