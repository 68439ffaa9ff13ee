"""What goes into the joiner in one step, and what comes out: structs of arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.label_windows import Emission
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


@dataclass(frozen=True)
class Outcomes:
    """Clicks or conversions of one step, in order of arrival.

    ``positive`` is False for a retraction; ``position`` is int64 (n, 3): partition, offset and row at the
    source.
    """

    impression_id: list[str]
    event_time: Ints
    arrival_time: Ints
    event_hash: NDArray[np.uint64]
    positive: NDArray[np.bool_]
    position: Ints

    def __len__(self) -> int:
        return len(self.impression_id)

    def take(self, rows: Ints) -> Outcomes:
        return Outcomes(
            [self.impression_id[row] for row in rows.tolist()],
            self.event_time[rows],
            self.arrival_time[rows],
            self.event_hash[rows],
            self.positive[rows],
            self.position[rows],
        )

    @classmethod
    def of_orphans(cls, impression_id: str, orphans: list[Orphan]) -> Outcomes:
        return cls(
            [impression_id] * len(orphans),
            np.array([orphan.event_time for orphan in orphans], np.int64),
            np.array([orphan.arrival_time for orphan in orphans], np.int64),
            np.array([orphan.event_hash for orphan in orphans], np.uint64),
            np.array([orphan.positive for orphan in orphans], np.bool_),
            np.array([orphan.position for orphan in orphans], np.int64).reshape(-1, 3),
        )


@dataclass(frozen=True)
class Examples:
    """Rows of one task in order of ``known_at``.

    Times in ms; ``slot`` indexes `Joiner.features`; ``weight`` is the traffic ratio.
    """

    slot: Ints
    kind: NDArray[np.int8]
    label: NDArray[np.int8]
    event_time: Ints
    known_at: Ints
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(frozen=True)
class Closed:
    """Windows of one task with their label; ``outcome_time`` is -1 where there was no outcome; ms."""

    slot: Ints
    label: NDArray[np.int8]
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

    examples: tuple[Examples, Examples]
    closed: tuple[Closed, Closed]
    counts: dict[tuple[int, str], int]
    negative_delays: list[NegativeDelay]
    repeated: NDArray[np.bool_]


@dataclass
class StepLog:
    """What the step that is being processed has said and counted so far."""

    emissions: tuple[list[Emission], list[Emission]] = field(default_factory=lambda: ([], []))
    counts: dict[tuple[int, str], int] = field(default_factory=dict)
    negative_delays: list[NegativeDelay] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)

    def tell(self, task: int, emission: Emission) -> None:
        if len(emission.slot):
            self.emissions[task].append(emission)

    def count(self, kind: int, what: str, n: int) -> None:
        if n:
            self.counts[kind, what] = self.counts.get((kind, what), 0) + n
