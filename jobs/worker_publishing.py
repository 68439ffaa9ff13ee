"""From a committed state to a release: schedule, gate, pointers, and what is told of them.

All of it belongs to the thread that commits, but for `WorkerPublishing.evidence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from jobs.audit_published import PublishedLog
from jobs.checkpoint import CheckpointStore
from jobs.online import OnlineLoop
from jobs.produced_times import RESOLUTION_MS, Produced, ProducedTimes
from jobs.publish_control import PublishControl
from jobs.publish_decision import Decision
from jobs.publish_evidence import EvidenceRows, EvidenceSample
from jobs.publishing import FirstReleases, Learned, publish_student
from jobs.release import garbage_collect, pointed
from jobs.release_pointer import CURRENT
from jobs.worker_metrics import WorkerMetrics
from jobs.worker_tracking import WorkerTracking
from pipelines.config import Task

__all__ = ["WorkerPublishing"]

# An hour of what no release has published yet; what came before is told as of the oldest of them.
_MOST_BUCKETS = 36_000
Arrays = Mapping[str, NDArray[Any]]


class WorkerPublishing:
    """Publishes what commits hold, if the schedule and the gate let it.

    Parameters
    ----------
    store : CheckpointStore
        Asked for the lease before ``CURRENT`` goes back.
    releases : Path
    first : FirstReleases
    loop : OnlineLoop
        Only what never changes of it is looked at: its students' specs and configurations.
    metrics : WorkerMetrics
        Told which events have been published.
    tracking : WorkerTracking
        Hears each decision.
    clock : callable
        Wall clock, seconds since the epoch.

    Attributes
    ----------
    release : str
        The release that ``CURRENT`` named when it was last looked at.
    evidence : EvidenceSample
        What the gate is to see; belongs to the learning thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
        releases: Path,
        first: FirstReleases,
        loop: OnlineLoop,
        metrics: WorkerMetrics,
        tracking: WorkerTracking,
        clock: Callable[[], float],
    ) -> None:
        self.release = first.student.name
        config = loop.config
        self.evidence = EvidenceSample(config.publish.sample_rows if config.publish.gate else 0)
        self._keep_releases = config.stream.keep_releases
        self._releases, self._first, self._loop = releases, first, loop
        self._metrics, self._clock = metrics, clock
        self._produced = ProducedTimes(most=_MOST_BUCKETS)
        self._control = PublishControl(releases, first, config.publish, store.check_lease, tracking.decided)
        self._log = PublishedLog(store.root / "audit")

    def observe(self, evidence: Mapping[Task, list[EvidenceRows]], produced: Produced) -> None:
        """Hear what a commit brings, before it is made."""
        self._produced.merge(produced)
        self._control.observe(evidence)

    def state(self) -> dict[str, Any]:
        """JSON data for the commit: no part of what is learned."""
        return {"produced_at": self._produced.value(), "publish": self._control.state()}

    def resume(
        self,
        state: Mapping[str, Any],
        arrays: Arrays,
        plain: Mapping[str, Any],
        **of: Any,
    ) -> None:
        """Go on after a commit; what the worker that made it has left undone is done (see `publish`)."""
        self.release = pointed(self._releases, CURRENT) or self.release
        self._produced.merge(state["produced_at"])
        self._control.load(state["publish"])
        self.publish(arrays, plain, is_redo=True, **of)

    def publish(
        self,
        arrays: Arrays,
        plain: Mapping[str, Any],
        *,
        epoch: int,
        digest: str | None,
        is_redo: bool = False,
    ) -> None:
        """Decide on the state that a commit holds; cut a release from it if it may be published.

        Parameters
        ----------
        arrays, plain
            Of the commit.
        epoch : int
            Under which it was made.
        digest : str
            Its digest.
        is_redo : bool
            Whether it is that of a worker that was killed: see `PublishControl.decide`.
        """
        decision = self._control.decide(arrays, plain, epoch, is_redo=is_redo)
        if decision.verdict == "published":
            self._cut_release(Learned.at_cut(self._loop, arrays, plain), epoch, digest, decision)
        self._control.conclude(decision, plain)
        self.release = pointed(self._releases, CURRENT) or self.release
        if self.release == decision.candidate:
            self._log.add(self.release)
            self._metrics.reached("published", self._produced.take())

    def collect(self) -> None:
        """Remove releases that nobody needs."""
        needed = {self._first.teacher.name, self._first.student.name, *self._control.needed()}
        garbage_collect(self._releases, self._keep_releases, needed)

    def _cut_release(self, learned: Learned, epoch: int, digest: str | None, decision: Decision) -> None:
        current = pointed(self._releases, CURRENT)
        if current == decision.candidate:
            # One that has lost the lease, and does not know it yet, has been faster: it is the same state.
            return
        produced = {"resolution_ms": RESOLUTION_MS, "counts": self._produced.value()}
        publish_student(
            self._releases,
            learned,
            self._first,
            epoch=epoch,
            parent=current or self._first.student.name,
            extra={
                "state_digest": digest,
                "published_at": round(self._clock() * 1000),
                "produced_at": produced,
                "gate": decision.about(),
            },
        )
