"""Files that are on the disk when the call returns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "sync_file", "sync_folder", "write_synced"]


@contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[None]:
    """Put the file that is written to ``temporary`` meanwhile in place of ``path``, which may not be there.

    A reader sees the old file or the new one; when the block has ended the disk has the new one. If anything
    goes wrong the old one stays, and ``temporary`` is removed.
    """
    try:
        yield
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


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
