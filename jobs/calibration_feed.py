"""What the online calibrator of a task hears: rows of labels of one origin, with the logits they judge.

::

    note(examples)         before the student learns: what it says of windows it is about to learn
    teach(chain, joined)   after it: the labels that have become known
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from calibration.delayed import exposure_weights
from calibration.label_origin import LabelOrigin
from models.losses import SAYS_THE_SAME, policy_weights
from models.student import Student
from pipelines.delay import DelayCurve
from pipelines.duration import HOUR_MS
from pipelines.joined import Closed, Examples, Joined
from pipelines.joiner import Joiner
from pipelines.label_news import FIRST
from pipelines.label_windows import AT_ONCE

__all__ = ["LOOKS", "CalibrationFeed"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LateShare = Callable[[Ints], Floats]

# Policies of which single rows are right from the first one on: no positive of theirs is yet to come.
_WHOLE_ROWS = ("wait", "relabel")
# Share of the outcomes of the first windows that must have come before rows of a policy are heard.
_SETTLED = 0.99
# Under `delay_model` a window is looked at so often while it is open, and at least once an hour.
LOOKS = 4


@dataclass(frozen=True)
class _Heard:
    """Windows by slot, each with what it counts of a positive and of a negative."""

    slot: Ints
    positive: Floats
    negative: Floats


class CalibrationFeed:
    """Labels of one task for its calibrator.

    Only windows whose impression was predicted before it was learned from are heard.

    Parameters
    ----------
    task, column : int
        Place of the task in the joiner, and among the predictions.
    origin : LabelOrigin
    curve : DelayCurve, optional
        Needed by mode ``delay_model``.
    late_share : callable
        Of ages (ms) the share of the outcomes that come later, for the weights of the policy.
    clock : int
        When learning begins, ms.
    patience : int
        Width of the window and how long after it outcomes may arrive, ms.

    Notes
    -----
    *Which logit.* The student goes on learning while a label is on its way. By the time the label is heard,
    it has unlearned much of the error that it made when the impression arrived, and a calibrator that hears
    that error corrects it a second time. So under ``matured`` and ``policy`` the logit is the student's from
    the moment before it learns the window's first row: the latest that has not seen the label. Where the
    first row comes with the impression that is the logit of the prediction. ``delay_model`` hears a window
    before the student does, so it takes the logit of the prediction.

    *When.* Weights of a policy assume that positives of earlier windows come in the proportion of the present
    ones. Windows from before the beginning are not heard, so mode ``policy`` waits until 99 in 100 of the
    outcomes of the first windows have come.
    """

    def __init__(
        self,
        task: int,
        column: int,
        origin: LabelOrigin,
        curve: DelayCurve | None,
        late_share: LateShare,
        *,
        clock: int,
        patience: int,
    ) -> None:
        self.task, self.column, self.origin = task, column, origin
        self.curve = curve if curve is not None else DelayCurve(np.zeros(0), np.zeros(0), 0.0)
        self._late_share = late_share
        self.hears_from = clock
        if origin.mode == "policy" and origin.policy not in _WHOLE_ROWS:
            quantile = self.curve.quantile(_SETTLED)
            self.hears_from += int(min(quantile, patience)) if quantile > 0 else patience
        # Up to when open windows have been looked at (delay_model), and how often they are.
        self.looked_at = clock
        self._look_every = max(1, min(HOUR_MS, origin.window // LOOKS))

    @property
    def is_rescored(self) -> bool:
        """Whether the logit is that from before a window's first row instead of the prediction's."""
        return self.origin.mode != "delay_model" and self.origin.policy not in AT_ONCE

    def note(self, joiner: Joiner, student: Student, examples: Examples) -> None:
        """Keep what the student says of first rows that it is about to learn."""
        if not self.is_rescored:
            return
        features = joiner.features
        slot = examples.slot[examples.kind == FIRST]
        slot = slot[np.isfinite(features["logit"][slot, self.column])]
        if len(slot):
            ids = features["ids"][slot] if "ids" in features else None
            logit = student.predict_logit(features["buckets"][slot], features["numbers"][slot], ids)
            joiner.write_feature("first_logit", slot, self.column, logit)

    def teach(self, chain: CalibrationChain, joiner: Joiner, joined: Joined, clock: int) -> None:
        """Let the chain learn from the labels that one step has made known."""
        if self.origin.mode == "policy":
            self._learn(chain, joiner, joined.examples[self.task])
            return
        closed = joined.closed[self.task]
        if self.origin.mode == "matured":
            self._hear(chain, joiner, _Heard(closed.slot, closed.label, 1.0 - closed.label))
            return
        self._look(chain, joiner, closed, np.ones(len(closed)))
        if clock // self._look_every > self.looked_at // self._look_every:
            windows = joiner.open_windows(self.task)
            age = np.minimum(clock - windows.event_time, self.origin.window)
            self._look(chain, joiner, windows, self.curve.cdf(age))
            self.looked_at = clock

    def state(self) -> dict[str, int]:
        """Plain JSON data."""
        return {"hears_from": self.hears_from, "looked_at": self.looked_at}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from a `state`."""
        self.hears_from, self.looked_at = state["hears_from"], state["looked_at"]

    def _learn(self, chain: CalibrationChain, joiner: Joiner, rows: Examples) -> None:
        """Rows of the label policy, with the weights that make single ones right."""
        known = np.isfinite(self._logit(joiner, rows.slot)) & (rows.known_at >= self.hears_from)
        slot, weight = rows.slot[known], rows.weight[known]
        if len(slot):
            policy = SAYS_THE_SAME.get(self.origin.policy, self.origin.policy)
            probability = self._probability(chain, joiner, slot)
            late_share = self._late_share(rows.elapsed[known])
            positive, negative = policy_weights(policy, rows.label[known], probability, late_share)
            self._hear(chain, joiner, _Heard(slot, weight * positive, weight * negative))

    def _look(self, chain: CalibrationChain, joiner: Joiner, windows: Closed, share: Floats) -> None:
        """What windows have shown since the last look, up to a share of their outcomes."""
        slot = windows.slot
        known = np.isfinite(self._logit(joiner, slot)) & ~joiner.features["heard"][slot, self.column]
        slot, label, share = slot[known], windows.label[known], share[known]
        if len(slot) == 0:
            return
        # A window that has become known since then has not been looked at yet.
        is_new = joiner.windows[self.task].known[slot] > self.looked_at
        age = np.clip(self.looked_at - windows.event_time[known], 0, self.origin.window)
        before = np.minimum(np.where(is_new, 0.0, self.curve.cdf(age)), share)
        positive, negative = exposure_weights(self._probability(chain, joiner, slot), label, before, share)
        self._hear(chain, joiner, _Heard(slot, positive, negative))
        if (label > 0.0).any():
            joiner.write_feature("heard", slot[label > 0.0], self.column, True)

    def _hear(self, chain: CalibrationChain, joiner: Joiner, rows: _Heard) -> None:
        logit, total = self._logit(joiner, rows.slot), rows.positive + rows.negative
        known = np.isfinite(logit) & (total > 0.0)
        if known.any():
            keys = joiner.features["segment_key"][rows.slot[known]]
            chain.update(logit[known], rows.positive[known] / total[known], total[known], keys)

    def _logit(self, joiner: Joiner, slot: Ints) -> Floats:
        name = "first_logit" if self.is_rescored else "logit"
        return np.asarray(joiner.features[name][slot, self.column], np.float64)

    def _probability(self, chain: CalibrationChain, joiner: Joiner, slot: Ints) -> Floats:
        return chain.transform(self._logit(joiner, slot), joiner.features["segment_key"][slot])
