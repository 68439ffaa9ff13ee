"""The online loop: predict, record, learn, calibrate. The same code for Kafka and for files.

What commits and publishes, and where events come from, is the caller's: `jobs.stream`, `jobs.backtest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from jobs.calibration_feed import CalibrationFeed
from jobs.calibration_labels import begun_origin
from jobs.prepared import StepEvents, Teacher
from jobs.progressive import JudgedRows, ProgressiveQuality, mature_rows, provisional_rows
from jobs.progressive_segments import SegmentQuality
from jobs.teacher_age import TeacherAge
from models.base import sigmoid
from models.late_head import LateHead
from models.student import LearnBatch, Student
from monitoring.accounting import Accounting
from pipelines.config import Config, Task
from pipelines.delay import DelayCurve
from pipelines.duration import HOUR_MS
from pipelines.events import KINDS
from pipelines.joined import Examples, Joined, NegativeDelay
from pipelines.joiner import TASKS, Joiner
from pipelines.label_news import FIRST
from pipelines.replay import ReplayBuffer

__all__ = ["OnlineLoop", "Predicted", "StepResult"]

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

# What travels with an impression for the calibrators, and how it is before anything is known.
_HEARD: dict[str, tuple[type[np.generic], float]] = {
    "first_logit": (np.float32, np.nan),
    "heard": (np.bool_, False),
}


@dataclass(frozen=True)
class Predicted:
    """Predictions for the impressions of one step, in the order of the loop's tasks.

    ``logit`` is the student's own, ``probability`` is calibrated; both (impressions, tasks).
    """

    impression_id: list[str]
    event_time: NDArray[np.int64]
    arrival_time: NDArray[np.int64]
    user_key: NDArray[np.int64]
    logit: Floats
    probability: Floats
    teacher_logit: Floats
    stale_logit: Floats

    def take(self, rows: NDArray[np.bool_]) -> Predicted:
        """Only some of the impressions."""
        if rows.all():
            return self
        ids = [name for name, is_wanted in zip(self.impression_id, rows.tolist(), strict=True) if is_wanted]
        columns = {name: values[rows] for name, values in vars(self).items() if name != "impression_id"}
        return Predicted(ids, **columns)


@dataclass(frozen=True)
class StepResult:
    """What the caller records: predictions, refused outcomes, and how many rows were learned."""

    predicted: Predicted
    negative_delays: list[NegativeDelay]
    learned_rows: int
    joined: Joined


class OnlineLoop:
    """All state of online learning, and the one way to advance it.

    Parameters
    ----------
    config : Config
        With settled label policies (`pipelines.label_plan`).

    Attributes
    ----------
    tasks : tuple of str
        What is learned, in the order of `pipelines.joiner.TASKS`; empty until `begin`. Until then the loop
        only joins: it is warming up.
    frozen : dict
        By task, the digest of the student's frozen layers when learning began.

    Notes
    -----
    A step is: ::

        predicted = predict(impressions)         # before anything of this step is learned
        joined = joiner.process(events)          # what has become known
        judge(joined)                            # what was predicted when the impression arrived
        learn(joined.examples + replay)
        calibrate(joined)                        # on what was said before learning

    The state after a step depends on the events and on where the steps were cut, on nothing else.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tasks: tuple[Task, ...] = ()
        self.students: dict[Task, Student] = {}
        self.calibrators: dict[Task, CalibrationChain] = {}
        self.feeds: dict[Task, CalibrationFeed] = {}
        self.late_share: dict[Task, float] = {}
        self.delay: dict[Task, DelayCurve] = {}
        self.late_heads: dict[Task, LateHead] = {}
        self.frozen: dict[Task, str] = {}
        self.joiner = Joiner(
            config.attribution,
            [config.policy(task) for task in config.attribution.tasks],
            observation=[config.observation(task) for task in config.attribution.tasks],
            confirm_window=config.labels.confirm_window,
            traffic_ratio=config.labels.traffic_ratio,
        )
        self.replay: dict[Task, ReplayBuffer] = {
            task: ReplayBuffer(config.replay.rows_per_hour, config.student.seed + index)
            for index, task in enumerate(config.labels.tasks)
        }
        self.accounting = Accounting()
        self.read = dict.fromkeys(KINDS, 0)
        self.progressive = ProgressiveQuality()
        self.segments = SegmentQuality(())
        self.teacher = TeacherAge(config.distillation.max_age)
        self.step_number = 0
        self.clock = -1
        self.last_event_time = -1
        self.learned_events = 0
        self.refitted_hour = -1

    def step(self, events: StepEvents) -> StepResult:
        """Advance by one step of events."""
        predicted = self._predict(events)
        joined = self._join(events, predicted)
        self._judge(joined)
        learned = 0
        for column, task in enumerate(self.tasks):
            index = TASKS.index(task)
            if task in self.feeds:
                self.feeds[task].note(self.joiner, self.students[task], joined.examples[index])
            learned += self._learn(task, column, joined.examples[index])
        self._calibrate(joined)
        for task in self.replay:
            self._remember(task, joined.examples[TASKS.index(task)])
        self._account(events, joined)
        self.joiner.release(joined)
        self.step_number += 1
        self.learned_events += learned
        # A redelivered impression has been predicted when it came first.
        return StepResult(predicted.take(~joined.repeated), joined.negative_delays, learned, joined)

    def begin(
        self,
        students: Mapping[Task, Student],
        calibrators: Mapping[Task, CalibrationChain],
        teachers: Mapping[Task, Teacher],
        late_share: Mapping[Task, float] | None = None,
        delay: Mapping[Task, DelayCurve] | None = None,
        *,
        taught_until: int | None = None,
        segments: tuple[str, ...] = (),
    ) -> None:
        """End the warm-up: from the next step on, predict and learn.

        Impressions whose windows are open were learned from, so a prediction of them is no progressive one
        and is not calibrated on.

        ``late_share`` is, by task, the share of the outcomes that come after the observation window (1 where
        it is not known); ``delay`` says how late they come (policy ``relabel``; without it no row is taken to
        be young). ``taught_until`` is the newest event that the teachers have learned (ms; None: they do not
        grow too old); ``segments`` names the columns of ``segment_key``.
        """
        self.tasks = tuple(students)
        self.students, self.calibrators = dict(students), dict(calibrators)
        self.frozen = {task: student.frozen_digest() for task, student in students.items()}
        self.late_share = dict.fromkeys(self.tasks, 1.0) | dict(late_share or {})
        self.delay = dict(delay or {})
        self.teacher = TeacherAge(self.config.distillation.max_age, taught_until)
        self.segments = SegmentQuality(segments)
        self.late_heads = {
            task: LateHead(student.spec, student.config, self.late_share[task])
            for task, student in students.items()
            if self.config.policy(task) == "bidefuse"
        }
        if self.config.calibration.online:
            self.feeds = {task: self._feed(task) for task in self.tasks}
        self.replay = {task: self.replay[task] for task in self.tasks}
        features = self.joiner.features
        if "buckets" not in features:
            return
        ids = features.get("ids")
        windows = range(len(self.joiner.tasks))
        slots = np.unique(np.concatenate([self.joiner.open_windows(index).slot for index in windows]))
        buckets, numbers = features["buckets"][slots], features["numbers"][slots]
        keys, ids = features["segment_key"][slots], None if ids is None else ids[slots]
        shape = (len(features["buckets"]), len(self.tasks))
        for name in ("teacher_logit", "logit", "probability"):
            features[name] = np.full(shape, np.nan, np.float32)
        for name, (dtype, value) in _HEARD.items():
            features[name] = np.full(shape, value, dtype)
        for column, task in enumerate(self.tasks if len(slots) else ()):
            features["teacher_logit"][slots, column] = teachers[task].calibrated_logit(
                buckets, numbers, keys, ids
            )
        self.joiner.touch_features()

    def _predict(self, events: StepEvents) -> Predicted:
        arrivals = events.arrivals
        n = len(arrivals)
        logit = np.full((n, len(self.tasks)), np.nan)
        probability = logit.copy()
        if n:
            features = arrivals.features
            for column, task in enumerate(self.tasks):
                raw = self.students[task].predict_logit(
                    features["buckets"], features["numbers"], features.get("ids")
                )
                logit[:, column] = raw
                probability[:, column] = self.calibrators[task].transform(raw, features["segment_key"])
        return Predicted(
            arrivals.impression_id,
            arrivals.event_time,
            arrivals.arrival_time,
            arrivals.features["user_key"],
            logit,
            probability,
            events.teacher_logit,
            events.stale_logit,
        )

    def _join(self, events: StepEvents, predicted: Predicted) -> Joined:
        arrivals = events.arrivals
        arrivals.features["logit"] = predicted.logit.astype(np.float32)
        arrivals.features["probability"] = predicted.probability.astype(np.float32)
        for name, (dtype, value) in _HEARD.items():
            arrivals.features[name] = np.full(predicted.logit.shape, value, dtype)
        if len(arrivals):
            self.last_event_time = max(self.last_event_time, int(arrivals.event_time.max()))
        self.clock = max(self.clock, events.clock)
        return self.joiner.process(arrivals, events.clicks, events.conversions, self.clock)

    def _judge(self, joined: Joined) -> None:
        """Add to the progressive figures; nothing that is learned depends on them."""
        features, rows = self.joiner.features, list[JudgedRows]()
        if "probability" not in features:
            return
        probability = features["probability"]
        for column, task in enumerate(self.tasks):
            closed, examples = joined.closed[TASKS.index(task)], joined.examples[TASKS.index(task)]
            late_share = self._late_share(task, examples.elapsed)
            policy = self.config.policy(task)
            rows.append(provisional_rows(task, column, examples, probability, policy, late_share))
            rows.append(mature_rows(task, column, closed, probability))
            keys = features["segment_key"][closed.slot]
            self.segments.update(task, keys, closed.label, probability[closed.slot, column])
        self.progressive.update(rows, features)

    def _learn(self, task: Task, column: int, examples: Examples) -> int:
        if len(examples) == 0:
            return 0
        features, config = self.joiner.features, self.config
        columns = self._columns(task, examples)
        self._see(task, columns, int(examples.known_at[-1]))
        teacher = features["teacher_logit"][examples.slot, column]
        is_taught = columns["first"] & self.teacher.teaches(examples.event_time)
        columns["teacher_logit"] = np.where(is_taught, teacher, np.nan).astype(np.float64)
        wanted = round(config.replay.ratio * len(examples))
        again = self.replay[task].draw(wanted, int(examples.known_at[-1]), self.step_number)
        if again is not None:
            columns = {name: np.concatenate([values, again[name]]) for name, values in columns.items()}
        columns["late_share"] = self._late_share(task, columns.pop("elapsed"))
        for start in range(0, len(columns["label"]), _mini_batch(config, len(columns["label"]))):
            part = slice(start, start + _mini_batch(config, len(columns["label"])))
            batch = LearnBatch(
                **{name: values[part] for name, values in columns.items()},
                policy=config.policy(task),
                distillation_weight=config.distillation.weight,
            )
            if task in self.late_heads:
                batch = self._learn_late_share(task, batch)
            self.students[task].learn(batch)
        return len(examples)

    def _see(self, task: Task, columns: Arrays, now: int) -> None:
        """Let the student note the ids of new windows: one said again, or replayed, is no news of them."""
        if "ids" in columns:
            first = columns["first"]
            self.students[task].see(columns["buckets"][first], columns["ids"][first], now)

    def _learn_late_share(self, task: Task, batch: LearnBatch) -> LearnBatch:
        """Let the second head learn; returns the batch with the shares that it predicted before."""
        head, student = self.late_heads[task], self.students[task]
        batch = replace(batch, late_share=head.share(batch.buckets, batch.numbers))
        head.learn(batch, sigmoid(student.predict_logit(batch.buckets, batch.numbers, batch.ids)))
        return batch

    def _columns(self, task: Task, examples: Examples) -> Arrays:
        """What is learned from rows, but for the teacher."""
        features = self.joiner.features
        ids = {"ids": features["ids"][examples.slot]} if "ids" in features else {}
        return {
            **ids,
            "buckets": features["buckets"][examples.slot],
            "numbers": features["numbers"][examples.slot],
            "label": examples.label.astype(np.float32),
            "weight": examples.weight.astype(np.float32),
            "first": examples.kind == FIRST,
            "elapsed": examples.elapsed,
        }

    def _late_share(self, task: Task, elapsed: NDArray[np.int64]) -> Floats:
        """Share of the outcomes that come later than rows of windows of this age (ms), shape (n,)."""
        if self.config.policy(task) == "relabel":
            return 1.0 - self.delay[task].cdf(elapsed) if task in self.delay else np.zeros(len(elapsed))
        return np.full(len(elapsed), self.late_share[task])

    def _feed(self, task: Task) -> CalibrationFeed:
        """What the calibrator of a task is to hear."""
        curve, rule = self.delay.get(task), self.config.attribution
        chain = self.calibrators[task]
        chain.labels = begun_origin(chain.labels, self.config, task, curve)
        return CalibrationFeed(
            TASKS.index(task),
            self.tasks.index(task),
            chain.labels,
            curve,
            lambda elapsed: self._late_share(task, elapsed),
            clock=self.clock,
            patience=rule.width(task) + rule.allowed_lateness,
        )

    def _calibrate(self, joined: Joined) -> None:
        """Update the calibrators from labels that have become known."""
        if "segment_key" not in self.joiner.features:
            return
        for task, feed in self.feeds.items():
            feed.teach(self.calibrators[task], self.joiner, joined, self.clock)
        if self.feeds and self.clock // HOUR_MS != self.refitted_hour:
            # How far segments are shrunk is estimated anew once an hour of event time.
            for chain in self.calibrators.values():
                chain.refit()
            self.refitted_hour = self.clock // HOUR_MS

    def _remember(self, task: Task, examples: Examples) -> None:
        if len(examples) == 0 or self.config.replay.ratio == 0:
            return
        # A replayed row is learned from its label alone: the teacher has spoken when it was fresh.
        teacher = np.full(len(examples), np.nan)
        columns = self._columns(task, examples)
        self.replay[task].add({"known_at": examples.known_at, **columns, "teacher_logit": teacher})

    def _account(self, events: StepEvents, joined: Joined) -> None:
        for kind, rows in events.read.items():
            self.read[KINDS[kind]] += rows
        accounted = dict(joined.counts)
        for kind, rows in events.read.items():
            outcomes = (events.arrivals, events.clicks, events.conversions)[kind]
            dead = rows - len(outcomes)
            if dead:
                accounted[kind, "dead_lettered"] = accounted.get((kind, "dead_lettered"), 0) + dead
        for (kind, what), change in accounted.items():
            name = KINDS[kind]
            is_unused = what == "trained" and not self._is_trained(name)
            target = "warm_up" if is_unused else what
            if change >= 0:
                self.accounting.add(name, target, change)
            else:
                self.accounting.remove(name, target, -change)

    def _is_trained(self, kind: str) -> bool:
        # A click is the label of one task and opens the window of another.
        used_by = {"impression": TASKS, "click": TASKS[:2], "conversion": TASKS[1:]}
        return any(task in self.tasks for task in used_by[kind])


def _mini_batch(config: Config, rows: int) -> int:
    """Rows of each update: as even as possible and at most twice ``batch_rows``."""
    updates = max(1, round(rows / config.student.batch_rows))
    return -(-rows // updates)
