"""`ctrstream features`: propose a feature spec from an event log, to read and to edit."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.group()
def command() -> None:
    """Feature specs."""


@command.command("infer")
@click.option(
    "--events",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder with impressions*.parquet or .jsonl, clicks*, conversions*.",
)
@click.option(
    "--warmup",
    metavar="SHARE|DURATION",
    default="25%",
    show_default=True,
    help="First part of the log to look at, as backtest's `backtest.warmup`.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; without it the spec goes to stdout.",
)
def infer_command(folder: Path, warmup: str, out: Path | None) -> None:
    """Propose a feature spec from the first part of an event log.

    The spec is TOML: types, hash sizes and numeric transforms. Columns that are not used are told on stderr,
    with the reason, and listed in the spec.
    """
    from jobs.backtest import warm_up_end
    from pipelines.config_sections import BacktestConfig
    from pipelines.errors import ConfigError, SetupError
    from pipelines.event_files import EventFiles
    from pipelines.inference import infer_spec

    try:
        BacktestConfig(warmup=warmup)
    except ValueError as error:
        raise ConfigError(
            f"expected --warmup as a share (25%) or a duration (6h). Received: {warmup!r}."
        ) from error
    files = EventFiles(folder)
    begins_at, _ = warm_up_end(files, warmup)
    spec = infer_spec(files.impressions_before(begins_at))
    for left_out in spec.left_out:
        click.echo(f"left out {left_out.name}: {left_out.reason}", err=True)
    if out is None:
        click.echo(spec.to_toml(), nl=False)
        return
    try:
        out.write_text(spec.to_toml(), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write the feature spec {out}: {error.strerror}.") from error
    click.echo(f"wrote {out}: {len(spec.field_names)} features, {len(spec.left_out)} left out", err=True)
