"""Checkpoints: one atomic, versioned cut of everything that a worker knows.

A checkpoint is a directory ``checkpoints/<step>-<epoch>/`` with tensors, plain data and a manifest that
names every file's sha256. It exists from the moment its directory is renamed into place; it *counts* from
the moment the head, a row in SQLite, is moved to it by compare-and-swap on the epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sqlite3
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from pipelines.errors import SetupError, StaleStateError

__all__ = ["Checkpoint", "CheckpointStore", "state_digest"]

log = logging.getLogger(__name__)

FORMAT = 1
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes
    ----------
    arrays : dict of str to ndarray
    plain : dict
        The JSON part of the state.
    manifest : dict
        ``step, epoch, parent, digest, cursor, outputs, files, volatile``.
    """

    path: Path
    arrays: dict[str, NDArray[Any]]
    plain: dict[str, Any]
    manifest: dict[str, Any]


def state_digest(arrays: Arrays, plain: Mapping[str, Any]) -> str:
    """sha256 over names, types, shapes and bytes of all arrays in name order, and the plain data.

    Equal digests mean equal state to the bit. Nothing that depends on the wall clock is part of it.
    """
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        total.update(array.data if array.size else b"")
    total.update(json.dumps(plain, sort_keys=True).encode())
    return total.hexdigest()


class CheckpointStore:
    """The checkpoints of one worker.

    Parameters
    ----------
    root : Path
        The worker's state folder.
    keep : int
        How many of the newest checkpoints garbage collection leaves.
    """

    def __init__(self, root: Path, keep: int = 3) -> None:
        self.root, self.keep = root, keep
        self.folder = root / "checkpoints"
        self._database = root / "head.sqlite"
        self.epoch = 0
        self._loaded: str | None = None
        self._corrupt: list[str] = []

    def open(self) -> None:
        """Create what is missing and take the lease: any worker that held it before is fenced.

        What never counted is swept: half-written checkpoints, and whole ones that no head came to name.

        Raises
        ------
        SetupError
            If the folder cannot be written.
        StaleStateError
            If the head cannot be read.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS head (id INTEGER PRIMARY KEY CHECK (id = 1), "
                    "epoch INTEGER NOT NULL, name TEXT)"
                )
                database.execute("BEGIN IMMEDIATE")
                database.execute("INSERT OR IGNORE INTO head VALUES (1, 0, NULL)")
                database.execute("UPDATE head SET epoch = epoch + 1 WHERE id = 1")
                epoch, head = database.execute("SELECT epoch, name FROM head").fetchone()
                database.execute("COMMIT")
            self.epoch = int(epoch)
            # Not before the lease is ours: until then another worker may still make one of them count.
            self._sweep(head)
        except (OSError, sqlite3.OperationalError) as error:
            raise SetupError(
                f"cannot write worker state in {self.root}: {error}.", hint="choose another --state folder"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged_head(error) from error

    def check_lease(self) -> None:
        """Raise StaleStateError if another worker has taken the lease."""
        if self._is_fenced():
            raise self._fenced()

    def head(self) -> str | None:
        """Name of the newest committed checkpoint."""
        if not self._database.exists():
            return None
        try:
            with closing(self._connect()) as database:
                # A worker that is just starting has made the file and not yet the table.
                table = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'head'").fetchone()
                row = table and database.execute("SELECT name FROM head WHERE id = 1").fetchone()
        except sqlite3.OperationalError as error:
            raise SetupError(f"cannot read {self._database}: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged_head(error) from error
        return None if row is None else row[0]

    def names(self) -> list[str]:
        """All checkpoints on disk, oldest first."""
        return sorted(path.name for path in self.folder.glob("[0-9]*") if path.is_dir())

    def commit(
        self,
        step: int,
        arrays: Arrays,
        plain: Mapping[str, Any],
        *,
        cursor: Any,
        outputs: list[str],
        volatile: Mapping[str, Any],
    ) -> str:
        """Make a cut of step ``step`` durable and move the head to it; returns its digest.

        1. Write all files into ``.tmp-<step>-<uuid>/``, each fsynced, the manifest last.
        2. Rename to ``<step>-<epoch>/`` and fsync the folder.
        3. Move the head by compare-and-swap on the epoch. This is the commit point.
        4. Remove checkpoints that nothing needs.

        Raises
        ------
        StaleStateError
            If another worker has taken the lease: nothing has been committed.
        SetupError
            If the disk refuses the write: the head still names the previous checkpoint.
        """
        digest = state_digest(arrays, plain)
        name = f"{step:012d}-{self.epoch:06d}"
        try:
            self._write(name, step, arrays, plain, digest, cursor, outputs, volatile)
            is_ours = self._move_head(name)
        except (OSError, sqlite3.OperationalError) as error:
            # A worker that takes the lease sweeps what this one is writing.
            if self._is_fenced():
                raise self._fenced() from error
            shutil.rmtree(self.folder / name, ignore_errors=True)
            raise SetupError(
                f"cannot write checkpoint {name} in {self.folder}: {error}.",
                hint="the last commit stands; make room and start the worker again",
            ) from error
        if not is_ours:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            raise self._fenced()
        self._loaded = name
        self._collect(name)
        return digest

    def load(self) -> Checkpoint | None:
        """The head if it is intact, else the newest intact checkpoint before it; None for a fresh start.

        Raises
        ------
        StaleStateError
            If checkpoints exist and none is intact.
        """
        head = self.head()
        if head is None:
            return None
        problems = []
        for name in [known for known in reversed(self.names()) if known <= head]:
            try:
                found = self.read(name)
            except StaleStateError as error:
                log.error("%s: going back to the checkpoint before it", error.message)
                problems.append(error.message)
                self._corrupt.append(name)
            else:
                self._loaded = name
                return found
        raise StaleStateError(
            f"no intact checkpoint in {self.folder}: " + "; ".join(problems or [f"{head} is missing"]),
            hint="restore the folder from a backup, or start a new one from a release",
        )

    def read(self, name: str) -> Checkpoint:
        """Read and verify one checkpoint.

        Raises
        ------
        StaleStateError
            If a file is missing or its sha256 is not the manifest's.
        """
        path = self.folder / name
        manifest = self.manifest(name)
        for file, expected in manifest["files"].items():
            found = _sha256(path / file)
            if found != expected:
                raise StaleStateError(
                    f"checkpoint {name}: {file} is corrupt (sha256 {found[:12]}, expected {expected[:12]})"
                )
        arrays: dict[str, NDArray[Any]] = {}
        for shard in manifest["shards"]:
            arrays.update(load_file(path / shard["file"]))
        plain = json.loads((path / "state.json").read_bytes())
        return Checkpoint(path, arrays, plain, manifest)

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a checkpoint; its files are not looked at.

        Raises
        ------
        StaleStateError
            If there is none that can be read.
        """
        try:
            manifest: dict[str, Any] = json.loads((self.folder / name / "MANIFEST.json").read_bytes())
        except (OSError, ValueError) as error:
            raise StaleStateError(f"checkpoint {name} has no readable manifest: {error}") from error
        seal = manifest.pop("seal", None) if isinstance(manifest, dict) else None
        if seal is None or seal != _seal(manifest):
            raise StaleStateError(f"checkpoint {name}: MANIFEST.json is corrupt")
        return manifest

    def _write(
        self,
        name: str,
        step: int,
        arrays: Arrays,
        plain: Mapping[str, Any],
        digest: str,
        cursor: Any,
        outputs: list[str],
        volatile: Mapping[str, Any],
    ) -> None:
        temporary = self.folder / f".tmp-{step}-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        files = {
            "shard-00000.safetensors": save(
                {key: np.ascontiguousarray(array) for key, array in arrays.items()}
            ),
            "state.json": json.dumps(plain, sort_keys=True).encode(),
        }
        manifest = {
            "format": FORMAT,
            "step": step,
            "epoch": self.epoch,
            # Not the head where that was corrupt.
            "parent": self._loaded or self.head(),
            "digest": digest,
            "cursor": cursor,
            "outputs": outputs,
            "shards": [{"rank": 0, "file": "shard-00000.safetensors"}],
            "files": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
            "volatile": dict(volatile),
        }
        files["MANIFEST.json"] = json.dumps({**manifest, "seal": _seal(manifest)}, indent=1).encode()
        target = self.folder / name
        try:
            for file, content in files.items():
                write_synced(temporary / file, content)
            sync_folder(temporary)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        finally:
            # On a full disk the half that was written would be in the way of the next try.
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(self.folder)

    def _move_head(self, name: str) -> bool:
        """The commit point; False, and nothing is changed, if the lease is another worker's."""
        with closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            moved = database.execute(
                "UPDATE head SET name = ? WHERE id = 1 AND epoch = ?", (name, self.epoch)
            ).rowcount
            database.execute("COMMIT")
        return moved == 1

    def _is_fenced(self) -> bool:
        try:
            with closing(self._connect()) as database:
                row = database.execute("SELECT epoch FROM head WHERE id = 1").fetchone()
        except sqlite3.Error:
            return False
        return row is not None and row[0] != self.epoch

    def _fenced(self) -> StaleStateError:
        return StaleStateError(
            f"another worker has taken over the state in {self.root} (this one held epoch {self.epoch}).",
            hint="only one worker may learn from one state folder; this one has stopped",
        )

    def _damaged_head(self, error: sqlite3.DatabaseError) -> StaleStateError:
        return StaleStateError(
            f"{self._database} is damaged: {error}.", hint="restore the state folder from a backup"
        )

    def _sweep(self, head: str | None) -> None:
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for name in self.names():
            if head is None or name > head:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _collect(self, newest: str) -> None:
        # Nobody goes back to a corrupt one, so it must not take the place of one that is intact.
        for name in self._corrupt:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self._corrupt = []
        for name in [known for known in self.names() if known <= newest][: -self.keep]:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._database, timeout=30, isolation_level=None)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until the disk has a file that was written through another library."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "missing"
