"""`ctrstream checkpoint`: look into a worker's state folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.errors import DataError, StaleStateError

if TYPE_CHECKING:
    from jobs.checkpoint import Checkpoint, CheckpointStore

__all__ = ["command"]

_state = click.argument("state", type=click.Path(path_type=Path, file_okay=False))


@click.group()
def command() -> None:
    """List, verify, compare and clear the checkpoints of a worker."""


@command.command("list")
@_state
def list_command(state: Path) -> None:
    """Checkpoints, oldest first: name, step, digest, what it stands on; the head is marked."""
    store, wrong = _store(state), []
    head = store.head()
    for name in store.names():
        mark = "head" if name == head else ""
        try:
            manifest = store.manifest(name)
        except StaleStateError as error:
            click.echo(f"{name}\t-\t-\tbroken\t{mark}")
            wrong.append(error.message)
            continue
        after = len(manifest["chain"])
        kind = f"delta {after} on {manifest['base']}" if after else "base"
        click.echo(f"{name}\t{manifest['step']}\t{manifest['digest']}\t{kind}\t{mark}")
    _fail_if(wrong)


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
    _fail_if(wrong)


@command.command()
@_state
def digest(state: Path) -> None:
    """Print the state digest of the head: equal digests mean equal state to the bit."""
    click.echo(_head(state).manifest["digest"])


@command.command()
@_state
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Rows printed.")
@click.option("--all", "is_all", is_flag=True, help="Every segment that is kept, by task, field and key.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def segments(state: Path, limit: int, is_all: bool, as_json: bool) -> None:
    """The segments that the head's student over- or under-predicts most, over windows that have closed.

    KEY is the hash of the segment's value: XXH64 of its text with the spec's hash_seed, 16 hexadecimal
    digits, 0000000000000000 for no value. Z is observed less predicted outcomes, in standard errors; segments
    with too few rows for it are left out. `other` is what was not kept apart.
    """
    from jobs.online_state import under
    from jobs.progressive_segments import SegmentQuality

    quality = SegmentQuality(())
    quality.load_state(under(_head(state).arrays, "segments/"))
    rows = [*(quality.rows() if is_all else quality.worst(limit)), *quality.others()]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    click.echo(
        f"{'TASK':<13} {'FIELD':<20} {'KEY':<16} {'ROWS':>10} {'POSITIVES':>10} {'EXPECTED':>11} "
        f"{'PCOC':>7} {'Z':>7} {'LOG LOSS':>9}"
    )
    for row in rows:
        click.echo(
            f"{row.task:<13} {row.field:<20} {row.key:<16} {row.rows:>10,} {row.positives:>10,g} "
            f"{row.expected:>11,.1f} {_figure(row.pcoc, 3):>7} {_figure(row.z, 1):>7} {row.log_loss:>9.4f}"
        )


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


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


def _fail_if(wrong: list[str]) -> None:
    if wrong:
        raise StaleStateError(
            "; ".join(wrong), hint="a worker that starts goes back to the newest intact checkpoint"
        )


def _head(state: Path) -> Checkpoint:
    checkpoint = _store(state).load()
    if checkpoint is None:
        raise DataError(f"no checkpoint has been committed in {state}.")
    return checkpoint


def _store(state: Path, keep: int = 3) -> CheckpointStore:
    from jobs.checkpoint import CheckpointStore

    if not (state / "head.sqlite").exists():
        raise DataError(
            f"{state} is not a worker's state folder: it has no head.sqlite.",
            hint="give the folder that was passed to `ctrstream stream --state`",
        )
    return CheckpointStore(state, keep)
