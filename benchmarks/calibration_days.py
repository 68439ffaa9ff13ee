"""Level and log loss by day of the online calibrator, for each kind of labels that it can learn from.

::

    make bench-calibration-days ARGS='--events FOLDER --task click'
    make bench-calibration-days ARGS='--events FOLDER --task conversion --set KEY=VALUE'

Each kind of labels is a whole backtest of the log, as in `benchmarks.online`; the student is the same in all
of them. Beside them stand its own probability (``raw``) and its first calibrator, never updated (``static``).
A cell is PCOC, predicted over observed, with its standard error, and the log loss (nats) below. Judged are
windows that have closed, by the day (UTC) of their opening.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calibration.label_origin import MODES
from jobs.backtest import run_backtest
from jobs.online import OnlineLoop
from pipelines.config import load_config
from pipelines.event_files import EventFiles

__all__ = ["main"]

_AUTO = "auto"


def replayed(files: EventFiles, settings: list[str]) -> OnlineLoop:
    """The loop at the end of a backtest."""
    with tempfile.TemporaryDirectory() as out:
        return run_backtest(load_config(None, settings), files, Path(out)).loop


def by_day(loop: OnlineLoop, predictor: str) -> dict[str, dict[str, Any]]:
    """Figures of a predictor by day, and of all days."""
    found = {
        datetime.fromtimestamp(day / 1000, UTC).strftime("%a %d"): figures
        for _, day, name, figures in loop.progressive.days()
        if name == predictor
    }
    return found | {"all": loop.progressive.totals(loop.tasks[0], predictor).value()}


def lines(title: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    """Two lines of the table."""
    level = [f"{one['pcoc']:.3f} ± {one['pcoc'] / one['positives'] ** 0.5:.3f}" for one in figures.values()]
    loss = [f"{one['log_loss']:.4f}" for one in figures.values()]
    return [f"| {title} | {' | '.join(level)} |", f"| | {' | '.join(loss)} |"]


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--task", choices=("click", "conversion"), required=True)
    parser.add_argument("--modes", nargs="*", default=[_AUTO, *MODES], choices=[_AUTO, *MODES])
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    files, base = EventFiles(given.events), [f"labels.tasks=['{given.task}']", *given.settings]
    static = replayed(files, [*base, "calibration.online=false"])
    raw = by_day(static, "student_uncalibrated")
    print(f"{given.events.name}, task {given.task}\n")
    print(f"| calibration | {' | '.join(raw)} |\n|---|{'---|' * len(raw)}")
    print("\n".join(lines("raw", raw) + lines("static", by_day(static, "student"))), flush=True)
    for mode in given.modes:
        loop = replayed(files, [*base, f"calibration.labels={mode}"])
        origin = loop.calibrators[loop.tasks[0]].labels
        title = mode if origin is None or origin.mode == mode else f"{mode} ({origin.mode})"
        print("\n".join(lines(title, by_day(loop, "student"))), flush=True)


if __name__ == "__main__":
    main()
