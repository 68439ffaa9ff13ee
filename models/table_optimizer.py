"""What all optimizers of table rows share: they touch the rows of the batch and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.table_rows import TableRows

__all__ = ["TableOptimizer", "resized"]


def resized(table: Tensor, rows: int) -> Tensor:
    """A copy with more or fewer rows at its end; new ones are zero."""
    copy = torch.zeros((rows, *table.shape[1:]), dtype=table.dtype)
    kept = min(rows, len(table))
    copy[:kept] = table[:kept]
    return copy


class TableOptimizer(ABC):
    """An optimizer of one table; its state, the *slots*, is one entry or row for each row of the table.

    The gradients of a row are *summed* over the batch, not averaged: what one event does to the row of its
    user is then the same in a batch of 256 and in a last batch of 3. A row that has not been touched for a
    day is left exactly as it was.

    An optimizer says how slots begin (`first_slots`) and what one update makes of rows and slots
    (`updated`). Both take rows apart from the table, so that they are the same for one row and for all.

    Parameters
    ----------
    table : Tensor, shape (rows, d) or (rows,)
        Updated in place. Row 0 is padding and stays zero.

    Attributes
    ----------
    slots : dict of str to Tensor
        Each of shape (rows, ...). Whoever writes to them or to the table calls `touch_all`.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self.slots = self.first_slots(table)
        # Sums duplicates without a sort: all zero between steps, so not part of the state.
        self._scratch = torch.zeros_like(table)
        self._touched = torch.zeros(len(table), dtype=torch.bool)
        self._all_touched = True
        self._collected: list[dict[str, TableRows]] = []

    @abstractmethod
    def first_slots(self, values: Tensor) -> dict[str, Tensor]:
        """Slots of rows that have learned nothing and stand at ``values``."""

    @abstractmethod
    def updated(
        self, old: Tensor, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """New values and slots of rows, from copies of the old ones and the sum of their gradients."""

    def reset(self) -> None:
        """Forget all gradients seen; the table is taken as it stands."""
        for name, first in self.first_slots(self._table).items():
            self.slots[name].copy_(first)
        self.touch_all()

    def start(self, rows: Tensor) -> None:
        """Begin learning some rows, each named once, that have been written to the table."""
        for name, first in self.first_slots(self._table.index_select(0, rows)).items():
            self.slots[name].index_copy_(0, rows, first)
        self._touched.index_fill_(0, rows, True)

    def clear(self, rows: Tensor) -> None:
        """Make some rows and their slots zero."""
        for values in (self._table, *self.slots.values()):
            values.index_fill_(0, rows, 0)
        self._touched.index_fill_(0, rows, True)

    def resize(self, table: Tensor) -> None:
        """Go on with a table of more or fewer rows: the first are the same, slots of new ones are zero."""
        self._table = table
        for name, old in self.slots.items():
            self.slots[name] = resized(old, len(table))
        self._scratch = torch.zeros_like(table)
        self._touched = torch.zeros(len(table), dtype=torch.bool)
        self.touch_all()

    def touch_all(self) -> None:
        """Count every row as changed: whoever writes the table or the slots by other means says so."""
        self._all_touched = True
        self._collected.clear()

    def collect(self, limit: int) -> None:
        """Copy at most so many changed rows ahead of `take_changes`.

        Those that change again are copied again: worth it just before, for what it saves then.
        """
        if not self._all_touched:
            self._collect(limit)

    def take_changes(self) -> dict[str, list[TableRows]]:
        """Copies of what changed since the last call, of the table, as ``weights``, and of each slot."""
        if self._all_touched:
            self._all_touched = False
            self._touched.zero_()
            return {name: [TableRows(None, array.copy())] for name, array in self._arrays().items()}
        self._collect()
        collected, self._collected = self._collected, []
        return {name: [part[name] for part in collected] for name in self._arrays()}

    def _collect(self, limit: int | None = None) -> None:
        # Much faster than torch's nonzero.
        touched = self._touched.numpy()
        rows = np.flatnonzero(touched)[:limit]
        touched[rows] = False
        changed = {name: TableRows(rows, array.take(rows, axis=0)) for name, array in self._arrays().items()}
        self._collected.append(changed)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"weights": self._table.numpy(), **{name: slot.numpy() for name, slot in self.slots.items()}}

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One update.

        Parameters
        ----------
        rows : Tensor of int64, shape (m,)
            Rows of the table, with repetitions.
        gradient : Tensor, shape (m, d) or (m,)
            Of the sum of the loss, for each entry of ``rows``.
        """
        scratch = self._scratch
        scratch.index_add_(0, rows, gradient)
        total = scratch.index_select(0, rows)
        scratch.index_fill_(0, rows, 0.0)
        old = self._table.index_select(0, rows)
        new, slots = self.updated(
            old, total, {name: slot.index_select(0, rows) for name, slot in self.slots.items()}
        )
        # Repetitions of a row write the same value, so the order of the copies does not matter.
        for name, slot in slots.items():
            self.slots[name].index_copy_(0, rows, slot)
        self._table.index_copy_(0, rows, new)
        self._table[0] = 0.0
        self._touched.index_fill_(0, rows, True)
