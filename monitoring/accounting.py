"""The conservation law of rows: every row read is in exactly one class, and the classes add up to them.

============== ======================================================================================
class          the row was
============== ======================================================================================
trained        learned from
late           behind the watermark: counted and kept, not learned
duplicate      a redelivery of an event already read
superseded     replaced by a later version of the same label before it was learned
dead_lettered  malformed or impossible: written to the dead letters with its reason
expired        valid, but its window closed without anything to learn from it
pending        waiting in the joiner; it moves to another class later
warm_up        read while catching up before the online start: learned offline by the teacher
============== ======================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.errors import DataError
from pipelines.events import KINDS

__all__ = ["CLASSES", "Accounting"]

CLASSES = ("trained", "late", "duplicate", "superseded", "dead_lettered", "expired", "pending", "warm_up")


class Accounting:
    """Rows of each event kind in each class.

    Examples
    --------
    >>> accounting = Accounting()
    >>> accounting.add("click", "trained", 7)
    >>> accounting.add("click", "pending", 3)
    >>> accounting.move("click", "pending", "expired")
    >>> accounting.check({"click": 11})
    {'impression': 0, 'click': 1, 'conversion': 0}
    """

    def __init__(self) -> None:
        self._rows = {kind: dict.fromkeys(CLASSES, 0) for kind in KINDS}

    def _known(self, kind: str, row_class: str, rows: int) -> None:
        if kind not in KINDS:
            raise DataError(f"expected an event kind ({', '.join(KINDS)}), received {kind!r}.")
        if row_class not in CLASSES:
            raise DataError(f"expected a row class ({', '.join(CLASSES)}), received {row_class!r}.")
        if rows < 0:
            raise DataError(f"expected a number of rows >= 0, received {rows}.")

    def add(self, kind: str, row_class: str, rows: int = 1) -> None:
        """Count ``rows`` newly read rows of ``kind`` in ``row_class``."""
        self._known(kind, row_class, rows)
        self._rows[kind][row_class] += int(rows)

    def move(self, kind: str, row_class: str, to: str, rows: int = 1) -> None:
        """Take rows from one class to another, as when a pending row is trained; DataError if too few."""
        self._known(kind, row_class, rows)
        self._known(kind, to, rows)
        held = self._rows[kind][row_class]
        if rows > held:
            raise DataError(
                f"expected at least {rows} {row_class} {kind} rows to move to {to}, received {held}."
            )
        self._rows[kind][row_class] -= int(rows)
        self._rows[kind][to] += int(rows)

    def remove(self, kind: str, row_class: str, rows: int = 1) -> None:
        """Take rows out of a class that are counted in another one by `add`; DataError if too few."""
        self._known(kind, row_class, rows)
        if rows > self._rows[kind][row_class]:
            raise DataError(
                f"expected at least {rows} {row_class} {kind} rows to remove, "
                f"received {self._rows[kind][row_class]}."
            )
        self._rows[kind][row_class] -= int(rows)

    def count(self, kind: str, row_class: str) -> int:
        """Rows of one kind in one class."""
        self._known(kind, row_class, 0)
        return self._rows[kind][row_class]

    def total(self, kind: str | None = None) -> int:
        """Rows of one kind in all classes, or of all kinds."""
        if kind is None:
            return sum(self.total(each) for each in KINDS)
        self._known(kind, CLASSES[0], 0)
        return sum(self._rows[kind].values())

    def value(self) -> dict[str, dict[str, int]]:
        """Rows by kind and class, every class present."""
        return {kind: dict(classes) for kind, classes in self._rows.items()}

    def by_class(self) -> dict[str, int]:
        """Rows by class, over all kinds."""
        return {name: sum(classes[name] for classes in self._rows.values()) for name in CLASSES}

    def merge(self, other: Accounting) -> Accounting:
        """Return the accounting of both; neither input changes."""
        both = Accounting()
        for kind in KINDS:
            for name in CLASSES:
                both._rows[kind][name] = self._rows[kind][name] + other._rows[kind][name]
        return both

    def check(self, rows_read: Mapping[str, int]) -> dict[str, int]:
        """Rows read less rows accounted for, by kind: all 0 if the law holds; positive means rows were lost.

        Parameters
        ----------
        rows_read : dict of kind -> rows
            A kind that is missing was not read: 0.
        """
        for kind in rows_read:
            self._known(kind, CLASSES[0], 0)
        return {kind: int(rows_read.get(kind, 0)) - self.total(kind) for kind in KINDS}

    def state(self) -> dict[str, Any]:
        """JSON state: the counts that are not 0."""
        return {
            kind: {name: rows for name, rows in classes.items() if rows}
            for kind, classes in self._rows.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Accounting:
        """Inverse of `state`, exact; DataError on an unknown kind or class."""
        accounting = cls()
        for kind, classes in state.items():
            for name, rows in classes.items():
                accounting.add(kind, name, rows)
        return accounting

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Accounting) and self._rows == other._rows

    __hash__ = None  # type: ignore[assignment]  # it counts, so it changes

    def __repr__(self) -> str:
        return f"Accounting({self.state()})"
