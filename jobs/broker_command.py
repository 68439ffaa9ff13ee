"""``ctrstream broker``: a real single-node Kafka for development: up, down, status."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from pipelines.errors import SetupError

logger = logging.getLogger(__name__)

_data_option = click.option(
    "--data",
    "data_dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/broker"),
    show_default=True,
    help="Data folder of the broker.",
)


@click.group()
def command() -> None:
    """Run a real single-node Kafka (KRaft) for development; no container is needed."""


@command.command()
@_data_option
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port on the loopback address; 0 for a free one. By default the one used last, else a free one.",
)
def up(data_dir: Path, port: int | None) -> None:
    """Start the broker, wait until it is ready, print its address; it goes on running."""
    from jobs.broker import Broker

    broker = Broker(data_dir)
    if broker.pid() is None:
        broker.start(port, detach=True)
    elif port and not broker.bootstrap_servers.endswith(f":{port}"):
        raise SetupError(
            f"expected a broker on port {port}. One is already up at {broker.bootstrap_servers}.",
            hint="run `ctrstream broker down` first, or leave --port out",
        )
    else:
        logger.info("already up, as process %d", broker.pid())
    click.echo(broker.bootstrap_servers)


@command.command()
@_data_option
def down(data_dir: Path) -> None:
    """Stop the broker; nothing happens if it is down. Its data stay."""
    from jobs.broker import Broker

    broker = Broker(data_dir)
    pid = broker.pid()
    broker.stop()
    logger.info("was down already" if pid is None else f"stopped process {pid}")


@command.command()
@_data_option
@click.pass_context
def status(ctx: click.Context, data_dir: Path) -> None:
    """Print the address of a running broker; exit code 0 if it answers, 1 if it is down."""
    from jobs.broker import Broker
    from jobs.topics import answers

    broker = Broker(data_dir)
    pid = broker.pid()
    if pid is None:
        logger.info("down")
        ctx.exit(1)
    if not answers(broker.bootstrap_servers):
        logger.warning("process %d is alive but does not answer; see %s", pid, broker.log_file)
        ctx.exit(1)
    click.echo(broker.bootstrap_servers)
