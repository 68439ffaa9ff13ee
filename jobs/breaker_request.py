"""What an operator asks of a worker's breaker: a file in its state folder, carried out exactly once.

The worker notes the request's id in the checkpoint that holds what came of it, and removes the file after
that commit. A worker that is not running finds the file when it starts.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import SetupError
from pipelines.synced_files import replacing

__all__ = ["Command", "Request", "forget_request", "read_request", "write_request"]

Command = Literal["resume", "discard"]
_NAME = "breaker_request.json"


@dataclass(frozen=True)
class Request:
    """One command; ``id`` tells it from an equal one that was given before."""

    id: str
    command: Command


def write_request(state: Path, command: Command) -> Request:
    """Leave a request for the worker of a state folder; it replaces one that has not been carried out.

    Raises
    ------
    SetupError
        If the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> request = write_request(folder, "resume")
    >>> read_request(folder) == request
    True
    >>> forget_request(folder, request.id)
    >>> read_request(folder) is None
    True
    """
    request = Request(uuid.uuid4().hex, command)
    temporary = state / f".{_NAME}-{request.id}"
    try:
        with replacing(state / _NAME, temporary):
            temporary.write_text(json.dumps(asdict(request)), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write to {state}: {error.strerror}.") from error
    return request


def read_request(state: Path) -> Request | None:
    """The request that waits in a state folder.

    Raises
    ------
    SetupError
        If the file holds something else.
    """
    try:
        text = (state / _NAME).read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        request = Request(str(found["id"]), found["command"])
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{state / _NAME} is not a request: {error!r}.", hint="remove it") from error
    if request.command not in ("resume", "discard"):
        raise SetupError(f"{state / _NAME} asks for {request.command!r}.", hint="remove it")
    return request


def forget_request(state: Path, identity: str) -> None:
    """Remove the request with this id, if it is the one that waits."""
    found = read_request(state)
    if found is not None and found.id == identity:
        with contextlib.suppress(FileNotFoundError):
            (state / _NAME).unlink()
