"""`ctrstream checkpoint`: look into a worker's state folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.errors import DataError, StaleStateError

if TYPE_CHECKING:
    from jobs.checkpoint import CheckpointStore

__all__ = ["command"]

_state = click.argument("state", type=click.Path(path_type=Path, file_okay=False))


@click.group()
def command() -> None:
    """List, verify, compare and clear the checkpoints of a worker."""


@command.command("list")
@_state
def list_command(state: Path) -> None:
    """Checkpoints, oldest first: name, step, digest, what it stands on; the head is marked."""
    store = _store(state)
    head = store.head()
    for name in store.names():
        manifest = store.manifest(name)
        after = len(manifest["chain"])
        kind = f"delta {after} on {manifest['base']}" if after else "base"
        mark = "head" if name == head else ""
        click.echo(f"{name}\t{manifest['step']}\t{manifest['digest']}\t{kind}\t{mark}")


@command.command()
@_state
def verify(state: Path) -> None:
    """Check every checkpoint: its files, all it stands on, and the digest of the state they give."""
    store, seen, wrong = _store(state), dict[Path, str](), []
    for name in store.names():
        try:
            store.read(name, seen)
        except StaleStateError as error:
            click.echo(f"{name}\tbroken")
            wrong.append(error.message)
        else:
            click.echo(f"{name}\tintact")
    if wrong:
        raise StaleStateError(
            "; ".join(wrong), hint="a worker that starts goes back to the newest intact checkpoint"
        )


@command.command()
@_state
def digest(state: Path) -> None:
    """Print the state digest of the head: equal digests mean equal state to the bit."""
    checkpoint = _store(state).load()
    if checkpoint is None:
        raise DataError(f"no checkpoint has been committed in {state}.")
    click.echo(checkpoint.manifest["digest"])


@command.command()
@_state
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How many of the newest stay, beside what they stand on.",
)
def gc(state: Path, keep: int) -> None:
    """Remove checkpoints that nothing needs; prints their names.

    The head, the newest checkpoint on another base, and all that these and the newest ones stand on stay.
    """
    for name in _store(state, keep).collect():
        click.echo(name)


def _store(state: Path, keep: int = 3) -> CheckpointStore:
    from jobs.checkpoint import CheckpointStore

    if not (state / "head.sqlite").exists():
        raise DataError(
            f"{state} is not a worker's state folder: it has no head.sqlite.",
            hint="give the folder that was passed to `ctrstream stream --state`",
        )
    return CheckpointStore(state, keep)
