"""``ctrstream samples ingest``: Kafka topics or event files into the lake."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.options import Duration, UtcTime, bootstrap_option, config_options
from jobs.spark_options import are_files_many, location_option, spark_for, spark_options
from pipelines.duration import format_duration
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["command"]

# Those of `pipelines.adapters`, which imports Spark.
FORMATS = ("criteo-attribution", "criteo-conversions", "avazu", "taobao", "kuairand", "table")
# Shorter makes smaller files: a batch has a file for every kind and hour that it touches.
_EVERY_MS = 600_000


@click.command("ingest")
@location_option("--lake", "Folder of the lake; created when missing.", use="write")
@bootstrap_option
@location_option(
    "--events",
    "Folder of files instead of Kafka: impressions*, clicks* and conversions* (.jsonl, .parquet).",
    required=False,
    use="read",
)
@click.option(
    "--format",
    "log_format",
    type=click.Choice(FORMATS),
    help="With --events: the folder holds a log of this format (docs/formats.md).",
)
@click.option(
    "--mapping",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --format: its options (TOML); for the format table, what its columns mean.",
)
@click.option(
    "--origin",
    type=UtcTime(),
    help="With --format: what times count from that are relative, as in 2026-01-01T00:00:00Z.",
)
@click.option("--continuous", is_flag=True, help="Kafka only: go on until interrupted.")
@click.option(
    "--every",
    type=Duration(),
    help=f"With --continuous, a batch this often; each writes a file for every kind and hour.  "
    f"[default: {format_duration(_EVERY_MS)}]",
)
@spark_options
@config_options
def command(
    lake: str,
    bootstrap_servers: str | None,
    events: str | None,
    log_format: str | None,
    mapping: Path | None,
    origin: int | None,
    continuous: bool,
    every: int | None,
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
    if every is not None and not continuous:
        raise ConfigError("expected --continuous with --every. Received --every alone.")
    if log_format is not None and events is None:
        raise ConfigError("expected --events with --format. Received --format alone.")
    if log_format is None and (mapping is not None or origin is not None):
        raise ConfigError("expected --format with --mapping and --origin. Received none.")
    from jobs.samples_ingest import ingest

    adapter = None
    if log_format is not None:
        from pipelines.adapters import load_adapter

        adapter = load_adapter(log_format, mapping, origin)
    jars = "spark-kafka" if events is None else None
    long_running = events is not None and are_files_many(events, master)
    with spark_for("samples ingest", master, spark_conf, jars, long_running=long_running) as spark:
        report = ingest(
            spark,
            lake,
            config,
            bootstrap_servers=bootstrap_servers,
            events=events,
            adapter=adapter,
            every=(every or _EVERY_MS) if continuous else None,
        )
    click.echo(report.to_json())
