"""The open label windows of one task, as columns: opened, told, closed.

The incremental form of the windows in `pipelines.attribution`: the same label, the same policies, many
windows at once.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipelines.duration import DAY_MS
from pipelines.label_fold import LONG_AGO, apply_outcomes
from pipelines.label_news import CONFIRM, FIRST, POSITIVE, Emission, News, WindowLabel
from pipelines.table_rows import Array, ChangedRows, TableRows
from pipelines.timers import Timers

__all__ = ["AT_ONCE", "LabelWindows"]

# What a window has said: nothing; that it is negative, so that a positive may follow; that it is positive;
# all that it has to say.
_UNSAID, _NEGATIVE, _POSITIVE, _FINISHED = 0, 1, 2, 3
# Policies that say a window's first row when it opens.
AT_ONCE = ("fnw", "fnc")
_WAITING = ("vanilla", "esdfm", "defuse", "bidefuse", "defer")

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class LabelWindows:
    """Label windows of one task, addressed by slot.

    Parameters
    ----------
    width, lateness : int
        Width of the window and how long after its end events may still arrive, ms.
    observation : int
        How long policies that wait do so before the first row, ms.
    policy : str
        One of `pipelines.config_sections.Policy`.
    confirm : int or None
        Policy ``defer``: how long after its opening a window is said once more, ms; None: when it closes.
    capacity : int
        Number of slots.

    Notes
    -----
    ``unsaid`` counts the accepted outcomes of a window that raised its label from 0 and that no row has said
    yet; ``time`` is the event time of the last outcome that had a say, ``happened`` of the one that raised
    the label.
    """

    _COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "opened": np.int64,
        "known": np.int64,
        "credit": np.float64,
        "time": np.int64,
        "happened": np.int64,
        "first_hash": np.uint64,
        "version": np.int32,
        "unsaid": np.int32,
        "traffic": np.float32,
        "stage": np.uint8,
        "is_open": np.bool_,
    }
    opened: Ints
    known: Ints
    credit: Floats
    time: Ints
    happened: Ints
    first_hash: NDArray[np.uint64]
    version: NDArray[np.int32]
    unsaid: NDArray[np.int32]
    traffic: NDArray[np.float32]
    stage: NDArray[np.uint8]
    is_open: Flags
    said: Floats

    def __init__(
        self, *, width: int, lateness: int, observation: int, policy: str, confirm: int | None, capacity: int
    ) -> None:
        self.width, self.lateness, self.observation = width, lateness, observation
        self.policy, self.confirm = policy, confirm
        self._closing = Timers(width + lateness)
        self._waiting = Timers(observation)
        self._confirming = Timers(width + lateness)
        # Hashes of the outcomes of a window beside its first: few windows have any.
        self._more: dict[int, list[int]] = {}
        self._columns = dict(self._COLUMNS)
        if policy == "defer":
            # The credit of the delayed positive that has been said.
            self._columns["said"] = np.float64
        for name, dtype in self._columns.items():
            setattr(self, name, np.zeros(capacity, dtype))
        self._changed = ChangedRows(capacity)

    def grow(self, capacity: int) -> None:
        for name in self._columns:
            column = getattr(self, name)
            larger = np.zeros(capacity, column.dtype)
            larger[: len(column)] = column
            setattr(self, name, larger)
        self._changed = ChangedRows(capacity)

    # Opening and closing -------------------------------------------------------------------------------

    def open(self, slot: Ints, opened: Ints, known: Ints) -> list[Emission]:
        """Open windows; returns the rows that the policy says at once."""
        self._changed.add(slot)
        for name in self._columns:
            getattr(self, name)[slot] = 0
        self.opened[slot], self.known[slot], self.is_open[slot] = opened, known, True
        self.time[slot] = self.happened[slot] = LONG_AGO
        # One tick late: whatever arrives at the very instant still counts.
        closed = self.closed(slot)
        if self.policy == "relabel":
            closed = (closed // DAY_MS + 1) * DAY_MS - 1
        self._closing.set(slot, closed + 1)
        if self.policy in _WAITING:
            self._waiting.set(slot, self._first_due(slot) + 1)
        if self.policy == "defer":
            self._confirming.set(slot, self._last_due(slot) + 1)
        if self.policy in AT_ONCE:
            self.stage[slot] = _NEGATIVE
            return [self._rows(slot, FIRST, known, known)]
        return []

    def closed(self, slot: Ints) -> Ints:
        """From when on nothing can change a window, ms."""
        return np.maximum(self.opened[slot] + (self.width + self.lateness), self.known[slot])

    def accepts(self, slot: Ints, event_time: Ints, arrival_time: Ints) -> Flags:
        """Whether outcomes lie inside their window and arrived before it closed."""
        opened = self.opened[slot]
        return (
            self.is_open[slot]
            & (event_time >= opened)
            & (event_time <= opened + self.width)
            & (arrival_time <= opened + (self.width + self.lateness))
        )

    def due(self, clock: int) -> list[Emission]:
        """Rows of timers up to a moment: first rows after waiting, and policy ``defer``'s last ones."""
        emissions = []
        if self.policy in _WAITING:
            slot, due = self._waiting.pop(clock)
            rows = self.is_open[slot] & (self.stage[slot] == _UNSAID)
            emissions += self._say_first(slot[rows], due[rows] - 1)
        if self.policy == "defer":
            slot, due = self._confirming.pop(clock)
            rows = self.is_open[slot] & (self.stage[slot] != _FINISHED)
            emissions += self._say_last(slot[rows], due[rows] - 1)
        return emissions

    def close(self, clock: int) -> tuple[Ints, list[Emission]]:
        """Slots whose window has closed by a moment, and the rows that this says (policy ``wait``)."""
        slot, due = self._closing.pop(clock)
        self._changed.add(slot)
        self.is_open[slot] = False
        if self._more:
            for each in slot.tolist():
                self._more.pop(each, None)
        if self.policy != "wait":
            return slot, []
        self.stage[slot] = np.where(self.credit[slot] > 0, _POSITIVE, _FINISHED)
        return slot, [self._rows(slot, FIRST, due - 1, due, self.credit[slot])]

    def daily(self, midnight: int) -> list[Emission]:
        """Policy ``relabel``: every open window with the label known before midnight (ms)."""
        slot = np.flatnonzero(self.is_open & (self.known < midnight))
        kind = np.where(self.stage[slot] == _UNSAID, FIRST, CONFIRM)
        self._changed.add(slot)
        self.stage[slot] = _NEGATIVE
        at = np.full(len(slot), midnight - 1)
        return [self._rows(slot, kind, at, at + 1, self.credit[slot])]

    # Outcomes ------------------------------------------------------------------------------------------

    def hear(self, news: News) -> tuple[list[Emission], Flags]:
        """Apply accepted outcomes; returns the rows that follow at once, and which outcomes are to be said.

        An outcome is to be said if it raises the label from 0 and no positive row has been said before.
        """
        emissions = self.catch_up(news.slot, news.known)
        slot = news.slot
        self._changed.add(slot)
        change = apply_outcomes(self.credit[slot], self.time[slot], news.event_time, news.op, news.credit)
        self.credit[slot], self.time[slot] = change.credit, change.time
        self.version[slot] += change.changes
        self.happened[slot] = np.where(change.rises, news.event_time, self.happened[slot])
        to_be_said = change.rises & (self.stage[slot] <= _NEGATIVE)
        self.unsaid[slot] += to_be_said
        return emissions + self._say_positive(slot, news.known), to_be_said

    def is_copy(self, slot: Ints, event_hash: NDArray[np.uint64]) -> Flags:
        """Whether an outcome has been heard before (see `remember`)."""
        first = self.first_hash[slot]
        copy = (first == event_hash) & (first != 0)
        if self._more:
            for row in np.flatnonzero(~copy & (first != 0)).tolist():
                copy[row] = int(event_hash[row]) in self._more.get(int(slot[row]), ())
        return np.asarray(copy, np.bool_)

    def remember(self, slot: Ints, event_hash: NDArray[np.uint64]) -> None:
        """Remember outcomes, at most one a slot, so that a copy is known as one."""
        is_first = self.first_hash[slot] == 0
        self.first_hash[slot[is_first]] = event_hash[is_first]
        for row in np.flatnonzero(~is_first).tolist():
            self._more.setdefault(int(slot[row]), []).append(int(event_hash[row]))

    def touch(self, slot: int) -> None:
        """Take note that a column of a slot has been written from outside."""
        self._changed.add(slot)

    def is_positive_said(self, slot: Ints) -> Flags:
        """Whether no later outcome will be said, for a positive row has been."""
        return np.asarray(self.stage[slot] >= _POSITIVE, np.bool_)

    def catch_up(self, slot: Ints, known: Ints) -> list[Emission]:
        """Rows of timers that were due before the news at ``known``, slots named once."""
        emissions = []
        if self.policy in _WAITING:
            due = self._first_due(slot)
            rows = (self.stage[slot] == _UNSAID) & (due < known)
            if rows.any():
                emissions += self._say_first(slot[rows], due[rows])
        if self.policy == "defer":
            due = self._last_due(slot)
            rows = (self.stage[slot] != _FINISHED) & (due < known)
            if rows.any():
                emissions += self._say_last(slot[rows], due[rows])
        return emissions

    def set_label(self, slot: int, known: int, label: WindowLabel) -> list[Emission]:
        """Set a label anew; returns the rows that follow at once."""
        one = np.array([slot])
        self._changed.add(slot)
        emissions = self.catch_up(one, np.array([known]))
        self.credit[slot], self.time[slot], self.happened[slot], self.version[slot] = label
        return emissions + self._say_positive(one, np.array([known]))

    # Rows ----------------------------------------------------------------------------------------------

    def _first_due(self, slot: Ints) -> Ints:
        return np.maximum(self.opened[slot] + self.observation, self.known[slot])

    def _last_due(self, slot: Ints) -> Ints:
        last = self.closed(slot)
        if self.confirm is not None:
            last = np.minimum(last, self.opened[slot] + self.confirm)
        return np.maximum(last, self._first_due(slot))

    def _say_first(self, slot: Ints, at: Ints) -> list[Emission]:
        credit = self.credit[slot]
        positive = credit > 0
        self._changed.add(slot)
        emissions = [self._rows(slot, FIRST, at, at + 1, credit)]
        if self.policy == "defer":
            emissions.append(
                self._rows(slot[positive], CONFIRM, at[positive], at[positive] + 1, credit[positive])
            )
        self.stage[slot] = np.where(positive, _FINISHED, _NEGATIVE)
        return emissions

    def _say_positive(self, slot: Ints, known: Ints) -> list[Emission]:
        if self.policy in ("wait", "relabel"):
            return []
        rows = (self.credit[slot] > 0) & (self.stage[slot] == _NEGATIVE)
        if not rows.any():
            return []
        slot, known = slot[rows], known[rows]
        self.stage[slot] = _POSITIVE
        credit = self.credit[slot]
        if self.policy == "defer":
            self.said[slot] = credit
        return [self._rows(slot, POSITIVE, known, known, np.ones(len(slot)), credit)]

    def _say_last(self, slot: Ints, at: Ints) -> list[Emission]:
        share = 1.0 - self.said[slot]
        self._changed.add(slot)
        self.stage[slot] = _FINISHED
        rows = share > 0
        slot, at, share = slot[rows], at[rows], share[rows]
        return [self._rows(slot, CONFIRM, at, at + 1, np.zeros(len(slot)), share)]

    def _rows(
        self,
        slot: Ints,
        kind: int | Ints,
        at: Ints,
        known_at: Ints,
        label: Floats | None = None,
        weight: Floats | None = None,
    ) -> Emission:
        n = len(slot)
        return Emission(
            slot,
            known_at,
            np.minimum(at - self.opened[slot], self.width),
            np.broadcast_to(np.asarray(kind, np.int8), n),
            np.zeros(n) if label is None else label,
            np.ones(n) if weight is None else weight,
            self.version[slot],
        )

    # State ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, NDArray[np.generic]]:
        arrays: dict[str, NDArray[np.generic]] = {name: getattr(self, name) for name in self._columns}
        for name, timers in self._timers().items():
            arrays.update({f"{name}_{part}": value for part, value in timers.state().items()})
        return {**arrays, **self._copies()}

    def take_changes(self) -> tuple[dict[str, Array], dict[str, list[TableRows]]]:
        """What ``state`` gives, for whoever keeps the last answer.

        Returns
        -------
        dict of str to array or its parts
            What is small, and timers.
        dict of str to list of TableRows
            Columns by slot: the slots that changed since the last call.
        """
        whole: dict[str, Array] = dict(self._copies())
        for name, timers in self._timers().items():
            whole.update({f"{name}_{part}": value for part, value in timers.parts().items()})
        slots = self._changed.take()
        rows = {name: [TableRows.copied(getattr(self, name), slots)] for name in self._columns}
        return whole, rows

    def _copies(self) -> dict[str, NDArray[np.generic]]:
        pairs = [(slot, value) for slot, values in self._more.items() for value in values]
        return {
            "more_slot": np.array([slot for slot, _ in pairs], np.int64),
            "more_hash": np.array([value for _, value in pairs], np.uint64),
        }

    def load_state(self, arrays: dict[str, NDArray[np.generic]]) -> None:
        for name, dtype in self._columns.items():
            setattr(self, name, np.array(arrays[name], dtype))
        self._changed = ChangedRows(len(self.opened))
        for name, timers in self._timers().items():
            timers.load_state({part: arrays[f"{name}_{part}"] for part in ("slots", "due", "border")})
        self._more = {}
        for slot, value in zip(arrays["more_slot"].tolist(), arrays["more_hash"].tolist(), strict=True):
            self._more.setdefault(slot, []).append(value)

    def _timers(self) -> dict[str, Timers]:
        return {"closing": self._closing, "waiting": self._waiting, "confirming": self._confirming}
