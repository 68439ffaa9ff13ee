"""`ctrstream demo`: the whole story on one machine, from events to a reviewed, calibrated release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.options import config_options, output_option

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["command"]


@click.command()
@click.option(
    "--events",
    type=click.Path(path_type=Path, file_okay=False),
    help="A real event log; without it one is simulated, with known truth.",
)
@click.option("--impressions", type=click.IntRange(min=5_000), default=240_000, show_default=True)
@click.option("--seed", type=int, default=7, show_default=True, help="Seed of the simulated log.")
@click.option("--live-seconds", type=click.IntRange(min=5), default=25, show_default=True)
@click.option("--live-rate", type=click.IntRange(min=50), default=2_000, show_default=True, help="Events/s.")
@click.option("--keep", is_flag=True, help="Keep Kafka and the MLflow UI running until Ctrl-C.")
@output_option(required=False, default="runs/demo")
@config_options
def command(
    events: Path | None,
    impressions: int,
    seed: int,
    live_seconds: int,
    live_rate: int,
    keep: bool,
    out: Path,
    config: Config,
) -> None:
    """Run everything once: Kafka, Spark, training, online learning with a crash, serving, MLflow, report."""
    from jobs.demo_run import DemoPlan, run_demo
    from jobs.demo_summary import print_summary

    _empty(out)
    plan = DemoPlan(
        out=out.resolve(),
        events=None if events is None else events.resolve(),
        impressions=impressions,
        seed=seed,
        live_seconds=live_seconds,
        live_rate=live_rate,
        keep=keep,
    )
    summary, evaluation = run_demo(plan, config)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_summary(summary, evaluation)


def _empty(out: Path) -> None:
    """A demo begins from nothing: remove what an earlier one has left, and nothing else."""
    from pipelines.errors import ConfigError

    found = {path.name for path in out.iterdir()}
    if found and "demo.json" not in found:
        raise ConfigError(
            f"{out} holds something that is not an earlier demo ({sorted(found)[0]}).",
            hint="name a new folder with --out",
        )
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "demo.json").write_text("{}\n", encoding="utf-8")
