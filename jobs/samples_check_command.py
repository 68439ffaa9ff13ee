"""``ctrstream samples check``: is a snapshot sound?"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from jobs.drift import Span, SpanParameter
from jobs.json_output import json_option, write_json
from jobs.options import config_options
from jobs.spark_options import location_option, spark_for
from pipelines.errors import DataError

if TYPE_CHECKING:
    from jobs.samples_check import CheckReport
    from pipelines.config import Config

__all__ = ["command"]


@click.command("check")
@location_option("--snapshot", "Folder that `samples build` printed.", use="read")
@location_option(
    "--lake", "The lake that it was built from: adds holes in time, dead letters.", required=False, use="read"
)
@location_option(
    "--against",
    "Another snapshot, to test on: nothing of it may be in --snapshot.",
    required=False,
    use="read",
)
@click.option("--train", type=SpanParameter(), help="Windows of --snapshot that are trained on, event time.")
@click.option(
    "--test", type=SpanParameter(), help="Windows that are tested on, of --against or else of --snapshot."
)
@json_option
@click.option(
    "--master",
    help="Where Spark runs: ids are compared there, and with --lake the delays of all events are counted. "
    "Without it one process reads the snapshot, in chunks.",
)
@click.option("--spark-conf", metavar="KEY=VALUE", multiple=True, help="A Spark setting. Repeatable.")
@config_options
def command(
    snapshot: str,
    lake: str | None,
    against: str | None,
    train: Span | None,
    test: Span | None,
    json_path: str | None,
    master: str | None,
    spark_conf: tuple[str, ...],
    config: Config,
) -> None:
    """Check a snapshot against its manifest, for leaks, for overlap and for holes; exit 3 if not sound.

    Limits are those of [checks] in the configuration. All that is found is told, not only the first.
    """
    from jobs.samples_check import check
    from pipelines.check_overlap import RowSet

    if against is None and (train is None) != (test is None):
        raise click.UsageError("--train and --test go together; or name another snapshot with --against.")
    if master is None and spark_conf:
        raise click.UsageError("--spark-conf says how Spark runs: add --master.")
    is_compared = against is not None or train is not None
    session = nullcontext() if master is None else spark_for("samples check", master, spark_conf)
    with session as spark:
        report = check(
            snapshot,
            config.checks,
            lake=lake,
            train=RowSet(snapshot, train) if is_compared else None,
            test=RowSet(against or snapshot, test) if is_compared else None,
            spark=spark,
        )
    if json_path is not None:
        write_json(json_path, report.as_dict())
    if json_path != "-":
        _print(report)
    if report.failed:
        raise DataError(
            f"{snapshot} is not sound: {'; '.join(finding.text for finding in report.failed)}.",
            hint="build it again, mend what feeds it, or set other limits in [checks]",
        )


def _print(report: CheckReport) -> None:
    from rich.console import Console

    from jobs.samples_check_lines import check_tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    for table in check_tables(report):
        console.print(table)
    counts = ", ".join(f"{own.rows:,} {task} rows" for task, own in report.manifest.tasks.items())
    verdict = f"not sound, {len(report.failed)} failed" if report.failed else "sound"
    many = len(report.warnings)
    warned = f", {many} warning{'s' if many > 1 else ''}" if many else ""
    click.echo(f"{report.location}: {verdict}{warned}, {counts}")
