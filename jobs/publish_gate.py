"""The gate: what the evidence says of the live model beside the last good release. No files, no clock.

Each task fills a *round* of closed windows that were predicted by the live model and are scored by one
release that was good. The round may be looked at at any time (`monitoring.paired`):

- refused: the live model is worse than allowed, or its level is off. The next round begins.
- passed: the round is full and it was neither. The next round begins.

A task that was refused stays ``bad`` until one of its rounds passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from monitoring.paired import PairedSums, look_limit
from pipelines.config import Task
from pipelines.config_sections import PublishConfig

__all__ = ["Look", "PublishGate", "Round", "Standing"]

Standing = Literal["unproven", "good", "bad"]
# Of fewer rows the normal approximation is none.
_EARLIEST_SHARE = 0.05


@dataclass
class Round:
    """Evidence on one task.

    Attributes
    ----------
    against : str
        The release that the live model is compared with.
    after : int
        Event time of the newest event that it has learned, ms: rows up to then prove nothing.
    since, until : int
        Event times of the oldest and the newest row; -1 of none.
    sums : PairedSums
        First the live model, then ``against``.
    standing : str
    """

    against: str
    after: int
    since: int = -1
    until: int = -1
    sums: PairedSums = field(default_factory=PairedSums)
    standing: Standing = "unproven"


@dataclass(frozen=True)
class Look:
    """What one look at a round has found.

    Attributes
    ----------
    outcome : str
        ``open``, ``passed`` or ``refused``.
    standing : str
        Of the task, after it.
    reasons : tuple of str
        Why it was refused.
    since, until : int
        Event times of the round's oldest and newest row.
    is_last_good_better : bool
        Whether the refused model had better give way to the one that it was compared with.
    figures : dict
    """

    outcome: Literal["open", "passed", "refused"]
    standing: Standing
    reasons: tuple[str, ...]
    since: int
    until: int
    is_last_good_better: bool
    figures: dict[str, Any]


class PublishGate:
    """The rounds of all tasks.

    Examples
    --------
    >>> gate = PublishGate(PublishConfig(support_rows=4, support_positives=1))
    >>> sums = PairedSums()
    >>> sums.update([0, 1, 0, 0], [0.2, 0.3, 0.2, 0.2], [0.2, 0.3, 0.3, 0.2])
    >>> gate.round("click", "student-0000-0000000000", 0).sums = sums
    >>> gate.look()["click"].outcome, gate.standing()
    ('passed', {'click': 'good'})
    """

    def __init__(self, config: PublishConfig) -> None:
        self.config = config
        self.rounds: dict[Task, Round] = {}

    def round(self, task: Task, against: str, after: int) -> Round:
        """The round of a task; one against the given release if there is none yet."""
        return self.rounds.setdefault(task, Round(against, after))

    def add(self, task: Task, sums: PairedSums, since: int, until: int) -> None:
        """Add rows to the round of a task; the times are those of the oldest and the newest, ms."""
        found = self.rounds[task]
        found.sums = found.sums.merge(sums)
        found.since = since if found.since < 0 else min(found.since, since)
        found.until = max(found.until, until)

    def look(self) -> dict[Task, Look]:
        """Judge each round as far as it has come; one that has ended is emptied."""
        looks = {}
        for task, found in self.rounds.items():
            look = looks[task] = self._judge(found)
            found.standing = look.standing
            if look.outcome != "open":
                found.sums, found.since, found.until = PairedSums(), -1, -1
        return looks

    def standing(self) -> dict[Task, Standing]:
        """By task."""
        return {task: found.standing for task, found in self.rounds.items()}

    def objections(self) -> list[str]:
        """Why nothing may be published now."""
        bad = [
            f"{task}: refused before and not proven since"
            for task, s in self.standing().items()
            if s == "bad"
        ]
        if not bad and self.config.without_support == "hold" and "good" not in self.standing().values():
            return ["no round of any task has been passed yet"]
        return bad

    def _judge(self, found: Round) -> Look:
        config, sums = self.config, found.sums
        low, high = config.pcoc
        share = self._share(sums, sums.positives)
        worse, level = sums.worse_z(config.worse_by), sums.level_z(low, high)
        # Where clicks have ceased, or are not predicted any more, the larger number says how much is known.
        level_share = self._share(sums, max(sums.positives, sums.first_expected))
        reasons = []
        if worse is not None and worse > _limit(config.z, share):
            reasons.append(f"log loss more than {config.worse_by:.1%} above that of {found.against}")
        is_worse = bool(reasons)
        if abs(level) > _limit(config.z, level_share):
            reasons.append(f"PCOC {'above' if level > 0 else 'below'} {high if level > 0 else low:g}")
        figures = {
            **sums.value(),
            "worse_z": worse,
            "level_z": level,
            "share": round(share, 4),
            "against": found.against,
        }
        rows = (found.since, found.until)
        if reasons:
            is_better = is_worse or _off(sums.second_expected, sums) < _off(sums.first_expected, sums)
            return Look("refused", "bad", tuple(reasons), *rows, is_better, figures)
        if share >= 1.0:
            return Look("passed", "good", (), *rows, False, figures)
        return Look("open", found.standing, (), *rows, False, figures)

    def _share(self, sums: PairedSums, positives: float) -> float:
        return min(sums.rows / self.config.support_rows, positives / self.config.support_positives, 1.0)

    def state(self) -> dict[str, Any]:
        """JSON data."""
        return {task: {**vars(found), "sums": found.sums.state()} for task, found in self.rounds.items()}

    @classmethod
    def from_state(cls, config: PublishConfig, state: Mapping[str, Any]) -> Self:
        """Inverse of `state`, exact."""
        gate = cls(config)
        for task, found in state.items():
            gate.rounds[task] = Round(**{**found, "sums": PairedSums.from_state(found["sums"])})  # type: ignore[index]
        return gate


def _limit(z: float, share: float) -> float:
    return look_limit(z, share) if share >= _EARLIEST_SHARE else math.inf


def _off(expected: float, sums: PairedSums) -> float:
    """How far a sum of probabilities is from the positives, as a factor."""
    return abs(math.log((expected + 0.5) / (sums.positives + 0.5)))
