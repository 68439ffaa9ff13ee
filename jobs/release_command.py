"""``ctrstream release``: list, show, promote and roll back releases."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pipelines.errors import DataError

releases_option = click.option(
    "--releases",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of releases.",
)


@click.group()
def command() -> None:
    """Govern the releases' life cycle."""


def _rows(root: Path) -> list[dict[str, Any]]:
    from jobs.release_manifest import Manifest
    from jobs.release_pointer import ALIASES, list_releases, pointed

    names = list_releases(root)
    if not names:
        raise DataError(f"expected releases in {root}. Found none.", hint="`ctrstream backtest` writes some")
    aliases = {alias: pointed(root, alias) for alias in ALIASES}
    rows = []
    for name in names:
        manifest = Manifest.read(root / name)
        rows.append(
            {
                "release": name,
                "aliases": [alias for alias, target in aliases.items() if target == name],
                "parent": manifest.parent,
                "tasks": {task: entry.model for task, entry in manifest.tasks.items()},
                "learned_events": manifest.learned_events,
                "last_event_time": manifest.last_event_time,
                "digest": manifest.digest,
                "gate": manifest.extra.get("gate"),
            }
        )
    return rows


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


@command.command("list")
@releases_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(root: Path, as_json: bool) -> None:
    """List the releases of a folder, oldest first, and where the pointers stand."""
    rows = _rows(root)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(
        f"{'RELEASE':<26} {'LEARNED UP TO':<21} {'EVENTS':>12}  {'DIGEST':<12}  {'GATE':<24}  POINTED TO BY"
    )
    for row in rows:
        click.echo(
            f"{row['release']:<26} {_utc(row['last_event_time']):<21} {row['learned_events']:>12,}  "
            f"{row['digest'][:12]}  {_standing(row['gate']):<24}  {' '.join(row['aliases'])}".rstrip()
        )


def _standing(gate: dict[str, Any] | None) -> str:
    tasks = gate["standing"].items() if gate is not None else ()
    return " ".join(f"{task}={standing}" for task, standing in tasks) or "-"


@command.command()
@releases_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON with all figures instead of lines.")
def decisions(root: Path, as_json: bool) -> None:
    """Show what the gate has refused, proven and taken back, oldest first."""
    from jobs.decision_log import read_decisions

    found = read_decisions(root)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for one in found:
        moves = [f"last_good to {one['proven']}"] if "proven" in one else []
        moves += [f"CURRENT back to {one['returned_to']}"] if "returned_to" in one else []
        said = "; ".join([*moves, *one["reasons"]])
        click.echo(f"{_utc(one['clock'])}  {one['candidate']:<26} {one['verdict']:<9}  {said}".rstrip())


@command.command()
@releases_option
@click.argument("name")
def show(root: Path, name: str) -> None:
    """Print the manifest of release NAME (or CURRENT, last_good, teacher) as JSON.

    Every file is verified first.
    """
    from jobs.release import read_verified
    from jobs.release_manifest import Manifest

    path = root / _resolve(root, name)
    manifest = Manifest.read(path)
    read_verified(path, manifest)
    click.echo(json.dumps(manifest.model_dump(mode="json"), indent=2))


@command.command()
@releases_option
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Rows printed.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of the segments called off that may be called so by chance.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, of all segments, instead of a table.")
@click.argument("name")
def segments(root: Path, name: str, limit: int, rate: float, as_json: bool) -> None:
    """The segments that the models of release NAME are most certainly wrong about, before their correction.

    EXPECTED is what the model and all levels above expect, MULTIPLIER the correction with its 95 % bounds,
    LOST what leaving the segment alone would cost (nats over all rows). OFF are those of which at most the
    share --rate is called off by chance. A key is the hash of a value, of crossed columns several.
    """
    from jobs.release_segments import release_segments

    found = release_segments(root / _resolve(root, name), rate)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(
        f"{'TASK':<12} {'LEVEL':<26} {'KEY':<33} {'ROWS':>11} {'POSITIVES':>10} {'EXPECTED':>10} "
        f"{'MULTIPLIER':>21} {'LOST':>9} {'Q':>8}"
    )
    for one in found[:limit]:
        bounds = f"{one['multiplier']:.3f} ({one['lower']:.3f}-{one['upper']:.3f})"
        click.echo(
            f"{one['task']:<12} {one['level']:<26} {one['key']:<33} {one['rows']:>11,.0f} "
            f"{one['positives']:>10,.1f} {one['expected']:>10,.1f} {bounds:>21} "
            f"{one['lost_log_loss']:>9.2f} {one['q_value']:>8.1e}{' OFF' if one['is_off'] else ''}"
        )


@command.command()
@releases_option
@click.option(
    "--alias",
    type=click.Choice(["CURRENT", "last_good", "teacher"]),
    default="CURRENT",
    show_default=True,
    help="Which pointer to move.",
)
@click.argument("name")
def promote(root: Path, alias: str, name: str) -> None:
    """Let serving load release NAME (or the one that last_good or teacher names).

    The release is loaded and verified first. CURRENT does not go back: see rollback.
    """
    from jobs.release import Release
    from jobs.release_pointer import point

    release = Release.load(root / _resolve(root, name))
    point(root, alias, release.name)
    click.echo(f"{alias} -> {release.name}")


@command.command()
@releases_option
@click.argument("name", required=False)
def rollback(root: Path, name: str | None) -> None:
    """Let serving go back to release NAME, by default the one that last_good names.

    A worker that goes on publishing moves CURRENT forward again: stop it, or start it from that release.
    """
    from jobs.release import Release
    from jobs.release_pointer import CURRENT, point

    release = Release.load(root / _resolve(root, name or "last_good"))
    point(root, CURRENT, release.name, rollback=True)
    click.echo(f"{CURRENT} -> {release.name}")


def _resolve(root: Path, name: str) -> str:
    from jobs.release_manifest import parse_name
    from jobs.release_pointer import ALIASES, pointed

    if name in ALIASES:
        target = pointed(root, name)
        if target is None:
            raise DataError(f"{name} was never set in {root}.", hint="name a release instead")
        return target
    parse_name(name)
    return name
