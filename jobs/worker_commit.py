"""What a commit of the worker does, beside the learning thread.

The learning thread takes a `Cut` at a batch boundary and goes on. Order matters in what follows:

1. Dead letters of the steps since the last commit are acknowledged by the broker, then written to the file.
2. The segment of predictions is written.
3. The checkpoint is written and the head moved: the commit point.
4. If the schedule and the gate say so, a release is cut from exactly this state and ``CURRENT`` moved to it
   (`jobs.publish_control`).
5. Offsets are committed to the broker, for lag charts only.

A crash before 3 repeats the steps since the last commit from the same cursors. Letters that the file holds
are not sent again; a segment that no commit has named is removed; what a crash between 3 and 4 has prevented
is decided again, from the same evidence, at the next start. While the broker is away, 1 waits, and with it
the commit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from jobs.checkpoint import Checkpoint, CheckpointStore
from jobs.online import OnlineLoop, Predicted
from jobs.online_state import take_loop_changes
from jobs.predictions import PredictionLog
from jobs.publish_control import PublishControl
from jobs.publish_decision import Decision
from jobs.publish_evidence import EvidenceRows, EvidenceSample
from jobs.publishing import FirstReleases, Learned, publish_student
from jobs.release import CURRENT, garbage_collect, pointed
from jobs.worker_tracking import WorkerTracking
from models.table_rows import TableRows
from pipelines.config import Task
from pipelines.dead_letters import DeadLetterFile
from pipelines.errors import TransientError
from pipelines.events import DeadLetter
from pipelines.kafka_source import Cursor, KafkaSource

__all__ = ["FRESHNESS_RESOLUTION_MS", "Commits", "Cut", "LoopCut"]

log = logging.getLogger(__name__)

FRESHNESS_RESOLUTION_MS = 100
_BROKER_RETRY_S = 1.0
# An hour of what no release has published yet; what came before is told as of the oldest of them.
_MOST_BUCKETS = 36_000
Produced = list[tuple[int, int]]


@dataclass(frozen=True)
class LoopCut:
    """The loop at one step, and what was predicted on the way there: copies."""

    arrays: Mapping[str, NDArray[Any]]
    tables: Mapping[str, TableRows]
    plain: dict[str, Any]
    after_step: int
    predicted: list[tuple[Predicted, str]]
    produced: Produced
    evidence: dict[Task, list[EvidenceRows]] = field(default_factory=dict)

    @classmethod
    def take(
        cls,
        loop: OnlineLoop,
        after_step: int,
        predicted: list[tuple[Predicted, str]],
        produced: Produced,
        evidence: dict[Task, list[EvidenceRows]],
        **plain: Any,
    ) -> LoopCut:
        """Of the loop as it is; ``plain`` is added to the plain part of its state."""
        arrays, tables, state = take_loop_changes(loop)
        return cls(arrays, tables, {**state, **plain}, after_step, predicted, produced, evidence)


@dataclass(frozen=True)
class Cut:
    """What a commit is to make durable; before the loop learns there are only dead letters."""

    letters: list[DeadLetter]
    cursor: Cursor
    loop: LoopCut | None


class Commits:
    """Makes cuts durable and publishes them.

    Parameters
    ----------
    loop : OnlineLoop
        Only what never changes of it is looked at: its students' specs and configurations.
    clock : callable
        Wall clock, seconds since the epoch.

    Attributes
    ----------
    segments : list of str
        Files of predictions that the last commit names.
    release : str
        The release that ``CURRENT`` named when it was last looked at.
    evidence : EvidenceSample
        What the gate is to see; belongs to the learning thread.
    digest : str or None
        Of the last committed state.
    """

    def __init__(
        self,
        store: CheckpointStore,
        predictions: PredictionLog,
        dead_letters: DeadLetterFile,
        releases: Path,
        first: FirstReleases,
        loop: OnlineLoop,
        tracking: WorkerTracking,
        *,
        keep_releases: int,
        clock: Callable[[], float],
    ) -> None:
        self.segments: list[str] = []
        self.release = first.student.name
        self.digest: str | None = None
        self._store, self._predictions, self._dead_letters = store, predictions, dead_letters
        self._releases, self._first, self._loop = releases, first, loop
        self._keep_releases, self._clock = keep_releases, clock
        self._produced: dict[int, int] = {}
        config = loop.config.publish
        self.evidence = EvidenceSample(config.sample_rows if config.gate else 0)
        self._control = PublishControl(releases, first, config, store.check_lease, tracking.decided)
        self._is_ending = threading.Event()

    def end(self) -> None:
        """Wait for the broker no longer."""
        self._is_ending.set()

    def commit(self, cut: Cut, source: KafkaSource) -> None:
        """Make a cut durable, then publish it: see the module's order.

        Raises
        ------
        TransientError
            If the broker does not take dead letters and the worker is ending: nothing has been committed.
        StaleStateError
            If another worker has taken over.
        SetupError
            If the disk refuses to take the state.
        """
        self._store.check_lease()
        self._hand_over(cut.letters, source)
        if cut.loop is None:
            return
        self._commit_loop(cut.loop)
        source.commit_offsets(cut.cursor)
        needed = {self._first.teacher.name, self._first.student.name, *self._control.needed()}
        garbage_collect(self._releases, self._keep_releases, needed)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on after the commit that a worker was started from; what it has left undone is done."""
        manifest = checkpoint.manifest
        self.segments, self.digest = list(manifest["outputs"]), manifest["digest"]
        self.release = pointed(self._releases, CURRENT) or self.release
        self._produced = {bucket: count for bucket, count in manifest["volatile"]["produced_at"]}
        if "publish" in manifest["volatile"]:
            self._control.load(manifest["volatile"]["publish"])
        self._publish(checkpoint.arrays, checkpoint.plain, manifest["epoch"], is_redo=True)

    def _commit_loop(self, cut: LoopCut) -> None:
        step, epoch = cut.plain["step"], self._store.epoch
        segment = self._predictions.write_segment(cut.predicted, cut.after_step, step, epoch)
        if segment is not None:
            self.segments.append(segment)
        self._add_produced(cut.produced)
        self._control.observe(cut.evidence)
        self.digest = self._store.commit(
            step,
            cut.arrays,
            cut.plain,
            tables=cut.tables,
            cursor=cut.plain["cursor"],
            outputs=list(self.segments),
            volatile={
                "committed_at": self._clock(),
                "produced_at": sorted(self._produced.items()),
                "publish": self._control.state(),
            },
        )
        self._publish(self._store.committed_arrays(), cut.plain, epoch)

    def _publish(
        self,
        arrays: Mapping[str, NDArray[Any]],
        plain: Mapping[str, Any],
        epoch: int,
        *,
        is_redo: bool = False,
    ) -> None:
        """Decide on what the commit of ``epoch`` holds, and cut a release from it if it may be published."""
        decision = self._control.decide(arrays, plain, epoch, is_redo=is_redo)
        if decision.verdict == "published":
            self._cut_release(Learned.at_cut(self._loop, arrays, plain), epoch, decision)
        self._control.conclude(decision, plain)
        self.release = pointed(self._releases, CURRENT) or self.release
        if self.release == decision.candidate:
            self._produced = {}

    def _cut_release(self, learned: Learned, epoch: int, decision: Decision) -> None:
        produced = {"resolution_ms": FRESHNESS_RESOLUTION_MS, "counts": sorted(self._produced.items())}
        publish_student(
            self._releases,
            learned,
            self._first,
            epoch=epoch,
            parent=pointed(self._releases, CURRENT) or self._first.student.name,
            extra={
                "state_digest": self.digest,
                "published_at": round(self._clock() * 1000),
                "produced_at": produced,
                "gate": decision.about(),
            },
        )

    def _add_produced(self, produced: Produced) -> None:
        for bucket, count in produced:
            self._produced[bucket] = self._produced.get(bucket, 0) + count
        excess = sorted(self._produced)[: max(len(self._produced) - _MOST_BUCKETS, 0)]
        if excess:
            counts = sum(self._produced.pop(bucket) for bucket in excess)
            self._produced[min(self._produced)] += counts

    def _hand_over(self, letters: list[DeadLetter], source: KafkaSource) -> None:
        letters = self._dead_letters.unwritten(letters)
        while True:
            try:
                source.publish_dead_letters(letters)
                break
            except TransientError as error:
                if self._is_ending.is_set():
                    raise
                log.warning("commit postponed: %s", error.message)
                self._is_ending.wait(_BROKER_RETRY_S)
        self._dead_letters.append(letters)
