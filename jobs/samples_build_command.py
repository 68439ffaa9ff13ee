"""``ctrstream samples build``: one immutable snapshot of labelled samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.options import as_of_option, config_options, output_option
from jobs.spark_options import lake_option, spark_for, spark_options

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["command"]


@click.command("build")
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
def command(
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

    with spark_for("build", master, spark_conf) as spark:
        snapshot = build(spark, lake, out, as_of, width, config, spec, negative_rate=negative_rate)
    click.echo(str(snapshot))
