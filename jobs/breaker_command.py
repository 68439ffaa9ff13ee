"""`ctrstream breaker`: see why a worker has stopped learning, and let it go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.json_output import json_option, write_json
from pipelines.errors import DataError

if TYPE_CHECKING:
    from jobs.breaker_request import Command

__all__ = ["command"]

_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder that was passed to `ctrstream stream --state`.",
)


@click.group()
def command() -> None:
    """Show, resume or discard what a worker's circuit breaker holds."""


@command.command()
@_state
@json_option
def status(state: Path, json_path: str | None) -> None:
    """What the last commit says: mode, held rows, why, and what was discarded before."""
    found = _committed(state)
    if json_path is not None:
        write_json(json_path, found)
    if json_path != "-":
        for line in _lines(found):
            click.echo(line)


@command.command()
@_state
def resume(state: Path) -> None:
    """Learn the held rows in order, then go on."""
    _ask(state, "resume")


@command.command()
@_state
def discard(state: Path) -> None:
    """Drop the held rows: they are counted as expired, and their offsets are written down."""
    _ask(state, "discard")


def _ask(state: Path, name: Command) -> None:
    """Leave the request; a worker that is running sees it at once, another one when it starts."""
    from jobs.breaker_request import write_request

    found = _committed(state)
    if found["mode"] != "holding" and not (found["mode"] == "draining" and name == "discard"):
        raise DataError(
            f"there is nothing to {name} in {state}: the breaker is {found['mode']}.",
            hint="`ctrstream breaker status` shows the last commit; one that has just opened commits soon",
        )
    write_request(state, name)
    click.echo(f"{name}: asked for {found['held_rows']} held rows")


def _committed(state: Path) -> dict[str, Any]:
    from jobs.breaker_request import read_request
    from jobs.state_head import head_state

    plain, volatile = head_state(state)
    breaker, request = plain["breaker"], read_request(state)
    is_waiting = request is not None and request.id != volatile["breaker"]["request"]
    return {
        "mode": breaker["mode"],
        "held_rows": sum(breaker["rows"].values()) + sum(breaker["dead"].values()),
        "rows": breaker["rows"],
        "dead_letters": breaker["dead"],
        "offsets": breaker["ranges"],
        "trips": breaker["trips"],
        "last_trip": breaker["last_trip"],
        "discarded": breaker["discarded"],
        "request": request.command if request is not None and is_waiting else None,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"mode\t{found['mode']}", f"held rows\t{found['held_rows']}", f"trips\t{found['trips']}"]
    if found["last_trip"] is not None:
        lines.append(
            f"last trip\tclock {found['last_trip']['clock']}: {'; '.join(found['last_trip']['reasons'])}"
        )
    lines += [f"held\t{name}\t{_range(ends)}" for name, ends in sorted(found["offsets"].items())]
    for entry in found["discarded"]:
        rows = json.dumps(entry["rows"])
        offsets = ", ".join(f"{name} {_range(ends)}" for name, ends in sorted(entry["offsets"].items()))
        lines.append(f"discarded\t{rows}\t{offsets}")
    if found["request"] is not None:
        lines.append(f"request\t{found['request']}, not carried out yet")
    return lines


def _range(ends: list[list[int]]) -> str:
    """First and last row, as offset, or offset.row inside of a packed message."""
    return " to ".join(str(offset) if row == 0 else f"{offset}.{row}" for offset, row in ends)
