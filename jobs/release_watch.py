"""Follows CURRENT: loads what it names, verified, and never goes back unless the pointer says so."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.release import Release
from jobs.release_manifest import parse_name
from jobs.release_pointer import CURRENT, Pointer, read_pointer
from pipelines.errors import CtrstreamError, DataError, StaleStateError

__all__ = ["Loaded", "ReleaseWatch", "wall_clock_ms"]

log = logging.getLogger(__name__)

# A release that was refused is tried again: it may have been on its way to this machine.
_RETRY_MS = 10_000
_PROBE = {"user_id": "", "item_id": "", "event_time": 0, "features": {}}


def wall_clock_ms() -> int:
    """Milliseconds since the epoch, UTC, by this machine's clock."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Loaded:
    """A release in service.

    Attributes
    ----------
    release : Release
    loaded_at : int
        Wall clock, ms.
    """

    release: Release
    loaded_at: int


class ReleaseWatch:
    """What is served, and why it is not newer.

    Parameters
    ----------
    root : Path
        Folder of releases.
    record : Path, optional
        Each release that comes into service is added to this file, one JSON object a line: ``release``,
        ``digest``, ``loaded_at_ms``, ``last_event_time``, ``learned_events``.
    clock : callable
        Wall clock, ms.

    Attributes
    ----------
    current : Loaded
        Replaced as a whole: a request takes it once and is answered by one release.
    problem : str or None
        Why the release that CURRENT names is not the one in service.
    refusals : int

    Raises
    ------
    DataError
        If CURRENT was never set.
    StaleStateError
        If the release that it names cannot be used: there is nothing to fall back on.
    """

    def __init__(
        self, root: Path, record: Path | None = None, clock: Callable[[], int] = wall_clock_ms
    ) -> None:
        self.root = root
        self.problem: str | None = None
        self.refusals = 0
        self._record = record
        self._clock = clock
        self._refused: tuple[Pointer, int] | None = None
        pointer = read_pointer(root, CURRENT)
        if pointer is None:
            raise DataError(
                f"there is no release to serve: {root / CURRENT} does not exist.",
                hint="`stream` and `backtest` publish releases; `ctrstream release promote` chooses one",
            )
        self.current = self._load(pointer.name)

    def poll(self) -> bool:
        """Look at CURRENT, and bring what it names into service; True if that is another release now.

        A release that is damaged, or older without the pointer saying ``rollback``, is refused: the one in
        service stays, and ``problem`` says why.
        """
        now = self._clock()
        pointer: Pointer | None = None
        try:
            pointer = read_pointer(self.root, CURRENT)
            if pointer is None:
                raise StaleStateError(f"{self.root / CURRENT} has gone.")
            if pointer.name == self.current.release.name:
                self.problem, self._refused = None, None
                return False
            if self._refused is not None and self._refused[0] == pointer and now < self._refused[1]:
                return False
            self._check_forward(pointer)
            self.current = self._load(pointer.name)
        except (CtrstreamError, OSError) as error:
            self._refuse(pointer, str(error), now)
            return False
        self.problem, self._refused = None, None
        return True

    def _check_forward(self, pointer: Pointer) -> None:
        serving = self.current.release.name
        if parse_name(pointer.name)[:2] < parse_name(serving)[:2] and not pointer.rollback:
            raise StaleStateError(
                f"{CURRENT} went back from {serving} to {pointer.name} without saying rollback.",
                hint="`ctrstream release rollback` goes back on purpose",
            )

    def _refuse(self, pointer: Pointer | None, problem: str, now: int) -> None:
        if problem != self.problem:
            log.error("still serving %s: %s", self.current.release.name, problem)
        self.problem = problem
        self.refusals += 1
        self._refused = None if pointer is None else (pointer, now + _RETRY_MS)

    def _load(self, name: str) -> Loaded:
        release = Release.load(self.root / name)
        # The first prediction of a model is slow, and must not be a user's; a broken one must not serve.
        for task, scored in release.score(release.encode([_PROBE])).items():
            if not np.isfinite([scored.logit, scored.probability]).all():
                raise StaleStateError(
                    f"{name} predicts {scored.logit[0]} for {task}: not a finite logit.",
                    hint="roll back, and find out what the worker learned",
                )
        loaded = Loaded(release, self._clock())
        log.info("serving %s", name)
        if self._record is not None:
            self._append(self._record, loaded)
        return loaded

    def _append(self, path: Path, loaded: Loaded) -> None:
        manifest = loaded.release.manifest
        line = {
            "release": manifest.name,
            "digest": manifest.digest,
            "loaded_at_ms": loaded.loaded_at,
            "last_event_time": manifest.last_event_time,
            "learned_events": manifest.learned_events,
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
