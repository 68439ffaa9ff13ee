"""What a commit of the worker does, beside the learning thread.

The learning thread takes a `Cut` at a batch boundary and goes on. Order matters in what follows:

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

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from jobs.checkpoint import CheckpointStore
from jobs.online import OnlineLoop, Predicted
from jobs.online_state import take_loop_changes
from jobs.predictions import PredictionLog
from jobs.publishing import FirstReleases, Learned, publish_student
from jobs.release import garbage_collect
from models.table_rows import TableRows
from pipelines.dead_letters import DeadLetterFile
from pipelines.errors import TransientError
from pipelines.events import DeadLetter
from pipelines.kafka_source import Cursor, KafkaSource

__all__ = ["FRESHNESS_RESOLUTION_MS", "Commits", "Cut", "LoopCut"]

log = logging.getLogger(__name__)

FRESHNESS_RESOLUTION_MS = 100
_BROKER_RETRY_S = 1.0
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

    @classmethod
    def take(
        cls,
        loop: OnlineLoop,
        after_step: int,
        predicted: list[tuple[Predicted, str]],
        produced: Produced,
        **plain: Any,
    ) -> LoopCut:
        """Of the loop as it is; ``plain`` is added to the plain part of its state."""
        arrays, tables, state = take_loop_changes(loop)
        return cls(arrays, tables, {**state, **plain}, after_step, predicted, produced)


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
        The newest release.
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
        needed = (self._first.teacher.name, self._first.student.name)
        garbage_collect(self._releases, self._keep_releases, needed)

    def publish(self, learned: Learned, epoch: int, produced: Produced) -> None:
        """Cut a release from what the commit of ``epoch`` holds."""
        self.release = publish_student(
            self._releases,
            learned,
            self._first,
            epoch=epoch,
            parent=self.release,
            extra={
                "state_digest": self.digest,
                "published_at": round(self._clock() * 1000),
                "produced_at": {"resolution_ms": FRESHNESS_RESOLUTION_MS, "counts": produced},
            },
        )

    def _commit_loop(self, cut: LoopCut) -> None:
        step, epoch = cut.plain["step"], self._store.epoch
        segment = self._predictions.write_segment(cut.predicted, cut.after_step, step, epoch)
        if segment is not None:
            self.segments.append(segment)
        self.digest = self._store.commit(
            step,
            cut.arrays,
            cut.plain,
            tables=cut.tables,
            cursor=cut.plain["cursor"],
            outputs=list(self.segments),
            volatile={"committed_at": self._clock(), "produced_at": cut.produced},
        )
        self.publish(
            Learned.at_cut(self._loop, self._store.committed_arrays(), cut.plain), epoch, cut.produced
        )

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
