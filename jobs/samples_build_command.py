"""``ctrstream samples build`` and ``relabel``: one immutable snapshot of labelled samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import Duration, as_of_option, bootstrap_option, config_options
from jobs.spark_options import (
    is_long_running,
    lake_option,
    location_option,
    spark_for,
    spark_options,
)

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["build_command", "relabel_command"]


@click.command("build")
@lake_option
@location_option("--out", "Folder of snapshots; the new one gets a folder of its own in it.")
@click.option(
    "--window",
    required=True,
    type=Duration(),
    help="How far back before --as-of: 7d, 15d, 30d, 45d, 60d, 90d or any other duration.",
)
@as_of_option(required=True)
@click.option(
    "--spec",
    "spec_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Feature spec (TOML). By default that of the configuration, else inferred from the window.",
)
@click.option("--granularity", type=click.Choice(["day", "hour"]), help="Length of a partition.")
@click.option(
    "--negative-rate",
    type=float,
    help="Share of the negatives to keep, by a stable hash; the rest's weight goes to those kept.",
)
@click.option(
    "--positive-copies", type=int, help="How often each positive is written; they share its weight."
)
@click.option(
    "--exploration-copies", type=int, help="The same for impressions with a propensity: exploration traffic."
)
@spark_options
@config_options
def build_command(
    lake: str,
    out: str,
    window: int,
    as_of: int,
    spec_path: Path | None,
    master: str,
    spark_conf: tuple[str, ...],
    config: Config,
    **sampling: Any,
) -> None:
    """Join, label as of a time, encode, and write one immutable snapshot.

    Labels are what had arrived by --as-of; the manifest beside the data says how many rows there are, what
    became of every event, and under which settings. The folder of the snapshot goes to stdout.
    """
    from pipelines.config import with_values
    from pipelines.feature_spec import FeatureSpec

    given = {key: value for key, value in sampling.items() if value is not None}
    config = with_values(config, "samples", given)
    path = spec_path if spec_path is not None else config.features.spec
    spec = None if path is None else FeatureSpec.read(path)

    from jobs.samples_build import build

    with spark_for("samples build", master, spark_conf, long_running=is_long_running(lake, master)) as spark:
        snapshot = build(spark, lake, out, as_of, window, config, spec)
    click.echo(snapshot)


@click.command("relabel")
@lake_option
@location_option("--base", "Snapshot to start from; the new one gets a folder beside it.", use="read")
@as_of_option(required=True)
@click.option(
    "--window",
    type=Duration(),
    help="How far back before --as-of; the base's if not given.",
)
@click.option(
    "--publish", is_flag=True, help="Send the label changes to the Kafka topic kafka.topics.labels."
)
@bootstrap_option
@spark_options
@config_options
def relabel_command(
    lake: str,
    base: str,
    as_of: int,
    window: int | None,
    publish: bool,
    bootstrap_servers: str | None,
    master: str,
    spark_conf: tuple[str, ...],
    config: Config,
) -> None:
    """Bring a snapshot up to a later time: rebuild what was still open, refer to what is closed.

    Attribution, tasks, sampling and features are those of the base. The result holds the same rows as a
    build of the same window, at the cost of the open partitions; the rows whose label has changed are
    listed beside the data, and with --publish sent to Kafka. The folder of the snapshot goes to stdout.
    """
    from jobs.samples_relabel import publish_changes, relabel

    kafka = config.kafka
    if bootstrap_servers is not None:
        kafka = kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
    jars = "spark-kafka" if publish else None
    long_running = is_long_running(lake, master)
    with spark_for("samples relabel", master, spark_conf, jars, long_running=long_running) as spark:
        snapshot = relabel(spark, lake, base, as_of, window)
        if publish:
            sent = publish_changes(spark, snapshot, kafka)
            click.echo(f"{sent} label changes sent to {kafka.topics.labels}", err=True)
    click.echo(snapshot)
