"""Which of the states that were committed have been published: ``audit/published.jsonl``.

A line is written after the fact. A crash in between leaves one out; the next start, which looks at
``CURRENT`` again, adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.json_lines import append_json_line, read_json_lines
from jobs.release_manifest import parse_name
from pipelines.errors import SetupError

__all__ = ["PublishedLog", "first_published", "published_releases"]

_FILE = "published.jsonl"


class PublishedLog:
    """Adds names of releases, each once.

    Parameters
    ----------
    folder : Path
        Made when the first name is added.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = published_releases(folder)
        self._last = names[-1] if names else None

    def add(self, release: str) -> None:
        """Take note that a release has been published.

        Raises
        ------
        SetupError
            If the disk refuses the write.
        """
        if release == self._last:
            return
        path = self._folder / _FILE
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            append_json_line(path, {"release": release})
        except OSError as error:
            raise SetupError(f"cannot write {path}: {error.strerror}.", hint="make room") from error
        self._last = release


def published_releases(folder: Path) -> list[str]:
    """Names of the releases that were published, oldest first; a torn line is left out."""
    return [str(line["release"]) for line in read_json_lines(folder / _FILE) if "release" in line]


def first_published(candidate: str | None, published: Sequence[str]) -> str | None:
    """The first of the published releases that holds all that a candidate for one had learned.

    Examples
    --------
    >>> first_published(
    ...     "student-0001-0000000020", ["student-0001-0000000010", "student-0002-0000000030"])
    'student-0002-0000000030'
    """
    if candidate is None:
        return None
    wanted = parse_name(candidate)[:2]
    return next((name for name in published if parse_name(name)[:2] >= wanted), None)
