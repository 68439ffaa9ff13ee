"""``ctrstream samples check``: is a snapshot sound?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.errors import DataError

if TYPE_CHECKING:
    pass

__all__ = ["command"]


@click.command("check")
@click.option(
    "--snapshot",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder that `samples build` printed.",
)
def command(snapshot: Path) -> None:
    """Check a snapshot against its manifest, and that it says only what was known; exit 3 if not."""
    from pipelines.snapshot import read_manifest
    from pipelines.snapshot_check import check_snapshot

    findings = check_snapshot(snapshot)
    if findings:
        raise DataError(f"{snapshot} is not sound: {'; '.join(findings)}.", hint="build it again")
    tasks = read_manifest(snapshot).tasks
    counts = ", ".join(f"{summary.rows} {task} rows" for task, summary in tasks.items())
    click.echo(f"{snapshot}: sound, {counts}")
