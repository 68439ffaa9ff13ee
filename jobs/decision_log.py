"""``decisions.jsonl`` in a folder of releases: what the gate refused, proved and took back, newest last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.json_lines import append_json_line, json_line, read_json_lines

__all__ = ["DECISIONS", "append_decision", "read_decisions"]

DECISIONS = "decisions.jsonl"
# When there are twice as many, the older half goes.
_KEEP = 1000


def append_decision(root: Path, decision: Mapping[str, Any]) -> None:
    """Add one decision, unless it is the last one again; the file is for people."""
    path = root / DECISIONS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    line = json_line(decision)
    if lines and lines[-1] == line:
        return
    if len(lines) < 2 * _KEEP:
        append_json_line(path, decision)
        return
    temporary = path.with_name(f".{DECISIONS}")
    temporary.write_text("\n".join([*lines[-_KEEP:], line]) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_decisions(root: Path) -> list[dict[str, Any]]:
    """All that are kept, oldest first; a line that a killed writer left torn is left out."""
    return read_json_lines(root / DECISIONS)
