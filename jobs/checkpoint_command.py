"""`ctrstream checkpoint`: look into a worker's state folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.errors import DataError

if TYPE_CHECKING:
    from jobs.checkpoint import CheckpointStore

__all__ = ["command"]

_state = click.argument("state", type=click.Path(path_type=Path, file_okay=False))


@click.group()
def command() -> None:
    """List, verify and compare the checkpoints of a worker."""


@command.command("list")
@_state
def list_command(state: Path) -> None:
    """Checkpoints, oldest first; the head is marked."""
    store = _store(state)
    head = store.head()
    for name in store.names():
        manifest = store.manifest(name)
        mark = "head" if name == head else ""
        click.echo(f"{name}\t{manifest['step']}\t{manifest['digest']}\t{mark}")


@command.command()
@_state
def verify(state: Path) -> None:
    """Check every file of every checkpoint against its manifest."""
    store = _store(state)
    for name in store.names():
        store.read(name)
        click.echo(f"{name}\tintact")


@command.command()
@_state
def digest(state: Path) -> None:
    """Print the state digest of the head: equal digests mean equal state to the bit."""
    from jobs.checkpoint import state_digest

    checkpoint = _store(state).load()
    if checkpoint is None:
        raise DataError(f"no checkpoint has been committed in {state}.")
    found = state_digest(checkpoint.arrays, checkpoint.plain)
    if found != checkpoint.manifest["digest"]:
        raise DataError(f"{checkpoint.path.name}: state digest {found} is not the manifest's.")
    click.echo(found)


def _store(state: Path) -> CheckpointStore:
    from jobs.checkpoint import CheckpointStore

    if not (state / "head.sqlite").exists():
        raise DataError(
            f"{state} is not a worker's state folder: it has no head.sqlite.",
            hint="give the folder that was passed to `ctrstream stream --state`",
        )
    return CheckpointStore(state)
