"""The worker as a process of its own that is killed, or finds the disk full, at a place chosen beforehand.

The worker knows nothing of it: functions that its commits go through are wrapped, in this process only.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jobs.worker
from jobs import checkpoint, publishing
from jobs.checkpoint import CheckpointStore
from jobs.online import OnlineLoop
from jobs.predictions import PredictionLog
from jobs.single_thread import use_one_thread
from jobs.worker import Worker
from jobs.worker_tracking import WorkerTracking
from pipelines.config import Config
from pipelines.dead_letters import DeadLetterFile, letter_value
from pipelines.errors import CtrstreamError
from pipelines.kafka_source import KafkaSource

__all__ = ["FULL_DISKS", "KILLS", "TOLD", "Fault", "run"]

# Exit code of a worker that ended with an error meant for its user; 1 is one that nobody foresaw.
TOLD = 70

Call = Callable[..., Any]
Plant = Callable[[int], None]


@dataclass(frozen=True)
class Fault:
    """What happens to a worker.

    Attributes
    ----------
    where : str
        A name of `KILLS` or `FULL_DISKS`.
    call : int
        How often that place is passed before.
    """

    where: str
    call: int


def run(folder: Path, config: Config, fault: Fault | None) -> None:
    """Work to the end of the topics; output goes to ``worker.log`` in the folder."""
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    logging.basicConfig(level=logging.WARNING, force=True)
    logging.getLogger("jobs").setLevel(logging.INFO)
    use_one_thread()
    if fault is not None:
        logging.getLogger(__name__).warning("process %d: %s", os.getpid(), fault)
        (KILLS | FULL_DISKS)[fault.where](fault.call)
    try:
        Worker(config, folder / "releases", folder / "state", until_end=True).run()
    except CtrstreamError as error:
        logging.getLogger(__name__).error("%s", error)
        sys.exit(TOLD)


def die() -> NoReturn:
    """What a power cut does to a process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nothing runs after SIGKILL")


def replace(owner: Any, name: str, by: Call) -> None:
    """For the rest of this process."""
    setattr(owner, name, by)


def always(*given: Any, **named: Any) -> bool:
    return True


def at(owner: Any, name: str, when: str, meant: Call = always, half: Call | None = None) -> Plant:
    """Die before or after a call of ``owner.name``; ``half`` does a part of its work first."""

    def plant(call: int) -> None:
        original, calls = getattr(owner, name), itertools.count()

        @functools.wraps(original)
        def wrapped(*given: Any, **named: Any) -> Any:
            is_due = meant(*given, **named) and next(calls) == call
            if is_due and half is not None:
                half(*given, **named)
            if is_due and when == "before":
                die()
            result = original(*given, **named)
            if is_due:
                die()
            return result

        replace(owner, name, wrapped)

    return plant


def in_the_transaction(call: int) -> None:
    """Die when the head's row is changed and the change is not committed."""
    connect, calls = CheckpointStore._connect, itertools.count()

    def traced(statement: str) -> None:
        if statement == "COMMIT" and next(calls) == call:
            die()

    def connected(store: CheckpointStore) -> sqlite3.Connection:
        database = connect(store)
        database.set_trace_callback(traced)
        return database

    replace(CheckpointStore, "_connect", connected)


def disk_full(call: int) -> None:
    """From one write on the disk takes nothing any more."""
    fsync, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    replace(os, "fsync", full)


def head_full(call: int) -> None:
    """The database of the head finds no room."""
    move, calls = CheckpointStore._move_head, itertools.count()

    def full(store: CheckpointStore, name: str) -> bool:
        if next(calls) >= call:
            raise sqlite3.OperationalError("database or disk is full")
        return move(store, name)

    replace(CheckpointStore, "_move_head", full)


# Which calls are meant ----------------------------------------------------------------------------------


def has_letters(owner: object, letters: Iterable[Any]) -> bool:
    return bool(letters)


def is_running_json(path: Path, *given: Any, **named: Any) -> bool:
    return path.name == ".running.json"


def goes_into(folder: str) -> Call:
    return lambda source, target, **named: Path(target).parent.name == folder


def is_release(source: Any, target: Any, **named: Any) -> bool:
    return Path(target).name.startswith("student-")


def is_current(source: Any, target: Any, **named: Any) -> bool:
    return Path(target).name == "CURRENT"


def is_old_checkpoint(path: Any, *given: Any, **named: Any) -> bool:
    return Path(path).parent.name == "checkpoints" and not Path(path).name.startswith(".")


def is_old_release(path: Any, *given: Any, **named: Any) -> bool:
    # What was not renamed into place is removed too, but is not there any more.
    return Path(path).parent.name == "releases" and Path(path).is_dir()


# Half of the work ----------------------------------------------------------------------------------------


def half_file(path: Path, content: bytes | str, *given: Any, **named: Any) -> None:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data[: len(data) // 2])


def half_letters(file: DeadLetterFile, letters: Iterable[Any]) -> None:
    data = b"".join(letter_value(letter) + b"\n" for letter in letters)
    with file.path.open("ab") as out:
        out.write(data[: len(data) - 9])


def half_removed(path: Any, *given: Any, **named: Any) -> None:
    min(file for file in Path(path).rglob("*") if file.is_file()).unlink()


KILLS: dict[str, Plant] = {
    "lease taken": at(CheckpointStore, "open", "after"),
    "state restored": at(jobs.worker, "load_loop_state", "after"),
    "before running.json": at(Path, "write_text", "before", is_running_json),
    "running.json half written": at(Path, "write_text", "before", is_running_json, half_file),
    "running.json written": at(Path, "write_text", "after", is_running_json),
    "in a step": at(OnlineLoop, "_calibrate", "before"),
    "before dead letters are sent": at(KafkaSource, "publish_dead_letters", "before", has_letters),
    "dead letters acknowledged": at(KafkaSource, "publish_dead_letters", "after", has_letters),
    "dead letters half written": at(DeadLetterFile, "append", "before", has_letters, half_letters),
    "dead letters written": at(DeadLetterFile, "append", "after", has_letters),
    "before the segment": at(PredictionLog, "write_segment", "before"),
    "segment not renamed": at(os, "replace", "before", goes_into("predictions")),
    "segment written": at(PredictionLog, "write_segment", "after"),
    "checkpoint file half written": at(checkpoint, "write_synced", "before", half=half_file),
    "checkpoint file written": at(checkpoint, "write_synced", "after"),
    "checkpoint not renamed": at(os, "rename", "before", goes_into("checkpoints")),
    "checkpoint renamed": at(os, "rename", "after", goes_into("checkpoints")),
    "head changed, not committed": in_the_transaction,
    "head moved": at(CheckpointStore, "_move_head", "after"),
    "old checkpoint half removed": at(shutil, "rmtree", "before", is_old_checkpoint, half_removed),
    "old checkpoint removed": at(shutil, "rmtree", "after", is_old_checkpoint),
    "before the release": at(publishing, "write_release", "before"),
    "release not renamed": at(os, "rename", "before", is_release),
    "release written": at(publishing, "write_release", "after"),
    "CURRENT not moved": at(os, "replace", "before", is_current),
    "CURRENT moved": at(os, "replace", "after", is_current),
    "before offsets are committed": at(KafkaSource, "commit_offsets", "before"),
    "offsets committed": at(KafkaSource, "commit_offsets", "after"),
    "old release half removed": at(shutil, "rmtree", "before", is_old_release, half_removed),
    "releases collected": at(jobs.worker, "garbage_collect", "after"),
    "MLflow told": at(WorkerTracking, "committed", "after"),
    "before any write is on disk": at(os, "fsync", "before"),
    "any write is on disk": at(os, "fsync", "after"),
    "before the worker leaves": at(Worker, "close", "before"),
}
FULL_DISKS: dict[str, Plant] = {"disk full": disk_full, "disk full at the head": head_full}
