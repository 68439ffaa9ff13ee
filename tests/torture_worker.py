"""The worker as a process of its own that is killed, or finds the disk full, at a place chosen beforehand."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.commit_thread import CommitThread
from jobs.online import OnlineLoop
from jobs.single_thread import use_one_thread
from jobs.tracking_outbox import TrackingOutbox
from jobs.worker import Worker
from pipelines.config import Config
from pipelines.errors import CtrstreamError
from tests.torture_points import FULL_DISKS, KILLS, SLOW, replace

__all__ = ["TOLD", "Fault", "run", "stay_close"]

# Steps learned beside a commit before the loop waits for it: a small log would be over after a few commits.
_MOST_AHEAD = 2
# Exit code of a worker that ended with an error meant for its user; 1 is one that nobody foresaw.
TOLD = 70


@dataclass(frozen=True)
class Fault:
    """What happens to a worker.

    Attributes
    ----------
    where : str
        A name of `KILLS`, `FULL_DISKS` or `SLOW`, or a random instant.
    call : int
        How often that place is passed before; of a random instant and of slow steps, ms.
    """

    where: str
    call: int

    def sooner(self) -> Fault:
        """The same at half the number, odd if it was odd."""
        return Fault(self.where, self.call // 4 * 2 + self.call % 2)


def run(folder: Path, config: Config, fault: Fault | None, sends: bool) -> None:
    """Work to the end of the topics; output goes to ``worker.log`` in the folder.

    Without ``sends`` what the worker has to tell MLflow stays in its outbox, and no process is started that
    would wait for a server.
    """
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    logging.basicConfig(level=logging.WARNING, force=True)
    logging.getLogger("jobs").setLevel(logging.INFO)
    use_one_thread()
    stay_close()
    if not sends:
        replace(TrackingOutbox, "_keep_draining", lambda outbox: None)
        close = TrackingOutbox.close
        replace(TrackingOutbox, "close", lambda outbox: close(outbox, 0.0))
    if fault is not None:
        logging.getLogger(__name__).warning("process %d: %s", os.getpid(), fault)
        (KILLS | FULL_DISKS | SLOW)[fault.where](fault.call)
    try:
        Worker(config, folder / "releases", folder / "state", until_end=True).run()
    except CtrstreamError as error:
        logging.getLogger(__name__).error("%s", error)
        sys.exit(TOLD)


def stay_close() -> None:
    """Let the loop wait for a commit that is still in flight some steps later."""
    start, step = CommitThread.start, OnlineLoop.step
    threads: list[CommitThread] = []
    steps = 0

    def started(thread: CommitThread, work: Any) -> None:
        nonlocal steps
        threads[:], steps = [thread], 0
        start(thread, work)

    def stepped(loop: OnlineLoop, events: Any) -> Any:
        nonlocal steps
        if threads and steps == _MOST_AHEAD:
            threads[0].finish()
        steps += 1
        return step(loop, events)

    replace(CommitThread, "start", started)
    replace(OnlineLoop, "step", stepped)
