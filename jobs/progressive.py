"""Progressive validation on matured labels: what was predicted on arrival against what came of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.base import sigmoid
from monitoring.quality import QualitySums
from pipelines.duration import HOUR_MS
from pipelines.joined import Closed

__all__ = ["ProgressiveQuality"]


class ProgressiveQuality:
    """Sums by task, hour of ``event_time`` and predictor, over windows that have closed."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int, str], QualitySums] = {}

    def update(self, task: str, column: int, closed: Closed, features: dict[str, NDArray[Any]]) -> None:
        """Add the windows of a task that closed in one step; windows without a prediction are left out."""
        if len(closed) == 0 or "probability" not in features:
            return
        probability = features["probability"][closed.slot, column].astype(np.float64)
        known = np.isfinite(probability)
        if not known.any():
            return
        slot, label = closed.slot[known], closed.label[known] > 0
        predictions = {
            "student": probability[known],
            "student_uncalibrated": sigmoid(features["logit"][slot, column].astype(np.float64)),
            "teacher": sigmoid(features["teacher_logit"][slot, column].astype(np.float64)),
        }
        hours = closed.event_time[known] // HOUR_MS
        for hour in np.unique(hours).tolist():
            rows = hours == hour
            for name, values in predictions.items():
                sums = self._sums.setdefault((task, hour, name), QualitySums())
                sums.update(label[rows], values[rows])

    def hours(self) -> list[tuple[str, int, str, dict[str, Any]]]:
        """Task, start of the hour (ms), predictor and figures, in order."""
        return [
            (task, hour * HOUR_MS, name, sums.value())
            for (task, hour, name), sums in sorted(self._sums.items())
        ]

    def totals(self, task: str, predictor: str) -> QualitySums:
        """The sums of all hours."""
        total = QualitySums()
        for (own_task, _, name), sums in sorted(self._sums.items()):
            if (own_task, name) == (task, predictor):
                total = total.merge(sums)
        return total

    def trailing(self, hours: int) -> dict[tuple[str, str], QualitySums]:
        """Sums by task and predictor over the last ``hours`` hours in which windows of the task closed."""
        newest: dict[str, int] = {}
        for task, hour, _ in self._sums:
            newest[task] = max(newest.get(task, hour), hour)
        found: dict[tuple[str, str], QualitySums] = {}
        for (task, hour, name), sums in sorted(self._sums.items()):
            if hour > newest[task] - hours:
                found[task, name] = found.get((task, name), QualitySums()).merge(sums)
        return found

    def state(self) -> list[list[Any]]:
        return [[*key, sums.state()] for key, sums in sorted(self._sums.items())]

    @classmethod
    def from_state(cls, state: list[list[Any]]) -> ProgressiveQuality:
        progressive = cls()
        for task, hour, name, sums in state:
            progressive._sums[task, int(hour), name] = QualitySums.from_state(sums)
        return progressive
