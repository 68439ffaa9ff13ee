"""Checkpoints: one atomic, versioned cut of everything that a worker knows.

A checkpoint is a directory ``checkpoints/<step>-<epoch>/`` with tensors, plain data and a manifest that
names every file's sha256. It exists from the moment its directory is renamed into place; it *counts* from
the moment the head, a row in SQLite, is moved to it by compare-and-swap on the epoch.
"""

from __future__ import annotations

import hashlib
import json
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

    def open(self) -> None:
        """Create what is missing and take the lease: any worker that held it before is fenced.

        Raises
        ------
        SetupError
            If the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover)
            with closing(self._connect()) as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS head (id INTEGER PRIMARY KEY CHECK (id = 1), "
                    "epoch INTEGER NOT NULL, name TEXT)"
                )
                database.execute("BEGIN IMMEDIATE")
                database.execute("INSERT OR IGNORE INTO head VALUES (1, 0, NULL)")
                database.execute("UPDATE head SET epoch = epoch + 1 WHERE id = 1")
                self.epoch = int(database.execute("SELECT epoch FROM head").fetchone()[0])
                database.execute("COMMIT")
        except (OSError, sqlite3.OperationalError) as error:
            raise SetupError(
                f"cannot write worker state in {self.root}: {error}.", hint="choose another --state folder"
            ) from error

    def head(self) -> str | None:
        """Name of the newest committed checkpoint."""
        if not self._database.exists():
            return None
        with closing(self._connect()) as database:
            row = database.execute("SELECT name FROM head WHERE id = 1").fetchone()
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
        except OSError as error:
            raise SetupError(
                f"cannot write checkpoint {name} in {self.folder}: {error}.",
                hint="the last commit stands; make room and start the worker again",
            ) from error
        with closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            moved = database.execute(
                "UPDATE head SET name = ? WHERE id = 1 AND epoch = ?", (name, self.epoch)
            ).rowcount
            database.execute("COMMIT")
        if moved == 0:
            shutil.rmtree(self.folder / name)
            raise StaleStateError(
                f"another worker has taken over the state in {self.root} (this one held epoch {self.epoch}).",
                hint="only one worker may learn from one state folder; this one has stopped",
            )
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
                return self.read(name)
            except StaleStateError as error:
                problems.append(error.message)
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
        try:
            manifest = json.loads((path / "MANIFEST.json").read_bytes())
        except (OSError, ValueError) as error:
            raise StaleStateError(f"checkpoint {name} has no readable manifest: {error}") from error
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
            "parent": self.head(),
            "digest": digest,
            "cursor": cursor,
            "outputs": outputs,
            "shards": [{"rank": 0, "file": "shard-00000.safetensors"}],
            "files": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
            "volatile": dict(volatile),
        }
        files["MANIFEST.json"] = json.dumps(manifest, indent=1).encode()
        for file, content in files.items():
            write_synced(temporary / file, content)
        sync_folder(temporary)
        target = self.folder / name
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        sync_folder(self.folder)

    def _collect(self, newest: str) -> None:
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


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "missing"
