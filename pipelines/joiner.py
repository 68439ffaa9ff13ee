"""The stream joiner: the attribution rule, one step of events at a time, with bounded state.

An impression takes a slot: its encoded features, what was predicted for it and its label windows. The
slot is free again when the last of its windows has closed. Clicks and conversions that arrive before what
they belong to are held as orphans for as long as it can still arrive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.joined import Arrivals, Closed, Examples, Joined, NegativeDelay, Outcomes, StepLog
from pipelines.label_windows import FIRST, POSITIVE, Emission, LabelWindows
from pipelines.orphans import Orphan, Orphans
from pipelines.traffic import MeanRatio, TrafficRate

__all__ = ["CLICK_TASK", "CONVERSION_TASK", "TASKS", "Joiner"]

TASKS = ("click", "conversion")
CLICK_TASK, CONVERSION_TASK = 0, 1
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Re-emitted rows are weighted by the ratio of traffic now to traffic then; beyond this factor the ratio
# says more about an outage than about the daily cycle.
_TRAFFIC_RATIO_LIMIT = 8.0
_FIRST_CAPACITY = 1024


class Joiner:
    """Joins impressions, clicks and conversions into examples.

    Parameters
    ----------
    attribution : AttributionConfig
    policy : {"wait", "vanilla", "esdfm", "fnw", "fnc"}, or one for each of TASKS
    observation : int or one for each of TASKS, optional
        How long a first row waits under a policy that waits, ms; the attribution's without it.
    traffic_ratio : bool
        Weight delayed positives by the rate of first rows now over the rate when theirs was said.

    Attributes
    ----------
    features : dict of str to ndarray
        What travels with each impression, by slot.
    """

    def __init__(
        self,
        attribution: AttributionConfig,
        policy: str | tuple[str, str],
        *,
        observation: tuple[int, int] | None = None,
        traffic_ratio: bool = True,
    ) -> None:
        self.attribution, self.traffic_ratio = attribution, traffic_ratio
        policies = (policy, policy) if isinstance(policy, str) else policy
        if observation is None:
            observation = (attribution.observation("click"), attribution.observation("conversion"))
        lateness = attribution.allowed_lateness
        self._patience = attribution.click_window + lateness
        self.windows = (
            LabelWindows(attribution.click_window, observation[0], lateness, policies[0], _FIRST_CAPACITY),
            LabelWindows(
                attribution.attribution_window, observation[1], lateness, policies[1], _FIRST_CAPACITY
            ),
        )
        self.traffic = (TrafficRate(), TrafficRate())
        self.mean_ratio = (MeanRatio(), MeanRatio())
        self.features: dict[str, NDArray[Any]] = {}
        self._slot_of: dict[str, int] = {}
        self._id_of: list[str | None] = [None] * _FIRST_CAPACITY
        self._free = list(range(_FIRST_CAPACITY - 1, -1, -1))
        self._orphans = {CLICK: Orphans(self._patience), CONVERSION: Orphans(self._patience)}

    def __len__(self) -> int:
        """Open impressions."""
        return len(self._slot_of)

    def process(self, impressions: Arrivals, clicks: Outcomes, conversions: Outcomes, clock: int) -> Joined:
        """Apply one step of events; ``clock`` is the arrival time of the step's last event, ms.

        1. Impressions open click windows; orphaned clicks that waited for them are applied.
        2. Clicks are credited and open conversion windows; orphaned conversions are applied.
        3. Conversions are credited.
        4. Timers up to ``clock`` are told, windows closed, orphans out of patience given up.

        The slots of closed windows stay readable until `release`.
        """
        step = StepLog()
        for matched in self._open_impressions(impressions, step):
            self._credit_clicks(matched, step)
        self._credit_clicks(clicks, step)
        self._credit_conversions(conversions, step)
        closing = []
        for task, windows in enumerate(self.windows):
            step.tell(task, windows.due(clock))
            slots, emission = windows.close(clock)
            step.tell(task, emission)
            closing.append(slots)
        for kind, orphans in self._orphans.items():
            expired = orphans.expire(clock)
            step.count(kind, "expired", expired)
            step.count(kind, "pending", -expired)
        click_rows, conversion_rows = (self._examples(task, step.emissions[task], clock) for task in (0, 1))
        self._count_told((click_rows, conversion_rows), step)
        click_closed, conversion_closed = (self._closed(task, closing[task], step) for task in (0, 1))
        repeated = np.zeros(len(impressions), np.bool_)
        repeated[step.repeated] = True
        return Joined(
            (click_rows, conversion_rows),
            (click_closed, conversion_closed),
            step.counts,
            step.negative_delays,
            repeated,
        )

    def release(self, joined: Joined) -> None:
        """Free the slots whose last window closed in this step."""
        closed = np.concatenate([part.slot for part in joined.closed])
        done = ~(self.windows[0].is_open[closed] | self.windows[1].is_open[closed])
        for slot in dict.fromkeys(closed[done].tolist()):
            name = self._id_of[slot]
            if name is not None:
                del self._slot_of[name]
                self._id_of[slot] = None
                self._free.append(slot)

    def open_windows(self, task: int) -> Closed:
        """The windows of a task that are open now, with the label known so far, by time of opening."""
        windows = self.windows[task]
        slot = np.flatnonzero(windows.is_open)
        slot = slot[np.argsort(windows.opened[slot], kind="stable")]
        return Closed(slot, windows.label[slot], windows.opened[slot], windows.outcome_time[slot])

    def ids(self, slots: Ints) -> list[str | None]:
        """Impression of each slot."""
        return [self._id_of[slot] for slot in slots.tolist()]

    # Impressions ---------------------------------------------------------------------------------------

    def _open_impressions(self, arrivals: Arrivals, step: StepLog) -> list[Outcomes]:
        if len(arrivals) == 0:
            return []
        ids, slot_of = arrivals.impression_id, self._slot_of
        is_late = (arrivals.arrival_time > arrivals.event_time + self._patience).tolist()
        fresh: list[int] = []
        for row, name in enumerate(ids):
            if name in slot_of:
                step.count(IMPRESSION, "duplicate", 1)
                step.repeated.append(row)
            elif is_late[row]:
                step.count(IMPRESSION, "late", 1)
            else:
                slot_of[name] = -1
                fresh.append(row)
        rows = np.array(fresh, np.int64)
        slots = self._take_slots(len(fresh))
        for row, slot in zip(fresh, slots.tolist(), strict=True):
            slot_of[ids[row]] = slot
            self._id_of[slot] = ids[row]
        self._store_features(slots, rows, arrivals.features)
        step.count(IMPRESSION, "pending", len(fresh))
        known = arrivals.arrival_time[rows]
        step.tell(CLICK_TASK, self.windows[0].open(slots, arrivals.event_time[rows], known))
        return list(self._waiting_for(CLICK, [ids[row] for row in fresh], known, step))

    def _store_features(self, slots: Ints, rows: Ints, features: dict[str, NDArray[Any]]) -> None:
        for name, values in features.items():
            if name not in self.features:
                self.features[name] = np.zeros((len(self._id_of), *values.shape[1:]), values.dtype)
            self.features[name][slots] = values[rows]

    def _take_slots(self, n: int) -> Ints:
        while len(self._free) < n:
            capacity = len(self._id_of)
            for windows in self.windows:
                windows.grow(2 * capacity)
            for name, column in self.features.items():
                larger = np.zeros((2 * capacity, *column.shape[1:]), column.dtype)
                larger[:capacity] = column
                self.features[name] = larger
            self._id_of += [None] * capacity
            self._free = list(range(2 * capacity - 1, capacity - 1, -1)) + self._free
        taken = self._free[len(self._free) - n :][::-1]
        del self._free[len(self._free) - n :]
        return np.array(taken, np.int64)

    # Outcomes ------------------------------------------------------------------------------------------

    def _credit_clicks(self, clicks: Outcomes, step: StepLog) -> None:
        windows = self.windows[CLICK_TASK]
        for part, slot, known in self._rounds(CLICK, clicks, step):
            fresh = windows.outcome_hash[slot] == 0
            self._count_repeats(CLICK, part, slot, ~fresh, step)
            if not fresh.all():
                part, slot, known = part.take(np.flatnonzero(fresh)), slot[fresh], known[fresh]
            if len(slot) == 0:
                continue
            step.count(CLICK, "pending", len(slot))
            for emission in windows.outcome(slot, part.event_time, known, part.positive, part.event_hash):
                step.tell(CLICK_TASK, emission)
            step.tell(CONVERSION_TASK, self.windows[CONVERSION_TASK].open(slot, part.event_time, known))
            for matched in self._waiting_for(CONVERSION, part.impression_id, known, step):
                self._credit_conversions(matched, step)

    def _credit_conversions(self, conversions: Outcomes, step: StepLog) -> None:
        windows = self.windows[CONVERSION_TASK]
        for part, slot, known in self._rounds(CONVERSION, conversions, step):
            # The first assertion wins; a retraction is always heard.
            repeated = part.positive & ((windows.label[slot] == 1) | windows.positive_said[slot])
            self._count_repeats(CONVERSION, part, slot, repeated, step)
            unheard = repeated & (windows.label[slot] == 1)
            if unheard.any():
                # The label stays, but a retraction that happened before this assertion is void.
                windows.assert_again(slot[unheard], part.event_time[unheard])
                rows = np.flatnonzero(~unheard)
                part, slot, known, repeated = part.take(rows), slot[rows], known[rows], repeated[rows]
            if len(slot) == 0:
                continue
            step.count(CONVERSION, "superseded", int((~part.positive).sum()))
            counted = part.positive & ~repeated
            step.count(CONVERSION, "pending", int(counted.sum()))
            for emission in windows.outcome(slot, part.event_time, known, part.positive, part.event_hash):
                step.tell(CONVERSION_TASK, emission)
            windows.unsaid[slot[repeated]] -= 1

    def _rounds(self, kind: int, outcomes: Outcomes, step: StepLog) -> Iterator[tuple[Outcomes, Ints, Ints]]:
        """Outcomes inside their windows, in rounds that name no slot twice, with slot and known time."""
        if len(outcomes) == 0:
            return
        windows = self.windows[kind - 1]
        slot = np.array([self._slot_of.get(name, -1) for name in outcomes.impression_id], np.int64)
        is_open = (slot >= 0) & windows.is_open[slot]
        if not is_open.all():
            self._hold(kind, outcomes, slot, is_open, step)
        patient = windows.known[slot] - outcomes.arrival_time <= self._patience
        accepted = is_open & windows.accepts(slot, outcomes.event_time, outcomes.arrival_time)
        if not accepted[is_open].all():
            self._refuse(kind, outcomes, slot, np.flatnonzero(is_open & ~accepted), step)
        step.count(kind, "expired", int((accepted & ~patient).sum()))
        rest = np.flatnonzero(accepted & patient)
        known = np.maximum(outcomes.arrival_time, windows.known[slot])
        while len(rest):
            _, first = np.unique(slot[rest], return_index=True)
            chosen = rest[np.sort(first)]
            yield outcomes.take(chosen), slot[chosen], known[chosen]
            if len(chosen) == len(rest):
                return
            rest = np.setdiff1d(rest, chosen, assume_unique=True)

    def _hold(self, kind: int, outcomes: Outcomes, slot: Ints, is_open: Flags, step: StepLog) -> None:
        clicked = self.windows[CLICK_TASK].outcome_hash
        for row in np.flatnonzero(~is_open).tolist():
            place = int(slot[row])
            if place >= 0 and (kind == CLICK or clicked[place] != 0):
                # Its window has closed; the slot lives on for another one.
                same = self.windows[kind - 1].outcome_hash[place] == outcomes.event_hash[row]
                step.count(kind, "duplicate" if same else "late", 1)
                continue
            partition, offset, message_row = outcomes.position[row].tolist()
            orphan = Orphan(
                int(outcomes.event_time[row]),
                int(outcomes.arrival_time[row]),
                int(outcomes.event_hash[row]),
                bool(outcomes.positive[row]),
                (partition, offset, message_row),
            )
            held = self._orphans[kind].hold(outcomes.impression_id[row], orphan)
            step.count(kind, "pending" if held else "duplicate", 1)

    def _waiting_for(self, kind: int, ids: list[str], known: Ints, step: StepLog) -> Iterator[Outcomes]:
        orphans = self._orphans[kind]
        if len(orphans) == 0:
            return
        for row, name in enumerate(ids):
            held = orphans.take(name)
            if not held:
                continue
            step.count(kind, "pending", -len(held))
            in_time = [orphan for orphan in held if int(known[row]) - orphan.arrival_time <= self._patience]
            step.count(kind, "expired", len(held) - len(in_time))
            if in_time:
                yield Outcomes.of_orphans(name, in_time)

    def _refuse(self, kind: int, outcomes: Outcomes, slot: Ints, refused: Ints, step: StepLog) -> None:
        opened = self.windows[kind - 1].opened[slot]
        for row in refused.tolist():
            if outcomes.event_time[row] >= opened[row]:
                step.count(kind, "late", 1)
                continue
            step.count(kind, "dead_lettered", 1)
            partition, offset, message_row = outcomes.position[row].tolist()
            step.negative_delays.append(
                NegativeDelay(
                    kind,
                    outcomes.impression_id[row],
                    int(outcomes.event_time[row]),
                    int(opened[row]),
                    (partition, offset, message_row),
                )
            )

    def _count_repeats(
        self, kind: int, outcomes: Outcomes, slot: Ints, repeated: Flags, step: StepLog
    ) -> None:
        if not repeated.any():
            return
        same = self.windows[kind - 1].outcome_hash[slot] == outcomes.event_hash
        step.count(kind, "duplicate", int((repeated & same).sum()))
        step.count(kind, "superseded", int((repeated & ~same).sum()))

    # Rows ----------------------------------------------------------------------------------------------

    def _examples(self, task: int, emissions: list[Emission], clock: int) -> Examples:
        windows = self.windows[task]
        parts = emissions or [Emission.of(np.zeros(0, np.int64), np.zeros(0, np.int64), FIRST, 0)]
        slot = np.concatenate([part.slot for part in parts])
        known_at = np.concatenate([part.known_at for part in parts])
        kind = np.concatenate([part.kind for part in parts])
        label = np.concatenate([part.label for part in parts])
        order = np.argsort(known_at, kind="stable")
        slot, kind, label = slot[order], kind[order], label[order]
        weight = np.ones(len(slot))
        again = kind == POSITIVE
        traffic = self.traffic[task]
        if not again.all():
            traffic.update(int((~again).sum()), clock)
            windows.traffic[slot[~again]] = traffic.rate
        if self.traffic_ratio and again.any():
            then, now = windows.traffic[slot[again]].astype(np.float64), traffic.rate_at(clock)
            # A rate of 0 means that nothing has been measured yet.
            ratio = np.divide(now, then, out=np.ones_like(then), where=(then > 0) & (now > 0))
            ratio = np.clip(ratio, 1 / _TRAFFIC_RATIO_LIMIT, _TRAFFIC_RATIO_LIMIT)
            # Every positive is said once: in the long run its weight must be 1. Where outcomes prefer busy
            # hours the bare ratio exceeds that.
            weight[again] = ratio / self.mean_ratio[task].update(ratio)
        return Examples(slot, kind, label, windows.opened[slot], known_at[order], weight)

    def _count_told(self, examples: tuple[Examples, Examples], step: StepLog) -> None:
        """Events leave ``pending`` for ``trained`` when the first row that needs them has been said."""
        first = int((examples[CLICK_TASK].kind == FIRST).sum())
        step.count(IMPRESSION, "trained", first)
        step.count(IMPRESSION, "pending", -first)
        for task, kind in ((CLICK_TASK, CLICK), (CONVERSION_TASK, CONVERSION)):
            unsaid = self.windows[task].unsaid
            said = examples[task].slot[examples[task].label == 1]
            waiting = int(unsaid[said].sum())
            step.count(kind, "trained", len(said))
            step.count(kind, "superseded", waiting - len(said))
            step.count(kind, "pending", -waiting)
            unsaid[said] = 0

    def _closed(self, task: int, slot: Ints, step: StepLog) -> Closed:
        windows = self.windows[task]
        # Accepted, then retracted before any row said it: nothing is left to learn from it.
        unsaid = int(windows.unsaid[slot].sum())
        step.count(task + 1, "superseded", unsaid)
        step.count(task + 1, "pending", -unsaid)
        windows.unsaid[slot] = 0
        return Closed(slot, windows.label[slot], windows.opened[slot], windows.outcome_time[slot])

    # State ---------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and plain data that hold all of it; `load_state` goes on identically."""
        names = [name or "" for name in self._id_of]
        text = "".join(names).encode()
        arrays: dict[str, NDArray[Any]] = {
            "id_bytes": np.frombuffer(text, np.uint8),
            "id_lengths": np.array([len(name.encode()) for name in names], np.int32),
            "free": np.array(self._free, np.int64),
        }
        arrays.update({f"feature_{name}": column for name, column in self.features.items()})
        for task, windows in zip(TASKS, self.windows, strict=True):
            arrays.update({f"{task}_{name}": value for name, value in windows.state().items()})
        plain = {
            "traffic": [rate.state() for rate in self.traffic],
            "mean_ratio": [mean.state() for mean in self.mean_ratio],
            "orphans": {str(kind): orphans.state() for kind, orphans in self._orphans.items()},
        }
        return arrays, plain

    def load_state(self, arrays: dict[str, NDArray[Any]], plain: dict[str, Any]) -> None:
        """Continue from a `state`."""
        text, ends = arrays["id_bytes"].tobytes(), np.cumsum(arrays["id_lengths"]).tolist()
        names = [text[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._id_of = [name or None for name in names]
        self._slot_of = {name: slot for slot, name in enumerate(names) if name}
        self._free = arrays["free"].tolist()
        self.features = {
            name.removeprefix("feature_"): np.array(column)
            for name, column in arrays.items()
            if name.startswith("feature_")
        }
        for task, windows in zip(TASKS, self.windows, strict=True):
            prefix = f"{task}_"
            windows.load_state(
                {
                    name.removeprefix(prefix): value
                    for name, value in arrays.items()
                    if name.startswith(prefix)
                }
            )
        first, second = (TrafficRate.from_state(state) for state in plain["traffic"])
        self.traffic = (first, second)
        click_mean, conversion_mean = (MeanRatio(*state) for state in plain["mean_ratio"])
        self.mean_ratio = (click_mean, conversion_mean)
        self._orphans = {
            int(kind): Orphans.from_state(self._patience, held) for kind, held in plain["orphans"].items()
        }
