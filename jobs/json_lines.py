"""Files of JSON objects, one a line, that are only added to; a writer may be killed at any byte."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["append_json_line", "json_line", "read_json_lines"]


def json_line(record: Mapping[str, Any]) -> str:
    """A record as its line says it, without the end of the line."""
    return json.dumps(record, sort_keys=True)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record, behind the end of a line that a killed writer has left torn; not forced to disk.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "lines.jsonl"
    >>> _ = path.write_text('{"number": 1}\\n{"numb')
    >>> append_json_line(path, {"number": 2})
    >>> read_json_lines(path)
    [{'number': 1}, {'number': 2}]
    """
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = b"\n" if file.read(1) not in (b"", b"\n") else b""
        file.write(torn + json_line(record).encode() + b"\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first, without torn lines; none where there is no file."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
