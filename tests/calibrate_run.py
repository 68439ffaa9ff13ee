"""A simulated log, a teacher trained on its first half, and a snapshot of the half that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jobs.release import Release
from jobs.samples_build import build
from jobs.samples_ingest import ingest
from jobs.train import train
from pipelines.config import Task, load_config
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_files import write_simulation
from pipelines.simulator import simulate
from pipelines.snapshot import read_snapshot
from pipelines.training_set import TrainingSet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SIMULATION = SimulationConfig(
    impressions=40_000,
    days=4,
    campaigns=40,
    advertisers=8,
    seed=3,
    attribution_window=6 * HOUR_MS,
    delay_scale=0.2,
)
CONFIG = load_config(
    None,
    [
        "attribution.attribution_window=6h",
        "teacher.rounds=25",
        "student.model=fm",
        "calibration.segments=['campaign_id']",
    ],
)
AS_OF = SIMULATION.start + 4 * DAY_MS


@dataclass(frozen=True)
class CalibrateRun:
    """Folders, and the teacher's release."""

    lake: Path
    snapshot: str
    release: Release

    def held_out(self, task: Task, as_of: int = AS_OF) -> TrainingSet:
        """Settled rows that the release has not learned, by numpy."""
        rows = read_snapshot(self.snapshot, task)
        settled = CONFIG.attribution.width(task) + CONFIG.attribution.allowed_lateness
        opened = rows.event_time
        return rows.take((opened > self.release.last_event_time) & (opened + settled < as_of))

    def logit(self, task: Task, rows: TrainingSet) -> NDArray[np.float64]:
        """The model's logits."""
        return self.release.models[task].predict_logit(rows.buckets, rows.numbers)


def calibrate_run(spark: SparkSession, folder: Path) -> CalibrateRun:
    """Half a minute, most of it Spark."""
    (folder / "log").mkdir()
    write_simulation(simulate(SIMULATION), folder / "log")
    lake = folder / "lake"
    ingest(spark, lake, CONFIG, events=folder / "log")
    learned = build(spark, lake, folder / "snapshots", AS_OF - 2 * DAY_MS, 2 * DAY_MS, CONFIG)
    first, _ = train(learned, folder / "releases", CONFIG)
    spec = first.teacher.spec
    later = build(spark, lake, folder / "snapshots", AS_OF, 3 * DAY_MS, CONFIG, spec)
    return CalibrateRun(lake, str(later), first.teacher)
