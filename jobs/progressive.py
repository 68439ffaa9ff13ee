"""Progressive validation: what was predicted on arrival against what came of it, by maturity of the label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.base import sigmoid
from models.losses import SAYS_THE_SAME, policy_weights
from monitoring.quality import QualitySums
from monitoring.soft_quality import quality_amounts, quality_sums
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.joined import Closed, Examples
from pipelines.label_news import FIRST

__all__ = [
    "MATURITIES",
    "JudgedRows",
    "Maturity",
    "ProgressiveQuality",
    "mature_rows",
    "provisional_rows",
    "provisional_weights",
]

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Maturity = Literal["mature", "provisional"]
MATURITIES: tuple[Maturity, ...] = ("mature", "provisional")

_PREDICTORS = ("student", "student_uncalibrated", "teacher")
_JUDGED_AS = {**SAYS_THE_SAME, "vanilla": "esdfm"}
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
    policy = _JUDGED_AS.get(policy, policy)
    positive, negative = policy_weights(policy, label, probability, late_share)
    if policy == "relabel":
        return positive, negative
    times = 2.0 if policy == "defer" else 1.0 + probability * (late_share if policy == "esdfm" else 1.0)
    return positive / times, negative / times


@dataclass(frozen=True)
class JudgedRows:
    """Rows of one task and maturity that have a prediction, all (n,): see `quality_amounts`."""

    maturity: Maturity
    task: str
    column: int
    slot: Ints
    hour: Ints
    positive: Floats
    negative: Floats
    is_positive: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.slot)


def mature_rows(task: str, column: int, closed: Closed, probability: Array) -> JudgedRows:
    """Windows of a task that closed in one step; those without a prediction are left out.

    ``probability`` is the joiner's column of what was predicted, (slots, tasks).
    """
    known = np.isfinite(probability[closed.slot, column])
    label, hour = closed.label[known], closed.event_time[known] // HOUR_MS
    return JudgedRows("mature", task, column, closed.slot[known], hour, label, 1.0 - label, label > 0)


def provisional_rows(
    task: str, column: int, examples: Examples, probability: Array, policy: str, late_share: Floats
) -> JudgedRows:
    """Rows of a task that are learned from in one step; parameters as `provisional_weights`."""
    own = probability[examples.slot, column].astype(np.float64)
    known = np.isfinite(own)
    if policy == "relabel":
        known &= examples.kind == FIRST
    if policy == "wait":
        known[:] = False
    label, weight = examples.label[known], examples.weight[known]
    positive, negative = weight, weight
    if len(label):
        positive, negative = provisional_weights(policy, label, own[known], late_share[known])
    hour = examples.known_at[known] // HOUR_MS
    slot = examples.slot[known]
    return JudgedRows(
        "provisional", task, column, slot, hour, weight * positive, weight * negative, label > 0
    )


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

    def update(self, rows: Sequence[JudgedRows], features: dict[str, Array]) -> None:
        """Add rows of one step, all at once: most of the time goes to calls, not to rows."""
        rows = [part for part in rows if len(part)]
        if not rows:
            return
        slot = np.concatenate([part.slot for part in rows])
        column = np.repeat([part.column for part in rows], [len(part) for part in rows])
        amounts = quality_amounts(
            np.concatenate([part.positive for part in rows]),
            np.concatenate([part.negative for part in rows]),
            np.concatenate([part.is_positive for part in rows]),
            _predictions(features, slot, column),
        )
        start = 0
        for part in rows:
            self._add(part, amounts[:, :, start : start + len(part)])
            start += len(part)

    def _add(self, rows: JudgedRows, amounts: Floats) -> None:
        first, last = int(rows.hour.min()), int(rows.hour.max())
        entries = len(self._sums)
        for hour in [first] if first == last else np.unique(rows.hour).tolist():
            own = amounts if first == last else amounts[:, :, rows.hour == hour]
            key, sums = (rows.maturity, rows.task, hour), own.sum(axis=2)
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        if rows.maturity == "provisional" and len(self._sums) > entries:
            self._forget(rows.task)

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

    def days(self, maturity: Maturity = "mature") -> list[tuple[str, int, str, dict[str, Any]]]:
        """The same by day (UTC): task, start of the day (ms), predictor and figures, in order."""
        found: dict[tuple[str, int, str], QualitySums] = {}
        for task, hour, name, sums in self._of(maturity):
            day = hour * HOUR_MS // DAY_MS * DAY_MS
            found[task, day, name] = found.get((task, day, name), QualitySums()).merge(sums)
        return [(task, day, name, sums.value()) for (task, day, name), sums in found.items()]

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


def _predictions(features: dict[str, Array], slot: Ints, column: Ints) -> Floats:
    """Probabilities, shape (predictors, n)."""
    found = np.empty((3, len(slot)))
    for row, name in zip(found, ("probability", "logit", "teacher_logit"), strict=True):
        row[:] = features[name][slot, column]
    found[1:] = sigmoid(found[1:])
    return found
