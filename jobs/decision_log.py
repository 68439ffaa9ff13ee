"""``decisions.jsonl`` in a folder of releases: what the gate refused, proved and took back, newest last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["DECISIONS", "append_decision", "read_decisions"]

DECISIONS = "decisions.jsonl"
# When there are twice as many, the older half goes.
_KEEP = 1000


def append_decision(root: Path, decision: Mapping[str, Any]) -> None:
    """Add one decision; the file is for people, so it is not forced to disk."""
    path = root / DECISIONS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.splitlines()
    line = json.dumps(decision, sort_keys=True)
    if lines and lines[-1] == line:
        return
    if len(lines) >= 2 * _KEEP:
        temporary = path.with_name(f".{DECISIONS}")
        temporary.write_text("\n".join([*lines[-_KEEP:], line]) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return
    with path.open("a", encoding="utf-8") as file:
        # A killed writer may have left half a line.
        file.write("\n" * (text[-1:] not in ("", "\n")) + line + "\n")


def read_decisions(root: Path) -> list[dict[str, Any]]:
    """All that are kept, oldest first; a line that a killed writer left torn is left out."""
    path = root / DECISIONS
    found = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
