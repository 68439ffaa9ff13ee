"""The contract, enforced row by row: which rows break it, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.conform import conform
from pipelines.events import (
    CONVERSION,
    IMPRESSION,
    OPERATIONS,
    SERVED_COLUMNS,
    feature_names,
)

__all__ = ["LATEST_TIME", "conform", "validate"]

# 2100-01-01T00:00:00Z in ms: a time beyond it was written in another unit (microseconds, nanoseconds).
LATEST_TIME = 4_102_444_800_000

_IDENTITY = ("event_id", "impression_id")
_IDENTITY_OF_IMPRESSIONS = (*_IDENTITY, "user_id", "item_id")

Mask = NDArray[np.bool_]
Check = tuple[Mask, Callable[[int], str]]


def validate(kind: int, table: pa.Table) -> tuple[Mask, dict[int, str]]:
    """Find the rows that break the contract.

    Parameters
    ----------
    kind : int
        IMPRESSION, CLICK or CONVERSION.
    table : pa.Table
        As `conform` leaves it.

    Returns
    -------
    ok : ndarray of bool, shape (n,)
    reasons : dict of int to str
        For each row that is not ok, what was expected and what was received.

    Examples
    --------
    >>> click = {"event_id": ["c1"], "impression_id": ["i1"], "event_time": [9], "arrival_time": [5]}
    >>> validate(1, conform(1, pa.table(click)))[1]
    {0: 'arrival_time must not be before event_time. Received: 5 < 9.'}
    """
    ok = np.ones(table.num_rows, np.bool_)
    reasons: dict[int, str] = {}
    if not table.num_rows:
        return ok, reasons
    for bad, reason in _checks(kind, table):
        if bad.any():
            for row in np.flatnonzero(bad & ok):
                reasons[int(row)] = reason(int(row))
            ok &= ~bad
    return ok, reasons


def _checks(kind: int, table: pa.Table) -> Iterator[Check]:
    yield from _identity_checks(kind, table)
    yield from _time_checks(table)
    if kind == IMPRESSION:
        yield from _impression_checks(table)
        for name in feature_names(table):
            yield from _feature_checks(table.column(name), name)
    if kind == CONVERSION:
        yield from _finite_check(table.column("value"), "value")
        op = table.column("op")
        known = _as_mask(pc.is_in(op, value_set=pa.array(OPERATIONS)))
        yield ~known, _received(op, f"op must be one of {', '.join(OPERATIONS)}")
        yield from _share_check(table.column("credit"), "credit")


def _identity_checks(kind: int, table: pa.Table) -> Iterator[Check]:
    for name in _IDENTITY_OF_IMPRESSIONS if kind == IMPRESSION else _IDENTITY:
        column = table.column(name)
        if column.null_count or pc.min(pc.binary_length(column)).as_py() == 0:
            absent = _as_mask(pc.equal(pc.fill_null(pc.binary_length(column), 0), 0))
            yield absent, _received(column, f"{name} must be a string that is not empty")
    if kind == IMPRESSION:
        event_id, impression_id = table.column("event_id"), table.column("impression_id")
        differs = ~_as_mask(pc.equal(event_id, impression_id))
        yield (
            differs,
            lambda row: (
                "event_id of an impression must equal its impression_id. "
                f"Received: {_shown(event_id, row)} and {_shown(impression_id, row)}."
            ),
        )


def _time_checks(table: pa.Table) -> Iterator[Check]:
    event_time, arrival_time = table.column("event_time"), table.column("arrival_time")
    happened = pc.fill_null(event_time, 0).to_numpy()
    became_known = pc.fill_null(arrival_time, 0).to_numpy()
    yield (
        (happened <= 0) | (happened > LATEST_TIME),
        _received(event_time, "event_time must be ms since the epoch, after 1970 and before 2100"),
    )
    yield (
        became_known < happened,
        lambda row: (
            f"arrival_time must not be before event_time. Received: {became_known[row]} < {happened[row]}."
        ),
    )
    yield (
        became_known > LATEST_TIME,
        _received(arrival_time, "arrival_time must be ms since the epoch, before 2100"),
    )


def _impression_checks(table: pa.Table) -> Iterator[Check]:
    position = table.column("position")
    if position.null_count < len(position):
        low = _as_mask(pc.less(position, 1))
        yield low, _received(position, "position must be at least 1")
    yield from _share_check(table.column("propensity"), "propensity")
    for name in SERVED_COLUMNS[1:3]:
        if name in table.column_names:
            yield from _finite_check(table.column(name), name)


def _feature_checks(column: pa.ChunkedArray, name: str) -> Iterator[Check]:
    if pa.types.is_floating(column.type):
        yield from _finite_check(column, f"feature {name}")
    elif pa.types.is_list(column.type):
        row, bad = 0, np.zeros(len(column), np.bool_)
        for chunk in column.chunks:
            inner = chunk.flatten()
            if inner.null_count:
                parent = pc.list_parent_indices(chunk).to_numpy()
                bad[row + parent[_as_mask(inner.is_null())]] = True
            row += len(chunk)
        yield bad, _received(column, f"feature {name} must be a list of strings")


def _finite_check(column: pa.ChunkedArray, name: str) -> Iterator[Check]:
    if column.null_count < len(column):
        infinite = ~_as_mask(pc.is_finite(column), absent=True)
        yield infinite, _received(column, f"{name} must be a finite number")


def _share_check(column: pa.ChunkedArray, name: str) -> Iterator[Check]:
    if column.null_count < len(column):
        outside = ~_as_mask(pc.and_(pc.greater(column, 0), pc.less_equal(column, 1)), absent=True)
        yield outside, _received(column, f"{name} must lie in (0, 1]")


def _as_mask(condition: pa.ChunkedArray | pa.Array, absent: bool = False) -> Mask:
    """A boolean column as a numpy mask; a null counts as ``absent``."""
    return np.asarray(pc.fill_null(condition, absent).to_numpy(zero_copy_only=False), np.bool_)


def _received(column: pa.ChunkedArray, expected: str) -> Callable[[int], str]:
    return lambda row: f"{expected}. Received: {_shown(column, row)}."


def _shown(column: pa.ChunkedArray, row: int) -> str:
    value = column[row].as_py()
    return "nothing" if value is None else repr(value)
