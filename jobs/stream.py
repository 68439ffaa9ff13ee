"""`ctrstream stream`: the online worker as a process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.options import bootstrap_option, config_options, writable_folder

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["command"]


@click.command()
@click.option(
    "--releases",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of releases; `ctrstream train` has written the first ones.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The worker's own folder: checkpoints, predictions, dead letters.",
)
@click.option("--until-end", is_flag=True, help="Stop at the offsets at which the topics end now.")
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    help="Serve figures for Prometheus there; PORT alone means 127.0.0.1. Overrides stream.metrics.",
)
@click.option(
    "--backfill",
    metavar="LAKE",
    help="Read messages that the broker has deleted and the state has not read yet from this lake.",
)
@bootstrap_option
@config_options
def command(
    releases: Path,
    state: Path,
    until_end: bool,
    metrics: str | None,
    backfill: str | None,
    bootstrap_servers: str | None,
    config: Config,
) -> None:
    """Learn from Kafka: predict, learn, calibrate, commit, publish.

    Killed at any point, it goes on from its last commit as if nothing had happened. SIGTERM commits and
    ends it.
    """
    writable_folder(state, option="--state")
    from jobs.single_thread import use_one_thread
    from jobs.worker import Worker

    if bootstrap_servers is not None:
        kafka = config.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
        config = config.model_copy(update={"kafka": kafka})
    if metrics is not None:
        stream = config.stream.model_copy(update={"metrics": metrics})
        config = config.model_copy(update={"stream": stream})
    use_one_thread()
    worker = Worker(config, releases, state, until_end=until_end, backfill=backfill)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: worker.stop())
    worker.run()
    click.echo(
        json.dumps(
            {
                "digest": worker.digest,
                "step": worker.loop.step_number,
                "release": worker.release,
                "breaker": worker.breaker.mode,
                "held_rows": worker.breaker.held_rows,
                "pause_p99_ms": worker.pause_p99_ms(),
            }
        )
    )
