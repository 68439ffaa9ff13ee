"""``ctrstream samples``: events into the lake, and from the lake into immutable snapshots, by Spark."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import as_of_option, bootstrap_option, config_options, output_option, writable_folder
from pipelines.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.config import Config

__all__ = ["command"]

logger = logging.getLogger(__name__)


def spark_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--master`` and ``--spark-conf``; passes ``master`` and ``spark_conf``."""
    for option in (
        click.option(
            "--spark-conf",
            metavar="KEY=VALUE",
            multiple=True,
            help="A Spark setting, as in `--spark-conf spark.executor.memory=4g`. Repeatable.",
        ),
        click.option(
            "--master",
            default="local[*]",
            show_default=True,
            help="Where Spark runs: local[N], spark://HOST:PORT, yarn, k8s://...",
        ),
    ):
        function = option(function)
    return function


def lake_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--lake DIR``; passes ``lake`` (``Path``)."""
    return click.option(
        "--lake", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the lake."
    )(function)


@contextmanager
def _session(
    name: str, master: str, spark_conf: tuple[str, ...], jars: str | None = None
) -> Iterator[SparkSession]:
    from jobs.jars import resolve
    from jobs.java import find_java
    from pipelines.spark_session import parse_settings, spark_session, stop_spark

    settings = parse_settings(spark_conf)
    find_java()
    folder = None if jars is None else resolve(jars)
    logger.info("starting Spark (%s)", master)
    spark = spark_session(
        f"ctrstream samples {name}",
        master=master,
        settings=settings,
        jars=() if folder is None else sorted(folder.glob("*.jar")),
    )
    try:
        yield spark
    finally:
        stop_spark(spark)


@click.group()
def command() -> None:
    """Build sample snapshots with Spark: ingest, build, check."""


@command.command("ingest")
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
def ingest_command(
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

    with _session("ingest", master, spark_conf, None if events else "spark-kafka") as spark:
        report = ingest(
            spark, lake, config, bootstrap_servers=bootstrap_servers, events=events, continuous=continuous
        )
    click.echo(report.to_json())


@command.command("build")
@lake_option
@output_option(help="Folder of snapshots; the new one gets a folder of its own in it.")
@click.option(
    "--window",
    required=True,
    metavar="DURATION",
    help="How far back before --as-of: 7d, 15d, 30d, 45d, 60d, 90d or any other duration.",
)
@as_of_option(required=True)
@click.option(
    "--spec",
    "spec_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Feature spec (TOML). By default that of the configuration, else inferred from the window.",
)
@click.option(
    "--negative-rate",
    type=float,
    default=1.0,
    show_default=True,
    help="Share of the negatives to keep, by a stable hash; the rest's weight goes to those kept.",
)
@spark_options
@config_options
def build_command(
    lake: Path,
    out: Path,
    window: str,
    as_of: int,
    spec_path: Path | None,
    negative_rate: float,
    master: str,
    spark_conf: tuple[str, ...],
    config: Config,
) -> None:
    """Join, label as of a time, encode, and write one immutable snapshot.

    Labels are what had arrived by --as-of; the manifest beside the data says how many rows there are, what
    became of every event, and under which settings. The folder of the snapshot goes to stdout.
    """
    from pipelines.duration import parse_duration
    from pipelines.feature_spec import FeatureSpec

    try:
        width = parse_duration(window)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--window") from error
    path = spec_path if spec_path is not None else config.features.spec
    spec = None if path is None else FeatureSpec.read(path)

    from jobs.samples_build import build

    with _session("build", master, spark_conf) as spark:
        snapshot = build(spark, lake, out, as_of, width, config, spec, negative_rate=negative_rate)
    click.echo(str(snapshot))


@command.command("check")
@click.option(
    "--snapshot",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder that `samples build` printed.",
)
def check_command(snapshot: Path) -> None:
    """Check a snapshot against its manifest, and that it says only what was known; exit 3 if not."""
    from pipelines.snapshot import read_manifest
    from pipelines.snapshot_check import check_snapshot

    findings = check_snapshot(snapshot)
    if findings:
        raise DataError(f"{snapshot} is not sound: {'; '.join(findings)}.", hint="build it again")
    tasks = read_manifest(snapshot).tasks
    counts = ", ".join(f"{summary.rows} {task} rows" for task, summary in tasks.items())
    click.echo(f"{snapshot}: sound, {counts}")
