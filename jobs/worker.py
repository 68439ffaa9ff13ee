"""The online worker: the loop fed by Kafka, with commits, releases and dead letters.

A commit is a copy of what changed, taken at a batch boundary; a thread makes it durable and publishes it
while the next steps are learned (`jobs.worker_commit`). One is in flight at a time, and what goes wrong in it
ends the worker at the next boundary.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.checkpoint import CheckpointStore
from jobs.commit_thread import CommitThread
from jobs.online import OnlineLoop
from jobs.online_state import load_loop_state
from jobs.predictions import PredictionLog
from jobs.prepared import PreparedBlock, StepEvents, prepare
from jobs.publishing import FirstReleases, load_first
from jobs.steps import StepCutter
from jobs.worker_commit import FRESHNESS_RESOLUTION_MS, Commits, Cut, LoopCut
from jobs.worker_tracking import WorkerTracking
from pipelines.config import Config
from pipelines.dead_letters import DeadLetterFile
from pipelines.errors import StaleStateError
from pipelines.events import TOPICS, DeadLetter, EventBlock
from pipelines.joined import NegativeDelay
from pipelines.kafka_source import Cursor, KafkaSource
from pipelines.misfits import set_aside_misfits

__all__ = ["Worker"]

log = logging.getLogger(__name__)

# A step that is not full is run all the same after this long without new rows.
_LINGER_S = 0.25
_POLL_ROWS = 8192
_REPORT_EVERY_S = 5.0
# Pauses that the report looks back on.
_PAUSES = 1000


class Worker:
    """One worker over one state folder.

    Parameters
    ----------
    config : Config
    releases : Path
        Where the first releases are and the next ones go.
    state : Path
        Checkpoints, prediction segments and dead letters.
    until_end : bool
        Stop at the offsets that the topics end at now.
    clock : callable
        Wall clock, seconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        releases: Path,
        state: Path,
        *,
        until_end: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.releases, self.state, self._clock = releases, state, clock
        self._until_end = until_end
        self.first: FirstReleases = load_first(releases)
        self.config = config = self.first.settle(config)
        self.store = CheckpointStore(state, keep=config.stream.keep_checkpoints, deltas=config.stream.deltas)
        self.store.open()
        self.loop = OnlineLoop(self.config)
        self.predictions = PredictionLog(state / "predictions")
        self.dead_letters = DeadLetterFile(state / "dead_letters.jsonl")
        self.tracking = WorkerTracking(config, state)
        self.commits = Commits(
            self.store,
            self.predictions,
            self.dead_letters,
            releases,
            self.first,
            self.loop,
            self.tracking,
            keep_releases=config.stream.keep_releases,
            clock=clock,
        )
        self.pauses_ms: deque[float] = deque(maxlen=_PAUSES)
        self._thread = CommitThread()
        self._frozen = self.first.frozen()
        cursor = self._restore()
        self.source = KafkaSource(config.kafka, cursor, until_end=until_end)
        self.cursor: Cursor = self.source.cursor
        self._kinds = dict(zip(_topic_names(config), range(3), strict=True))
        self._cutter = StepCutter(self._prepare, config.student.batch_rows, self.first.warm_up_until)
        self._cut_step = self.loop.step_number
        self._letters: list[DeadLetter] = []
        self._produced: dict[int, int] = {}
        self._last_commit = self._last_report = self._clock()
        self._reported_step = self.loop.step_number
        self._is_stopping = self._is_untold = False

    @property
    def release(self) -> str:
        """Name of the release that serves."""
        return self.commits.release

    @property
    def digest(self) -> str | None:
        """Digest of the last committed state."""
        return self.commits.digest

    def stop(self) -> None:
        """Finish the step at hand, commit and return from `run`."""
        self._is_stopping = True
        self.commits.end()

    def pause_p99_ms(self) -> float:
        """How long learning stopped for a commit: 99th percentile of the last thousand, ms; 0 of none."""
        return round(float(np.quantile(self.pauses_ms, 0.99)), 3) if self.pauses_ms else 0.0

    def run(self) -> None:
        """Consume until stopped, or until the end if that was asked for."""
        running = {"pid": os.getpid(), "epoch": self.store.epoch, "since_ms": round(self._clock() * 1000)}
        (self.state / "running.json").write_text(json.dumps(running), encoding="utf-8")
        try:
            self._consume()
            self._thread.wait()
            self._begin_commit()
            self._thread.wait()
            self._tell()
            self.tracking.published(self.releases / self.release)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the broker and MLflow, once no commit is in flight."""
        self.commits.end()
        self._thread.finish()
        self.source.close()
        self.tracking.close()

    def _consume(self) -> None:
        """Each step is: predict, record, learn, calibrate; then, when it is time, commit and publish."""
        last_row = self._clock()
        while not self._is_stopping:
            block = self.source.poll(_POLL_ROWS, timeout_s=0.1)
            if block is not None:
                last_row = self._clock()
                fitting = set_aside_misfits(block, self.first.student.spec, self.source.partitions)
                self._apply(self._cutter.feed(fitting))
            elif self.source.exhausted:
                self._apply(self._cutter.flush())
                return
            elif not self._until_end and self._clock() - last_row >= _LINGER_S:
                # Of a log with an end every step is full but the last, however slowly it comes.
                self._apply(self._cutter.flush())
            self._when_due()

    def _apply(self, steps: Iterable[StepEvents]) -> None:
        for events in steps:
            self._step(events)
            if self._is_stopping:
                return
            self._when_due()

    def _when_due(self) -> None:
        now = self._clock()
        if self._thread.is_free():
            self._tell()
            if now - self._last_commit >= self.config.stream.publish_every / 1000:
                self._begin_commit()
                self._last_commit = self._clock()
        if now - self._last_report >= _REPORT_EVERY_S:
            self._report(now - self._last_report, self.loop.step_number - self._reported_step)
            self._last_report, self._reported_step = now, self.loop.step_number

    def _begin_commit(self) -> None:
        """Copy what changed since the last commit; the rest is done while the loop runs on."""
        began = time.perf_counter()
        step, loop = self.loop.step_number, None
        if self.loop.tasks and step != self._cut_step:
            loop = LoopCut.take(
                self.loop,
                self._cut_step,
                self.predictions.take(),
                sorted(self._produced.items()),
                self.commits.evidence.take(),
                # The cursor is part of what is compared: equal digests mean equal state at the same rows.
                cursor=self.cursor.to_state(),
                first_release=self.first.student.digest(),
            )
            self._produced, self._cut_step, self._is_untold = {}, step, True
        cut, self._letters = Cut(self._letters, self.cursor, loop), []
        self._thread.start(lambda: self.commits.commit(cut, self.source))
        if loop is not None:
            self.pauses_ms.append((time.perf_counter() - began) * 1000)

    def _tell(self) -> None:
        """Log a commit that has succeeded."""
        if self._is_untold:
            self.tracking.committed(self.loop, {"messages": float(self.source.lag())})
            self._is_untold = False

    def _restore(self) -> Cursor | None:
        checkpoint = self.store.load()
        if checkpoint is None:
            self.predictions.keep_only([])
            return None
        plain = dict(checkpoint.plain)
        cursor = Cursor.from_state(plain.pop("cursor"))
        if plain.pop("first_release") != self.first.student.digest():
            raise StaleStateError(
                f"the state in {self.state} began with another first student than that in {self.releases}.",
                hint="name the --releases folder that belongs to this --state, or a new --state folder",
            )
        self.loop.begin(
            self.first.students(),
            self.first.calibrators(),
            self._frozen.teachers,
            self.first.late_share,
            self.first.delay,
        )
        load_loop_state(self.loop, checkpoint.arrays, plain)
        self.predictions.keep_only(list(checkpoint.manifest["outputs"]))
        log.info("restored step=%d checkpoint=%s", self.loop.step_number, checkpoint.path.name)
        self.commits.resume(checkpoint)
        return cursor

    def _prepare(self, block: EventBlock) -> PreparedBlock:
        return prepare(block, self.first.student.spec, self.first.student.segments, self._frozen, self._kinds)

    def _step(self, events: StepEvents) -> None:
        if not self.loop.tasks and events.clock >= self.first.warm_up_until:
            self.loop.begin(
                self.first.students(),
                self.first.calibrators(),
                self._frozen.teachers,
                self.first.late_share,
                self.first.delay,
            )
            self._cut_step = self.loop.step_number
        result = self.loop.step(events)
        self.commits.evidence.add(result.joined, self.loop)
        self.predictions.add(result.predicted, self.loop.tasks, self.release)
        self._letters += events.dead_letters
        self._letters += [self._negative_delay(found) for found in result.negative_delays]
        self.cursor = self.source.advance(self.cursor, events.source)
        if self.loop.tasks and events.source.produced_at is not None:
            buckets, counts = np.unique(
                events.source.produced_at // FRESHNESS_RESOLUTION_MS, return_counts=True
            )
            for bucket, count in zip(buckets.tolist(), counts.tolist(), strict=True):
                self._produced[bucket] = self._produced.get(bucket, 0) + count

    def _negative_delay(self, found: NegativeDelay) -> DeadLetter:
        topic, partition = self.source.partitions[found.position[0]]
        return DeadLetter(
            topic,
            partition,
            found.position[1],
            found.position[2],
            f"expected an event_time of at least {found.opened}, when what it belongs to happened. "
            f"Received {found.event_time}.",
            json.dumps(asdict(found), sort_keys=True),
        )

    def _report(self, seconds: float, steps: int) -> None:
        figures: dict[str, Any] = {
            "step": self.loop.step_number,
            "rows_per_s": round(steps * self.config.student.batch_rows / seconds),
            "lag": self.source.lag(),
            "open_impressions": len(self.loop.joiner),
            "release": self.release,
            "pause_p99_ms": self.pause_p99_ms(),
        }
        log.info("progress %s", " ".join(f"{name}={value}" for name, value in figures.items()))


def _topic_names(config: Config) -> list[str]:
    return [str(getattr(config.kafka.topics, name)) for name in TOPICS]
