"""What each label policy learns in worlds whose true probabilities are known.

::

    make bench-policies ARGS='--seeds 1 2 3 --policies fnw esdfm'

For each seed a log is simulated, and each policy goes through the same backtest of it: the conversion task,
windows of 2 days, an observation window of 1 hour, so that most conversions come late. Printed is the mean
over the seeds of the regret, the mean KL divergence from the truth in nats x 1000 (0 is the truth), of PCOC,
predicted over true (1 is right), and of the gain, the share of the frozen first student's regret that is
gone; for the student's own probability and for the calibrated one. The truth is the bound: no policy can beat
it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq

from jobs.backtest import run_backtest
from jobs.evaluation import evaluate
from pipelines.config import load_config
from pipelines.config_sections import Policy
from pipelines.duration import DAY_MS
from pipelines.event_files import EventFiles
from pipelines.simulation_files import write_simulation
from pipelines.simulator import SimulationConfig, simulate

__all__ = ["main"]

_SETTINGS = (
    "labels.tasks=['conversion']",
    "attribution.attribution_window=2d",
    "attribution.observation_window=1h",
    "student.hidden=[32, 16]",
    "teacher.rounds=40",
)
_PREDICTORS = ("student_uncalibrated", "student")


@dataclass(frozen=True)
class Figures:
    """Regret (nats) and true PCOC of a predictor, and the regret of the first student, frozen."""

    regret: float
    pcoc: float
    frozen: float


def world(seed: int, impressions: int) -> Path:
    """A simulated log in the temporary folder; made once."""
    config = SimulationConfig(
        impressions=impressions,
        days=8,
        seed=seed,
        base_click_rate=0.3,
        attribution_window=2 * DAY_MS,
    )
    folder = Path(tempfile.gettempdir()) / f"ctrstream-policies-{impressions}-{seed}"
    if not (folder / "truth.parquet").exists():
        write_simulation(simulate(config), folder)
    return folder


def run(policy: str, folder: Path) -> dict[str, Figures]:
    """A backtest under a policy; figures by predictor."""
    config, files = load_config(None, [*_SETTINGS, f"labels.policy={policy}"]), EventFiles(folder)
    with tempfile.TemporaryDirectory() as out:
        predictions = run_backtest(config, files, Path(out)).predictions
    truth = pq.read_table(folder / "truth.parquet")
    found = evaluate(predictions, files.tables, config.attribution, truth=truth).metrics["conversion"][
        "regret"
    ]
    frozen = found["stale"]["regret"]
    return {name: Figures(found[name]["regret"], found[name]["true_pcoc"], frozen) for name in _PREDICTORS}


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__.split("\n")[0])
    parser.add_argument("--impressions", type=int, default=120_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--policies", nargs="+", default=list(get_args(Policy)), choices=get_args(Policy))
    given = parser.parse_args()
    print("| policy | regret | PCOC | gain | calibrated: regret | PCOC | gain | s |")
    print("|---|---|---|---|---|---|---|---|")
    for policy in given.policies:
        began = time.monotonic()
        runs = [run(policy, world(seed, given.impressions)) for seed in given.seeds]
        cells = [policy]
        for name in _PREDICTORS:
            figures = [one[name] for one in runs]
            cells.append(f"{1000 * float(np.mean([one.regret for one in figures])):.2f}")
            cells.append(f"{float(np.mean([one.pcoc for one in figures])):.3f}")
            cells.append(f"{float(np.mean([1 - one.regret / one.frozen for one in figures])):+.2f}")
        print(f"| {' | '.join(cells)} | {(time.monotonic() - began) / len(runs):.0f} |", flush=True)


if __name__ == "__main__":
    main()
