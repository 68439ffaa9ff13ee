"""What goes into the joiner in one step, and what comes out: structs of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.label_news import Emission
from pipelines.orphans import Orphan

__all__ = ["Arrivals", "Closed", "Examples", "Joined", "NegativeDelay", "Outcomes", "StepLog"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Arrivals:
    """Impressions of one step, in order of arrival.

    ``impression_id`` is a list of n strings, times are int64 (n,) in ms; ``features`` maps a name to an
    array of n rows: whatever is to travel with the impression's examples.
    """

    impression_id: list[str]
    event_time: Ints
    arrival_time: Ints
    features: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.impression_id)

    def slice(self, start: int, stop: int) -> Arrivals:
        """Rows ``[start, stop)``."""
        rows = slice(start, stop)
        features = {name: values[rows] for name, values in self.features.items()}
        return Arrivals(self.impression_id[rows], self.event_time[rows], self.arrival_time[rows], features)


@dataclass(frozen=True)
class Outcomes:
    """Clicks or conversions of one step, in order of arrival.

    ``op`` (int8) is a place in `pipelines.events.OPERATIONS`, ``credit`` (float64) what the outcome counts;
    ``position`` is int64 (n, 3): partition, offset and row at the source.
    """

    impression_id: list[str]
    event_time: Ints
    arrival_time: Ints
    event_hash: NDArray[np.uint64]
    op: NDArray[np.int8]
    credit: NDArray[np.float64]
    position: Ints

    def __len__(self) -> int:
        return len(self.impression_id)

    def slice(self, start: int, stop: int) -> Outcomes:
        """Rows ``[start, stop)``."""
        rows = slice(start, stop)
        return Outcomes(**{name: values[rows] for name, values in vars(self).items()})

    def orphan(self, row: int) -> Orphan:
        """One row, to be held."""
        partition, offset, message_row = self.position[row].tolist()
        return Orphan(
            self.impression_id[row],
            int(self.event_time[row]),
            int(self.arrival_time[row]),
            int(self.event_hash[row]),
            int(self.op[row]),
            float(self.credit[row]),
            (partition, offset, message_row),
        )

    def after(self, orphans: Sequence[Orphan]) -> Outcomes:
        """These rows behind those that were held."""
        if not orphans:
            return self
        columns: dict[str, Any] = {
            name: np.concatenate(
                [np.array([getattr(orphan, name) for orphan in orphans], values.dtype), values]
            )
            for name, values in vars(self).items()
            if name != "impression_id"
        }
        return Outcomes([orphan.impression_id for orphan in orphans] + self.impression_id, **columns)


@dataclass(frozen=True)
class Examples:
    """Rows of one task in order of ``known_at``.

    Attributes
    ----------
    slot : ndarray of int64, shape (n,)
        Place in `Joiner.features`.
    kind : ndarray of int8
        FIRST, POSITIVE or CONFIRM of `pipelines.label_windows`.
    label : ndarray of float64
        In [0, 1].
    label_version : ndarray of int32
        How often the label of the window had changed by then.
    event_time, known_at, elapsed : ndarray of int64
        When the window opened; when the row could first be said and how old the window was then; ms.
    weight : ndarray of float64
        Share of the window that the row stands for, times the traffic ratio.
    """

    slot: Ints
    kind: NDArray[np.int8]
    label: NDArray[np.float64]
    label_version: NDArray[np.int32]
    event_time: Ints
    known_at: Ints
    elapsed: Ints
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(frozen=True)
class Closed:
    """Windows of one task with their label; ms.

    ``outcome_time`` is when the outcome behind the label happened; it means nothing where the label is 0.
    """

    slot: Ints
    label: NDArray[np.float64]
    event_time: Ints
    outcome_time: Ints

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(frozen=True)
class NegativeDelay:
    """An outcome that claims to have happened before what it belongs to."""

    kind: int
    impression_id: str
    event_time: int
    opened: int
    position: tuple[int, int, int]


@dataclass(frozen=True)
class Joined:
    """What one step has made known; examples and closed windows are by task.

    ``counts`` says what became of events, by (event kind, class); the changes of ``pending`` may be
    negative. ``repeated`` marks the arrivals that had arrived before, (arrivals,).
    """

    examples: tuple[Examples, ...]
    closed: tuple[Closed, ...]
    counts: dict[tuple[int, str], int]
    negative_delays: list[NegativeDelay]
    repeated: NDArray[np.bool_]


@dataclass
class StepLog:
    """What the step that is being processed has said, closed and counted so far; the first two by task."""

    tasks: int
    emissions: list[list[Emission]] = field(init=False)
    closing: list[list[Ints]] = field(init=False)
    counts: dict[tuple[int, str], int] = field(default_factory=dict)
    negative_delays: list[NegativeDelay] = field(default_factory=list)
    repeated: list[Ints] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.emissions = [[] for _ in range(self.tasks)]
        self.closing = [[] for _ in range(self.tasks)]

    def tell(self, task: int, emissions: Sequence[Emission]) -> None:
        self.emissions[task] += [emission for emission in emissions if len(emission.slot)]

    def count(self, kind: int, what: str, n: int) -> None:
        if n:
            self.counts[kind, what] = self.counts.get((kind, what), 0) + n

    def refuse(self, kind: int, orphan: Orphan, opened: int) -> None:
        """Count an outcome that happened before what it belongs to (``opened``, ms) as a dead letter."""
        self.count(kind, "dead_lettered", 1)
        self.negative_delays.append(
            NegativeDelay(kind, orphan.impression_id, orphan.event_time, opened, orphan.position)
        )
