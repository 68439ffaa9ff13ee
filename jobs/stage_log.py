"""Stages of a long job: announced, timed, kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

__all__ = ["StageLog"]


class StageLog:
    """Prints each stage with the time it took, on stderr, and keeps the seconds by name.

    Examples
    --------
    >>> stages = StageLog()
    >>> with stages("simulate") as say:
    ...     say("300,000 impressions")
    >>> list(stages.seconds)
    ['simulate']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.monotonic()
        self._stage, self._stage_begun = "", self._begun
        self._said: list[str] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[str], None]]:
        """Run a stage; what it yields adds a remark to its line."""
        self._start(stage)
        yield self._said.append
        self._finish()

    def next(self, stage: str) -> None:
        """End the stage at hand and begin another inside the same block."""
        self._finish()
        self._start(stage)

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self._begun

    def _start(self, stage: str) -> None:
        self._stage, self._stage_begun = stage, time.monotonic()
        self._said.clear()
        click.echo(f"[{self.elapsed:6.1f} s] {stage} ...", err=True)

    def _finish(self) -> None:
        seconds = time.monotonic() - self._stage_begun
        self.seconds[self._stage] = round(seconds, 2)
        remark = f" ({'; '.join(self._said)})" if self._said else ""
        click.echo(f"[{self.elapsed:6.1f} s] {self._stage}: {seconds:.1f} s{remark}", err=True)
