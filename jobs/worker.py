"""The online worker: the loop fed by Kafka, with commits, releases and dead letters.

Order matters. At a commit:

1. Dead letters of the steps since the last commit are written and acknowledged.
2. The segment of predictions is written.
3. The checkpoint is written and the head moved: the commit point.
4. A release is cut from exactly this state and ``CURRENT`` moved to it.
5. Offsets are committed to the broker, for lag charts only.

A crash before 3 repeats the steps since the last commit from the same cursors; 1, 2 and 4 are idempotent.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.checkpoint import CheckpointStore
from jobs.online import OnlineLoop
from jobs.online_state import load_loop_state, loop_state
from jobs.predictions import PredictionLog
from jobs.prepared import PreparedBlock, StepEvents, prepare
from jobs.publishing import FirstReleases, load_first, publish_student
from jobs.release import garbage_collect, pointed
from jobs.steps import StepCutter
from jobs.worker_tracking import WorkerTracking
from pipelines.config import Config
from pipelines.dead_letters import DeadLetterFile
from pipelines.events import TOPICS, DeadLetter, EventBlock
from pipelines.joined import NegativeDelay
from pipelines.kafka_source import Cursor, KafkaSource

__all__ = ["Worker"]

log = logging.getLogger(__name__)

# A step that is not full is run all the same after this long without new rows.
_LINGER_S = 0.25
_POLL_ROWS = 8192
_FRESHNESS_RESOLUTION_MS = 100


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
        self.config, self.releases, self.state, self._clock = config, releases, state, clock
        self.first: FirstReleases = load_first(releases)
        self.store = CheckpointStore(state, keep=config.stream.keep_checkpoints)
        self.store.open()
        self.loop = OnlineLoop(config)
        self.predictions = PredictionLog(state / "predictions")
        self.dead_letters = DeadLetterFile(state / "dead_letters.jsonl")
        self.tracking = WorkerTracking(config, state)
        self.segments: list[str] = []
        self.release = self.first.student.name
        self.digest: str | None = None
        self._frozen = self.first.frozen()
        cursor = self._restore()
        self.source = KafkaSource(config.kafka, cursor, until_end=until_end)
        self.cursor: Cursor = self.source.cursor
        self._kinds = dict(zip(_topic_names(config), range(3), strict=True))
        self._cutter = StepCutter(self._prepare, config.student.batch_rows, self.first.warm_up_until)
        self._committed_step = self.loop.step_number
        self._letters: list[DeadLetter] = []
        self._produced: dict[int, int] = {}
        self._stopping = False

    def stop(self) -> None:
        """Finish the step at hand, commit and return from `run`."""
        self._stopping = True

    def run(self) -> None:
        """Consume until stopped, or until the end if that was asked for.

        Each step is: predict, record, learn, calibrate (`OnlineLoop.step`); then, when it is time, commit
        and publish.
        """
        running = {"pid": os.getpid(), "epoch": self.store.epoch, "since_ms": round(self._clock() * 1000)}
        (self.state / "running.json").write_text(json.dumps(running), encoding="utf-8")
        last_commit = last_row = last_report = self._clock()
        reported = self.loop.step_number
        while not self._stopping:
            block = self.source.poll(_POLL_ROWS, timeout_s=0.1)
            now = self._clock()
            if block is not None:
                last_row = now
                for events in self._cutter.feed(block):
                    self._step(events)
                    if self._stopping:
                        break
                    if self._clock() - last_commit >= self.config.stream.publish_every / 1000:
                        self.commit()
                        last_commit = self._clock()
            elif self.source.exhausted:
                break
            elif now - last_row >= _LINGER_S:
                for events in self._cutter.flush():
                    self._step(events)
            if now - last_commit >= self.config.stream.publish_every / 1000:
                self.commit()
                last_commit = self._clock()
            if now - last_report >= 5:
                self._report(now - last_report, self.loop.step_number - reported)
                last_report, reported = now, self.loop.step_number
        if not self._stopping:
            for events in self._cutter.flush():
                self._step(events)
        self.commit()
        self.tracking.published(self.releases / self.release)
        self.close()

    def close(self) -> None:
        """Leave the broker and MLflow."""
        self.source.close()
        self.tracking.close()

    def commit(self) -> None:
        """Make everything up to the last step durable, then publish it: see the module's order."""
        if not self.loop.tasks or self.loop.step_number == self._committed_step:
            return
        self.dead_letters.append(self._letters)
        self.source.publish_dead_letters(self._letters)
        self._letters = []
        segment = self.predictions.write_segment(self._committed_step, self.loop.step_number)
        if segment is not None:
            self.segments.append(segment)
        arrays, plain = loop_state(self.loop)
        # The cursor is part of what is compared: equal digests mean equal state at the same rows.
        plain["cursor"] = self.cursor.to_state()
        produced, self._produced = self._produced, {}
        self.digest = self.store.commit(
            self.loop.step_number,
            arrays,
            plain,
            cursor=plain["cursor"],
            outputs=self.segments,
            volatile={"committed_at": self._clock()},
        )
        self._committed_step = self.loop.step_number
        self.release = publish_student(
            self.releases,
            self.loop,
            self.first,
            epoch=self.store.epoch,
            parent=self.release,
            extra={
                "state_digest": self.digest,
                "published_at": round(self._clock() * 1000),
                "produced_at": {
                    "resolution_ms": _FRESHNESS_RESOLUTION_MS,
                    "counts": sorted(produced.items()),
                },
            },
        )
        self.source.commit_offsets(self.cursor)
        garbage_collect(self.releases, self.config.stream.keep_releases)
        self.tracking.committed(self.loop, {"messages": float(self.source.lag())})

    def _restore(self) -> Cursor | None:
        checkpoint = self.store.load()
        if checkpoint is None:
            self.predictions.keep_only([])
            return None
        self.loop.begin(self.first.students(), self.first.calibrators(), self._frozen.teachers)
        cursor = Cursor.from_state(checkpoint.plain.pop("cursor"))
        load_loop_state(self.loop, checkpoint.arrays, checkpoint.plain)
        self.segments = list(checkpoint.manifest["outputs"])
        self.predictions.keep_only(self.segments)
        self.digest = checkpoint.manifest["digest"]
        self.release = pointed(self.releases, "CURRENT") or self.release
        log.info("restored step=%d checkpoint=%s", self.loop.step_number, checkpoint.path.name)
        return cursor

    def _prepare(self, block: EventBlock) -> PreparedBlock:
        return prepare(
            block, self.first.student.spec, self.first.student.segments, self._teachers, self._kinds
        )

    def _step(self, events: StepEvents) -> None:
        if not self.loop.tasks and events.clock >= self.first.warm_up_until:
            self.loop.begin(self.first.students(), self.first.calibrators(), self._frozen.teachers)
            self._committed_step = self.loop.step_number
        result = self.loop.step(events)
        self.predictions.add(result.predicted, self.loop.tasks, self.release)
        self._letters += events.dead_letters
        self._letters += [self._negative_delay(found) for found in result.negative_delays]
        self.cursor = self.source.advance(self.cursor, events.source)
        if self.loop.tasks and events.source.produced_at is not None:
            buckets, counts = np.unique(
                events.source.produced_at // _FRESHNESS_RESOLUTION_MS, return_counts=True
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
        }
        log.info("progress %s", " ".join(f"{name}={value}" for name, value in figures.items()))


def _topic_names(config: Config) -> list[str]:
    return [str(getattr(config.kafka.topics, name)) for name in TOPICS]
