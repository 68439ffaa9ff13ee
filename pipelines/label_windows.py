"""The open label windows of one task, as columns: opened, told, closed.

The incremental form of the windows in `pipelines.attribution`: the same policies, many windows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipelines.timers import TimerWheel

__all__ = ["FIRST", "POSITIVE", "Emission", "LabelWindows"]

FIRST, POSITIVE = 0, 1
# Policies whose first row waits for the observation window.
_WAITING = ("vanilla", "esdfm")
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Emission:
    """Rows to be said: arrays of equal length.

    Attributes
    ----------
    slot, known_at : ndarray of int64
    kind : ndarray of int8
        FIRST or POSITIVE (a delayed positive).
    label : ndarray of int8
    """

    slot: Ints
    known_at: Ints
    kind: NDArray[np.int8]
    label: NDArray[np.int8]

    @classmethod
    def of(cls, slot: Ints, known_at: Ints, kind: int, label: int | NDArray[np.int8]) -> Emission:
        n = len(slot)
        return cls(
            slot,
            known_at,
            np.full(n, kind, np.int8),
            np.broadcast_to(np.int8(label), n).copy() if isinstance(label, int) else label,
        )


class LabelWindows:
    """Label windows of one task, addressed by slot.

    Parameters
    ----------
    width, observation, lateness : int
        Width of the window, how long to wait before the first emission (policies ``vanilla`` and ``esdfm``)
        and how long after its end events may still arrive; ms.
    policy : {"wait", "vanilla", "esdfm", "fnw", "fnc"}

    Notes
    -----
    ``unsaid`` counts the accepted positive outcomes of a window that no row has said yet.
    """

    _COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "opened": np.int64,
        "known": np.int64,
        "outcome_time": np.int64,
        "outcome_hash": np.uint64,
        "label": np.int8,
        "is_open": np.bool_,
        "first_said": np.bool_,
        "positive_said": np.bool_,
        "unsaid": np.int32,
        "traffic": np.float32,
    }
    opened: Ints
    known: Ints
    outcome_time: Ints
    outcome_hash: NDArray[np.uint64]
    label: NDArray[np.int8]
    is_open: Flags
    first_said: Flags
    positive_said: Flags
    unsaid: NDArray[np.int32]
    traffic: NDArray[np.float32]

    def __init__(self, width: int, observation: int, lateness: int, policy: str, capacity: int) -> None:
        self.width, self.observation, self.lateness, self.policy = width, observation, lateness, policy
        self._closing = TimerWheel((width + lateness) // 2048)
        self._waiting = TimerWheel(max(1, observation) // 512)
        for name, dtype in self._COLUMNS.items():
            setattr(self, name, np.zeros(capacity, dtype))

    def grow(self, capacity: int) -> None:
        for name in self._COLUMNS:
            column = getattr(self, name)
            larger = np.zeros(capacity, column.dtype)
            larger[: len(column)] = column
            setattr(self, name, larger)

    def open(self, slot: Ints, opened: Ints, known: Ints) -> Emission:
        """Open windows; returns the rows that the policy says at once."""
        self.opened[slot], self.known[slot] = opened, known
        self.outcome_time[slot], self.outcome_hash[slot] = -1, 0
        self.label[slot], self.is_open[slot] = 0, True
        self.first_said[slot], self.positive_said[slot] = False, False
        self.unsaid[slot] = 0
        self.traffic[slot] = 0.0
        # One tick late: whatever arrives at the very instant of closing still counts.
        self._closing.set(slot, np.maximum(opened + (self.width + self.lateness), known) + 1)
        if self.policy in _WAITING:
            self._waiting.set(slot, np.maximum(opened + self.observation, known) + 1)
        if self.policy in ("fnw", "fnc"):
            self.first_said[slot] = True
            return Emission.of(slot, known, FIRST, 0)
        return Emission.of(slot[:0], known[:0], FIRST, 0)

    def accepts(self, slot: Ints, event_time: Ints, arrival_time: Ints) -> Flags:
        """Whether outcomes lie inside their window and arrived before it closed."""
        opened = self.opened[slot]
        return (
            self.is_open[slot]
            & (event_time >= opened)
            & (event_time <= opened + self.width)
            & (arrival_time <= opened + (self.width + self.lateness))
        )

    def outcome(
        self, slot: Ints, event_time: Ints, known: Ints, positive: Flags, event_hash: NDArray[np.uint64]
    ) -> list[Emission]:
        """Apply accepted outcomes, at most one a slot; returns the rows that follow at once."""
        emissions = []
        if self.policy in _WAITING:
            due = np.maximum(self.opened[slot] + self.observation, self.known[slot])
            overdue = ~self.first_said[slot] & (due < known)
            if overdue.any():
                late = slot[overdue]
                emissions.append(Emission.of(late, due[overdue] + 1, FIRST, self.label[late]))
                self.positive_said[late] |= self.label[late] == 1
                self.first_said[late] = True
        last = self.outcome_time[slot]
        newer, same = event_time > last, event_time == last
        label = np.where(
            newer, positive, np.where(same, (self.label[slot] == 1) & positive, self.label[slot])
        )
        self.label[slot] = label
        self.outcome_time[slot] = np.maximum(last, event_time)
        self.outcome_hash[slot] = np.where(self.outcome_hash[slot] == 0, event_hash, self.outcome_hash[slot])
        self.unsaid[slot] += positive
        if self.policy != "wait":
            tell = (label == 1) & self.first_said[slot] & ~self.positive_said[slot]
            self.positive_said[slot[tell]] = True
            emissions.append(Emission.of(slot[tell], known[tell], POSITIVE, 1))
        return emissions

    def assert_again(self, slot: Ints, event_time: Ints) -> None:
        """Another assertion of windows whose label is 1, at most one a slot."""
        self.outcome_time[slot] = np.maximum(self.outcome_time[slot], event_time)

    def due(self, clock: int) -> Emission:
        """First rows whose waiting time has passed (policies ``vanilla`` and ``esdfm``)."""
        slot, due = self._waiting.pop(clock)
        untold = ~self.first_said[slot] & self.is_open[slot]
        slot, due = slot[untold], due[untold]
        self.first_said[slot] = True
        self.positive_said[slot] |= self.label[slot] == 1
        return Emission.of(slot, due, FIRST, self.label[slot])

    def close(self, clock: int) -> tuple[Ints, Emission]:
        """Slots whose window has closed, and the rows that this says (policy ``wait``)."""
        slot, due = self._closing.pop(clock)
        self.is_open[slot] = False
        if self.policy != "wait":
            return slot, Emission.of(slot[:0], due[:0], FIRST, 0)
        self.first_said[slot] = True
        self.positive_said[slot] = self.label[slot] == 1
        return slot, Emission.of(slot, due, FIRST, self.label[slot])

    def state(self) -> dict[str, NDArray[np.generic]]:
        arrays: dict[str, NDArray[np.generic]] = {name: getattr(self, name) for name in self._COLUMNS}
        for prefix, wheel in (("closing", self._closing), ("waiting", self._waiting)):
            arrays.update({f"{prefix}_{name}": value for name, value in wheel.state().items()})
        return arrays

    def load_state(self, arrays: dict[str, NDArray[np.generic]]) -> None:
        for name, dtype in self._COLUMNS.items():
            setattr(self, name, np.array(arrays[name], dtype))
        for prefix in ("closing", "waiting"):
            wheel = getattr(self, f"_{prefix}")
            timers = {name: np.array(arrays[f"{prefix}_{name}"], np.int64) for name in ("slots", "due")}
            setattr(self, f"_{prefix}", TimerWheel.from_state(wheel.width, timers))
