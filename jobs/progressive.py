"""Progressive validation: what was predicted on arrival against what came of it, by maturity of the label."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.base import sigmoid
from models.losses import policy_weights
from monitoring.quality import QualitySums
from monitoring.soft_quality import quality_amounts, quality_sums
from pipelines.duration import HOUR_MS
from pipelines.joined import Closed, Examples
from pipelines.label_news import FIRST

__all__ = ["MATURITIES", "Maturity", "ProgressiveQuality", "provisional_weights"]

Floats = NDArray[np.float64]
Maturity = Literal["mature", "provisional"]
MATURITIES: tuple[Maturity, ...] = ("mature", "provisional")

_PREDICTORS = ("student", "student_uncalibrated", "teacher")
# Policies without unbiased weights of their own for single rows, and one that says the same rows.
_SAYS_THE_SAME = {"vanilla": "esdfm", "fnc": "fnw", "defuse": "esdfm", "bidefuse": "esdfm"}
# What is provisional is of use while it is fresh. Older hours have matured, and make commits longer.
_PROVISIONAL_HOURS = 24


def provisional_weights(
    policy: str, label: Floats, probability: Floats, late_share: Floats
) -> tuple[Floats, Floats]:
    """What rows stand for, ``(positive, negative)``, so that a window counts about once.

    First rows alone say nothing true where they are all negatives (``fnw``, ``fnc``), and too little wherever
    positives are still to come. So every row that is learned counts, with the weights that make its policy
    unbiased, over the times that the policy says a window: ``1 + d`` of `models.losses.policy_weights`, two
    for ``defer``. ``vanilla`` is judged as ``esdfm``, which says the same rows, and so is not reproached for
    what it has not waited for.

    Parameters
    ----------
    policy : str
        Any but ``wait``, whose labels are final.
    label, late_share : ndarray, shape (n,)
    probability : ndarray, shape (n,)
        The student's, from the moment at which the impression arrived.
    """
    policy = _SAYS_THE_SAME.get(policy, policy)
    positive, negative = policy_weights(policy, label, probability, late_share)
    if policy == "relabel":
        return positive, negative
    times = 2.0 if policy == "defer" else 1.0 + probability * (late_share if policy == "esdfm" else 1.0)
    return positive / times, negative / times


class ProgressiveQuality:
    """Sums by maturity, task, hour and predictor; predictions are those made when impressions arrived.

    ``mature``: windows that have closed, by hour of the window's opening. ``provisional``: rows as they are
    learned from, by hour of ``known_at``, with `provisional_weights`, the last 24 hours of them.

    Notes
    -----
    A provisional figure is known hours or days before the mature one, and is less certain: how many of the
    negatives are none is taken from the student's own probability, for all predictors. At a PCOC of ``1 + e``
    it says about ``1 + e (1 - p)`` under ``fnw``; under ``relabel`` what is yet to come is left to the
    student altogether. Where learning has just begun, outcomes of windows that were open before are missing.
    Policy ``wait`` has no provisional rows. ``relabel`` counts the first row of each window.
    """

    def __init__(self) -> None:
        # By maturity, task and hour: sums of each predictor, shape (predictors, 9).
        self._sums: dict[tuple[str, str, int], Floats] = {}

    def update(self, task: str, column: int, closed: Closed, features: dict[str, NDArray[Any]]) -> None:
        """Add the windows of a task that closed in one step; windows without a prediction are left out."""
        slot = closed.slot
        known = _predicted(features, slot, column)
        if not known.any():
            return
        label = closed.label[known]
        self._add(
            "mature",
            task,
            closed.event_time[known] // HOUR_MS,
            (label, 1.0 - label, label > 0),
            _predictions(features, slot[known], column),
        )

    def learn(
        self,
        task: str,
        column: int,
        examples: Examples,
        features: dict[str, NDArray[Any]],
        policy: str,
        late_share: Floats,
    ) -> None:
        """Add the rows of a task that are learned from in one step; parameters as `provisional_weights`."""
        if policy == "wait":
            return
        known = _predicted(features, examples.slot, column)
        if policy == "relabel":
            known &= examples.kind == FIRST
        if not known.any():
            return
        predictions = _predictions(features, examples.slot[known], column)
        label, weight = examples.label[known], examples.weight[known]
        positive, negative = provisional_weights(policy, label, predictions[0], late_share[known])
        hours, entries = examples.known_at[known] // HOUR_MS, len(self._sums)
        self._add("provisional", task, hours, (weight * positive, weight * negative, label > 0), predictions)
        if len(self._sums) > entries:
            self._forget(task)

    def _add(
        self,
        maturity: Maturity,
        task: str,
        hours: NDArray[np.int64],
        stands_for: tuple[Floats, Floats, NDArray[np.bool_]],
        predictions: Floats,
    ) -> None:
        amounts = quality_amounts(*stands_for, predictions)
        first, last = int(hours.min()), int(hours.max())
        for hour in [first] if first == last else np.unique(hours).tolist():
            own = amounts if first == last else amounts[:, :, hours == hour]
            key, sums = (maturity, task, hour), own.sum(axis=2)
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def _forget(self, task: str) -> None:
        """Drop provisional hours of a task that are too old."""
        own = [key for key in self._sums if key[:2] == ("provisional", task)]
        oldest = max(hour for _, _, hour in own) - _PROVISIONAL_HOURS
        for key in own:
            if key[2] <= oldest:
                del self._sums[key]

    def _of(self, maturity: Maturity) -> Iterator[tuple[str, int, str, QualitySums]]:
        for (own, task, hour), sums in sorted(self._sums.items(), key=itemgetter(0)):
            if own == maturity:
                for name, one in zip(_PREDICTORS, sums, strict=True):
                    yield task, hour, name, quality_sums(one)

    def hours(self, maturity: Maturity = "mature") -> list[tuple[str, int, str, dict[str, Any]]]:
        """Task, start of the hour (ms), predictor and figures, in order."""
        return [(task, hour * HOUR_MS, name, sums.value()) for task, hour, name, sums in self._of(maturity)]

    def totals(self, task: str, predictor: str, maturity: Maturity = "mature") -> QualitySums:
        """The sums of all hours that are kept."""
        total = QualitySums()
        for own_task, _, name, sums in self._of(maturity):
            if (own_task, name) == (task, predictor):
                total = total.merge(sums)
        return total

    def trailing(self, hours: int, maturity: Maturity = "mature") -> dict[tuple[str, str], QualitySums]:
        """Sums by task and predictor over the last ``hours`` hours that rows of the task fell into."""
        kept, newest = list(self._of(maturity)), dict[str, int]()
        for task, hour, _, _ in kept:
            newest[task] = max(newest.get(task, hour), hour)
        found: dict[tuple[str, str], QualitySums] = {}
        for task, hour, name, sums in kept:
            if hour > newest[task] - hours:
                found[task, name] = found.get((task, name), QualitySums()).merge(sums)
        return found

    def state(self) -> list[list[Any]]:
        return [[*key, sums.tolist()] for key, sums in sorted(self._sums.items(), key=itemgetter(0))]

    @classmethod
    def from_state(cls, state: list[list[Any]]) -> ProgressiveQuality:
        progressive = cls()
        for maturity, task, hour, sums in state:
            progressive._sums[maturity, task, int(hour)] = np.array(sums, np.float64)
        return progressive


def _predicted(features: dict[str, NDArray[Any]], slot: NDArray[np.int64], column: int) -> NDArray[np.bool_]:
    """Which rows were predicted when they arrived."""
    if len(slot) == 0 or "probability" not in features:
        return np.zeros(len(slot), np.bool_)
    return np.asarray(np.isfinite(features["probability"][slot, column]), np.bool_)


def _predictions(features: dict[str, NDArray[Any]], slot: NDArray[np.int64], column: int) -> Floats:
    """Probabilities, shape (predictors, n)."""
    return np.stack(
        [
            features["probability"][slot, column].astype(np.float64),
            sigmoid(features["logit"][slot, column].astype(np.float64)),
            sigmoid(features["teacher_logit"][slot, column].astype(np.float64)),
        ]
    )
