"""Between a commit and its release: evidence in, decision out, pointers moved.

At each commit, in this order:

1. The rows sampled since the last commit are scored with the release that each task is compared with.
2. The commit is made; it carries the evidence as it is now.
3. The rounds are looked at. If one was passed by rows that all came after the release on trial was cut,
   ``last_good`` moves to that release.
4. If one was refused by rows that came after ``last_good`` was cut, ``CURRENT`` goes back to it. Labels that
   take longer than a release takes to prove itself speak of a model from before ``last_good``: they stop
   what would be published, but say nothing for going back.
5. If the schedule says so, the commit is a candidate: refused, for what the evidence or its own weights say,
   or published. The first release published after a proof, or a refusal, is the next on trial.

What 3 to 5 do follows from what 2 has made durable and from the pointers, and done twice it does nothing:
after a crash they are done again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.decision_log import append_decision
from jobs.online_state import under
from jobs.publish_decision import Decision
from jobs.publish_evidence import EvidenceRows
from jobs.publish_gate import Look, PublishGate
from jobs.publish_schedule import PublishSchedule
from jobs.publishing import FirstReleases
from jobs.release import Release, release_name
from jobs.release_manifest import parse_name
from jobs.release_pointer import CURRENT, LAST_GOOD, Pointer, point, pointed, read_pointer
from jobs.weight_check import broken_parameter, growth, weight_sizes
from models.student import Student
from monitoring.paired import PairedSums
from pipelines.config import Task
from pipelines.config_sections import PublishConfig
from pipelines.errors import StaleStateError

__all__ = ["PublishControl"]

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Trial:
    """A published release that has to prove itself."""

    name: str
    last_event_time: int


class PublishControl:
    """Keeps the evidence, decides, and moves the pointers.

    Parameters
    ----------
    releases : Path
    first : FirstReleases
        Its student is the last good release where none has been named.
    config : PublishConfig
    check_lease : callable
        Raises if another worker has taken over.
    tell : callable
        Hears each decision, with the folder of releases.
    """

    def __init__(
        self,
        releases: Path,
        first: FirstReleases,
        config: PublishConfig,
        check_lease: Callable[[], None],
        tell: Callable[[Decision, Path], None],
    ) -> None:
        self.config = config
        self.gate = PublishGate(config)
        self.schedule = PublishSchedule(config, first.student.last_event_time, 0)
        self._releases, self._first = releases, first
        self._check_lease, self._tell = check_lease, tell
        self._trial: _Trial | None = None
        self._loaded: dict[str, Release] = {}
        self._sizes: dict[tuple[str, Task], dict[str, float]] = {}
        self._before: Decision | None = None
        # Where CURRENT stood when the last decision was concluded.
        self._left = read_pointer(releases, CURRENT)

    # The evidence ------------------------------------------------------------------------------------------

    def observe(self, evidence: Mapping[Task, list[EvidenceRows]]) -> None:
        """Add windows that have closed to the rounds of their tasks."""
        for task, parts in evidence.items():
            found = self.gate.round(task, *self._last_good())
            against = self._release(found.against)
            rows = EvidenceRows.concat(parts).smallest(self.config.sample_rows)
            rows = rows.take(rows.event_time > found.after)
            if len(rows) and task in against.models:
                sums = PairedSums()
                sums.update(rows.label, rows.probability, _scored(against, task, rows))
                self.gate.add(task, sums, int(rows.event_time.min()), int(rows.event_time.max()))

    def state(self) -> dict[str, Any]:
        """JSON data for the commit: no part of what is learned."""
        trial = None if self._trial is None else [self._trial.name, self._trial.last_event_time]
        left = None if self._left is None else [self._left.name, self._left.rollback]
        return {"rounds": self.gate.state(), "schedule": self.schedule.state(), "trial": trial, "left": left}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what a commit carries."""
        self.gate = PublishGate.from_state(self.config, state["rounds"])
        self.schedule = PublishSchedule(self.config, **state["schedule"])
        self._trial = None if state["trial"] is None else _Trial(*state["trial"])
        # States of before this was noted have none.
        left = state.get("left")
        self._left = None if left is None else Pointer(*left)

    def needed(self) -> set[str]:
        """Releases that must not be collected."""
        against = {found.against for found in self.gate.rounds.values()}
        return against if self._trial is None else {*against, self._trial.name}

    # The decision ------------------------------------------------------------------------------------------

    def decide(
        self, arrays: Arrays, plain: Mapping[str, Any], epoch: int, *, is_redo: bool = False
    ) -> Decision:
        """Look at the evidence and the committed state; moves ``last_good``, and ``CURRENT`` back.

        The caller publishes what is to be published, then calls `conclude`.

        Parameters
        ----------
        arrays, plain
            Of the commit.
        epoch : int
            Under which it was made.
        is_redo : bool
            The commit is that of a worker that was killed: what it has done, or somebody undone, stays.
        """
        decision = Decision(
            candidate=release_name("student", epoch, plain["step"]),
            clock=plain["clock"],
            verdict="not due",
            standing={},
            reasons=(),
            figures={},
            growth={},
        )
        if self.config.gate:
            decision = self._judge_line(decision)
        if not self.schedule.is_due(plain["clock"], plain["learned_events"]):
            return decision
        if is_redo and not self._is_new(decision.candidate):
            return decision
        if self.config.gate:
            decision = self._judge_candidate(decision, arrays, plain)
        return decision if decision.verdict == "refused" else replace(decision, verdict="published")

    def conclude(self, decision: Decision, plain: Mapping[str, Any]) -> None:
        """Take note of what has been done, and tell it."""
        self._left = read_pointer(self._releases, CURRENT)
        is_current = self._left is not None and self._left.name == decision.candidate
        if is_current:
            self.schedule.published(plain["clock"], plain["learned_events"])
        begins_trial = self.config.gate and self._trial is None and is_current
        if begins_trial:
            self._trial = _Trial(decision.candidate, plain["last_event_time"])
            decision = replace(decision, begins_trial=True)
        if decision.verdict == "not due" and decision.proven is None and decision.returned_to is None:
            return
        is_news = decision.is_news(self._before)
        level = logging.WARNING if is_news and decision.reasons else logging.INFO
        log.log(level, "publish %s", _line(decision))
        if is_news and self.config.gate:
            append_decision(self._releases, decision.about())
        self._before = decision
        self._tell(decision, self._releases)

    def _judge_line(self, decision: Decision) -> Decision:
        """Steps 3 and 4."""
        looks = self.gate.look()
        proven = self._prove(looks)
        refused = [look for look in looks.values() if look.outcome == "refused"]
        good_until = self._last_good()[1]
        speaks_for_it = [look for look in refused if look.is_last_good_better and look.until > good_until]
        returned = self._go_back() if speaks_for_it else None
        if refused:
            self._trial = None
        for task, look in looks.items():
            if look.outcome != "open":
                found = self.gate.rounds[task]
                found.against, found.after = self._last_good()
        self._forget()
        return replace(
            decision,
            standing={task: str(standing) for task, standing in self.gate.standing().items()},
            reasons=tuple(f"{task}: {why}" for task, look in looks.items() for why in look.reasons),
            figures={task: look.figures for task, look in looks.items()},
            proven=proven,
            returned_to=returned,
        )

    def _judge_candidate(self, decision: Decision, arrays: Arrays, plain: Mapping[str, Any]) -> Decision:
        """Step 5, but for the publishing."""
        grown, faults = self._faults(arrays, plain)
        decision = replace(decision, growth=grown)
        if faults:
            self._trial = None
            returned = self._go_back() or decision.returned_to
            reasons = (*decision.reasons, *faults)
            return replace(decision, verdict="refused", reasons=reasons, returned_to=returned)
        objections = self.gate.objections()
        if objections:
            reasons = decision.reasons or tuple(objections)
            return replace(decision, verdict="refused", reasons=reasons)
        return decision

    def _faults(self, arrays: Arrays, plain: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """Largest growth by task, and what is wrong with the weights and calibrators themselves."""
        good, grown, faults = self._release(self._last_good()[0]), {}, []
        for task, calibrator in plain["calibrators"].items():
            where = broken_parameter(calibrator)
            if where is not None:
                faults.append(f"{task}: the calibrator's {where} is not finite")
            sizes = weight_sizes(under(arrays, f"student/{task}/weights/"))
            broken = [name for name, size in sizes.items() if not np.isfinite(size)]
            faults += [f"{task}: a weight of {name} is not finite" for name in broken]
            model = good.models.get(task)
            if broken or not isinstance(model, Student):
                continue
            factors = growth(sizes, self._sizes_of(good.name, task, model))
            if factors:
                worst = max(factors, key=lambda name: factors[name])
                grown[task] = factors[worst]
                if factors[worst] > self.config.weight_growth:
                    faults.append(f"{task}: {worst} has grown {factors[worst]:.3g} times since {good.name}")
        return grown, faults

    # Releases and pointers -----------------------------------------------------------------------------

    def _last_good(self) -> tuple[str, int]:
        """Name of the last good release, and event time of the newest event that it learned."""
        name = pointed(self._releases, LAST_GOOD)
        if name is None:
            # A folder that was made before there was a gate.
            name = self._first.student.name
            point(self._releases, LAST_GOOD, name)
        return name, self._release(name).last_event_time

    def _release(self, name: str) -> Release:
        """A release to compare with.

        Raises
        ------
        StaleStateError
            If it is damaged, or reads other features than the worker's.
        """
        if name not in self._loaded:
            release = Release.load(self._releases / name)
            if (release.spec.digest(), release.segments) != (
                self._first.student.spec.digest(),
                self._first.student.segments,
            ):
                raise StaleStateError(
                    f"{name} reads other features than what this worker learns: it cannot be its last_good.",
                    hint="`ctrstream release promote --alias last_good` names another",
                )
            self._loaded[name] = release
        return self._loaded[name]

    def _sizes_of(self, name: str, task: Task, model: Student) -> dict[str, float]:
        """Sizes of the tables and layers of a release that is loaded: it never changes."""
        if (name, task) not in self._sizes:
            weights = {layer: weight.numpy() for layer, weight in model.weights.items()}
            self._sizes[name, task] = weight_sizes(weights)
        return self._sizes[name, task]

    def _forget(self) -> None:
        wanted = {found.against for found in self.gate.rounds.values()} | {pointed(self._releases, LAST_GOOD)}
        self._loaded = {name: release for name, release in self._loaded.items() if name in wanted}
        self._sizes = {key: sizes for key, sizes in self._sizes.items() if key[0] in wanted}

    def _prove(self, looks: Mapping[Task, Look]) -> str | None:
        trial = self._trial
        if trial is None or "bad" in self.gate.standing().values():
            return None
        if not any(
            look.outcome == "passed" and look.since > trial.last_event_time for look in looks.values()
        ):
            return None
        self._trial = None
        before = self._last_good()[0]
        if parse_name(trial.name)[:2] <= parse_name(before)[:2]:
            return None
        return trial.name if point(self._releases, LAST_GOOD, trial.name, only_from=before) else None

    def _go_back(self) -> str | None:
        """Let ``CURRENT`` go back to ``last_good``; None if it is not past it."""
        current, good = pointed(self._releases, CURRENT), self._last_good()[0]
        if current is None or parse_name(current)[:2] <= parse_name(good)[:2]:
            return None
        self._check_lease()
        went = point(self._releases, CURRENT, good, rollback=True, only_from=current)
        return good if went else None

    def _is_new(self, candidate: str) -> bool:
        """Whether a candidate was not published before its worker was killed.

        Where ``CURRENT`` has gone back somebody may have undone that; but not if it had gone back before, and
        stands where the last decision left it.
        """
        pointer = read_pointer(self._releases, CURRENT)
        if pointer is None:
            return True
        has_gone_back = pointer.rollback and pointer != self._left
        return not has_gone_back and parse_name(pointer.name)[:2] < parse_name(candidate)[:2]


def _scored(release: Release, task: Task, rows: EvidenceRows) -> NDArray[np.float32]:
    logit = release.models[task].predict_logit(rows.buckets, rows.numbers, rows.ids)
    # As coarse as what was kept of the live model: equal models must come out equal.
    return release.calibrators[task].transform(logit, rows.segment_key).astype(np.float32)


def _line(decision: Decision) -> str:
    parts = [f"{decision.verdict} {decision.candidate}"]
    parts += [f"{task}={standing}" for task, standing in decision.standing.items()]
    for task, figures in decision.figures.items():
        z = figures["worse_z"]
        parts.append(f"{task}_rows={figures['rows']} {task}_z={'-' if z is None else format(z, '.2f')}")
    parts += [f"last_good={decision.proven}"] if decision.proven else []
    parts += [f"returned_to={decision.returned_to}"] if decision.returned_to else []
    parts += [f"reasons={'; '.join(decision.reasons)!r}"] if decision.reasons else []
    return " ".join(parts)
