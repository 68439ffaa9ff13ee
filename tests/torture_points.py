"""Every place at which the worker is killed, and every way in which its disk is full.

The worker knows nothing of it: functions that its commits go through are wrapped, in its process only.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq

import jobs.release
import jobs.worker
from jobs import checkpoint_files, publishing, release_pointer, worker_publishing
from jobs.checkpoint import CheckpointStore
from jobs.checkpoint_head import Head
from jobs.commit_thread import CommitThread
from jobs.online import OnlineLoop
from jobs.predictions import PredictionLog
from jobs.tensor_file import write_tensors
from jobs.worker import Worker
from jobs.worker_commit import Commits, LoopCut
from pipelines.dead_letters import DeadLetterFile, letter_value
from pipelines.kafka_source import KafkaSource

__all__ = ["FULL_DISKS", "KILLS", "OFTEN", "ONCE", "SLOW", "Plant", "die", "replace"]

Call = Callable[..., Any]
Plant = Callable[[int], None]

_write = os.write


def replace(owner: Any, name: str, by: Call) -> None:
    """For the rest of this process."""
    setattr(owner, name, by)


def die() -> NoReturn:
    """What a power cut does to a process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nothing runs after SIGKILL")


def no_space(*given: Any, **named: Any) -> NoReturn:
    """What the kernel answers where the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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


def full(
    owner: Any, name: str, half: Call | None = None, answer: Call = no_space, meant: Call = always
) -> Plant:
    """From one call of ``owner.name`` on, the disk takes nothing, or ``half`` of it, any more."""

    def plant(call: int) -> None:
        original, calls = getattr(owner, name), itertools.count()

        @functools.wraps(original)
        def wrapped(*given: Any, **named: Any) -> Any:
            if not meant(*given, **named) or next(calls) < call:
                return original(*given, **named)
            if half is not None:
                half(*given, **named)
            return answer()

        replace(owner, name, wrapped)

    return plant


def in_the_transaction(call: int) -> None:
    """Die when the head's row is changed and the change is not committed."""
    connect, calls = Head._connect, itertools.count()

    def traced(statement: str) -> None:
        if statement == "COMMIT" and next(calls) == call:
            die()

    def connected(head: Head) -> sqlite3.Connection:
        database = connect(head)
        database.set_trace_callback(traced)
        return database

    replace(Head, "_connect", connected)


def beside_a_commit(call: int) -> None:
    """Die in a step that is learned while the one before it is being committed."""
    commit, in_flight = Commits.commit, threading.Event()

    def flying(*given: Any, **named: Any) -> None:
        in_flight.set()
        try:
            commit(*given, **named)
        finally:
            in_flight.clear()

    replace(Commits, "commit", flying)
    at(OnlineLoop, "_calibrate", "before", lambda *given, **named: in_flight.is_set())(call)


def slow_steps(ms: int) -> None:
    """Each step takes longer, so that a worker is still there when something happens to it from outside."""
    step = OnlineLoop.step

    def slowed(loop: OnlineLoop, events: Any) -> Any:
        time.sleep(ms / 1000)
        return step(loop, events)

    replace(OnlineLoop, "step", slowed)


def no_room_for_the_head() -> NoReturn:
    raise sqlite3.OperationalError("database or disk is full")


# Which calls are meant ----------------------------------------------------------------------------------


def has_letters(owner: object, letters: Iterable[Any]) -> bool:
    return bool(letters)


def is_running_json(path: Path, *given: Any, **named: Any) -> bool:
    return path.name.startswith(".running-")


def is_delta(path: Path, arrays: Mapping[str, Any]) -> bool:
    return any(name.startswith("@rows") for name in arrays)


def is_base(path: Path, arrays: Mapping[str, Any]) -> bool:
    return not is_delta(path, arrays)


def is_named(name: str) -> Call:
    return lambda path, *given, **named: path.name == name


def goes_into(folder: str) -> Call:
    """Renamed to what counts there, not out of the way."""
    return lambda source, target, **named: (
        Path(target).parent.name == folder and not Path(target).name.startswith(".")
    )


def is_set_aside(folder: str) -> Call:
    return lambda source, target, **named: (
        Path(source).parent.name == folder and not Path(source).name.startswith(".")
    )


def is_doomed(folder: str, prefix: str) -> Call:
    """What is removed was renamed before; half-written files are removed too, but are not there any more."""
    return lambda path, *given, **named: (
        Path(path).parent.name == folder and Path(path).name.startswith(prefix) and Path(path).is_dir()
    )


def is_record(descriptor: int, line: bytes) -> bool:
    return line.startswith(b'{"op"')


def is_current(source: Any, target: Any, **named: Any) -> bool:
    return Path(target).name == "CURRENT"


# Half of the work ----------------------------------------------------------------------------------------


def half_file(path: Path, content: bytes | str, *given: Any, **named: Any) -> None:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data[: len(data) // 2])


def half_tensors(path: Path, arrays: Mapping[str, Any]) -> None:
    write_tensors(path, arrays)
    os.truncate(path, path.stat().st_size // 2)


def half_parquet(table: Any, path: Path, *given: Any, **named: Any) -> None:
    path.write_bytes(b"PAR1" + bytes(100))


def half_letters(file: DeadLetterFile, letters: Iterable[Any]) -> None:
    data = b"".join(letter_value(letter) + b"\n" for letter in letters)
    with file.path.open("ab") as out:
        out.write(data[: len(data) - 9])


def half_record(descriptor: int, line: bytes) -> None:
    _write(descriptor, line[: len(line) // 2])


def half_removed(path: Any, *given: Any, **named: Any) -> None:
    min(file for file in Path(path).rglob("*") if file.is_file()).unlink()


_CHECKPOINTS, _RELEASES = goes_into("checkpoints"), goes_into("releases")
_OLD_CHECKPOINT = is_doomed("checkpoints", ".tmp-removed-")
_OLD_RELEASE = is_doomed("releases", release_pointer.TEMPORARY)

# In the order in which a worker comes to them.
KILLS: dict[str, Plant] = {
    "lease taken": at(CheckpointStore, "open", "after"),
    "state restored": at(jobs.worker, "load_loop_state", "after"),
    "before running.json": at(Path, "write_text", "before", is_running_json),
    "running.json half written": at(Path, "write_text", "before", is_running_json, half_file),
    "running.json written": at(Path, "write_text", "after", is_running_json),
    "in a step": at(OnlineLoop, "_calibrate", "before"),
    "in a step beside a commit": beside_a_commit,
    "cut taken": at(LoopCut, "take", "after"),
    "commit begun": at(CommitThread, "start", "after"),
    "before dead letters are sent": at(KafkaSource, "publish_dead_letters", "before", has_letters),
    "dead letters acknowledged": at(KafkaSource, "publish_dead_letters", "after", has_letters),
    "dead letters half written": at(DeadLetterFile, "append", "before", has_letters, half_letters),
    "dead letters written": at(DeadLetterFile, "append", "after", has_letters),
    "before the segment": at(PredictionLog, "write_segment", "before"),
    "segment half written": at(pq, "write_table", "before", half=half_parquet),
    "segment not renamed": at(os, "replace", "before", goes_into("predictions")),
    "segment written": at(PredictionLog, "write_segment", "after"),
    "base half written": at(checkpoint_files, "write_tensors", "before", is_base, half_tensors),
    "base written": at(checkpoint_files, "write_tensors", "after", is_base),
    "delta half written": at(checkpoint_files, "write_tensors", "before", is_delta, half_tensors),
    "delta written": at(checkpoint_files, "write_tensors", "after", is_delta),
    "plain state half written": at(
        checkpoint_files, "write_synced", "before", is_named("state.json"), half_file
    ),
    "manifest half written": at(
        checkpoint_files, "write_synced", "before", is_named("MANIFEST.json"), half_file
    ),
    "manifest written": at(checkpoint_files, "write_synced", "after", is_named("MANIFEST.json")),
    "checkpoint not renamed": at(os, "rename", "before", _CHECKPOINTS),
    "checkpoint renamed": at(os, "rename", "after", _CHECKPOINTS),
    "head changed, not committed": in_the_transaction,
    "head moved": at(CheckpointStore, "_move_head", "after"),
    "old checkpoint set aside": at(os, "rename", "after", is_set_aside("checkpoints")),
    "old checkpoint half removed": at(shutil, "rmtree", "before", _OLD_CHECKPOINT, half_removed),
    "old checkpoint removed": at(shutil, "rmtree", "after", _OLD_CHECKPOINT),
    "before the release": at(publishing, "write_release", "before"),
    "release files written": at(jobs.release, "sync_folder", "before"),
    "release not renamed": at(os, "rename", "before", _RELEASES),
    "release written": at(publishing, "write_release", "after"),
    "CURRENT not moved": at(os, "replace", "before", is_current),
    "CURRENT moved": at(os, "replace", "after", is_current),
    "before offsets are committed": at(KafkaSource, "commit_offsets", "before"),
    "offsets committed": at(KafkaSource, "commit_offsets", "after"),
    "old release set aside": at(os, "rename", "after", is_set_aside("releases")),
    "old release half removed": at(shutil, "rmtree", "before", _OLD_RELEASE, half_removed),
    "releases collected": at(worker_publishing, "garbage_collect", "after"),
    "commit done": at(Commits, "commit", "after"),
    "MLflow record half written": at(os, "write", "before", is_record, half_record),
    "MLflow record written": at(os, "write", "after", is_record),
    "before any write is on disk": at(os, "fsync", "before"),
    "any write is on disk": at(os, "fsync", "after"),
    "before the worker leaves": at(Worker, "close", "before"),
}
FULL_DISKS: dict[str, Plant] = {
    "disk full": full(os, "fsync"),
    "disk full in the segment": full(pq, "write_table", half_parquet),
    "disk full in the checkpoint": full(checkpoint_files, "write_tensors", half_tensors),
    "disk full at the head": full(CheckpointStore, "_move_head", answer=no_room_for_the_head),
    "disk full in the outbox": full(os, "write", half_record, meant=is_record),
}
SLOW: dict[str, Plant] = {"slow steps": slow_steps}
# Places that a process comes to once, and those that each commit comes to many times.
ONCE = (
    "lease taken",
    "state restored",
    "before running.json",
    "running.json half written",
    "running.json written",
    "before the worker leaves",
)
OFTEN = ("before any write is on disk", "any write is on disk", "disk full")
