"""What one task is trained on and what is held out, of rows in memory or in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.held_out import (
    HELD_OUT_SHARE,
    LEAST_SHARE,
    base_rate_of,
    enough_of_both,
    informative,
    split_in_time,
    too_few,
)
from pipelines.streamed_rows import StreamedRows
from pipelines.training_set import TrainingSet

__all__ = ["TaskRows", "TaskSplit", "split_task"]

TaskRows = TrainingSet | StreamedRows

_COUNTED_ROWS = 65_536


@dataclass(frozen=True)
class TaskSplit:
    """Rows of one task that can be trained.

    Attributes
    ----------
    used : TrainingSet or StreamedRows
        Rows of which enough is known.
    train : TrainingSet or StreamedRows
        The earlier ones of them.
    held_out : TrainingSet
        The later ones, in memory.
    span : int
        Event time from the first to the last row of ``train``, ms.
    report : dict
        ``rows, positives, used_rows, held_out_rows, held_out_positives, base_rate, held_out_from``: see
        `jobs.training.train_models`.
    """

    used: TaskRows
    train: TaskRows
    held_out: TrainingSet
    span: int
    report: dict[str, Any]


def split_task(rows: TaskRows, at: int | None = None) -> TaskSplit | str:
    """Leave out rows of which too little is known, and hold out the last fifth; or say why that cannot be.

    Both kinds of rows are split at the same row. Those in files are passed through for counting; only the
    held-out ones are loaded.

    Parameters
    ----------
    rows : TrainingSet or StreamedRows
    at : int, optional
        Event time (ms) from which rows are held out; by default see `jobs.held_out.split_in_time`.
    """
    if isinstance(rows, StreamedRows):
        return _split_streamed(rows, at)
    used = informative(rows)
    reason = enough_of_both(used)
    if reason is not None:
        return reason
    train, held_out = split_in_time(used, at)
    reason = enough_of_both(train)
    if reason is not None:
        return f"before the held-out window: {reason}"
    span = int(train.event_time[-1] - train.event_time[0])
    return _split(used, train, held_out, span, len(rows), _positives(rows))


@dataclass(frozen=True)
class _Counts:
    """Of rows in time order; times in ms."""

    rows: int
    positives: int
    first: int
    last: int


def _split_streamed(rows: StreamedRows, at: int | None) -> TaskSplit | str:
    used = rows.filter("observed_share", LEAST_SHARE)
    of_used = _counts(used)
    reason = too_few(of_used.positives, of_used.rows)
    if reason is not None:
        return reason
    train, held_out = (
        _earlier_and_later(used, of_used)
        if at is None
        else (
            used.filter("event_time", None, at),
            used.filter("event_time", at),
        )
    )
    of_train = _counts(train)
    reason = too_few(of_train.positives, of_train.rows)
    if reason is not None:
        return f"before the held-out window: {reason}"
    of_rows = _counts(rows)
    span = of_train.last - of_train.first
    return _split(used, train, held_out.load(), span, of_rows.rows, of_rows.positives)


def _earlier_and_later(used: StreamedRows, counts: _Counts) -> tuple[StreamedRows, StreamedRows]:
    """As `jobs.held_out.split_in_time`, by counting."""
    by_rows = round((1.0 - HELD_OUT_SHARE) * counts.rows)
    last_part = counts.last - round(HELD_OUT_SHARE * (counts.last - counts.first))
    cut = max(by_rows, len(used.filter("event_time", None, last_part)))
    if cut > by_rows:
        later = _counts(used.part(cut))
        if too_few(later.positives, later.rows) is not None:
            cut = by_rows
    return used.part(0, cut), used.part(cut)


def _counts(rows: StreamedRows) -> _Counts:
    count, positives, first, last = 0, 0, 0, 0
    for batch in rows.stream.select("label", "event_time").batch(_COUNTED_ROWS).prefetch(2):
        time = batch.column("event_time").to_numpy()
        first = first if count else int(time[0])
        last = int(time[-1])
        count += len(time)
        positives += int(np.count_nonzero(batch.column("label").to_numpy() > 0.5))
    return _Counts(count, positives, first, last)


def _split(
    used: TaskRows, train: TaskRows, held_out: TrainingSet, span: int, rows: int, positives: int
) -> TaskSplit:
    report: dict[str, Any] = {
        "rows": rows,
        "positives": positives,
        "used_rows": len(used),
        "held_out_rows": len(held_out),
        "held_out_positives": _positives(held_out),
        "base_rate": base_rate_of(train),
    }
    if len(held_out):
        report["held_out_from"] = int(held_out.event_time[0])
    return TaskSplit(used, train, held_out, span, report)


def _positives(rows: TrainingSet) -> int:
    return int(np.count_nonzero(rows.label > 0.5))
