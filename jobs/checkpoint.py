"""Checkpoints: one atomic, versioned cut of everything that a worker knows.

A checkpoint is a directory ``checkpoints/<step>-<epoch>/`` with tensors, plain data and a manifest that
names every file's sha256. It exists from the moment its directory is renamed into place; it *counts* from
the moment the head, a row in SQLite, is moved to it by compare-and-swap on the epoch.

Tables are written whole in a base, and by the rows that changed in the deltas that follow it. The state
digest is the same whichever way a state was written.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from jobs.checkpoint_files import (
    PLAIN,
    OtherFormatError,
    broken_file,
    read_arrays,
    read_manifest,
    write_files,
)
from jobs.checkpoint_head import Head
from jobs.checkpoint_retention import needed, remove
from jobs.state_digest import state_digest
from jobs.state_mirror import StateMirror
from pipelines.errors import SetupError, StaleStateError
from pipelines.synced_files import sync_folder
from pipelines.table_rows import Array, TableRows

__all__ = ["Checkpoint", "CheckpointStore", "state_digest"]

log = logging.getLogger(__name__)

_BROKEN = ".broken-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes
    ----------
    arrays : dict of str to ndarray
        All of the state, tables included.
    plain : dict
        The JSON part of the state.
    manifest : dict
        ``step, epoch, parent, base, chain, digest, cursor, outputs, shards, files, volatile``.
    """

    path: Path
    arrays: dict[str, NDArray[Any]]
    plain: dict[str, Any]
    manifest: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one worker.

    Parameters
    ----------
    root : Path
        The worker's state folder.
    keep : int
        How many of the newest checkpoints garbage collection leaves, beside what they stand on.
    deltas : int
        How many deltas may follow a base.
    """

    def __init__(self, root: Path, keep: int = 3, deltas: int = 16) -> None:
        self.root, self.keep, self.deltas = root, keep, deltas
        self.folder = root / "checkpoints"
        self.epoch = 0
        self._head = Head(root)
        self._mirror = StateMirror()
        self._chain: list[dict[str, str]] = []  # name and seal of what the next delta stands on, base first
        self._manifests: dict[str, dict[str, Any]] = {}

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
            sync_folder(self.root)
            self.epoch, head = self._head.take_lease()
            # Not before the lease is ours: until then another worker may still make one of them count.
            self._sweep(head)
        except (OSError, sqlite3.OperationalError) as error:
            raise SetupError(
                f"cannot write worker state in {self.root}: {error}.", hint="choose another --state folder"
            ) from error

    def check_lease(self) -> None:
        """Raise StaleStateError if another worker has taken the lease."""
        if self._head.is_fenced(self.epoch):
            raise self._head.fenced(self.epoch)

    def head(self) -> str | None:
        """Name of the newest committed checkpoint."""
        return self._head.name()

    def names(self) -> list[str]:
        """All checkpoints on disk, oldest first."""
        return sorted(path.name for path in self.folder.glob("[0-9]*") if path.is_dir())

    def commit(
        self,
        step: int,
        arrays: Mapping[str, Array],
        plain: Mapping[str, Any],
        *,
        tables: Mapping[str, Sequence[TableRows]] | None = None,
        cursor: Any,
        outputs: list[str],
        volatile: Mapping[str, Any],
    ) -> str:
        """Make a cut of step ``step`` durable and move the head to it; returns its digest.

        1. Write all files into ``.tmp-<step>-<uuid>/``, each fsynced, the manifest last.
        2. Rename to ``<step>-<epoch>/`` and fsync the folder.
        3. Move the head by compare-and-swap on the epoch. This is the commit point.
        4. Remove checkpoints that nothing needs.

        Rows of ``tables`` are what changed since the last call, whether that call succeeded or not; the first
        call of a process gives whole tables.

        Raises
        ------
        StaleStateError
            If another worker has taken the lease: nothing has been committed.
        SetupError
            If the disk refuses the write: the head still names the previous checkpoint.
        ValueError
            If the step has been committed before.
        """
        self._mirror.apply(arrays, tables or {})
        digest = self._mirror.digest(plain)
        name = f"{step:012d}-{self.epoch:06d}"
        if name == self.head():
            raise ValueError(f"step {step} has been committed before")
        about = {"step": step, "digest": digest, "cursor": cursor, "outputs": outputs}
        try:
            manifest = self._write(name, plain, {**about, "volatile": dict(volatile)})
            is_ours = self._move_head(name)
        except (OSError, sqlite3.OperationalError) as error:
            # A worker that takes the lease sweeps what this one is writing.
            self.check_lease()
            self._drop_unless_head(name)
            raise SetupError(
                f"cannot write checkpoint {name} in {self.folder}: {error}.",
                hint="the last commit stands; make room and start the worker again",
            ) from error
        if not is_ours:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            raise self._head.fenced(self.epoch)
        self._mirror.settle()
        self._chain = [*manifest["chain"], {"name": name, "seal": manifest["seal"]}]
        self._manifests[name] = manifest
        try:
            self._collect()
        except StaleStateError as error:
            log.error("%s The next checkpoint will be a base.", error.message)
            self._chain = []
        except (OSError, SetupError) as error:
            # What was committed stands; the next commit tries again to clear what came before it.
            log.warning("old checkpoints in %s not removed: %s", self.folder, error)
        return digest

    def committed_arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays of the last commit, by reference: valid until the next one."""
        return {**self._mirror.arrays, **self._mirror.tables}

    def load(self) -> Checkpoint | None:
        """The head if it is intact, else the newest intact checkpoint before it; None for a fresh start.

        A worker that holds the lease takes the head back with it, and sets aside what it went back over.

        Raises
        ------
        StaleStateError
            If checkpoints exist and none is intact, another version of ctrstream wrote the newest, or another
            worker has taken the lease.
        SetupError
            If the disk refuses to take the head back.
        """
        head = self.head()
        if head is None:
            return None
        problems: list[str] = []
        seen: dict[Path, str] = {}
        for name in [known for known in reversed(self.names()) if known <= head]:
            try:
                found = self.read(name, seen)
            except OtherFormatError:
                raise  # nothing is wrong with it: to go back would throw away what another version learned
            except StaleStateError as error:
                log.error("%s: going back to the checkpoint before it", error.message)
                problems.append(error.message)
                continue
            if name != head and self.epoch:
                try:
                    self._go_back(name)
                except (OSError, sqlite3.OperationalError) as error:
                    raise SetupError(
                        f"cannot go back to checkpoint {name} in {self.folder}: {error}.", hint="make room"
                    ) from error
            return found
        raise StaleStateError(
            f"no intact checkpoint in {self.folder}: " + "; ".join(problems or [f"{head} is missing"]),
            hint="restore the folder from a backup, or start a new one from a release",
        )

    def read(self, name: str, seen: dict[Path, str] | None = None) -> Checkpoint:
        """Read and verify one checkpoint and all that it stands on.

        Parameters
        ----------
        seen : dict, optional
            Files that have been hashed before; to verify many checkpoints, give each call the same one.

        Raises
        ------
        StaleStateError
            If a file is missing or is not what its manifest says; the message names it.
        """
        manifest = self.manifest(name)
        chain = [(self.folder / name, manifest)]
        for link in reversed(manifest["chain"]):
            try:
                found = self.manifest(link["name"])
                if found["seal"] != link["seal"]:
                    raise StaleStateError(f"checkpoint {link['name']} is not the one that was built on")
            except OtherFormatError:
                raise
            except StaleStateError as error:
                raise StaleStateError(f"checkpoint {name} cannot be used: {error.message}") from error
            chain.insert(0, (self.folder / link["name"], found))
        for folder, found in chain:
            wrong = broken_file(folder, found, {} if seen is None else seen)
            if wrong is not None:
                on = "" if folder.name == name else f" stands on {folder.name}, of which"
                raise StaleStateError(f"checkpoint {name}{on or ':'} {wrong}")
        arrays = read_arrays(chain)
        plain = json.loads((self.folder / name / PLAIN).read_bytes())
        digest = state_digest(arrays, plain)
        if digest != manifest["digest"]:
            raise StaleStateError(
                f"checkpoint {name}: the state that its files give has digest {digest[:12]}, "
                f"expected {manifest['digest'][:12]}"
            )
        return Checkpoint(self.folder / name, arrays, plain, manifest)

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a checkpoint; its files are not looked at.

        Raises
        ------
        StaleStateError
            If there is none that can be read.
        """
        return read_manifest(self.folder / name)

    def collect(self) -> list[str]:
        """Remove committed checkpoints that nothing needs, and those set aside as broken; their names.

        Safe beside a running worker: what is not committed yet, and what the head stands on, is not touched.

        Raises
        ------
        StaleStateError
            If the head's chain is broken.
        """
        gone = self._collect()
        for broken in sorted(self.folder.glob(f"{_BROKEN}*")):
            shutil.rmtree(broken, ignore_errors=True)
            gone.append(broken.name)
        return gone

    def _write(self, name: str, plain: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
        changes = self._mirror.changes() if 0 < len(self._chain) <= self.deltas else None
        chain = [] if changes is None else self._chain
        history = {
            "epoch": self.epoch,
            "parent": self.head(),
            "base": chain[0]["name"] if chain else name,
            "chain": chain,
        }
        temporary = self.folder / f".tmp-{about['step']}-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        target = self.folder / name
        try:
            manifest = write_files(
                temporary,
                self._mirror.arrays,
                self._mirror.tables,
                changes,
                plain,
                {**about, **history},
                self._mirror.unchanged(),
            )
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        finally:
            # On a full disk the half that was written would be in the way of the next try.
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(self.folder)
        return manifest

    def _move_head(self, name: str) -> bool:
        """The commit point; False, and nothing is changed, if the lease is another worker's."""
        return self._head.move(name, self.epoch)

    def _drop_unless_head(self, name: str) -> None:
        """Remove what a failed commit has written; a disk error may come after the head was moved."""
        try:
            counts = self.head() == name
        except (SetupError, StaleStateError):
            return  # the next start sweeps what does not count
        if not counts:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _go_back(self, name: str) -> None:
        """Make an older checkpoint the head; newer ones count no more and are kept for inspection."""
        if not self._move_head(name):
            raise self._head.fenced(self.epoch)
        for broken in [known for known in self.names() if known > name]:
            aside = self.folder / f"{_BROKEN}{broken}-{uuid.uuid4().hex[:8]}"
            (self.folder / broken).rename(aside)
            log.error("checkpoint %s has been set aside as %s", broken, aside.name)

    def _sweep(self, head: str | None) -> None:
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        remove(self.folder, [name for name in self.names() if head is None or name > head])

    def _collect(self) -> list[str]:
        head = self.head()
        if head is None:
            return []
        names = [name for name in self.names() if name <= head]
        stay = needed(names, head, self.keep, self._known_manifest)
        gone = remove(self.folder, [name for name in names if name not in stay])
        for name in gone:
            self._manifests.pop(name, None)
        return gone

    def _known_manifest(self, name: str) -> dict[str, Any]:
        if name not in self._manifests:
            self._manifests[name] = self.manifest(name)
        return self._manifests[name]
