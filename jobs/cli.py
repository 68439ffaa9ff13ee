"""The one command, ``ctrstream``: a table of subcommands, each imported only when it is called.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 bad input data, 130 interrupted. Data goes to
stdout, logs and messages to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from importlib import import_module
from typing import Any, cast

import click

from jobs.json_logs import JsonFormatter
from jobs.roots import PACKAGES, check_one_root
from pipelines.errors import CtrstreamError, SetupError

# name -> module that holds it (its attribute ``command``), one line of help. The help lives here, because
# reading it from the modules would import torch and Spark to print a list.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("jobs.demo", "The whole story on one machine: events to a reviewed, calibrated release."),
    "simulate": ("jobs.simulate", "Write a synthetic event stream whose true probabilities are known."),
    "broker": ("jobs.broker_command", "Run a real single-node Kafka for development: up, down, status."),
    "produce": ("jobs.produce", "Send an event log to the broker."),
    "features": ("jobs.features", "Propose a feature spec from an event log: infer."),
    "samples": ("jobs.samples", "Sample snapshots by Spark: ingest, build, relabel, check, replay, show."),
    "spark-entry": ("jobs.spark_submit", "Print the file that spark-submit runs the commands with."),
    "train": ("jobs.train", "Train a teacher or a first student from a sample snapshot."),
    "calibrate": ("jobs.calibrate", "Calibrate a release anew on held-out rows; register it if better."),
    "stream": ("jobs.stream", "Update the student online from Kafka: predict, learn, calibrate, commit."),
    "backtest": ("jobs.backtest", "Run the worker's loop over event files and record every prediction."),
    "checkpoint": ("jobs.checkpoint_command", "Look into a worker's state: list, verify, digest, gc."),
    "breaker": ("jobs.breaker_command", "A worker that stopped learning: status, resume, discard."),
    "audit": ("jobs.audit_command", "What became of rows; in which step and release one was learned."),
    "evaluate": ("jobs.evaluate", "Measure recorded predictions: log loss, NE, AUC, PCOC."),
    "consistency": ("jobs.consistency", "Rescore served requests offline and compare the logits."),
    "drift": ("jobs.drift", "Compare features, predictions and labels of two windows."),
    "release": ("jobs.release_command", "Govern the releases' life cycle: list, show, promote, rollback."),
    "serve": ("jobs.serve", "Score requests over HTTP with the current release."),
    "report": ("jobs.report", "Write the one-page HTML review."),
    "tracking": ("jobs.tracking_command", "Run the MLflow server for development: up, down, status."),
}
ATTRIBUTE = "command"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
INTERRUPTED = 130  # the shell's convention for SIGINT: 128 + 2


class LazyGroup(click.Group):
    """A command group that imports a subcommand's module only when the subcommand is called.

    ``CtrstreamError`` and Ctrl-C become a message and an exit code here, so that commands raise and never
    exit, and so that tests see through ``click.testing.CliRunner`` what a user sees.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, which is the order of the story."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one subcommand and return the click command in it.

        Raises
        ------
        SetupError
            If a package that the module needs is not installed.
        """
        if cmd_name not in COMMANDS:
            return None
        module_name, _ = COMMANDS[cmd_name]
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            raise SetupError(
                f"`ctrstream {cmd_name}` needs the package {error.name}, which is not installed.",
                hint="run `make setup`, or `pip install -e .` in this environment",
            ) from error
        return cast(click.Command, getattr(module, ATTRIBUTE))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; an unknown name is a usage error that names the nearest ones."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.exceptions.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; turn the errors meant for a user into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except CtrstreamError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


def configure_logging(level: str, form: str = "text") -> None:
    """Send log lines to stderr: ours from `level` up, other libraries' from warning up.

    Parameters
    ----------
    level : str
        One of ``LOG_LEVELS``. ``debug`` shows other libraries' informational lines too.
    form : str
        One of ``LOG_FORMATS``; ``json`` writes one object a line.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter())
    else:
        formatter = logging.Formatter(
            "{asctime}.{msecs:03.0f}Z {levelname} {name}: {message}", datefmt="%Y-%m-%dT%H:%M:%S", style="{"
        )
        formatter.converter = time.gmtime  # logs are compared with event times, which are UTC
        handler.setFormatter(formatter)
    logging.basicConfig(
        handlers=[handler], level=logging.INFO if level == "debug" else logging.WARNING, force=True
    )
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level.upper())


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="ctrstream", message="%(prog)s %(version)s")
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    envvar="CTRSTREAM_LOG_LEVEL",
    show_envvar=True,
    help="Least severe log line to print (stderr).",
)
@click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="text",
    show_default=True,
    envvar="CTRSTREAM_LOG_FORMAT",
    show_envvar=True,
    help="Log lines as text, or as one JSON object a line.",
)
def cli(log_level: str, log_format: str) -> None:
    """Predict clicks and conversions online: calibrated, reproducible, from events to a reviewed release."""
    configure_logging(log_level, log_format)
    check_one_root()


def main() -> None:
    """Entry point of the console script; ends the process with the documented exit code."""
    try:
        cli.main(prog_name="ctrstream")
    except BrokenPipeError:
        # The reader of our stdout (`| head`) has gone: not an error of ours. Python would complain once more
        # while it flushes at exit, so stdout is pointed elsewhere first.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
