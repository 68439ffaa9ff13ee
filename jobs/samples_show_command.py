"""``ctrstream samples show``: what a snapshot holds, for a reader."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from jobs.json_output import json_option, write_json
from jobs.spark_options import location_option

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.config import Task
    from pipelines.snapshot_days import DayRates
    from pipelines.snapshot_manifest import SnapshotManifest

__all__ = ["command", "described"]


@click.command("show")
@location_option("--snapshot", "Folder that `samples build` printed.", use="read")
@json_option
def command(snapshot: str, json_path: str | None) -> None:
    """Print what a snapshot holds: settings, label rates by day, what became of the events.

    Three rates stand beside each other: naive, by what was known when the day was over; as of the snapshot;
    and matured, of the windows whose label is final.
    """
    from pipelines.snapshot import read_manifest

    manifest = read_manifest(snapshot)
    if json_path is not None:
        write_json(json_path, described(manifest))
    if json_path == "-":
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    for table in _tables(manifest):
        console.print(table)


def described(manifest: SnapshotManifest) -> dict[str, Any]:
    """Plain JSON data: the manifest but for its files and delay curves, with the rates by day."""
    from pipelines.snapshot_days import day_rates, whole_rates

    document = manifest.model_dump(mode="json", exclude={"partitions", "extra_files", "tasks"})
    tasks = {}
    for task, summary in manifest.tasks.items():
        tasks[task] = summary.model_dump(mode="json", exclude={"delay_curve"}) | {
            "whole": whole_rates(manifest, task).as_dict(),
            "days": [day.as_dict() for day in day_rates(manifest, task)],
        }
    files = [file for part in manifest.partitions for file in part.files.values()]
    size = sum(file.bytes for file in files)
    return document | {"tasks": tasks, "files": len(files), "bytes": size}


def _tables(manifest: SnapshotManifest) -> Iterator[Table]:
    from rich.table import Table

    facts = Table(show_header=False, title=manifest.snapshot_id, title_justify="left")
    for name, text in _facts(manifest):
        facts.add_row(name, text)
    yield facts
    for task in manifest.tasks:
        yield _day_table(manifest, task)
    if manifest.changes:
        yield _change_table(manifest)
    if manifest.events:
        yield _event_table(manifest)


def _facts(manifest: SnapshotManifest) -> Iterator[tuple[str, str]]:
    from pipelines.config_sections import AttributionConfig
    from pipelines.duration import format_duration

    rule = AttributionConfig.model_validate(manifest.config["attribution"])
    files = [file for part in manifest.partitions for file in part.files.values()]
    closed = sum(part.closed for part in manifest.partitions)
    begins = manifest.as_of - manifest.window
    rest = f" and the rest of the {manifest.granularity}" if manifest.since < begins else ""
    yield "labels as of", _moment(manifest.as_of)
    yield (
        "windows opened",
        f"from {_moment(manifest.since)}: {format_duration(manifest.window)}{rest}",
    )
    widths = ", ".join(f"{task} {format_duration(rule.width(task))}" for task in manifest.tasks)
    yield "label windows", f"{widths}; {format_duration(rule.allowed_lateness)} for late events"
    yield "sampling", _sampling(manifest)
    inferred = "inferred" if manifest.feature_spec_inferred else "given"
    yield "features", f"spec {manifest.feature_spec_digest[:12]}, {inferred}"
    segments = ", ".join(manifest.segments) or "none"
    yield "segments", segments
    yield (
        "partitions",
        f"{len(manifest.partitions)} by {manifest.granularity}, {closed} closed; "
        f"{len(files)} files, {_size(sum(file.bytes for file in files))}",
    )
    batches = len(manifest.lake_batches)
    yield "lake", f"{batches} batch{'es' if batches != 1 else ''}, version {manifest.lake_version}"
    yield "base", manifest.base or "none: built from scratch"
    yield "settings", f"{manifest.settings_digest[:12]}, ctrstream {manifest.code_version}"


def _sampling(manifest: SnapshotManifest) -> str:
    parts = []
    if manifest.negative_sampling_rate < 1:
        parts.append(f"{100 * manifest.negative_sampling_rate:g} % of the negatives")
    if manifest.positive_copies > 1:
        parts.append(f"each positive {manifest.positive_copies} times")
    if manifest.exploration_copies > 1:
        parts.append(f"exploration {manifest.exploration_copies} times")
    return ", ".join(parts) or "every window once"


def _day_table(manifest: SnapshotManifest, task: Task) -> Table:
    from rich.table import Table

    from pipelines.snapshot_days import day_rates, whole_rates

    summary, days = manifest.tasks[task], day_rates(manifest, task)
    misfits = f", {summary.misfits:,} misfits left out" if summary.misfits else ""
    title = f"{task}: {summary.rows:,} rows, {summary.positives:,.10g} positives{misfits}"
    table = Table(title=title, title_justify="left")
    table.add_column("opened on")
    for name in ("rows", "mature", "naive", "as of", "matured", "missed"):
        table.add_column(name, justify="right")
    table.add_column("state")
    borrowed = any(origin != manifest.snapshot_id for day in days for origin in day.origins)
    if borrowed:
        table.add_column("files of")
    for place, day in enumerate([*days, whole_rates(manifest, task)]):
        cells = [
            day.day,
            f"{day.rows:,}",
            _percent(day.mature / day.rows if day.rows else None, 1),
            *[_percent(rate, 3) for rate in (day.naive_rate, day.rate, day.mature_rate)],
            _percent(day.missed, 1),
            _state(day),
        ]
        own = "" if day.day == "all" else ", ".join(_short(origin, manifest) for origin in day.origins)
        table.add_row(*cells, *([own] if borrowed else []), end_section=place == len(days) - 1)
    over = f"the {manifest.granularity} was over"
    table.caption = (
        f"naive: known when {over}; missed: of the labels of what is closed, those that came after"
    )
    table.caption_justify = "left"
    return table


def _state(day: DayRates) -> str:
    if day.closed == day.partitions:
        return "[green]closed[/]"
    return "open" if day.closed == 0 else f"{day.closed} of {day.partitions} closed"


def _short(origin: str, manifest: SnapshotManifest) -> str:
    return "this" if origin == manifest.snapshot_id else origin.split("-")[0]


def _change_table(manifest: SnapshotManifest) -> Table:
    from rich.table import Table

    table = Table(title=f"labels changed since {manifest.base}", title_justify="left")
    table.add_column("task")
    for name in ("raised", "lowered", "restated", "late rows"):
        table.add_column(name, justify="right")
    for task, change in manifest.changes.items():
        counts = (change.raised, change.lowered, change.restated, change.late)
        table.add_row(task, *[f"{count:,}" for count in counts])
    return table


def _event_table(manifest: SnapshotManifest) -> Table:
    from rich.table import Table

    from pipelines.events import KINDS

    around = ", around its open partitions" if manifest.base else ""
    table = Table(title=f"what became of the events read{around}", title_justify="left")
    table.add_column("")
    events = [manifest.events[kind] for kind in KINDS if kind in manifest.events]
    for kind in KINDS:
        if kind in manifest.events:
            table.add_column(f"{kind}s", justify="right")
    names = list(dict.fromkeys(name for classes in events for name in classes))
    names.sort(key=lambda name: (name == "read", -max(own.get(name, 0) for own in events)))
    for place, name in enumerate(names):
        counts = [classes.get(name) for classes in events]
        if any(counts):
            words = ["" if count is None else f"{count:,}" for count in counts]
            table.add_row(name.replace("_", " "), *words, end_section=place == len(names) - 2)
    return table


def _moment(time: int) -> str:
    moment = datetime.fromtimestamp(time / 1000, UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S") + (f".{time % 1000:03d}" if time % 1000 else "") + " UTC"


def _percent(share: float | None, digits: int) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
