"""``ctrstream samples replay``: yesterday's rows from after this time of day, by reference."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.options import as_of_option, writable_folder
from jobs.spark_options import location_option
from pipelines.errors import DataError

if TYPE_CHECKING:
    from pipelines.replay_draw import ReplayTime

__all__ = ["command"]

log = logging.getLogger(__name__)


@click.command("replay")
@location_option("--snapshot", "Folder that `samples build` printed.", use="read")
@as_of_option(required=True)
@click.option("--rows", type=click.IntRange(min=1), required=True, help="Rows to draw of each task.")
@click.option("--seed", type=int, default=0, show_default=True, help="Other seeds draw other rows.")
@click.option(
    "--by",
    type=click.Choice(["event_time", "known_at"]),
    default="event_time",
    show_default=True,
    help="What must lie in yesterday: when a row's window opened, or when the row was known.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Parquet file of references.",
)
def command(snapshot: str, as_of: int, rows: int, seed: int, by: ReplayTime, out: Path) -> None:
    """Draw yesterday's rows from after the time of day of --as-of, as the worker mixes them into updates.

    Every row of yesterday is as likely as any other, and may come more than once; none is drawn that was
    known only after --as-of. The file refers to rows of the snapshot. Its name goes to stdout.
    """
    from pipelines.replay_draw import ReplayWindow, draw_replay
    from pipelines.replay_rows import write_references
    from pipelines.snapshot import read_manifest

    writable_folder(out.parent)
    window = ReplayWindow(as_of, by)
    draw = draw_replay(snapshot, window, rows, seed)
    if not draw.references.num_rows:
        raise DataError(
            f"expected rows of {snapshot} with {by} between {_moment(window.low)} and "
            f"{_moment(window.midnight)} that were known by {_moment(as_of)}. Found none.",
            hint="name a snapshot of that day, labelled as of --as-of or earlier",
        )
    write_references(out, draw, read_manifest(snapshot).snapshot_id, window, seed)
    for task, pool in draw.pool.items():
        if pool:
            log.info("%d rows drawn of %d task=%s", rows, pool, task)
        else:
            log.warning("no row of yesterday from after this time of day was known task=%s", task)
    click.echo(out)


def _moment(time: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(time / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
