"""The next window: rows later than those a model was trained on, and how well it predicts them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.base import sigmoid
from models.base_rate import base_rate_and_weight
from models.losses import cure_derivatives, cured_log_loss
from models.student import Student
from monitoring.ranking import auc
from pipelines.training_set import TrainingRows, TrainingSet

__all__ = [
    "HELD_OUT_SHARE",
    "LEAST_SHARE",
    "base_rate_of",
    "enough_of_both",
    "figures",
    "informative",
    "progressive_logit",
    "split_in_time",
    "too_few",
]

# Fewer outcomes, or fewer rows without, say nothing about a probability.
ENOUGH = 20
HELD_OUT_SHARE = 0.2
# A label of less is worth little and can do much harm: the estimate divides by the share, whose error is the
# largest, relative to it, for the youngest rows (who comes back within minutes depends on the hour). On a log
# with two humps of delay the predictions were 2.3 times the truth with all rows and 1.2 times with these.
LEAST_SHARE = 0.5
# AUC has no likelihood of open labels; it is taken over the rows of which this share would be known.
_NEARLY_CLOSED = 0.95


def enough_of_both(rows: TrainingSet) -> str | None:
    """None, or why the rows are too few: positives or negatives."""
    return too_few(int(np.count_nonzero(rows.label > 0)), len(rows))


def too_few(positives: int, rows: int) -> str | None:
    """None, or why so many positives among so many rows are too few of either class."""
    for found, name in ((positives, "positives"), (rows - positives, "negatives")):
        if found < ENOUGH:
            return f"{found} {name} among {rows} rows; at least {ENOUGH} are needed"
    return None


def informative(rows: TrainingSet) -> TrainingSet:
    """The rows of which at least half of the outcomes would be known by now."""
    return rows.take(rows.observed_share >= LEAST_SHARE)


def split_in_time(rows: TrainingSet, at: int | None = None) -> tuple[TrainingSet, TrainingSet]:
    """Rows before and from ``at`` (event time, ms).

    Without ``at``, the last fifth of the event time is held out; or of the rows, where those are fewer
    (traffic that grows) or the first cut leaves too few positives or negatives.
    """
    if at is not None:
        return rows.split(at)
    first, last = int(rows.event_time[0]), int(rows.event_time[-1])
    by_rows = round((1.0 - HELD_OUT_SHARE) * len(rows))
    by_time = int(np.searchsorted(rows.event_time, last - round(HELD_OUT_SHARE * (last - first))))
    cut = max(by_rows, by_time)
    if enough_of_both(rows.take(slice(cut, len(rows)))) is not None:
        cut = by_rows
    return rows.take(slice(0, cut)), rows.take(slice(cut, len(rows)))


def progressive_logit(student: Student, rows: TrainingSet, label_delay: int) -> NDArray[np.float64]:
    """Logits of rows in time order by a student that goes on learning, as it will be served; shape (n,).

    Each mini-batch is predicted first; then the rows are learned that are ``label_delay`` (ms) older than the
    batch's last one. The student is changed: in the end it has learned all rows but the last of that age.
    """
    size = student.config.batch_rows
    logit = np.empty(len(rows))
    learned = 0
    for start in range(0, len(rows), size):
        batch = slice(start, start + size)
        part = rows.take(batch)
        logit[batch] = student.predict_logit(part.buckets, part.numbers, part.ids)
        now = int(rows.event_time[batch][-1])
        known = int(np.searchsorted(rows.event_time[: start + size], now - label_delay, side="right"))
        for begin in range(learned, known, size):
            _learn(student, rows.take(slice(begin, min(begin + size, known))))
        learned = max(learned, known)
    return logit


def _learn(student: Student, rows: TrainingSet) -> None:
    label, share = rows.label.astype(np.float64), rows.observed_share.astype(np.float64)
    weight = rows.weight.astype(np.float64)
    student.see(rows.buckets, rows.ids, int(rows.event_time[-1]))
    student.update(
        rows.buckets, rows.numbers, lambda logit: weight * cure_derivatives(logit, label, share)[0], rows.ids
    )


def figures(logit: NDArray[np.float64], rows: TrainingSet, base_rate: float) -> dict[str, Any]:
    """Quality of logits on rows whose labels may still change.

    Returns
    -------
    dict
        ``log_loss`` (cure-model, all rows), ``ne`` (over that of the constant ``base_rate``), ``pcoc``
        (expected positives known by now over those seen) and, where both classes are there, ``auc`` over the
        rows with observed share >= 0.95. All finite.
    """
    base = np.full(len(rows), np.log(base_rate / (1.0 - base_rate)))
    loss = cured_log_loss(logit, rows)
    found: dict[str, Any] = {"log_loss": loss, "ne": loss / cured_log_loss(base, rows)}
    weight = rows.weight.astype(np.float64)
    seen = float(np.sum(weight * rows.label))
    if seen > 0.0:
        found["pcoc"] = float(np.sum(weight * rows.observed_share * sigmoid(logit))) / seen
    closed = rows.observed_share >= _NEARLY_CLOSED
    if len(np.unique(rows.label[closed] > 0)) == 2:
        found["auc"] = auc(rows.label[closed] > 0, sigmoid(logit[closed]), weight[closed])
    return found


def base_rate_of(rows: TrainingRows) -> float:
    """Share of positives once all outcomes are known."""
    return base_rate_and_weight(rows)[0]
