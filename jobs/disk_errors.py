"""What is said when the disk refuses a file of a commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import SetupError

__all__ = ["disk_errors"]


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Raise ``SetupError`` where the writing of ``what`` into a folder ends with an ``OSError``."""
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"cannot write {what} in {folder}: {error}.",
            hint="the last commit stands; make room and start the worker again",
        ) from error
