"""The online worker: the loop fed by Kafka, with commits, releases and dead letters.

Order matters. At a commit:

1. Dead letters of the steps since the last commit are acknowledged by the broker, then written to the file.
2. The segment of predictions is written.
3. The checkpoint is written and the head moved: the commit point.
4. A release is cut from exactly this state and ``CURRENT`` moved to it.
5. Offsets are committed to the broker, for lag charts only.

A crash before 3 repeats the steps since the last commit from the same cursors. Letters that the file holds
are not sent again; a segment that no commit has named is removed; a release that a crash between 3 and 4 has
prevented is cut at the next start. While the broker is away, 1 waits, and with it the commit.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.audit_log import AuditLog
from jobs.breaker_gate import BreakerGate
from jobs.checkpoint import CheckpointStore
from jobs.online import OnlineLoop
from jobs.online_state import load_loop_state, loop_state
from jobs.predictions import PredictionLog
from jobs.prepared import PreparedBlock, StepEvents, prepare
from jobs.publishing import FirstReleases, load_first, publish_student
from jobs.release import garbage_collect, pointed
from jobs.release_manifest import parse_name, release_name
from jobs.release_pointer import CURRENT, read_pointer
from jobs.steps import StepCutter
from jobs.worker_metrics import WorkerMetrics
from jobs.worker_tracking import WorkerTracking
from pipelines.config import Config
from pipelines.dead_letters import DeadLetterFile
from pipelines.errors import StaleStateError, TransientError
from pipelines.events import TOPICS, DeadLetter, EventBlock
from pipelines.joined import NegativeDelay
from pipelines.kafka_source import Cursor, KafkaSource
from pipelines.misfits import set_aside_misfits

__all__ = ["Worker"]

log = logging.getLogger(__name__)

# A step that is not full is run all the same after this long without new rows.
_LINGER_S = 0.25
_POLL_ROWS = 8192
_FRESHNESS_RESOLUTION_MS = 100
_REPORT_EVERY_S = 5.0
_BROKER_RETRY_S = 1.0
_FULL_RETRY_S = 0.1


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
        self.store = CheckpointStore(state, keep=config.stream.keep_checkpoints)
        self.store.open()
        self.loop = OnlineLoop(self.config)
        self.predictions = PredictionLog(state / "predictions")
        self.dead_letters = DeadLetterFile(state / "dead_letters.jsonl")
        self.tracking = WorkerTracking(config, state)
        self.gate = BreakerGate(config.breaker, self.first.student.spec, state, self.store.epoch)
        self.audit = AuditLog(state / "audit")
        self.segments: list[str] = []
        self.release = self.first.student.name
        self.digest: str | None = None
        self._frozen = self.first.frozen()
        cursor = self._restore()
        self.metrics = WorkerMetrics(config.stream, clock)
        self.source = KafkaSource(config.kafka, cursor, until_end=until_end)
        self.cursor: Cursor = self.source.cursor
        self.audit.restore(self._audit_end, self.loop, self.cursor.to_state())
        self._kinds = dict(zip(_topic_names(config), range(3), strict=True))
        self._cutter = StepCutter(self._prepare, config.student.batch_rows, self.first.warm_up_until)
        self._committed_step = self.loop.step_number
        self._committed_version = self.version
        self._letters: list[DeadLetter] = []
        self._produced: dict[int, int] = {}
        self._last_commit = self._last_report = self._clock()
        self._reported_step = self.loop.step_number
        self._is_stopping = False

    @property
    def version(self) -> int:
        """Number of the next checkpoint: it grows with each step that is learned or held."""
        return self.loop.step_number + self.gate.moves

    @property
    def committed_step(self) -> int:
        """Steps learned up to the last commit."""
        return self._committed_step

    def stop(self) -> None:
        """Finish the step at hand, commit and return from `run`."""
        self._is_stopping = True

    def run(self) -> None:
        """Consume until stopped, or until the end if that was asked for."""
        running = {"pid": os.getpid(), "epoch": self.store.epoch, "since_ms": round(self._clock() * 1000)}
        (self.state / "running.json").write_text(json.dumps(running), encoding="utf-8")
        try:
            self._consume()
            while not self._commit_or_wait():
                time.sleep(_BROKER_RETRY_S)
            self.tracking.published(self.releases / self.release)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the broker and MLflow."""
        self.source.close()
        self.metrics.close()
        self.tracking.close()

    def commit(self) -> None:
        """Make everything up to the last step durable, then publish it: see the module's order.

        Raises
        ------
        TransientError
            If the broker does not take dead letters: nothing has been committed, and it can be tried again.
        StaleStateError
            If another worker has taken over.
        SetupError
            If the disk refuses to take the state.
        """
        self.store.check_lease()
        self._hand_over_letters()
        if not self.loop.tasks or self.version == self._committed_version:
            return
        has_learned = self.loop.step_number != self._committed_step
        self.gate.flush(self.source.partitions)
        segment = self.predictions.write_segment(
            self._committed_step, self.loop.step_number, self.store.epoch
        )
        if segment is not None:
            self.segments.append(segment)
        arrays, plain = loop_state(self.loop)
        # The cursor is part of what is compared: equal digests mean equal state at the same rows.
        plain["cursor"] = self.cursor.to_state()
        plain["first_release"] = self.first.student.digest()
        plain["breaker"] = self.gate.state()
        release = release_name("student", self.store.epoch, self.loop.step_number) if has_learned else None
        audit = self.audit.append(
            self.loop, plain["cursor"], version=self.version, epoch=self.store.epoch, release=release
        )
        produced, self._produced = sorted(self._produced.items()), {}
        self.digest = self.store.commit(
            self.version,
            arrays,
            plain,
            cursor=plain["cursor"],
            outputs=self.segments,
            volatile={
                "committed_at": self._clock(),
                "produced_at": produced,
                "breaker": self.gate.volatile(),
                "audit": audit,
            },
        )
        self._committed_step, self._committed_version = self.loop.step_number, self.version
        self.metrics.reached("committed", produced)
        if has_learned:
            self._publish(self.store.epoch, produced)
            self.metrics.reached("published", produced)
        self.gate.committed(self.store)
        self.source.commit_offsets(self.cursor)
        needed = (self.first.teacher.name, self.first.student.name)
        garbage_collect(self.releases, self.config.stream.keep_releases, needed)
        figures = {"messages": float(self.source.lag()), "held_rows": float(self.gate.held_rows)}
        self.tracking.committed(self.loop, figures)

    def _consume(self) -> None:
        """Each step is: predict, record, learn, calibrate; then, when it is time, commit and publish."""
        last_row = self._clock()
        while not self._is_stopping:
            self.gate.obey(self.loop)
            self._learn_held()
            if self.gate.is_full:
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
        for events in self.gate.drain(self.loop, self._prepare, self.source.partitions):
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
        if now - self._last_commit >= self.config.stream.publish_every / 1000:
            self._commit_or_wait()
            self._last_commit = self._clock()
        self.metrics.update(now, self)
        if now - self._last_report >= _REPORT_EVERY_S:
            self._report(now - self._last_report, self.loop.step_number - self._reported_step)
            self._last_report, self._reported_step = now, self.loop.step_number

    def _commit_or_wait(self) -> bool:
        """Commit; False if the broker is away and the commit has to wait."""
        try:
            self.commit()
        except TransientError as error:
            if self._is_stopping:
                raise
            log.warning("commit postponed: %s", error.message)
            return False
        return True

    def _hand_over_letters(self) -> None:
        letters = self.dead_letters.unwritten(self._letters)
        self.source.publish_dead_letters(letters)
        self.dead_letters.append(letters)
        self._letters = []

    def _publish(self, epoch: int, produced: list[tuple[int, int]]) -> None:
        """Cut a release from the state of the last commit, which ``epoch`` has made."""
        counts = {"resolution_ms": _FRESHNESS_RESOLUTION_MS, "counts": produced}
        self.release = publish_student(
            self.releases,
            self.loop,
            self.first,
            epoch=epoch,
            parent=self.release,
            extra={
                "state_digest": self.digest,
                "published_at": round(self._clock() * 1000),
                "produced_at": counts,
            },
        )

    def _restore(self) -> Cursor | None:
        checkpoint = self.store.load()
        self._audit_end: dict[str, Any] | None = None
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
        volatile = checkpoint.manifest["volatile"]
        self.gate.load_state(plain.pop("breaker"), volatile["breaker"])
        self._audit_end = volatile["audit"]
        self.segments = list(checkpoint.manifest["outputs"])
        self.predictions.keep_only(self.segments)
        self.digest = checkpoint.manifest["digest"]
        self.release = pointed(self.releases, CURRENT) or self.release
        log.info("restored step=%d checkpoint=%s", self.loop.step_number, checkpoint.path.name)
        self._publish_what_a_crash_prevented(checkpoint.manifest, plain["step"])
        return cursor

    def _publish_what_a_crash_prevented(self, manifest: Mapping[str, Any], step: int) -> None:
        pointer = read_pointer(self.releases, CURRENT)
        committed = (manifest["epoch"], step)
        if pointer is None or (not pointer.rollback and parse_name(pointer.name)[:2] < committed):
            produced = [(bucket, count) for bucket, count in manifest["volatile"]["produced_at"]]
            self._publish(manifest["epoch"], produced)

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
            self._committed_step = self.loop.step_number
        if self.loop.tasks and not self.gate.admits(events, self.loop):
            self.gate.take(events, self.loop, self.source.partitions)
            self._letters += events.dead_letters
        else:
            self._learn(events)
        self.cursor = self.source.advance(self.cursor, events.source)

    def _learn(self, events: StepEvents) -> None:
        produced_at = events.source.produced_at if self.loop.tasks else None
        self.metrics.began(produced_at)
        result = self.loop.step(events)
        self.metrics.learned(produced_at)
        self.audit.add(result.joined, self.loop)
        self.predictions.add(result.predicted, self.loop.tasks, self.release)
        self._letters += events.dead_letters
        self._letters += [self._negative_delay(found) for found in result.negative_delays]
        if produced_at is not None:
            buckets, counts = np.unique(produced_at // _FRESHNESS_RESOLUTION_MS, return_counts=True)
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
            "breaker": self.gate.mode,
            "held_rows": self.gate.held_rows,
            "open_impressions": len(self.loop.joiner),
            "release": self.release,
        }
        text = " ".join(f"{name}={value}" for name, value in figures.items())
        log.info("progress %s", text, extra={"figures": figures})


def _topic_names(config: Config) -> list[str]:
    return [str(getattr(config.kafka.topics, name)) for name in TOPICS]
