"""MANIFEST.json of a release: what it is, what it was made from, and the sha256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.config import Task
from pipelines.errors import DataError, StaleStateError

__all__ = ["MANIFEST", "Kind", "Manifest", "ModelKind", "TaskEntry", "parse_name", "release_name"]

MANIFEST = "MANIFEST.json"
FORMAT: Literal[1] = 1
Kind = Literal["teacher", "student"]
ModelKind = Literal["gbdt", "student"]

_NAME = re.compile(r"(teacher|student)-(\d{4,})-(\d{10,})(?:-c(\d+))?")
# They say who wrote the release and when, not what it is: a worker that is killed and writes the same
# release again after an upgrade or a second later must come to the same digest.
_NOT_IDENTITY = {"digest", "code_version", "extra"}


def release_name(kind: Kind, epoch: int, step: int, calibration: int = 0) -> str:
    """Directory name of a release; ``calibration`` counts how often its weights were calibrated anew.

    Examples
    --------
    >>> release_name("student", 1, 1234)
    'student-0001-0000001234'
    >>> release_name("teacher", 0, 0, 2)
    'teacher-0000-0000000000-c2'
    """
    return f"{kind}-{epoch:04d}-{step:010d}" + (f"-c{calibration}" if calibration else "")


def parse_name(name: str) -> tuple[int, int, str, int]:
    """(epoch, step, kind, calibration) of a release name; names compare in the order of their releases by it.

    Raises
    ------
    DataError
        If it is not the name of a release.

    Examples
    --------
    >>> parse_name("student-0001-0000001234")
    (1, 1234, 'student', 0)
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(f"expected a release name such as student-0001-0000001234. Received: {name!r}.")
    return int(match[2]), int(match[3]), match[1], int(match[4] or 0)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskEntry(_Part):
    """What one task is predicted with.

    Attributes
    ----------
    model : str
        ``gbdt`` or ``student``: which class reads the files.
    sampling : dict
        Sampling constants that the logits still contain, such as ``negative_sampling_rate``.
    """

    model: ModelKind
    sampling: dict[str, float] = Field(default_factory=dict)


class Manifest(_Part):
    """Content of MANIFEST.json.

    Attributes
    ----------
    name, kind, epoch, step
        ``epoch`` is the writer's fencing token, ``step`` counts its updates.
    parent : str or None
        The release or checkpoint that this one was learned from.
    tasks : dict
    feature_spec_digest : str
    hash_seed : int
    segments : tuple of str
        Columns whose values are calibration segments, in the order of ``Encoded.segment_key``.
    last_event_time : int
        Event time of the newest event learned, ms.
    learned_events : int
        Events learned up to this release.
    files : dict
        Path inside the release to sha256.
    code_version : str
    extra : dict
        Notes of the writer, such as ``produced_at``; not part of the digest.
    digest : str
        sha256 of all of the above but ``code_version`` and ``extra``.
    """

    format: Literal[1] = FORMAT
    name: str
    kind: Kind
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    parent: str | None
    tasks: dict[Task, TaskEntry] = Field(min_length=1)
    feature_spec_digest: str
    hash_seed: int
    segments: tuple[str, ...]
    last_event_time: int
    learned_events: int = Field(ge=0)
    files: dict[str, str]
    code_version: str
    extra: dict[str, Any] = Field(default_factory=dict)
    digest: str = ""

    def expected_digest(self) -> str:
        """sha256 of what the release is, hexadecimal."""
        body = self.model_dump(mode="json", exclude=_NOT_IDENTITY)
        return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def signed(self) -> Manifest:
        """The same manifest with its digest filled in."""
        return self.model_copy(update={"digest": self.expected_digest()})

    def to_bytes(self) -> bytes:
        """The file's content."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def read(cls, release: Path) -> Manifest:
        """Read and check the manifest of a release; its files are not looked at.

        Raises
        ------
        DataError
            If there is no release at that path.
        StaleStateError
            If the manifest is damaged, of another format, or names another release.
        """
        path = release / MANIFEST
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"expected a release at {release}. Found no {MANIFEST} there.",
                hint="`ctrstream release list` shows the releases of a folder",
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "(whole file)"
            raise StaleStateError(
                f"{path} is not a manifest of format {FORMAT}: {key}: {first['msg']}.",
                hint="it is damaged or was written by another version; roll back to a release that loads",
            ) from error
        if manifest.digest != manifest.expected_digest():
            raise StaleStateError(
                f"{path} was changed after it was written: expected the digest {manifest.digest}, "
                f"got {manifest.expected_digest()}.",
                hint="roll back to a release that loads",
            )
        if manifest.name != release.name:
            raise StaleStateError(f"expected the release {release.name} at {release}. Found {manifest.name}.")
        return manifest
