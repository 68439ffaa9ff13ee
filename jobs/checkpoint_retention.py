"""Which checkpoints may go, and taking them away so that a kill leaves no half of one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import StaleStateError

__all__ = ["needed", "remove"]


def needed(
    names: Sequence[str], head: str, keep: int, manifest: Callable[[str], Mapping[str, Any]]
) -> set[str]:
    """The checkpoints that must stay.

    These are the newest ``keep`` that can be read, the newest on another base than the head's, so that one
    corrupt file never leaves nothing to go back to, and all that any of them stands on.

    Parameters
    ----------
    names : sequence of str
        On disk and committed, oldest first.
    manifest : callable
        Manifest by name; raises StaleStateError if it cannot be read.

    Raises
    ------
    StaleStateError
        If the head's own chain is broken: nothing may go before that is mended.
    """
    reach: dict[str, set[str]] = {}
    bases: dict[str, str] = {}
    for name in names:
        try:
            found = manifest(name)
        except StaleStateError:
            continue
        links = {link["name"] for link in found["chain"]}
        if links <= reach.keys():  # those are older
            reach[name], bases[name] = {name, *links}, found["base"]
    if head not in reach:
        raise StaleStateError(
            f"the head {head} cannot be read, or stands on a checkpoint that is gone: nothing is removed.",
            hint="start the worker: it goes back to the newest whole checkpoint",
        )
    newest = sorted(reach, reverse=True)
    kept = newest[:keep]
    kept += [name for name in newest if bases[name] != bases[head]][:1]
    return set().union(*(reach[name] for name in kept), reach[head])


def remove(folder: Path, names: Sequence[str]) -> list[str]:
    """Remove checkpoints, newest first, so that none ever lacks what it stands on; returns the names."""
    gone = []
    for name in sorted(names, reverse=True):
        aside = folder / f".tmp-removed-{name}-{uuid.uuid4().hex}"
        try:
            (folder / name).rename(aside)
        except FileNotFoundError:  # another process was faster
            continue
        shutil.rmtree(aside, ignore_errors=True)
        gone.append(name)
    return gone
