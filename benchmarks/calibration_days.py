"""Level and log loss by day of the online calibrator, for each kind of labels that it can learn from.

::

    make bench-calibration-days ARGS='--events FOLDER --task click'
    make bench-calibration-days ARGS='--events FOLDER --task conversion --set KEY=VALUE'
    make bench-calibration-days ARGS='--simulate impressions=250000 days=8 seed=5 --task conversion'

Each kind of labels is a whole backtest of the log, as in `benchmarks.online`; the student is the same in all
of them. Beside them stand its own probability (``raw``) and its first calibrator, never updated (``static``).
A cell is PCOC, predicted over observed, with its standard error, and the log loss (nats) below. Judged are
windows that have closed, by the day (UTC) of their opening. Of a simulated log the truth is known: the last
column is then regret, the mean KL divergence from it in nats x 1000 over all predictions, and PCOC to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calibration.label_origin import MODES
from jobs.backtest import run_backtest
from jobs.evaluate import read_table
from jobs.evaluation import evaluate
from jobs.online import OnlineLoop
from pipelines.config import load_config
from pipelines.event_files import EventFiles
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_files import write_simulation
from pipelines.simulator import simulate

__all__ = ["main"]

_AUTO = "auto"


@dataclass(frozen=True)
class Replayed:
    """A backtest: its loop at the end, and by predictor what only the truth tells."""

    loop: OnlineLoop
    truth: dict[str, str]

    def lines(self, title: str, predictor: str) -> list[str]:
        """Two lines of the table."""
        figures = by_day(self.loop, predictor).values()
        level = [f"{one['pcoc']:.3f} ± {one['pcoc'] / one['positives'] ** 0.5:.3f}" for one in figures]
        loss = [f"{one['log_loss']:.4f}" for one in figures]
        more = [self.truth[predictor]] if self.truth else []
        return [f"| {title} | {' | '.join(level + more)} |", f"| | {' | '.join(loss + ['' for _ in more])} |"]


def replayed(files: EventFiles, settings: list[str], truth: Path | None) -> Replayed:
    """Run a backtest; judge its predictions by the truth where there is one."""
    config = load_config(None, settings)
    with tempfile.TemporaryDirectory() as out:
        loop = run_backtest(config, files, Path(out)).loop
        if truth is None:
            return Replayed(loop, {})
        predictions = read_table(Path(out) / "predictions.parquet", "predictions")
    judged = evaluate(predictions, files.tables, config.attribution, truth=read_table(truth, "truth"))
    regret = judged.metrics[loop.tasks[0]]["regret"]
    told = {
        name: f"{1e3 * one['regret']:.1f}, {one['true_pcoc']:.3f}"
        for name, one in regret.items()
        if isinstance(one, dict) and "true_pcoc" in one
    }
    return Replayed(loop, told)


def by_day(loop: OnlineLoop, predictor: str) -> dict[str, dict[str, Any]]:
    """Figures of a predictor by day, and of all days."""
    found = {
        datetime.fromtimestamp(day / 1000, UTC).strftime("%a %d"): figures
        for _, day, name, figures in loop.progressive.days()
        if name == predictor
    }
    return found | {"all": loop.progressive.totals(loop.tasks[0], predictor).value()}


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--events", type=Path)
    source.add_argument("--simulate", nargs="+", metavar="KEY=VALUE", help="make a log with these settings")
    parser.add_argument("--task", choices=("click", "conversion"), required=True)
    parser.add_argument("--modes", nargs="*", default=[_AUTO, *MODES], choices=[_AUTO, *MODES])
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.simulate:
            pairs = (text.split("=", 1) for text in given.simulate)
            world = SimulationConfig(**{key: json.loads(value) for key, value in pairs})
            write_simulation(simulate(world), Path(folder))
            given.events = Path(folder)
            given.settings.append(f"attribution.attribution_window={world.attribution_window}")
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Print the table of one log."""
    files, base = EventFiles(given.events), [f"labels.tasks=['{given.task}']", *given.settings]
    truth = given.events / "truth.parquet"
    known = truth if truth.exists() else None
    static = replayed(files, [*base, "calibration.online=false"], known)
    raw = by_day(static.loop, "student_uncalibrated")
    titles = [*raw, *(["regret, true PCOC"] if known else [])]
    name = " ".join(given.simulate) if given.simulate else given.events.name
    print(f"{name}, task {given.task}\n\n| calibration | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
    rows = static.lines("raw", "student_uncalibrated") + static.lines("static", "student")
    print("\n".join(rows), flush=True)
    for mode in given.modes:
        found = replayed(files, [*base, f"calibration.labels={mode}"], known)
        origin = found.loop.calibrators[found.loop.tasks[0]].labels
        title = mode if origin is None or origin.mode == mode else f"{mode} ({origin.mode})"
        print("\n".join(found.lines(title, "student")), flush=True)


if __name__ == "__main__":
    main()
