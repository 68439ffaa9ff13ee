"""``ctrstream samples``: events into the lake, and from the lake into immutable snapshots, by Spark."""

from __future__ import annotations

import click

from jobs import (
    samples_build_command,
    samples_check_command,
    samples_ingest_command,
    samples_replay_command,
    samples_show_command,
)

__all__ = ["command"]


@click.group()
def command() -> None:
    """Sample snapshots: ingest, build and relabel with Spark; check, replay, show."""


for _command in (
    samples_ingest_command.command,
    samples_build_command.build_command,
    samples_build_command.relabel_command,
    samples_check_command.command,
    samples_replay_command.command,
    samples_show_command.command,
):
    command.add_command(_command)
