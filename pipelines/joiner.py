"""The stream joiner: the attribution rule, one step of events at a time, with bounded state.

An impression takes a slot: its encoded features, what was predicted for it and its label windows. The
slot is free again when the last of its windows has closed. Clicks and conversions that arrive before what
they belong to are held as orphans for as long as it can still arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config_sections import TASKS, AttributionConfig, Task
from pipelines.duration import DAY_MS
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.joined import Arrivals, Closed, Examples, Joined, Outcomes, StepLog
from pipelines.label_fold import rounds
from pipelines.label_news import CONFIRM, FIRST, POSITIVE, Emission, News
from pipelines.label_windows import LabelWindows
from pipelines.orphans import Orphan, Orphans
from pipelines.slot_table import Keys, SlotTable, hash_ids
from pipelines.table_rows import Array, RowLog, TableRows
from pipelines.traffic import TrafficRatio
from pipelines.view_through import Clicks, ViewThrough

__all__ = ["CLICK_TASK", "CONVERSION_TASK", "TASKS", "Joiner"]

CLICK_TASK, CONVERSION_TASK, VIEW_TASK = 0, 1, 2
_KIND_OF_TASK = (CLICK, CONVERSION, CONVERSION)
_NEVER = np.iinfo(np.int64).max
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Joiner:
    """Joins impressions, clicks and conversions into examples.

    Parameters
    ----------
    attribution : AttributionConfig
        Its view-through window, if any, makes the third task.
    policy : str or one for each task
        Of `pipelines.config_sections.Policy`.
    observation : one for each task, optional
        How long a first row waits under a policy that waits, ms; the attribution's without it.
    confirm_window : int, optional
        Policy ``defer``: how long after its opening a window is said once more, ms; without it, when it has
        closed.
    traffic_ratio : bool
        Weight rows that come again by the rate of first rows now over the rate when theirs was said.

    Attributes
    ----------
    tasks : tuple of str
    windows : tuple of LabelWindows
        By task.
    features : dict of str to ndarray
        What travels with each impression, by slot.
    """

    def __init__(
        self,
        attribution: AttributionConfig,
        policy: str | Sequence[str],
        *,
        observation: Sequence[int] | None = None,
        confirm_window: int | None = None,
        traffic_ratio: bool = True,
    ) -> None:
        self.attribution, self.traffic_ratio = attribution, traffic_ratio
        self.tasks: tuple[Task, ...] = attribution.tasks
        policies = [policy] * len(self.tasks) if isinstance(policy, str) else policy
        waits = observation or [attribution.observation(task) for task in self.tasks]
        self._patience = attribution.click_window + attribution.allowed_lateness
        self._table = SlotTable()
        self.windows = tuple(
            LabelWindows(
                width=attribution.width(task),
                lateness=attribution.allowed_lateness,
                observation=wait,
                policy=own_policy,
                confirm=confirm_window,
                capacity=self._table.capacity,
            )
            for task, own_policy, wait in zip(self.tasks, policies, waits, strict=True)
        )
        self._views = ViewThrough(self.windows[VIEW_TASK], VIEW_TASK) if len(self.tasks) > VIEW_TASK else None
        self._ratio = [TrafficRatio(kinds=2) for _ in self.tasks]
        self._orphans = {CLICK: Orphans(self._patience), CONVERSION: Orphans(self._patience)}
        self.features: dict[str, NDArray[Any]] = {}
        self._stored = RowLog()
        self._clock = -1

    def __len__(self) -> int:
        """Open impressions."""
        return len(self._table)

    def process(self, impressions: Arrivals, clicks: Outcomes, conversions: Outcomes, clock: int) -> Joined:
        """Apply one step of events; ``clock`` is the arrival time of the step's last event, ms.

        1. Impressions open click and view-through windows; orphaned clicks that waited for them come in.
        2. Clicks are credited and open conversion windows; orphaned conversions come in.
        3. Conversions are credited.
        4. Timers up to ``clock`` are told, windows closed, orphans out of patience given up.

        The slots of closed windows stay readable until `release`.
        """
        step = StepLog(len(self.tasks))
        kinds = (impressions, clicks, conversions)
        start = [0, 0, 0]
        for midnight in self._midnights(kinds, clock):
            stop = [int(np.searchsorted(events.arrival_time, midnight)) for events in kinds]
            self._advance(impressions, clicks, conversions, start, stop, midnight - 1, step)
            for task, windows in enumerate(self.windows):
                if windows.policy == "relabel":
                    step.tell(task, windows.daily(midnight))
            start = stop
        self._advance(impressions, clicks, conversions, start, [len(events) for events in kinds], clock, step)
        self._clock = clock
        examples = tuple(self._examples(task, step, clock) for task in range(len(self.tasks)))
        self._count_told(examples, step)
        closed = tuple(self._closed(task, step) for task in range(len(self.tasks)))
        repeated = np.zeros(len(impressions), np.bool_)
        for rows in step.repeated:
            repeated[rows] = True
        return Joined(examples, closed, step.counts, step.negative_delays, repeated)

    def release(self, joined: Joined) -> None:
        """Free the slots whose last window closed in this step."""
        closed = np.unique(np.concatenate([part.slot for part in joined.closed]))
        is_open = np.zeros(len(closed), np.bool_)
        for windows in self.windows:
            is_open |= windows.is_open[closed]
        self._table.remove(closed[~is_open])

    def touch_features(self) -> None:
        """Take note that features have been written, or added, from outside."""
        self._stored.forget()

    def write_feature(self, name: str, slots: Ints, column: int, values: NDArray[Any] | float) -> None:
        """Write one column of a feature, shape (capacity, columns), in some slots."""
        self.features[name][slots, column] = values
        self._stored.add(slots, {name: self.features[name][slots]})

    def knows(self, impression_id: list[str]) -> Flags:
        """Which impressions have an open window, shape (n,)."""
        return np.asarray(self._table.find(hash_ids(impression_id)) >= 0, np.bool_)

    def keys_of(self, slots: Ints) -> Keys:
        """Hash of the id of the impression in each slot, (n, 2); until the next step also of freed ones."""
        return self._table.keys[slots]

    def open_windows(self, task: int) -> Closed:
        """The windows of a task that are open now, with the label known so far, by time of opening."""
        windows = self.windows[task]
        slot = np.flatnonzero(windows.is_open)
        slot = slot[np.argsort(windows.opened[slot], kind="stable")]
        return Closed(slot, windows.credit[slot], windows.opened[slot], windows.happened[slot])

    # One stretch of events -----------------------------------------------------------------------------

    def _advance(
        self,
        impressions: Arrivals,
        clicks: Outcomes,
        conversions: Outcomes,
        start: list[int],
        stop: list[int],
        clock: int,
        step: StepLog,
    ) -> None:
        fresh = self._open_impressions(impressions.slice(start[0], stop[0]), start[0], step)
        known = self.windows[CLICK_TASK].known
        waited = self._waiting_for(CLICK, fresh, known[fresh], step)
        credited = self._credit_clicks(clicks.slice(start[1], stop[1]).after(waited), step)
        waited = self._waiting_for(CONVERSION, credited.slot, credited.known, step)
        arrived = conversions.slice(start[2], stop[2]).after(waited)
        self._credit_conversions(arrived, step)
        self._hear_views(arrived, fresh, credited, step)
        for task, windows in enumerate(self.windows):
            step.tell(task, windows.due(clock))
            slots, emissions = windows.close(clock)
            step.tell(task, emissions)
            step.closing[task].append(slots)
            if task == CLICK_TASK and self._views is not None:
                self._views.settle(slots, self._table.keys, self._orphans[CONVERSION], step)
        for kind, orphans in self._orphans.items():
            expired = orphans.expire(clock)
            step.count(kind, "expired", expired)
            step.count(kind, "pending", -expired)

    def _midnights(self, kinds: tuple[Arrivals, Outcomes, Outcomes], clock: int) -> range:
        """The midnights (UTC) of the arrival clock in this step, where a policy speaks at midnight."""
        if all(windows.policy != "relabel" for windows in self.windows):
            return range(0)
        arrived = [int(events.arrival_time[0]) for events in kinds if len(events)]
        last = self._clock if self._clock >= 0 else min(arrived, default=clock)
        return range((last // DAY_MS + 1) * DAY_MS, clock + 1, DAY_MS)

    # Impressions ---------------------------------------------------------------------------------------

    def _open_impressions(self, arrivals: Arrivals, offset: int, step: StepLog) -> Ints:
        """Slots of the impressions that are new."""
        if len(arrivals) == 0:
            return np.zeros(0, np.int64)
        keys = hash_ids(arrivals.impression_id)
        in_time = arrivals.arrival_time <= arrivals.event_time + self._patience
        slots = np.full(len(arrivals), -1, np.int64)
        is_new = np.zeros(len(arrivals), np.bool_)
        slots[in_time], is_new[in_time] = self._table.add(keys[in_time])
        if not in_time.all():
            slots[~in_time] = self._table.find(keys[~in_time])
        repeated = np.flatnonzero((slots >= 0) & ~is_new)
        step.repeated.append(repeated + offset)
        step.count(IMPRESSION, "duplicate", len(repeated))
        step.count(IMPRESSION, "late", int((slots < 0).sum()))
        rows = np.flatnonzero(is_new)
        fresh = slots[rows]
        self._grow()
        self._store_features(fresh, rows, arrivals.features)
        step.count(IMPRESSION, "pending", len(rows))
        for task in (CLICK_TASK, VIEW_TASK)[: len(self.tasks) - 1]:
            opened, known = arrivals.event_time[rows], arrivals.arrival_time[rows]
            step.tell(task, self.windows[task].open(fresh, opened, known))
        return fresh

    def _store_features(self, slots: Ints, rows: Ints, features: dict[str, NDArray[Any]]) -> None:
        stored = {name: values[rows] for name, values in features.items()}
        for name, values in stored.items():
            if name not in self.features:
                self.features[name] = np.zeros((self._table.capacity, *values.shape[1:]), values.dtype)
                self._stored.forget()
            self.features[name][slots] = values
        self._stored.add(slots, stored)

    def _grow(self) -> None:
        """Make room in all columns for the slots of the table."""
        capacity = self._table.capacity
        if len(self.windows[0].opened) == capacity:
            return
        for windows in self.windows:
            windows.grow(capacity)
        for name, column in self.features.items():
            larger = np.zeros((capacity, *column.shape[1:]), column.dtype)
            larger[: len(column)] = column
            self.features[name] = larger
        self._stored.forget()

    # Orphans -------------------------------------------------------------------------------------------

    def _held(self, kind: int, slots: Ints) -> Iterator[tuple[int, Orphan]]:
        """What is held for slots: row of the slot, and event."""
        orphans = self._orphans[kind]
        if len(orphans):
            keys = self._table.keys[slots]
            for row in range(len(slots)):
                for orphan in orphans.get(keys[row].tobytes()):
                    yield row, orphan

    def _waiting_for(self, kind: int, slots: Ints, known: Ints, step: StepLog) -> list[Orphan]:
        """What was held for slots that are known now; out of patience is out of the game."""
        found = list(self._held(kind, slots))
        step.count(kind, "pending", -len(found))
        for row in dict.fromkeys(row for row, _ in found):
            self._orphans[kind].take(self._table.keys[slots[row]].tobytes())
        in_time = [orphan for row, orphan in found if int(known[row]) - orphan.arrival_time <= self._patience]
        step.count(kind, "expired", len(found) - len(in_time))
        return in_time

    # Outcomes ------------------------------------------------------------------------------------------

    def _credit_clicks(self, clicks: Outcomes, step: StepLog) -> Clicks:
        """Credit the first click of each impression; returns those that are new."""
        windows = self.windows[CLICK_TASK]
        keys = hash_ids(clicks.impression_id)
        slot = self._table.find(keys)
        rows = self._accepted(CLICK, clicks, keys, slot, np.zeros(len(slot), np.bool_), step)
        first = next(rounds(slot[rows]), np.zeros(0, np.int64))
        first = first[windows.credit[slot[rows[first]]] == 0]
        news = _news(windows, clicks, slot, rows[first])
        emissions, _ = windows.hear(news)
        step.tell(CLICK_TASK, emissions)
        windows.remember(news.slot, news.event_hash)
        others = np.delete(rows, first)
        copies = int(windows.is_copy(slot[others], clicks.event_hash[others]).sum())
        step.count(CLICK, "pending", len(news))
        step.count(CLICK, "duplicate", copies)
        step.count(CLICK, "superseded", len(others) - copies)
        opened = self.windows[CONVERSION_TASK].open(news.slot, news.event_time, news.known)
        step.tell(CONVERSION_TASK, opened)
        return Clicks(news.slot, news.event_time, news.known)

    def _credit_conversions(self, conversions: Outcomes, step: StepLog) -> None:
        windows = self.windows[CONVERSION_TASK]
        keys = hash_ids(conversions.impression_id)
        slot = self._table.find(keys)
        rows = self._accepted(CONVERSION, conversions, keys, slot, self._of_views(conversions, slot)[1], step)
        for turn in rounds(slot[rows]):
            news = _news(windows, conversions, slot, rows[turn])
            copy = windows.is_copy(news.slot, news.event_hash)
            news = news.take(~copy)
            emissions, to_be_said = windows.hear(news)
            step.tell(CONVERSION_TASK, emissions)
            windows.remember(news.slot, news.event_hash)
            step.count(CONVERSION, "duplicate", int(copy.sum()))
            step.count(CONVERSION, "pending", int(to_be_said.sum()))
            # What does not raise the label replaces what was said of it, or is replaced.
            step.count(CONVERSION, "superseded", int((~to_be_said).sum()))

    def _accepted(
        self, kind: int, outcomes: Outcomes, keys: Keys, slot: Ints, is_views: Flags, step: StepLog
    ) -> Ints:
        """Rows that their window accepts; the others are held or refused, unless a view-through window's."""
        windows, clicked = self.windows[kind - 1], self.windows[CLICK_TASK].credit
        is_open = (slot >= 0) & windows.is_open[slot]
        accepted = is_open & windows.accepts(slot, outcomes.event_time, outcomes.arrival_time)
        for row in np.flatnonzero(~is_open & ~is_views).tolist():
            place = int(slot[row])
            if place >= 0 and (kind == CLICK or clicked[place] > 0):
                # Its window has closed; the slot lives on for another one.
                is_copy = windows.first_hash[place] == outcomes.event_hash[row]
                step.count(kind, "duplicate" if is_copy else "late", 1)
            else:
                is_new = self._orphans[kind].hold(keys[row].tobytes(), outcomes.orphan(row))
                step.count(kind, "pending" if is_new else "duplicate", 1)
        for row in np.flatnonzero(is_open & ~accepted & ~is_views).tolist():
            # Beside view-through windows a conversion before its click is late for what it belongs to.
            base = windows if self._views is None else self.windows[CLICK_TASK]
            if outcomes.event_time[row] >= base.opened[slot[row]]:
                step.count(kind, "late", 1)
            else:
                step.refuse(kind, outcomes.orphan(row), int(windows.opened[slot[row]]))
        is_patient = windows.known[slot] - outcomes.arrival_time <= self._patience
        step.count(kind, "expired", int((accepted & ~is_patient).sum()))
        return np.flatnonzero(accepted & is_patient)

    # View-through windows ------------------------------------------------------------------------------

    def _of_views(self, conversions: Outcomes, slot: Ints) -> tuple[Flags, Flags]:
        """Conversions that a view-through window accepts, and those of them that no click can claim."""
        if self._views is None:
            return np.zeros(len(slot), np.bool_), np.zeros(len(slot), np.bool_)
        clicks, conversion, views = self.windows
        accepted = (
            (slot >= 0)
            & views.accepts(slot, conversions.event_time, conversions.arrival_time)
            & (views.known[slot] - conversions.arrival_time <= self._patience)
        )
        before_click = conversions.event_time < conversion.opened[slot]
        unclaimed = np.where(clicks.credit[slot] > 0, before_click, ~clicks.is_open[slot])
        return accepted, accepted & unclaimed

    def _hear_views(self, conversions: Outcomes, fresh: Ints, clicks: Clicks, step: StepLog) -> None:
        """Let view-through windows hear a step's conversions, and orphans of impressions that are new."""
        if self._views is None:
            return
        # Those of a clicked impression are among the conversions.
        unclicked = fresh[self.windows[CLICK_TASK].credit[fresh] == 0]
        conversions = conversions.after([orphan for _, orphan in self._held(CONVERSION, unclicked)])
        slot = self._table.find(hash_ids(conversions.impression_id))
        accepted, is_own = self._of_views(conversions, slot)
        rows = np.flatnonzero(accepted)
        news, is_own = _news(self.windows[VIEW_TASK], conversions, slot, rows), is_own[rows]
        clicked = self.windows[CLICK_TASK].credit[news.slot] > 0
        conversion = self.windows[CONVERSION_TASK]
        click_is_known = clicked & (conversion.known[news.slot] <= news.known)
        rest = ~click_is_known | (news.event_time < conversion.opened[news.slot])
        may_come = np.where(clicked, ~click_is_known, self.windows[CLICK_TASK].is_open[news.slot])
        self._views.hear(news.take(rest), is_own[rest], may_come[rest], clicks, step)

    # Rows ----------------------------------------------------------------------------------------------

    def _examples(self, task: int, step: StepLog, clock: int) -> Examples:
        windows, traffic = self.windows[task], self._ratio[task]
        said = Emission.concat(step.emissions[task])
        weight = said.weight.copy()
        first = said.kind == FIRST
        if first.any():
            windows.traffic[said.slot[first]] = traffic.first_rows(int(first.sum()), clock)
        if self.traffic_ratio and windows.policy != "relabel":
            for number, kind in enumerate((POSITIVE, CONFIRM)):
                rows = np.flatnonzero(said.kind == kind)
                if len(rows):
                    then = windows.traffic[said.slot[rows]].astype(np.float64)
                    weight[rows] *= traffic.again(number, then, clock)
        return Examples(
            said.slot,
            said.kind,
            said.label,
            said.label_version,
            windows.opened[said.slot],
            said.known_at,
            said.elapsed,
            weight,
        )

    def _count_told(self, examples: Sequence[Examples], step: StepLog) -> None:
        """Events leave ``pending`` for ``trained`` when the first row that needs them has been said."""
        first = int((examples[CLICK_TASK].kind == FIRST).sum())
        step.count(IMPRESSION, "trained", first)
        step.count(IMPRESSION, "pending", -first)
        for windows, rows, kind in zip(self.windows, examples, _KIND_OF_TASK, strict=False):
            said = np.unique(rows.slot[rows.label > 0])
            waiting, trained = int(windows.unsaid[said].sum()), int((windows.unsaid[said] > 0).sum())
            step.count(kind, "trained", trained)
            step.count(kind, "superseded", waiting - trained)
            step.count(kind, "pending", -waiting)
            windows.unsaid[said] = 0

    def _closed(self, task: int, step: StepLog) -> Closed:
        windows, kind = self.windows[task], _KIND_OF_TASK[task]
        slot = np.concatenate(step.closing[task])
        # Accepted, but never said: nothing is left to learn from it.
        unsaid = int(windows.unsaid[slot].sum())
        step.count(kind, "superseded", unsaid)
        step.count(kind, "pending", -unsaid)
        windows.unsaid[slot] = 0
        return Closed(slot, windows.credit[slot], windows.opened[slot], windows.happened[slot])

    # State ---------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and plain data that hold all of it; `load_state` goes on identically."""
        arrays: dict[str, NDArray[Any]] = {f"table_{k}": v for k, v in self._table.state().items()}
        arrays.update({f"feature_{name}": column for name, column in self.features.items()})
        for task, windows in zip(self.tasks, self.windows, strict=True):
            arrays.update({f"{task}_{name}": value for name, value in windows.state().items()})
        return arrays, self._plain()

    def take_changes(self) -> tuple[dict[str, Array], dict[str, list[TableRows]], dict[str, Any]]:
        """The same for whoever keeps the last answer: of columns by slot, only the slots that changed.

        Nothing in it is written to afterwards.
        """
        whole: dict[str, Array] = {}
        columns: dict[str, list[TableRows]] = {}
        taken = [("table_", self._table.take_changes())]
        taken += [
            (f"{task}_", windows.take_changes())
            for task, windows in zip(self.tasks, self.windows, strict=True)
        ]
        for prefix, (own, rows) in taken:
            whole.update({prefix + name: value for name, value in own.items()})
            columns.update({prefix + name: value for name, value in rows.items()})
        stored = self._stored.take()
        if stored is None:
            stored = {name: [TableRows(None, column.copy())] for name, column in self.features.items()}
        columns.update({f"feature_{name}": stored.get(name, []) for name in self.features})
        return whole, columns, self._plain()

    def _plain(self) -> dict[str, Any]:
        return {
            "clock": self._clock,
            "traffic": [ratio.state() for ratio in self._ratio],
            "orphans": {str(kind): orphans.state() for kind, orphans in self._orphans.items()},
            "views": [] if self._views is None else self._views.state(),
        }

    def load_state(self, arrays: dict[str, NDArray[Any]], plain: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self._clock = plain["clock"]
        self._table.load_state(_under("table_", arrays))
        self.features = {name: np.array(column) for name, column in _under("feature_", arrays).items()}
        self._stored.forget()
        for task, windows in zip(self.tasks, self.windows, strict=True):
            windows.load_state(_under(f"{task}_", arrays))
        for ratio, state in zip(self._ratio, plain["traffic"], strict=True):
            ratio.load_state(state)
        self._orphans = {
            int(kind): Orphans.from_state(self._patience, held) for kind, held in plain["orphans"].items()
        }
        if self._views is not None:
            self._views.load_state(plain["views"])


def _under(prefix: str, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _news(windows: LabelWindows, outcomes: Outcomes, slot: Ints, rows: Ints) -> News:
    """Some rows of outcomes, as news of their windows."""
    place = slot[rows]
    return News(
        place,
        outcomes.event_time[rows],
        np.maximum(outcomes.arrival_time[rows], windows.known[place]),
        outcomes.op[rows],
        outcomes.credit[rows],
        outcomes.event_hash[rows],
    )
