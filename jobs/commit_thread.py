"""One piece of work at a time beside the learning thread; what goes wrong in it is raised in the latter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

__all__ = ["CommitThread"]

# Hashing many small blocks hardly ever lets go of the interpreter by itself: learning would wait for it up to
# the switch interval, by default 5 ms, in each of its operations.
_SWITCH_S = 1e-4


class CommitThread:
    """At most one commit in flight.

    Examples
    --------
    >>> thread, done = CommitThread(), []
    >>> thread.start(lambda: done.append(1))
    >>> thread.wait()
    >>> done
    [1]
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "commit")
        self._work: Future[None] | None = None

    def is_free(self) -> bool:
        """Whether nothing is in flight; raises what the last piece of work has raised."""
        if self._work is not None and not self._work.done():
            return False
        self.wait()
        return True

    def start(self, work: Callable[[], None]) -> None:
        """Begin; the caller has seen that `is_free`."""
        sys.setswitchinterval(_SWITCH_S)
        self._work = self._pool.submit(work)

    def wait(self) -> None:
        """Return once nothing is in flight; raises what the work has raised."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def finish(self) -> None:
        """Return once nothing is in flight, whatever became of it."""
        if self._work is not None:
            wait([self._work])
