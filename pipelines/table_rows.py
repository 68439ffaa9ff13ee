"""Rows of a table that changed, with the values that they have now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "ChangedRows", "RowLog", "TableRows"]

# An array, or the parts that make it up, one after the other: joining them is left to who needs the whole.
Array = NDArray[Any] | list[NDArray[Any]]


@dataclass(frozen=True)
class TableRows:
    """What changed of a table since it was last asked for: copies, or arrays that nobody writes to.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,), or None
        Of a row that is named twice the last value counts. None: ``values`` is the whole table.
    values : ndarray, shape (n, ...)
    """

    rows: NDArray[np.int64] | None
    values: NDArray[Any]

    @classmethod
    def copied(cls, table: NDArray[Any], rows: NDArray[np.int64] | None) -> TableRows:
        """Some rows of a table, or all, as they are now."""
        return cls(rows, table.copy() if rows is None else table[rows])


class ChangedRows:
    """Which rows were written since somebody last asked; at first, all.

    Parameters
    ----------
    rows : int

    Examples
    --------
    >>> changed = ChangedRows(4)
    >>> changed.take() is None
    True
    >>> changed.add(np.array([3, 1]))
    >>> changed.take().tolist(), changed.take().tolist()
    ([1, 3], [])
    """

    def __init__(self, rows: int) -> None:
        self._is_changed = np.zeros(rows, np.bool_)
        self._is_all = True

    def add(self, rows: NDArray[np.int64] | int) -> None:
        """Take note of rows that are written."""
        self._is_changed[rows] = True

    def add_all(self) -> None:
        """Take note that any row may have been written."""
        self._is_all = True

    def take(self) -> NDArray[np.int64] | None:
        """Rows written since the last call, ascending; None if all may have been."""
        rows = None if self._is_all else np.flatnonzero(self._is_changed)
        self._is_changed.fill(False)
        self._is_all = False
        return rows


class RowLog:
    """Rows as they were written, kept until they are asked for: nothing is copied.

    Parameters
    ----------
    bound : int
        So many bytes at most are kept. What is written beyond that is forgotten, and the answer is None: the
        whole table is to be taken.

    Examples
    --------
    >>> log = RowLog()
    >>> log.take() is None
    True
    >>> log.add(np.array([1, 3]), {"price": np.array([0.5, 0.7])})
    >>> [(part.rows.tolist(), part.values.tolist()) for part in log.take()["price"]]
    [([1, 3], [0.5, 0.7])]
    """

    def __init__(self, bound: int = 256 * 2**20) -> None:
        self._bound = bound
        self._bytes = 0
        self._parts: dict[str, list[TableRows]] | None = None

    def add(self, rows: NDArray[np.int64], values: dict[str, NDArray[Any]]) -> None:
        """Take note of rows that have been written; neither array may be changed any more."""
        if self._parts is None:
            return
        self._bytes += rows.nbytes + sum(column.nbytes for column in values.values())
        if self._bytes > self._bound:
            self.forget()
            return
        for name, column in values.items():
            self._parts.setdefault(name, []).append(TableRows(rows, column))

    def forget(self) -> None:
        """Ask for whole tables the next time."""
        self._parts = None

    def take(self) -> dict[str, list[TableRows]] | None:
        """What was written since the last call, in order, by table; None if that is not known."""
        parts, self._parts, self._bytes = self._parts, {}, 0
        return parts
