"""The option ``--json`` of commands that print tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from pipelines.errors import SetupError

__all__ = ["json_option", "write_json"]

Function = TypeVar("Function", bound=Callable[..., Any])


def json_option(function: Function) -> Function:
    """Add ``--json FILE``; passes ``json_path`` (``str | None``)."""
    return click.option(
        "--json",
        "json_path",
        metavar="FILE",
        help="Write the figures as JSON, too; - for stdout, instead of the tables.",
    )(function)


def write_json(path: str, document: Mapping[str, Any]) -> None:
    """Write a document to a file, or to stdout for ``-``.

    Raises
    ------
    SetupError
        If the file cannot be written.
    """
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}.", hint="name another file") from error
