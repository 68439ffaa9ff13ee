"""What the last cut of a worker's state held, kept up to date from the rows that changed.

A commit needs the whole state twice: to hash it, and every so often to write it as a base. The learning
thread hands over only the rows of its tables that it touched; the mirror puts them into a copy of the tables
that is the committing side's own. It costs the memory of the tables once more and saves a pause as long as
copying them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.state_digest import BlockHashes, digest_of
from models.table_rows import TableRows

__all__ = ["StateMirror"]

Arrays = Mapping[str, NDArray[Any]]


class StateMirror:
    """The arrays of a cut, and which rows of its tables no committed checkpoint has yet.

    Attributes
    ----------
    arrays : dict of str to ndarray
        Those that are written whole each time.
    tables : dict of str to ndarray
        Those that change by rows.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self.tables: dict[str, NDArray[Any]] = {}
        self._hashes: dict[str, BlockHashes] = {}
        self._changed: dict[str, NDArray[np.bool_]] = {}
        self._is_whole = False

    def apply(self, arrays: Arrays, tables: Mapping[str, TableRows]) -> None:
        """Take over a cut; its arrays are the mirror's from now on.

        Raises
        ------
        ValueError
            If rows are given of a table that has never been given whole.
        """
        self.arrays = dict(arrays)
        for name in self.tables.keys() - tables.keys():
            del self.tables[name], self._hashes[name], self._changed[name]
            self._is_whole = True
        for name, part in tables.items():
            if part.rows is None:
                self.tables[name] = np.require(part.values, requirements=["C", "W"])
                self._hashes[name] = BlockHashes(self.tables[name])
                self._changed[name] = np.zeros(len(part.values), np.bool_)
                self._is_whole = True
            elif name not in self.tables:
                raise ValueError(f"rows of {name} came before the table")
            else:
                self.tables[name][part.rows] = part.values
                self._hashes[name].rehash(part.rows)
                self._changed[name][part.rows] = True

    def changes(self) -> dict[str, NDArray[np.int64]] | None:
        """Rows of each table that no committed checkpoint has; None if a delta would not do.

        It would not if a table is new or gone, or if more than half of all rows changed.
        """
        if self._is_whole or not self.tables:
            return None
        rows = {name: np.flatnonzero(changed) for name, changed in self._changed.items()}
        changed = sum(self.tables[name][:1].nbytes * len(found) for name, found in rows.items())
        whole = sum(table.nbytes for table in self.tables.values())
        return rows if 2 * changed <= whole else None

    def settle(self) -> None:
        """Take note that the state as it is here has been committed."""
        self._is_whole = False
        for changed in self._changed.values():
            changed.fill(False)

    def digest(self, plain: Mapping[str, Any]) -> str:
        """What `state_digest` would say of all arrays and the plain data."""
        found = {name: BlockHashes(array).digest() for name, array in self.arrays.items()}
        found.update({name: hashes.digest() for name, hashes in self._hashes.items()})
        return digest_of(found, plain)
