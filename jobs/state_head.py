"""What the last commit of a worker's state folder says, without its arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.checkpoint import CheckpointStore
from pipelines.errors import DataError, StaleStateError

__all__ = ["head_state"]

_TRIES = 3


def head_state(state: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain part of the head's state, and the volatile part of its manifest.

    Raises
    ------
    DataError
        If the folder is not a worker's, or nothing has been committed.
    StaleStateError
        If the head cannot be read.
    """
    if not (state / "head.sqlite").exists():
        raise DataError(
            f"{state} is not a worker's state folder: it has no head.sqlite.",
            hint="give the folder that was passed to `ctrstream stream --state`",
        )
    store = CheckpointStore(state)
    for left in range(_TRIES - 1, -1, -1):
        name = store.head()
        if name is None:
            raise DataError(f"no checkpoint has been committed in {state}.")
        try:
            manifest = store.manifest(name)
            plain = json.loads((store.folder / name / "state.json").read_bytes())
            return plain, manifest["volatile"]
        except (StaleStateError, OSError, ValueError) as error:
            # A worker that is running may have moved on meanwhile, and removed it.
            if left == 0:
                raise StaleStateError(f"the head {name} in {state} cannot be read: {error}.") from error
    raise AssertionError("the loop returns or raises")
