"""What became of rows, commit by commit: a ledger, and which impressions were learned in which step.

``audit/commits-<epoch>.jsonl`` has a line for each commit: cursors before and after, rows read, and by how
much each class has changed, which must add up to the rows read. A line names the sha256 of the one before it.
It is synced before the checkpoint that names its end; what is behind that end does not count. A worker writes
a file of its own, so that one that has been fenced, and does not know it yet, spoils nothing.

``audit/learned-*.parquet`` has a row for each time an impression was learned from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.checkpoint import sync_file, sync_folder
from jobs.online import OnlineLoop
from monitoring.accounting import KINDS, Accounting
from pipelines.errors import SetupError, StaleStateError
from pipelines.joined import Joined
from pipelines.joiner import TASKS

__all__ = ["LEARNED_SCHEMA", "AuditLog", "CommitLine", "learned_rows", "read_lines"]

LEARNED_SCHEMA = pa.schema(
    [
        ("key_low", pa.uint64()),
        ("key_high", pa.uint64()),
        ("outcome", pa.uint64()),
        ("step", pa.int64()),
        ("task", pa.int8()),
        ("said", pa.int8()),
        ("label", pa.float32()),
    ]
)
# Before the first line of a ledger.
_START = "0" * 64
Counts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class CommitLine:
    """One line of the ledger.

    Attributes
    ----------
    version, epoch : int
        Of the checkpoint.
    steps : (int, int)
        Steps learned since the commit before: first, and last + 1.
    clock : int
        Arrival time of the last event, ms.
    release : str or None
        The release that is cut from this commit; None if nothing was learned.
    before, after : list
        Cursors, as `pipelines.cursor.Cursor.to_state` gives them.
    read : dict
        Rows read, by kind. Negative where held rows are read anew within the next line.
    classes : dict
        Change of each class, by kind; only what has changed.
    learned : str or None
        The file of learned rows.
    previous : str
        sha256 of the line before.
    """

    version: int
    epoch: int
    steps: tuple[int, int]
    clock: int
    release: str | None
    before: list[list[Any]]
    after: list[list[Any]]
    read: dict[str, int]
    classes: Counts
    learned: str | None
    previous: str

    def difference(self) -> dict[str, int]:
        """Rows read less rows accounted for, by kind: all 0 if no row was lost."""
        return {kind: self.read[kind] - sum(self.classes.get(kind, {}).values()) for kind in KINDS}


@dataclass(frozen=True)
class _End:
    """Where the ledger ends: bytes of each file that count, and sha256 of the last line."""

    files: dict[str, int] = field(default_factory=dict)
    last: str = _START

    @classmethod
    def of(cls, named: Mapping[str, Any] | None) -> _End:
        return cls() if named is None else cls(dict(named["files"]), named["last"])


@dataclass
class AuditLog:
    """Writes the ledger of one worker.

    Parameters
    ----------
    folder : Path
    """

    folder: Path
    _end: _End = field(default_factory=_End)
    _read: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    _classes: Counts = field(default_factory=lambda: Accounting().value())
    _cursor: list[list[Any]] = field(default_factory=list)
    _step: int = 0
    _parts: list[pa.RecordBatch] = field(default_factory=list)

    def restore(self, end: Mapping[str, Any] | None, loop: OnlineLoop, cursor: list[list[Any]]) -> None:
        """Go on behind what a checkpoint names; without a checkpoint (None) from the start.

        Raises
        ------
        StaleStateError
            If the ledger is shorter than the checkpoint says, or another one.
        """
        self._end = _End.of(end)
        needed = {line.learned for line in read_lines(self.folder, end)} | set(self._end.files)
        for pattern in ("learned-*.parquet", "commits-*.jsonl", ".tmp-*"):
            for left in self.folder.glob(pattern):
                if left.name not in needed:
                    left.unlink(missing_ok=True)
        self._note(loop, cursor)

    def add(self, joined: Joined, loop: OnlineLoop) -> None:
        """Record the rows that the last step has learned."""
        for task in loop.tasks:
            index = TASKS.index(task)
            rows = joined.examples[index]
            if len(rows):
                keys = loop.joiner.keys_of(rows.slot)
                # What an outcome is told apart by; a row without one has none.
                first = loop.joiner.windows[index].first_hash[rows.slot]
                self._parts.append(
                    pa.record_batch(
                        [
                            keys[:, 0],
                            keys[:, 1],
                            np.where(rows.label > 0, first, np.uint64(0)),
                            np.full(len(rows), loop.step_number - 1),
                            np.full(len(rows), index, np.int8),
                            rows.kind.astype(np.int8),
                            rows.label.astype(np.float32),
                        ],
                        schema=LEARNED_SCHEMA,
                    )
                )

    def append(
        self, loop: OnlineLoop, cursor: list[list[Any]], *, version: int, epoch: int, release: str | None
    ) -> dict[str, Any]:
        """Add the line of a commit and sync it; returns what the checkpoint is to name.

        Raises
        ------
        SetupError
            If the disk refuses the write.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            learned = self._write_learned(version, epoch)
            line = self._line(loop, cursor, version, epoch, release, learned)
            text = json.dumps(vars(line), sort_keys=True).encode()
            name = f"commits-{epoch:06d}.jsonl"
            size = self._end.files.get(name, 0)
            with (self.folder / name).open("ab") as file:
                # A commit that failed may have left its line.
                file.truncate(size)
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)
        except OSError as error:
            raise SetupError(
                f"cannot write the ledger in {self.folder}: {error}.",
                hint="the last commit stands; make room and start the worker again",
            ) from error
        files = {**self._end.files, name: size + len(text) + 1}
        self._end = _End(files, hashlib.sha256(text).hexdigest())
        self._note(loop, cursor)
        return {"files": files, "last": self._end.last}

    def _note(self, loop: OnlineLoop, cursor: list[list[Any]]) -> None:
        self._read, self._classes = dict(loop.read), loop.accounting.value()
        self._cursor, self._step = cursor, loop.step_number

    def _line(
        self,
        loop: OnlineLoop,
        cursor: list[list[Any]],
        version: int,
        epoch: int,
        release: str | None,
        learned: str | None,
    ) -> CommitLine:
        now = loop.accounting.value()
        changes = {
            kind: {name: rows - self._classes[kind][name] for name, rows in classes.items()}
            for kind, classes in now.items()
        }
        return CommitLine(
            version=version,
            epoch=epoch,
            steps=(self._step, loop.step_number),
            clock=loop.clock,
            release=release,
            before=self._cursor,
            after=cursor,
            read={kind: rows - self._read[kind] for kind, rows in loop.read.items()},
            classes={
                kind: {name: rows for name, rows in classes.items() if rows}
                for kind, classes in changes.items()
            },
            learned=learned,
            previous=self._end.last,
        )

    def _write_learned(self, version: int, epoch: int) -> str | None:
        if not self._parts:
            return None
        name = f"learned-{version:012d}-{epoch:06d}.parquet"
        temporary = self.folder / f".tmp-{name}"
        table = pa.Table.from_batches(self._parts, LEARNED_SCHEMA)
        pq.write_table(table, temporary, compression="zstd")
        sync_file(temporary)
        temporary.replace(self.folder / name)
        self._parts = []
        return name


def read_lines(folder: Path, end: Mapping[str, Any] | None) -> list[CommitLine]:
    """The ledger up to the end that a checkpoint names, oldest first.

    Raises
    ------
    StaleStateError
        If it is not the ledger that the checkpoint was written with.
    """
    found, last = [], _START
    for name, size in _End.of(end).files.items():
        try:
            content = (folder / name).read_bytes()[:size]
        except OSError as error:
            raise _damaged(folder / name, str(error.strerror)) from error
        for number, line in enumerate(content.splitlines(), 1):
            try:
                fields = json.loads(line)
                entry = CommitLine(**{**fields, "steps": tuple(fields["steps"])})
            except (ValueError, TypeError, KeyError) as error:
                raise _damaged(folder / name, f"line {number}: {error!r}") from error
            if entry.previous != last:
                raise _damaged(folder / name, f"the line before line {number} was changed or removed")
            found.append(entry)
            last = hashlib.sha256(line).hexdigest()
    if last != _End.of(end).last:
        raise _damaged(folder, "its last line is missing or was changed")
    return found


def learned_rows(folder: Path, lines: list[CommitLine]) -> Iterator[tuple[CommitLine, pa.Table]]:
    """Each commit that has learned rows, with them."""
    for line in lines:
        if line.learned is not None:
            yield line, pq.read_table(folder / line.learned, schema=LEARNED_SCHEMA)


def _damaged(path: Path, problem: str) -> StaleStateError:
    return StaleStateError(
        f"the ledger {path} is not the one that the checkpoint was written with: {problem}.",
        hint="restore the state folder from a backup",
    )
