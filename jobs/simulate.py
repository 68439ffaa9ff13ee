"""``ctrstream simulate``: a synthetic event log whose probabilities, delays and drift are known exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import UtcTime, output_option
from pipelines.simulation_config import SimulationConfig, read_simulation_config

if TYPE_CHECKING:
    from pipelines.simulator import Simulation

__all__ = ["command"]

_DEFAULT = SimulationConfig()
_out = output_option(help="Folder for the log; a log simulated into it before is replaced.")


@click.command()
@_out
@click.option("--impressions", type=int, help=f"Impressions to show.  [default: {_DEFAULT.impressions}]")
@click.option("--days", type=float, help=f"Length of the log.  [default: {_DEFAULT.days:g}]")
@click.option("--seed", type=int, help=f"The same seed gives the same log.  [default: {_DEFAULT.seed}]")
@click.option("--start", type=UtcTime(), help="First moment of the log.  [default: 2026-01-05T00:00:00Z]")
@click.option(
    "--faults",
    type=float,
    metavar="RATE",
    help=f"Share of events that are late, repeated, malformed, retracted, orphaned: each.  "
    f"[default: {_DEFAULT.faults:g}]",
)
@click.option("--click-window", metavar="DURATION", help="How long a click counts.  [default: 30m]")
@click.option(
    "--attribution-window", metavar="DURATION", help="How long a conversion is credited.  [default: 24h]"
)
@click.option("--users", type=int, help="Users.  [default: one for each 15 impressions]")
@click.option("--campaigns", type=int, help=f"Campaigns.  [default: {_DEFAULT.campaigns}]")
@click.option("--items", type=int, help="Items.  [default: eight a campaign]")
@click.option("--drift", type=float, help=f"Strength of all drift; 0: none.  [default: {_DEFAULT.drift:g}]")
@click.option(
    "--delay-scale",
    type=float,
    help=f"Stretches the conversion delays; below 1 for short logs.  [default: {_DEFAULT.delay_scale:g}]",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with a section [simulation], such as the simulation.toml of another log; options win.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(("parquet", "jsonl")),
    default="parquet",
    show_default=True,
    help="Format of the event files.",
)
def command(out: Path, config_path: Path | None, file_format: Any, **options: Any) -> None:
    """Write a synthetic event log whose true probabilities are known.

    The folder receives the events (impressions, clicks, conversions), malformed.jsonl with messages that
    no reader can use, simulation.toml with the settings, and truth.parquet: the exact probability of each
    click and conversion, to judge predictions by, never to learn from. A summary goes to stdout as TOML.
    """
    base = SimulationConfig() if config_path is None else read_simulation_config(config_path)
    given = {name: value for name, value in options.items() if value is not None}
    config = SimulationConfig.from_mapping(base.to_mapping() | given)

    # Not before the options are known to be right: numpy, scipy and Arrow take half a second.
    import tomli_w

    from pipelines.simulation_files import write_simulation
    from pipelines.simulator import simulate

    with _progress(f"simulating {config.impressions:,} impressions"):
        simulation = simulate(config)
    with _progress(f"writing {out}"):
        written = write_simulation(simulation, out, file_format)
    click.echo(tomli_w.dumps(_summary(simulation, out, written)), nl=False)


@contextmanager
def _progress(message: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time, on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


def _summary(simulation: Simulation, out: Path, written: list[Path]) -> dict[str, Any]:
    import numpy as np

    config, truth = simulation.config, simulation.truth
    click_probability = truth["click_probability"].to_numpy()
    conversion_probability = truth["conversion_probability"].to_numpy()
    windows = config.to_mapping()
    return {
        "out": str(out),
        "files": [path.name for path in written],
        "start": _iso(config.start),
        "end": _iso(config.end),
        "click_window": windows["click_window"],
        "attribution_window": windows["attribution_window"],
        "mean_click_probability": round(float(click_probability.mean()), 6),
        "mean_conversion_probability": round(
            float(np.average(conversion_probability, weights=click_probability)), 6
        ),
        "counts": simulation.counts,
    }


def _iso(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
