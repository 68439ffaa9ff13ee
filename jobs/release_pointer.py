"""Pointers into a folder of releases, the list of what it holds, and garbage collection.

A pointer is a small text file: the name of a release, and a second line ``rollback`` where somebody chose
to go back. ``CURRENT`` is what serving loads; it moves only forward unless told otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.release_manifest import MANIFEST, parse_name
from pipelines.errors import ConfigError, DataError, SetupError, StaleStateError
from pipelines.synced_files import replacing

__all__ = [
    "ALIASES",
    "CURRENT",
    "LAST_GOOD",
    "TEACHER",
    "Pointer",
    "garbage_collect",
    "list_releases",
    "point",
    "pointed",
    "read_pointer",
]

log = logging.getLogger(__name__)

CURRENT, LAST_GOOD, TEACHER = "CURRENT", "last_good", "teacher"
ALIASES = (CURRENT, LAST_GOOD, TEACHER)
TEMPORARY = ".tmp-"
_ROLLBACK = "rollback"
# A release is written in seconds; what is older was left by a writer that was killed.
_LEFT_OVER_S = 3600.0


@dataclass(frozen=True)
class Pointer:
    """Where an alias points.

    Attributes
    ----------
    name : str
        A release.
    rollback : bool
        Whether going back was asked for.
    """

    name: str
    rollback: bool = False


def point(root: Path, alias: str, name: str, *, rollback: bool = False, only_from: str | None = None) -> bool:
    """Let an alias point to a release, atomically and durably.

    Parameters
    ----------
    root : Path
        Folder of releases.
    alias : str
        ``CURRENT``, ``last_good`` or ``teacher``.
    name : str
        A release in `root`; it is checked to exist, not to be intact.
    rollback : bool
        Allow ``CURRENT`` to go back in (epoch, step); serving follows.
    only_from : str, optional
        Do nothing unless the alias points to this release now.

    Returns
    -------
    bool
        False if ``only_from`` kept it where it is.

    Raises
    ------
    StaleStateError
        If ``CURRENT`` would go back: another writer with a later epoch is at work.
    DataError
        If there is no such release.
    SetupError
        If the disk refuses the write.
    """
    _check_alias(alias)
    if not (root / name / MANIFEST).is_file():
        raise DataError(f"there is no release {name} in {root}.", hint="`ctrstream release list` shows them")
    with _exclusive(root):
        before = pointed(root, alias)
        if only_from is not None and before != only_from:
            return False
        goes_back = before is not None and parse_name(name)[:2] < parse_name(before)[:2]
        if alias == CURRENT and goes_back and not rollback:
            raise StaleStateError(
                f"{CURRENT} in {root} points to {before}; it does not go back to {name} by itself.",
                hint=f"`ctrstream release rollback --releases {root} {name}` if that is wanted",
            )
        text = f"{name}\n{_ROLLBACK}\n" if rollback and goes_back else f"{name}\n"
        if before != name or read_pointer(root, alias) != Pointer(name, rollback and goes_back):
            try:
                _replace(root / alias, text)
            except OSError as error:
                raise SetupError(
                    f"cannot move {alias} in {root} to {name}: {error.strerror}.",
                    hint="make room, then try again",
                ) from error
    return True


def read_pointer(root: Path, alias: str) -> Pointer | None:
    """Where an alias points; None where it was never set.

    Raises
    ------
    StaleStateError
        If the file does not name a release.
    """
    _check_alias(alias)
    try:
        lines = (root / alias).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return None
    try:
        parse_name(lines[0])
    except DataError as error:
        raise StaleStateError(
            f"{root / alias} does not name a release: {error.message}",
            hint="`ctrstream release promote` writes it anew",
        ) from error
    return Pointer(lines[0], rollback=_ROLLBACK in lines[1:])


def pointed(root: Path, alias: str) -> str | None:
    """Name of the release that an alias points to; None where it was never set."""
    pointer = read_pointer(root, alias)
    return None if pointer is None else pointer.name


def list_releases(root: Path) -> list[str]:
    """Names of the releases in a folder, oldest first by (epoch, step)."""
    names = []
    for entry in root.iterdir() if root.is_dir() else ():
        with contextlib.suppress(DataError):
            parse_name(entry.name)
            if (entry / MANIFEST).is_file():
                names.append(entry.name)
    return sorted(names, key=parse_name)


def garbage_collect(root: Path, keep: int, needed: Collection[str] = ()) -> list[str]:
    """Remove all but the newest `keep` releases and what a pointer names.

    What a killed writer left half-written is removed too, after an hour.

    Parameters
    ----------
    root : Path
    keep : int
        Releases to keep beside those that a pointer names, >= 1.
    needed : collection of str
        Further releases to keep, such as those that a worker starts from.

    Returns
    -------
    list of str
        The removed releases, oldest first.
    """
    if keep < 1:
        raise ConfigError(f"at least one release must be kept. Received: keep={keep}.")
    with _exclusive(root):
        named = {pointed(root, alias) for alias in ALIASES} | set(needed)
        removed = [name for name in list_releases(root)[:-keep] if name not in named]
        for name in removed:
            # Renamed first: a reader sees a whole release or none.
            doomed = root / f"{TEMPORARY}{name}-{uuid.uuid4().hex}"
            os.rename(root / name, doomed)
            shutil.rmtree(doomed)
        _sweep(root)
    return removed


def _check_alias(alias: str) -> None:
    if alias not in ALIASES:
        raise ConfigError(f"expected one of {', '.join(ALIASES)}. Received: {alias!r}.")


def _sweep(root: Path) -> None:
    oldest = time.time() - _LEFT_OVER_S
    for entry in root.glob(f"{TEMPORARY}*"):
        if entry.stat().st_mtime < oldest:
            log.warning("removing %s: left over by a writer that was stopped.", entry)
            shutil.rmtree(entry)


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Keep two writers of pointers apart; the lock ends with its process."""
    try:
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise SetupError(f"cannot write to the releases in {root}: {error.strerror}.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    with replacing(path, temporary):
        temporary.write_text(text, encoding="utf-8")
