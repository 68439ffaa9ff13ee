"""Workers on topics of their own, and ways to kill them inside a test."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.broker import Broker
from jobs.produce import produce
from jobs.worker import Worker
from pipelines.config import Config
from pipelines.config_sections import KafkaConfig, TopicsConfig
from pipelines.events import TOPICS
from tests.small_run import SmallRun

__all__ = [
    "Killed",
    "Plant",
    "Produced",
    "TickingClock",
    "crash",
    "finished",
    "kill_in",
    "killed_at",
    "ready_worker",
    "ticking_worker",
    "with_topics",
]

# Makes a worker die at a moment, when that has come so many times before.
Plant = Callable[[Worker, pytest.MonkeyPatch, int], None]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the worker runs after it."""


class TickingClock:
    """A wall clock that advances at each look, so that commits come every few steps on any machine."""

    def __init__(self, seconds: float = 0.3) -> None:
        self._ticks = itertools.count()
        self._seconds = seconds

    def __call__(self) -> float:
        return 1_800_000_000 + next(self._ticks) * self._seconds


def with_topics(config: Config, bootstrap_servers: str, prefix: str) -> Config:
    topics = {name: f"{prefix}-{name}" for name in (*TOPICS, "dead_letters")}
    kafka = KafkaConfig(bootstrap_servers=bootstrap_servers, topics=TopicsConfig(**topics), partitions=2)
    return config.model_copy(update={"kafka": kafka})


@dataclass(frozen=True)
class Produced:
    """A log in Kafka, and the digest of a worker that read it without a disturbance."""

    small_run: SmallRun
    config: Config
    reference: Path
    digest: str

    @classmethod
    def to(cls, broker: Broker, prefix: str, small_run: SmallRun, reference: Path) -> Produced:
        """Send the log of a small run, and read it in ``reference``."""
        config = with_topics(small_run.config, broker.bootstrap_servers, prefix)
        produce(small_run.files, config)
        worker = cls(small_run, config, reference, "").worker(reference)
        return cls(small_run, config, reference, finished(worker))

    def worker(self, folder: Path, **options: Any) -> Worker:
        """A worker over ``folder``, which is made ready on the first call."""
        return ready_worker(self.small_run, folder, options.pop("config", self.config), **options)


def ready_worker(small_run: SmallRun, folder: Path, config: Config, **options: Any) -> Worker:
    """A `ticking_worker` over ``folder``, which gets its first releases on the first call."""
    if not (folder / "releases").exists():
        small_run.first_releases(folder / "releases")
    return ticking_worker(folder, config, **options)


def ticking_worker(folder: Path, config: Config, **options: Any) -> Worker:
    """A worker to the end of the topics whose commits come at the same steps, however slow the disk is."""
    settings = {"until_end": True, "clock": TickingClock(), **options}
    worker = Worker(config, folder / "releases", folder / "state", **settings)
    thread, is_free = worker._thread, worker._thread.is_free

    def is_free_soon() -> bool:
        # One step is learned beside a commit, or more while nobody looks.
        if thread._work is not None:
            wait([thread._work])
        return is_free()

    thread.is_free = is_free_soon  # type: ignore[method-assign]
    return worker


def finished(worker: Worker) -> str:
    worker.run()
    assert worker.digest is not None
    return worker.digest


def crash(worker: Worker) -> None:
    """Leave a worker as a kill would; its sockets are closed, as the system would close them.

    A commit that was in flight comes to its end: it might have been killed just after that.
    """
    worker.commits.end()
    worker._thread.finish()
    worker.source.close()


def killed_at(owner: Callable[[Worker], Any], name: str, *, before: bool) -> Plant:
    """Kills a worker before or after a call of a function, when it has been called so many times."""

    def plant(worker: Worker, patch: pytest.MonkeyPatch, after: int) -> None:
        kill_in(owner(worker), name, patch, after, before=before)

    return plant


def kill_in(target: Any, name: str, patch: pytest.MonkeyPatch, after: int, *, before: bool) -> None:
    """Raise `Killed` before or after a call of ``target.name``, the one that comes after so many others."""
    original, calls = getattr(target, name), itertools.count()

    def killed(*given: Any, **named: Any) -> Any:
        is_last = next(calls) == after
        if is_last and before:
            raise Killed
        result = original(*given, **named)
        if is_last:
            raise Killed
        return result

    patch.setattr(target, name, killed)
