"""Rows to judge the live model by: windows that have closed, with what was predicted when they opened.

The learning thread keeps copies of a bounded sample; scoring the same rows with another release is left to
the thread that commits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from jobs.online import OnlineLoop
from pipelines.config import Task
from pipelines.hashing import mix
from pipelines.joined import Closed, Joined
from pipelines.joiner import TASKS

__all__ = ["EvidenceRows", "EvidenceSample"]

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class EvidenceRows:
    """Closed windows of one task, (n,) each but the features.

    ``probability`` is what the live model said, calibrated, before anything of the window was known;
    ``order`` a stable hash of the row.
    """

    order: NDArray[np.uint64]
    label: NDArray[np.bool_]
    probability: NDArray[np.float32]
    event_time: NDArray[np.int64]
    buckets: NDArray[np.int32]
    numbers: NDArray[np.float32]
    segment_key: NDArray[np.int64]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.order)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> EvidenceRows:
        """Only some of the rows."""
        return EvidenceRows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def smallest(self, count: int) -> EvidenceRows:
        """The rows of the smallest hashes, in their order of closing."""
        if len(self) <= count:
            return self
        return self.take(np.sort(np.argsort(self.order, kind="stable")[:count]))

    @classmethod
    def concat(cls, parts: Sequence[EvidenceRows]) -> EvidenceRows:
        """The rows of all parts; at least one is needed."""
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(cls)
            }
        )


class EvidenceSample:
    """Of each task the windows closed since the last `take` whose hashes are smallest.

    Which rows that are follows from the rows alone; which order they came in, and what else was sampled,
    does not matter.

    Parameters
    ----------
    rows : int
        The most that are kept of a task; 0 keeps none.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._parts: dict[Task, list[EvidenceRows]] = {}
        self._below: dict[Task, np.uint64] = {}

    def add(self, joined: Joined, loop: OnlineLoop) -> None:
        """Look at the windows that a step has closed, before the next step is run."""
        features = loop.joiner.features
        if self._rows == 0 or "probability" not in features:
            return
        for column, task in enumerate(loop.tasks):
            closed = joined.closed[TASKS.index(task)]
            if len(closed):
                self._add(task, column, closed, features)

    def _add(
        self, task: Task, column: int, closed: Closed, features: Mapping[str, NDArray[np.generic]]
    ) -> None:
        probability = np.asarray(features["probability"][closed.slot, column], np.float32)
        user = features["user_key"][closed.slot].astype(np.int64).view(np.uint64)
        order = mix(closed.event_time.view(np.uint64), user)
        # What opened before learning began was not predicted.
        chosen = np.isfinite(probability) & (order <= self._below.get(task, _ALL))
        if not chosen.any():
            return
        slot = closed.slot[chosen]
        ids = features["ids"][slot] if "ids" in features else np.zeros((len(slot), 0))
        parts = self._parts.setdefault(task, [])
        parts.append(
            EvidenceRows(
                order[chosen],
                closed.label[chosen] > 0,
                probability[chosen],
                closed.event_time[chosen],
                np.asarray(features["buckets"][slot], np.int32),
                np.asarray(features["numbers"][slot], np.float32),
                np.asarray(features["segment_key"][slot], np.int64),
                np.asarray(ids, np.int64),
            )
        )
        if sum(map(len, parts)) > 2 * self._rows:
            kept = EvidenceRows.concat(parts).smallest(self._rows)
            self._parts[task], self._below[task] = [kept], kept.order.max()

    def take(self) -> dict[Task, list[EvidenceRows]]:
        """What was kept, in parts that may hold up to twice as many rows; begins anew."""
        taken, self._parts, self._below = self._parts, {}, {}
        return taken
