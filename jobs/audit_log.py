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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.disk_errors import disk_errors
from jobs.learned_rows import LEARNED_SCHEMA
from monitoring.accounting import Accounting
from pipelines.errors import StaleStateError
from pipelines.events import KINDS
from pipelines.synced_files import sync_file, sync_folder

__all__ = ["AuditLog", "CommitLine", "Tally", "learned_rows", "read_lines"]

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
    candidate : str or None
        Name that a release of this commit has, if it is published; None if nothing was learned.
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
    candidate: str | None
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


@dataclass(frozen=True)
class Tally:
    """What had been read, and what had become of it, at one batch boundary."""

    step: int
    clock: int
    cursor: list[list[Any]]
    read: dict[str, int]
    classes: Counts

    @classmethod
    def start(cls, cursor: list[list[Any]]) -> Tally:
        """Before the first row."""
        return cls(0, -1, cursor, dict.fromkeys(KINDS, 0), Accounting().value())

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Tally:
        """By the plain part of a state (`jobs.online_state.loop_state`) with the cursor in it.

        Raises
        ------
        StaleStateError
            If the rows read are not those accounted for.
        """
        accounting = Accounting.from_state(plain["accounting"])
        if any(accounting.check(plain["read"]).values()):
            raise StaleStateError(
                f"rows were lost or counted twice up to step {plain['step']}: expected every row read in "
                f"exactly one class. Received {plain['read']} rows read, {accounting.state()}.",
                hint="nothing of it is committed, the last commit stands: keep the state folder and the log, "
                "for this is a defect of the worker",
            )
        return cls(plain["step"], plain["clock"], plain["cursor"], dict(plain["read"]), accounting.value())


class AuditLog:
    """Writes the ledger of one worker; it belongs to whoever commits.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._end = _End()
        self._last = Tally.start([])

    def restore(self, end: Mapping[str, Any] | None, last: Tally) -> None:
        """Go on behind what a checkpoint names; without a checkpoint (None) from the start.

        Raises
        ------
        StaleStateError
            If the ledger is shorter than the checkpoint says, or another one.
        """
        self._end, self._last = _End.of(end), last
        needed = {line.learned for line in read_lines(self.folder, end)} | set(self._end.files)
        for pattern in ("learned-*.parquet", "commits-*.jsonl", ".tmp-*"):
            for left in self.folder.glob(pattern):
                if left.name not in needed:
                    left.unlink(missing_ok=True)

    def append(
        self,
        tally: Tally,
        learned: Sequence[pa.RecordBatch],
        *,
        version: int,
        epoch: int,
        candidate: str | None,
    ) -> dict[str, Any]:
        """Add the line of a commit and sync it; returns what the checkpoint is to name.

        Raises
        ------
        SetupError
            If the disk refuses the write.
        """
        name = f"commits-{epoch:06d}.jsonl"
        size = self._end.files.get(name, 0)
        with disk_errors("the ledger", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file_name = self._write_learned(learned, version, epoch)
            line = self._line(tally, version, epoch, candidate, file_name)
            text = json.dumps(vars(line), sort_keys=True).encode()
            with (self.folder / name).open("ab") as file:
                # Behind the last line that counts there is nothing that does.
                file.truncate(size)
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)
        files = {**self._end.files, name: size + len(text) + 1}
        self._end, self._last = _End(files, hashlib.sha256(text).hexdigest()), tally
        return {"files": files, "last": self._end.last}

    def _line(
        self, tally: Tally, version: int, epoch: int, candidate: str | None, learned: str | None
    ) -> CommitLine:
        last = self._last
        changes = {
            kind: {name: rows - last.classes[kind][name] for name, rows in classes.items()}
            for kind, classes in tally.classes.items()
        }
        return CommitLine(
            version=version,
            epoch=epoch,
            steps=(last.step, tally.step),
            clock=tally.clock,
            candidate=candidate,
            before=last.cursor,
            after=tally.cursor,
            read={kind: rows - last.read[kind] for kind, rows in tally.read.items()},
            classes={
                kind: {name: rows for name, rows in classes.items() if rows}
                for kind, classes in changes.items()
            },
            learned=learned,
            previous=self._end.last,
        )

    def _write_learned(self, parts: Sequence[pa.RecordBatch], version: int, epoch: int) -> str | None:
        if not parts:
            return None
        name = f"learned-{version:012d}-{epoch:06d}.parquet"
        temporary = self.folder / f".tmp-{name}"
        pq.write_table(pa.Table.from_batches(parts, LEARNED_SCHEMA), temporary, compression="zstd")
        sync_file(temporary)
        temporary.replace(self.folder / name)
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
