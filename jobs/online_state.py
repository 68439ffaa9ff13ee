"""The whole state of an online loop as arrays and plain data, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from jobs.online import OnlineLoop
from jobs.progressive import ProgressiveQuality
from models.late_head import LateHead
from models.student import Student
from monitoring.accounting import Accounting
from pipelines.errors import StaleStateError
from pipelines.table_rows import Array, TableRows

__all__ = ["collect_loop_changes", "load_loop_state", "loop_state", "take_loop_changes", "under"]

Arrays = dict[str, NDArray[Any]]


def loop_state(loop: OnlineLoop) -> tuple[Arrays, dict[str, Any]]:
    """Everything that decides how the loop goes on, copied, so that the loop may run on meanwhile.

    Raises
    ------
    StaleStateError
        If frozen layers have changed since learning began: such a state must not be committed.
    """
    arrays, plain = _rest_of_state(loop)
    joiner_arrays, plain["joiner"] = loop.joiner.state()
    arrays.update({f"joiner/{name}": np.array(value) for name, value in joiner_arrays.items()})
    for prefix, learner in _learners(loop):
        arrays.update({f"{prefix}/{name}": np.array(value) for name, value in learner.state().items()})
    return arrays, plain


def take_loop_changes(
    loop: OnlineLoop,
) -> tuple[dict[str, Array], dict[str, list[TableRows]], dict[str, Any]]:
    """The same, but of tables and of the joiner's columns only the rows that changed since the last call.

    The first call of a loop gives whole tables, and so does one after `load_loop_state`. Raises as
    `loop_state` does.
    """
    rest, plain = _rest_of_state(loop)
    arrays: dict[str, Array] = dict(rest)
    joined, columns, plain["joiner"] = loop.joiner.take_changes()
    arrays.update({f"joiner/{name}": value for name, value in joined.items()})
    tables = {f"joiner/{name}": rows for name, rows in columns.items()}
    for prefix, learner in _learners(loop):
        whole, changed = learner.take_changes()
        arrays.update({f"{prefix}/{name}": value for name, value in whole.items()})
        tables.update({f"{prefix}/{name}": rows for name, rows in changed.items()})
    return arrays, tables, plain


def collect_loop_changes(loop: OnlineLoop, limit: int) -> None:
    """Copy some changed rows ahead of `take_loop_changes`: at most so many of each table."""
    for _, learner in _learners(loop):
        learner.collect_changes(limit)


def _learners(loop: OnlineLoop) -> Iterator[tuple[str, Student | LateHead]]:
    for task, student in loop.students.items():
        yield f"student/{task}", student
        if task in loop.late_heads:
            yield f"late_head/{task}", loop.late_heads[task]


def _rest_of_state(loop: OnlineLoop) -> tuple[Arrays, dict[str, Any]]:
    """All but the learners' arrays and the joiner."""
    arrays: Arrays = {}
    plain: dict[str, Any] = {
        "tasks": list(loop.tasks),
        "step": loop.step_number,
        "clock": loop.clock,
        "last_event_time": loop.last_event_time,
        "learned_events": loop.learned_events,
        "refitted_hour": loop.refitted_hour,
        "read": dict(loop.read),
        "accounting": loop.accounting.state(),
        "progressive": loop.progressive.state(),
        "calibrators": {task: chain.state() for task, chain in loop.calibrators.items()},
        "calibration_feeds": {task: feed.state() for task, feed in loop.feeds.items()},
        "frozen": _checked_frozen(loop),
        "replay": {},
    }
    arrays.update({f"segments/{name}": values for name, values in loop.segments.state().items()})
    for task, replay in loop.replay.items():
        # By reference: what the buffer holds is replaced, never written to.
        columns, plain["replay"][task] = replay.state()
        arrays.update({f"replay/{task}/{name}": value for name, value in columns.items()})
    return arrays, plain


def _checked_frozen(loop: OnlineLoop) -> dict[str, str]:
    """Digests of the students' frozen layers as they are, known to be as they were."""
    for task, student in loop.students.items():
        found, expected = student.frozen_digest(), loop.frozen[task]
        if found != expected:
            raise StaleStateError(
                f"the frozen layers of the {task} student have changed while it learned: expected the digest "
                f"{expected}. Received: {found}.",
                hint="nothing of this has been committed; start again from the last checkpoint",
            )
    return {str(task): digest for task, digest in loop.frozen.items()}


def load_loop_state(loop: OnlineLoop, arrays: Arrays, plain: dict[str, Any]) -> None:
    """Put a loop where `loop_state` was taken.

    Raises
    ------
    StaleStateError
        If the state was taken with other tasks, or its frozen layers are not those the loop began with.
    """
    if tuple(plain["tasks"]) != loop.tasks:
        raise StaleStateError(
            f"the checkpoint learns {', '.join(plain['tasks'])}; this worker {', '.join(loop.tasks)}.",
            hint="use the config and release that the checkpoint was made with, or a new --state folder",
        )
    loop.step_number, loop.clock = plain["step"], plain["clock"]
    loop.last_event_time, loop.learned_events = plain["last_event_time"], plain["learned_events"]
    loop.refitted_hour = plain["refitted_hour"]
    loop.read = dict(plain["read"])
    loop.accounting = Accounting.from_state(plain["accounting"])
    loop.progressive = ProgressiveQuality.from_state(plain["progressive"])
    loop.segments.load_state(under(arrays, "segments/"))
    for task, student in loop.students.items():
        student.load_state(under(arrays, f"student/{task}/"))
        if not student.frozen_digest() == plain["frozen"][task] == loop.frozen[task]:
            raise StaleStateError(f"the frozen layers of the {task} student are not those of the checkpoint.")
        if task in loop.late_heads:
            loop.late_heads[task].load_state(under(arrays, f"late_head/{task}/"))
        loop.calibrators[task] = _same_labels(
            CalibrationChain.from_state(plain["calibrators"][task]), loop.calibrators[task], task
        )
        if task in loop.feeds:
            loop.feeds[task].load_state(plain["calibration_feeds"][task])
        loop.replay[task].load_state(under(arrays, f"replay/{task}/"), plain["replay"][task])
    loop.joiner.load_state(under(arrays, "joiner/"), plain["joiner"])


def _same_labels(chain: CalibrationChain, begun: CalibrationChain, task: str) -> CalibrationChain:
    """The chain, if it has heard labels of the origin that the loop has begun with."""
    if chain.labels is not None and begun.labels is not None:
        chain.labels.refuse_other(begun.labels, f"the {task} calibrator of the checkpoint")
    elif chain.labels is not begun.labels:
        raise StaleStateError(
            f"of the {task} calibrators of checkpoint and release one learns online, the other does not.",
            hint="set calibration.online as it was",
        )
    return chain


def under(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    """The arrays whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
