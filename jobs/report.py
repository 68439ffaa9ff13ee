"""``ctrstream report``: the one-page HTML review of a run."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from jobs.options import writable_folder

__all__ = ["REPORT_FILE", "command", "write_report"]

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the review of a run folder.

    Parameters
    ----------
    run : Path
        What ``ctrstream backtest`` or ``ctrstream demo`` left; parts that are not there are named as missing.
    out : Path, optional
        The page. Default: ``report.html`` in the run folder.

    Returns
    -------
    Path
        The page: one file that loads nothing from anywhere.

    Raises
    ------
    DataError
        If the folder holds nothing to report, or a damaged file.
    SetupError
        If the page cannot be written.
    """
    from jobs.report_page import render
    from jobs.report_run import RunFolder

    page = render(RunFolder.read(run))
    target = run / REPORT_FILE if out is None else out
    writable_folder(target.parent)
    part = target.with_name(f".{target.name}.part")
    part.write_text(page, encoding="utf-8")
    return part.replace(target)


@click.command()
@click.option(
    "--run",
    "run",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder that a backtest or a demo left.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page.  [default: report.html in the run folder]",
)
def command(run: Path, out: Path | None) -> None:
    """Write the one-page HTML review of a run; prints where it is."""
    click.echo(str(write_report(run, out)))
