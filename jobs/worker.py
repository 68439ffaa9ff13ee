"""The online worker: the loop fed by Kafka, with commits, releases and dead letters.

A commit is a copy of what changed, taken at a batch boundary; a thread makes it durable and publishes it
while the next steps are learned (`jobs.worker_commit`). One is in flight at a time, and what goes wrong in it
ends the worker at the next boundary. What a step is held back for, and what becomes of it, says
`jobs.worker_breaker`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jobs.audit_log import Tally
from jobs.checkpoint import Checkpoint, CheckpointStore
from jobs.commit_thread import CommitThread
from jobs.learned_rows import LearnedRows
from jobs.online import OnlineLoop
from jobs.online_state import collect_loop_changes, load_loop_state
from jobs.predictions import PredictionLog
from jobs.prepared import PreparedBlock, StepEvents, prepare
from jobs.produced_times import ProducedTimes
from jobs.publishing import FirstReleases, load_first
from jobs.steps import StepCutter
from jobs.worker_breaker import WorkerBreaker
from jobs.worker_commit import Commits, Cut, LoopCut
from jobs.worker_metrics import WorkerMetrics
from jobs.worker_publishing import WorkerPublishing
from jobs.worker_tracking import WorkerTracking
from pipelines.backfill import Backfill
from pipelines.config import Config
from pipelines.dead_letters import DeadLetterFile, negative_delay_letter
from pipelines.errors import SetupError, StaleStateError
from pipelines.events import TOPICS, DeadLetter, EventBlock
from pipelines.kafka_source import Cursor, KafkaSource
from pipelines.misfits import set_aside_misfits

__all__ = ["Worker"]

log = logging.getLogger(__name__)

# A step that is not full is run all the same after this long without new rows.
_LINGER_S = 0.25
_POLL_ROWS = 8192
# Just before a commit is due, what changed is copied in small parts: one pause becomes several short ones.
_COLLECT_AHEAD_S = 0.5
_COLLECT_ROWS = 16_384
_REPORT_EVERY_S = 5.0
# How often a worker with a full hold looks for a command.
_FULL_RETRY_S = 0.1
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
    backfill : str or Path, optional
        Lake that has what the broker has deleted and the state has not read yet.
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
        backfill: str | Path | None = None,
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
        self.breaker = WorkerBreaker(config.breaker, state, self.store.epoch)
        self.metrics = WorkerMetrics(config.stream, clock)
        publishing = WorkerPublishing(
            self.store, releases, self.first, self.loop, self.metrics, self.tracking, clock
        )
        self.commits = Commits(
            self.store, self.predictions, self.dead_letters, publishing, self.metrics, clock=clock
        )
        self.pauses_ms: deque[float] = deque(maxlen=_PAUSES)
        self._thread = CommitThread()
        self._frozen = self.first.frozen()
        checkpoint = self._restore()
        cursor = None if checkpoint is None else Cursor.from_state(checkpoint.plain["cursor"])
        lake = None if backfill is None else Backfill(backfill, state / "backfill")
        self.source = KafkaSource(config.kafka, cursor, until_end=until_end, backfill=lake)
        self.cursor: Cursor = self.source.cursor
        self._restore_audit(checkpoint)
        self._kinds = dict(zip(_topic_names(config), range(3), strict=True))
        self._cutter = StepCutter(self._prepare, config.student.batch_rows, self.first.warm_up_until)
        self._cut_step, self._cut_version = self.loop.step_number, self.version
        self._letters: list[DeadLetter] = []
        self._produced, self._learned = ProducedTimes(), LearnedRows()
        self._last_commit = self._last_report = self._clock()
        self._reported_step = self.loop.step_number
        self._is_stopping = False
        self._untold: LoopCut | None = None
        # A crash may have come before the commit that was restored was told.
        self._is_untold = checkpoint is not None

    @property
    def release(self) -> str:
        """Name of the release that serves."""
        return self.commits.publishing.release

    @property
    def digest(self) -> str | None:
        """Digest of the last committed state."""
        return self.commits.digest

    @property
    def version(self) -> int:
        """Number of the next checkpoint: it grows with each step that is learned or held."""
        return self.loop.step_number + self.breaker.moves

    def stop(self) -> None:
        """Finish the step at hand, commit and return from `run`."""
        self._is_stopping = True
        self.commits.end()

    def pause_p99_ms(self) -> float:
        """How long learning stopped for a commit: 99th percentile of the last thousand, ms; 0 of none."""
        return round(float(np.quantile(self.pauses_ms, 0.99)), 3) if self.pauses_ms else 0.0

    def run(self) -> None:
        """Consume until stopped, or until the end if that was asked for."""
        try:
            self._announce()
            self._consume()
            self._thread.wait()
            self._tell()
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
        self.metrics.close()
        self.tracking.close()

    def _announce(self) -> None:
        """Say in ``running.json`` who works here; a reader sees all of it or what was there before."""
        running = {"pid": os.getpid(), "epoch": self.store.epoch, "since_ms": round(self._clock() * 1000)}
        path = self.state / "running.json"
        # Of its own: a worker that is started at the same moment must not take it away.
        temporary = self.state / f".running-{self.store.epoch}.json"
        try:
            for leftover in self.state.glob(".running-*"):
                leftover.unlink(missing_ok=True)
            temporary.write_text(json.dumps(running), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise SetupError(f"cannot write {path}: {error.strerror}.", hint="make room") from error

    def _consume(self) -> None:
        """Each step is: predict, record, learn, calibrate; then, when it is time, commit and publish."""
        last_row = self._clock()
        while not self._is_stopping:
            self.breaker.obey(self.loop)
            self._learn_held()
            if self.breaker.is_full:
                self._when_due()
                time.sleep(_FULL_RETRY_S)
                continue
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

    def _learn_held(self) -> None:
        for events in self.breaker.drain(self.loop, self._prepare, self.source.partitions):
            self._learn(events)
            if self._is_stopping:
                return
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
            every = self.config.stream.publish_every / 1000
            due_in = self._last_commit + every - now
            if due_in <= 0:
                self._begin_commit()
                self._last_commit = self._clock()
            elif due_in <= min(_COLLECT_AHEAD_S, every / 2):
                with self._paused():
                    collect_loop_changes(self.loop, _COLLECT_ROWS)
        self.metrics.update(now, self)
        if now - self._last_report >= _REPORT_EVERY_S:
            self._report(now - self._last_report, self.loop.step_number - self._reported_step)
            self._last_report, self._reported_step = now, self.loop.step_number

    def _begin_commit(self) -> None:
        """Copy what changed since the last commit; the rest is done while the loop runs on."""
        loop = None
        if self.loop.tasks and self.version != self._cut_version:
            with self._paused():
                loop = self._cut_loop()
            self._cut_step, self._cut_version = self.loop.step_number, self.version
            self._untold, self._is_untold = loop, True
        cut, self._letters = Cut(self._letters, self.cursor, loop), []
        self._thread.start(lambda: self.commits.commit(cut, self.source))

    def _cut_loop(self) -> LoopCut:
        return LoopCut.take(
            self.loop,
            self.breaker.cut(self.source.partitions),
            self.first.student.digest(),
            self.cursor,
            version=self.version,
            after_step=self._cut_step,
            predicted=self.predictions.take(),
            learned=self._learned.take(),
            produced=self._produced.take(),
            evidence=self.commits.publishing.evidence.take(),
        )

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Take note of how long learning stands still."""
        began = time.perf_counter()
        yield
        self.pauses_ms.append((time.perf_counter() - began) * 1000)

    def _tell(self) -> None:
        """Clear up after a commit that has succeeded, and tell MLflow of it; none is in flight."""
        if not self._is_untold:
            return
        cut, self._untold, self._is_untold = self._untold, None, False
        if cut is not None:
            self.breaker.committed(cut.breaker, self.store)
        figures = {"messages": float(self.source.lag()), "held_rows": float(self.breaker.held_rows)}
        self.tracking.committed(self.loop, figures)

    def _restore(self) -> Checkpoint | None:
        checkpoint = self.store.load()
        if checkpoint is None:
            self.commits.restore(None)
            return None
        plain = checkpoint.plain
        if plain["first_release"] != self.first.student.digest():
            raise StaleStateError(
                f"the state in {self.state} began with another first student than that in {self.releases}.",
                hint="name the --releases folder that belongs to this --state, or a new --state folder",
            )
        self.first.begin(self.loop)
        load_loop_state(self.loop, checkpoint.arrays, plain)
        self.breaker.load_state(plain["breaker"], checkpoint.manifest["volatile"]["breaker"])
        log.info("restored step=%d checkpoint=%s", self.loop.step_number, checkpoint.path.name)
        self.commits.restore(checkpoint)
        return checkpoint

    def _restore_audit(self, checkpoint: Checkpoint | None) -> None:
        cursor = self.cursor.to_state()  # of the source: partitions may have come since the checkpoint
        if checkpoint is None:
            self.commits.audit.restore(None, Tally.start(cursor))
        else:
            end = checkpoint.manifest["volatile"]["audit"]
            self.commits.audit.restore(end, Tally.of({**checkpoint.plain, "cursor": cursor}))

    def _prepare(self, block: EventBlock) -> PreparedBlock:
        return prepare(block, self.first.student.spec, self.first.student.segments, self._frozen, self._kinds)

    def _step(self, events: StepEvents) -> None:
        if not self.loop.tasks and events.clock >= self.first.warm_up_until:
            self.first.begin(self.loop)
            self._cut_step = self.loop.step_number
        if self.loop.tasks and not self.breaker.admits(events, self.loop):
            self.breaker.take(events, self.loop, self.source.partitions)
            self._letters += events.dead_letters
        else:
            self._learn(events)
        self.cursor = self.source.advance(self.cursor, events.source)

    def _learn(self, events: StepEvents) -> None:
        produced_at = events.source.produced_at if self.loop.tasks else None
        self.metrics.began(produced_at)
        result = self.loop.step(events)
        self.metrics.learned(produced_at)
        self._learned.add(result.joined, self.loop)
        self.commits.publishing.evidence.add(result.joined, self.loop)
        self.predictions.add(result.predicted, self.loop.tasks, self.release)
        self._letters += events.dead_letters
        partitions = self.source.partitions
        self._letters += [negative_delay_letter(found, partitions) for found in result.negative_delays]
        if produced_at is not None:
            self._produced.add(produced_at)

    def _report(self, seconds: float, steps: int) -> None:
        figures: dict[str, Any] = {
            "step": self.loop.step_number,
            "rows_per_s": round(steps * self.config.student.batch_rows / seconds),
            "lag": self.source.lag(),
            "breaker": self.breaker.mode,
            "held_rows": self.breaker.held_rows,
            "open_impressions": len(self.loop.joiner),
            "release": self.release,
            "pause_p99_ms": self.pause_p99_ms(),
        }
        text = " ".join(f"{name}={value}" for name, value in figures.items())
        log.info("progress %s", text, extra={"figures": figures})


def _topic_names(config: Config) -> list[str]:
    return [str(getattr(config.kafka.topics, name)) for name in TOPICS]
