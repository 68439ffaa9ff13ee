"""``ctrstream tracking``: an MLflow server for development: up, down, status."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from pipelines.errors import SetupError

logger = logging.getLogger(__name__)

_data_option = click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/mlflow"),
    show_default=True,
    help="Data folder of the server.",
)


@click.group()
def command() -> None:
    """Run an MLflow server on sqlite for development."""


@command.command()
@_data_option
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port on the loopback address; 0 for a free one. By default the one used last, else a free one.",
)
def up(folder: Path, port: int | None) -> None:
    """Start the server, wait until it answers, print its address; it goes on running."""
    from jobs.mlflow_server import TrackingServer

    server = TrackingServer(folder)
    pid = server.pid()
    if pid is None:
        server.start(port, detach=True)
    elif port and not server.uri.endswith(f":{port}"):
        raise SetupError(
            f"expected an MLflow server on port {port}. One is already up at {server.uri}.",
            hint="run `ctrstream tracking down` first, or leave --port out",
        )
    else:
        logger.info("already up, as process %d", pid)
    click.echo(server.uri)


@command.command()
@_data_option
def down(folder: Path) -> None:
    """Stop the server; nothing happens if it is down. Its data stay."""
    from jobs.mlflow_server import TrackingServer

    server = TrackingServer(folder)
    pid = server.pid()
    server.stop()
    logger.info("was down already" if pid is None else f"stopped process {pid}")


@command.command()
@_data_option
@click.pass_context
def status(ctx: click.Context, folder: Path) -> None:
    """Print the address of a running server; exit code 0 if it answers, 1 if it is down."""
    from jobs.mlflow_server import TrackingServer

    server = TrackingServer(folder)
    pid = server.pid()
    if pid is None:
        logger.info("down")
        ctx.exit(1)
    if not server.answers():
        logger.warning("process %d is alive but does not answer; see %s", pid, server.log_path)
        ctx.exit(1)
    click.echo(server.uri)
