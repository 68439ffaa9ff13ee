"""``ctrstream samples ingest``: Kafka topics or event files into the lake."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.options import bootstrap_option, config_options, writable_folder
from jobs.spark_options import lake_option, spark_for, spark_options
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["command"]


@click.command("ingest")
@lake_option
@bootstrap_option
@click.option(
    "--events",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder with impressions*, clicks* and conversions* files (.jsonl, .parquet) instead of Kafka.",
)
@click.option("--continuous", is_flag=True, help="Kafka only: go on until interrupted.")
@spark_options
@config_options
def command(
    lake: Path,
    bootstrap_servers: str | None,
    events: Path | None,
    continuous: bool,
    master: str,
    spark_conf: tuple[str, ...],
    config: Config,
) -> None:
    """Add new events to the lake, each exactly once.

    Run again, it takes up where it ended: Kafka at the next offsets, event files by content. Events that
    cannot be used are kept in the lake as dead letters with reason and position. A summary goes to stdout
    as JSON.
    """
    if events is not None and (bootstrap_servers is not None or continuous):
        raise ConfigError(
            "expected either --events or Kafka (--bootstrap-servers, --continuous). Received both."
        )
    writable_folder(lake, option="--lake")
    from jobs.samples_ingest import ingest

    with spark_for("ingest", master, spark_conf, None if events else "spark-kafka") as spark:
        report = ingest(
            spark, lake, config, bootstrap_servers=bootstrap_servers, events=events, continuous=continuous
        )
    click.echo(report.to_json())
