"""View-through windows: what comes of an impression and belongs to no click.

A conversion belongs to a click that is known and happened at or before it. As long as a click may still
come, the conversions of a window are kept; when it is known, the label is made anew without its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.attribution import Label, Outcome, apply_outcome
from pipelines.events import CONVERSION, OPERATIONS
from pipelines.joined import StepLog
from pipelines.label_fold import LONG_AGO, rounds
from pipelines.label_news import News, WindowLabel
from pipelines.label_windows import LabelWindows
from pipelines.orphans import Orphans

__all__ = ["Clicks", "ViewThrough"]

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Clicks:
    """Credited clicks: slot, when they happened and since when they are known; each (n,), ms."""

    slot: Ints
    event_time: Ints
    known: Ints


@dataclass
class _Heard:
    """A conversion that a window has heard while a click could still claim it.

    ``is_counted``: it is this window's in the accounts; until then it is an orphan's.
    """

    event_time: int
    known: int
    op: int
    credit: float
    event_hash: int
    to_be_said: bool
    is_counted: bool


class ViewThrough:
    """The label windows of the task ``view_through``.

    Parameters
    ----------
    windows : LabelWindows
    task : int
        Place of the task among the joiner's.
    """

    def __init__(self, windows: LabelWindows, task: int) -> None:
        self.windows, self.task = windows, task
        self._unclaimed: dict[int, list[_Heard]] = {}

    def hear(self, news: News, is_own: Flags, may_come: Flags, clicks: Clicks, step: StepLog) -> None:
        """Apply accepted conversions, and clicks that have become known, in order of becoming known.

        Parameters
        ----------
        news : News
            Of any number a slot.
        is_own : ndarray of bool, (n,)
            Conversions that no click can claim, so that they are counted here.
        may_come : ndarray of bool, (n,)
            Whether a click that may claim it may still become known.
        clicks : Clicks
            The clicks of this step.
        """
        touched = np.isin(clicks.slot, news.slot)
        if self._unclaimed:
            touched |= np.array([slot in self._unclaimed for slot in clicks.slot.tolist()], np.bool_)
        claims = np.flatnonzero(touched)
        n = len(news)
        slot = np.concatenate([news.slot, clicks.slot[claims]])
        known = np.concatenate([news.known, clicks.known[claims]])
        # At one instant a click is known before what it claims.
        order = np.lexsort((np.arange(len(slot)) < n, known))
        for turn in rounds(slot[order]):
            rows = order[turn]
            outcomes = rows[rows < n]
            self._hear(news.take(outcomes), is_own[outcomes], may_come[outcomes], step)
            for row in claims[rows[rows >= n] - n].tolist():
                self._claim(int(clicks.slot[row]), int(clicks.event_time[row]), int(clicks.known[row]), step)

    def settle(self, slots: Ints, keys: NDArray[np.uint64], orphans: Orphans, step: StepLog) -> None:
        """Slots whose click windows have closed: what no click has claimed is theirs."""
        if not self._unclaimed:
            return
        for slot in slots.tolist():
            heard = {each.event_hash: each for each in self._unclaimed.pop(slot, [])}
            for orphan in orphans.take_heard(keys[slot].tobytes(), set(heard)) if heard else []:
                step.count(CONVERSION, "pending", -1)
                self._count(slot, heard[orphan.event_hash], step)

    def state(self) -> list[list[Any]]:
        """Plain rows of what a click may still claim."""
        return [
            [slot, *(str(value) if name == "event_hash" else value for name, value in vars(each).items())]
            for slot, heard in self._unclaimed.items()
            for each in heard
        ]

    def load_state(self, state: list[list[Any]]) -> None:
        """Continue from a `state`."""
        self._unclaimed = {}
        for slot, event_time, known, op, credit, event_hash, to_be_said, is_counted in state:
            each = _Heard(event_time, known, op, credit, int(event_hash), to_be_said, is_counted)
            self._unclaimed.setdefault(slot, []).append(each)

    def _hear(self, news: News, is_own: Flags, may_come: Flags, step: StepLog) -> None:
        """Apply conversions, at most one a slot."""
        if len(news) == 0:
            return
        copy = self.windows.is_copy(news.slot, news.event_hash)
        for row in np.flatnonzero(copy & is_own).tolist():
            slot, event_hash = int(news.slot[row]), int(news.event_hash[row])
            heard = [each for each in self._unclaimed.get(slot, ()) if each.event_hash == event_hash]
            if heard and not heard[0].is_counted:
                self._count(slot, heard[0], step)
            else:
                step.count(CONVERSION, "duplicate", 1)
        news, is_own, may_come = news.take(~copy), is_own[~copy], may_come[~copy]
        emissions, to_be_said = self.windows.hear(news)
        step.tell(self.task, emissions)
        self.windows.remember(news.slot, news.event_hash)
        step.count(CONVERSION, "pending", int((is_own & to_be_said).sum()))
        step.count(CONVERSION, "superseded", int((is_own & ~to_be_said).sum()))
        self.windows.unsaid[news.slot] -= to_be_said & ~is_own
        for row in np.flatnonzero(may_come).tolist():
            self._unclaimed.setdefault(int(news.slot[row]), []).append(
                _Heard(
                    int(news.event_time[row]),
                    int(news.known[row]),
                    int(news.op[row]),
                    float(news.credit[row]),
                    int(news.event_hash[row]),
                    bool(to_be_said[row]),
                    bool(is_own[row]),
                )
            )

    def _claim(self, slot: int, event_time: int, known: int, step: StepLog) -> None:
        """A click is known: the label without what happened at or after it."""
        heard = self._unclaimed.pop(slot, [])
        if not heard or known > self.windows.closed(np.array([slot]))[0]:
            return
        label = Label()
        for each in heard:
            if each.event_time < event_time:
                outcome = Outcome(each.known, each.event_time, OPERATIONS[each.op], each.credit)
                label = apply_outcome(label, outcome)
        anew = WindowLabel(
            label.credit,
            int(max(label.time, LONG_AGO)),
            LONG_AGO if label.happened is None else label.happened,
            label.version,
        )
        step.tell(self.task, self.windows.set_label(slot, known, anew))

    def _count(self, slot: int, heard: _Heard, step: StepLog) -> None:
        """Take a conversion into this window's accounts."""
        heard.is_counted = True
        one = np.array([slot])
        if heard.to_be_said and self.windows.is_positive_said(one)[0]:
            step.count(CONVERSION, "trained", 1)
        elif heard.to_be_said and self.windows.is_open[slot]:
            step.count(CONVERSION, "pending", 1)
            self.windows.unsaid[slot] += 1
            self.windows.touch(slot)
        else:
            step.count(CONVERSION, "superseded", 1)
