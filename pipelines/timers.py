"""Timers over numpy arrays: set many, pop all that are due, in a fixed order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.table_rows import Array

__all__ = ["Timers"]

# Timers are looked through this often while they wait, so the sorted part is small.
_LOOKS = 16
Slots = NDArray[np.int64]
Entry = tuple[NDArray[np.int32], NDArray[np.int64]]


class Timers:
    """Timers of integer slots.

    What is due before a border lies sorted; the rest lies as it was set until the border moves on.

    Parameters
    ----------
    span : int
        How long a timer typically runs, ms. Any span is correct; the right one is fast.

    Examples
    --------
    >>> timers = Timers(span=10)
    >>> timers.set(np.array([7, 8]), np.array([25, 12]))
    >>> timers.pop(clock=24)[0].tolist(), timers.pop(clock=25)[0].tolist()
    ([8], [7])
    """

    def __init__(self, span: int) -> None:
        self._stride = max(1, span // _LOOKS)
        self._border = 0
        self._soon: Entry = (np.zeros(0, np.int32), np.zeros(0, np.int64))
        self._begin = 0
        self._added: list[Entry] = []
        self._later: list[Entry] = []
        # Of the sorted part; the border where that is empty.
        self._next_due = 0

    def __len__(self) -> int:
        return len(self._soon[0]) - self._begin + sum(len(part[0]) for part in self._added + self._later)

    def set(self, slots: Slots, due: Slots) -> None:
        """Set a timer for each slot at ``due`` (ms)."""
        if len(slots) == 0:
            return
        earliest, small = int(due.min()), slots.astype(np.int32)
        if earliest >= self._border:
            self._later.append((small, due))
            return
        self._next_due = min(self._next_due, earliest)
        is_soon = due < self._border
        self._added.append((small[is_soon], due[is_soon]))
        self._later.append((small[~is_soon], due[~is_soon]))

    def pop(self, clock: int) -> tuple[Slots, Slots]:
        """Slots and due times of all timers with ``due <= clock``, ordered by due time, then by setting."""
        if clock < self._next_due:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if clock >= self._border:
            self._move_border(clock + 1 + self._stride)
        elif self._added:
            self._sort_in()
        slots, due = self._soon
        end = int(np.searchsorted(due, clock, side="right"))
        found = slots[self._begin : end].astype(np.int64), due[self._begin : end].copy()
        self._begin = end
        self._next_due = int(due[end]) if end < len(due) else self._border
        return found

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All timers, and the border."""
        slots, due = _joined(self._entries())
        return {"slots": slots, "due": due, "border": np.array([self._border])}

    def parts(self) -> dict[str, Array]:
        """The same in parts that nobody writes to: nothing is copied."""
        entries = self._entries()
        slots, due = [part[0] for part in entries], [part[1] for part in entries]
        return {"slots": slots, "due": due, "border": np.array([self._border])}

    def _entries(self) -> list[Entry]:
        self._sort_in()
        soon = self._soon[0][self._begin :], self._soon[1][self._begin :]
        return [soon, *self._later]

    def load_state(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from a `state`."""
        slots, due = np.array(state["slots"], np.int32), np.array(state["due"], np.int64)
        self._border = int(np.array(state["border"], np.int64)[0])
        is_soon = due < self._border
        self._soon, self._begin = (slots[is_soon], due[is_soon]), 0
        self._added, self._later = [], [(slots[~is_soon], due[~is_soon])]
        self._next_due = int(due[0]) if is_soon.any() else self._border

    def _move_border(self, border: int) -> None:
        slots, due = _joined(self._later)
        is_soon = due < border
        self._added.append((slots[is_soon], due[is_soon]))
        self._later = [(slots[~is_soon], due[~is_soon])]
        self._border = border
        self._sort_in()

    def _sort_in(self) -> None:
        """Sort what was added into what was sorted; of one instant what was set first stays first."""
        left = self._soon[0][self._begin :], self._soon[1][self._begin :]
        slots, due = _joined([left, *self._added])
        order = np.argsort(due, kind="stable")
        self._soon, self._begin, self._added = (slots[order], due[order]), 0, []


def _joined(entries: list[Entry]) -> Entry:
    if not entries:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    return np.concatenate([slots for slots, _ in entries]), np.concatenate([due for _, due in entries])
