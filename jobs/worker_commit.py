"""What a commit of the worker does, beside the learning thread.

The learning thread takes a `Cut` at a batch boundary and goes on. Order matters in what follows:

1. The rows read are compared with those accounted for: if they differ, the worker ends here.
2. Dead letters of the steps since the last commit are acknowledged by the broker, then written to the file.
3. Held rows, predictions and the line of the ledger are written.
4. The checkpoint is written and the head moved: the commit point.
5. Unless nothing was learned: if the schedule and the gate say so, a release is cut from exactly this state
   and ``CURRENT`` moved to it (`jobs.worker_publishing`).
6. Offsets are committed to the broker, for lag charts only.

A crash before 4 repeats the steps since the last commit from the same cursors. Letters that the file holds
are not sent again; files that no commit has named are removed; what a crash between 4 and 5 has prevented is
decided again, from the same evidence, at the next start. While the broker is away, 2 waits, and with it the
commit.

A checkpoint is numbered by the cut's ``version``: steps learned, steps held and commands of the breaker
obeyed. A release is numbered by the steps learned.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.audit_log import AuditLog, Tally
from jobs.checkpoint import Checkpoint, CheckpointStore
from jobs.online import OnlineLoop, Predicted
from jobs.online_state import take_loop_changes
from jobs.predictions import PredictionLog
from jobs.produced_times import Produced
from jobs.publish_evidence import EvidenceRows
from jobs.release_manifest import parse_name, release_name
from jobs.worker_breaker import BreakerCut
from jobs.worker_metrics import WorkerMetrics
from jobs.worker_publishing import WorkerPublishing
from pipelines.config import Task
from pipelines.dead_letters import DeadLetterFile
from pipelines.errors import TransientError
from pipelines.events import DeadLetter
from pipelines.kafka_source import Cursor, KafkaSource
from pipelines.table_rows import Array, TableRows

__all__ = ["Commits", "Cut", "LoopCut"]

log = logging.getLogger(__name__)

_BROKER_RETRY_S = 1.0


@dataclass(frozen=True)
class LoopCut:
    """The loop at one boundary, and what happened on the way there: copies.

    Attributes
    ----------
    version : int
        Of the checkpoint to be.
    after_step : int
        Steps learned at the cut before.
    predicted, learned : list
        What was predicted and learned since.
    produced : list of (int, int)
        When the events learned since reached the broker: `jobs.produced_times`.
    breaker : BreakerCut
    evidence : dict
        What the gate is to see: `jobs.publish_evidence`.
    """

    arrays: Mapping[str, Array]
    tables: Mapping[str, Sequence[TableRows]]
    plain: dict[str, Any]
    version: int
    after_step: int
    predicted: list[tuple[Predicted, str]]
    learned: list[pa.RecordBatch]
    produced: Produced
    breaker: BreakerCut
    evidence: dict[Task, list[EvidenceRows]]

    @classmethod
    def take(
        cls, loop: OnlineLoop, breaker: BreakerCut, first_release: str, cursor: Cursor, **since: Any
    ) -> LoopCut:
        """Of the loop as it is; ``since`` is what happened since the cut before."""
        arrays, tables, plain = take_loop_changes(loop)
        # All of it is compared: equal digests mean equal state at the same rows.
        plain |= {"cursor": cursor.to_state(), "first_release": first_release, "breaker": breaker.state}
        return cls(arrays, tables, plain, breaker=breaker, **since)

    @property
    def has_learned(self) -> bool:
        """Whether the weights are others than at the cut before."""
        return int(self.plain["step"]) != self.after_step


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
    publishing : WorkerPublishing
        Decides what becomes of a state that has been committed.
    metrics : WorkerMetrics
        Told which events have been committed.
    clock : callable
        Wall clock, seconds since the epoch.

    Attributes
    ----------
    segments : list of str
        Files of predictions that the last commit names.
    digest : str or None
        Of the last committed state.
    step : int
        Steps learned up to it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        predictions: PredictionLog,
        dead_letters: DeadLetterFile,
        publishing: WorkerPublishing,
        metrics: WorkerMetrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.segments: list[str] = []
        self.digest: str | None = None
        self.step = 0
        self.audit = AuditLog(store.root / "audit")
        self._candidate: str | None = None  # name of a release of the last commit that has learned
        self.publishing, self._metrics, self._clock = publishing, metrics, clock
        self._store, self._predictions, self._dead_letters = store, predictions, dead_letters
        self._is_ending = threading.Event()

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Go on behind a checkpoint, or (None) from the start.

        Predictions beyond it are removed; a release that belongs to it, and is missing, is published.
        """
        if checkpoint is None:
            self._predictions.keep_only([])
            return
        manifest, plain = checkpoint.manifest, checkpoint.plain
        volatile = manifest["volatile"]
        self.segments = list(manifest["outputs"])
        self._predictions.keep_only(self.segments)
        self.digest, self.step = manifest["digest"], plain["step"]
        self._candidate = volatile["candidate"]
        if self._candidate is not None:
            epoch = parse_name(self._candidate)[0]
            self.publishing.resume(volatile, checkpoint.arrays, plain, epoch=epoch, digest=self.digest)

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
            If another worker has taken over, or rows were lost or counted twice.
        SetupError
            If the disk refuses to take the state.
        """
        tally = None if cut.loop is None else Tally.of(cut.loop.plain)
        self._store.check_lease()
        self._hand_over(cut.letters, source)
        if cut.loop is None or tally is None:
            return
        self._commit_loop(cut.loop, tally)
        source.commit_offsets(cut.cursor)
        self.publishing.collect()

    def _commit_loop(self, cut: LoopCut, tally: Tally) -> None:
        epoch = self._store.epoch
        held = cut.breaker.write(self._store.root / "hold")
        segment = self._predictions.write_segment(cut.predicted, cut.after_step, tally.step, epoch)
        if segment is not None:
            self.segments.append(segment)
        candidate = release_name("student", epoch, tally.step) if cut.has_learned else None
        self._candidate = candidate or self._candidate
        self.publishing.observe(cut.evidence, cut.produced)
        audit = self.audit.append(tally, cut.learned, version=cut.version, epoch=epoch, candidate=candidate)
        self.digest = self._store.commit(
            cut.version,
            cut.arrays,
            cut.plain,
            tables=cut.tables,
            cursor=tally.cursor,
            outputs=list(self.segments),
            volatile={
                "committed_at": self._clock(),
                "breaker": held,
                "audit": audit,
                "candidate": self._candidate,
                **self.publishing.state(),
            },
        )
        self.step = tally.step
        self._metrics.reached("committed", cut.produced)
        if cut.has_learned:
            arrays = self._store.committed_arrays()
            self.publishing.publish(arrays, cut.plain, epoch=epoch, digest=self.digest)

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
