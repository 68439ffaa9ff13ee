"""A small simulated log with faults and a backtest over it: what the tests of the online part start from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.backtest import Backtest, run_backtest
from jobs.online import OnlineLoop
from jobs.prepared import StepEvents, prepare
from jobs.steps import StepCutter
from pipelines.config import Config, load_config
from pipelines.event_files import EventFiles
from pipelines.simulation_files import write_simulation
from pipelines.simulator import SimulationConfig, simulate

# Three days, so that there is a yesterday to replay; models as small as they can be and still learn.
SIMULATION = SimulationConfig(
    impressions=12_000,
    days=3,
    campaigns=40,
    advertisers=8,
    faults=0.01,
    seed=5,
    attribution_window=86_400_000,
)
SETTINGS = (
    "labels.policy=fnw",
    "attribution.attribution_window=24h",
    "student.batch_rows=128",
    "student.embedding_dim=4",
    "student.hidden=[16, 8]",
    "student.warmup_epochs=1",
    "teacher.rounds=20",
    "replay.rows_per_hour=64",
)

# The ids of users do not fit, items come and go, and some values come too seldom to be admitted.
DYNAMIC = (
    'features.dynamic=["user_id", "item_id", "tags"]',
    "student.tables.capacity=300",
    "student.tables.filter_cells=4096",
    "student.tables.ttl=8h",
)


@dataclass(frozen=True)
class SmallRun:
    """A log, the config it was run with, and what a backtest left in ``out``."""

    events: Path
    files: EventFiles
    config: Config
    out: Path
    backtest: Backtest

    def first_releases(self, folder: Path) -> Path:
        """A folder of releases as training leaves it: before anything was learned online."""
        first = self.backtest.first
        for release in (first.teacher, first.student):
            shutil.copytree(self.out / "releases" / release.name, folder / release.name)
        (folder / "teacher").write_text(f"{first.teacher.name}\n", encoding="utf-8")
        (folder / "CURRENT").write_text(f"{first.student.name}\n", encoding="utf-8")
        return folder

    def warm_loop(self, config: Config | None = None) -> OnlineLoop:
        """A loop that has read the warm-up and is about to learn."""
        loop = OnlineLoop(config or self.config)
        for events in self.steps(0, self.warm_rows):
            loop.step(events)
        return self.begun(loop)

    def begun(self, loop: OnlineLoop) -> OnlineLoop:
        """A loop whose warm-up ends here."""
        self.backtest.first.begin(loop)
        return loop

    @property
    def warm_rows(self) -> int:
        """Input rows before online learning begins."""
        return self.files.rows - self.backtest.events

    def steps(
        self, start: int, stop: int | None = None, files: EventFiles | None = None
    ) -> Iterator[StepEvents]:
        """Rows ``[start, stop)`` cut into steps, ready for a loop."""
        first, files = self.backtest.first, files or self.files
        cutter = StepCutter(
            lambda block: prepare(
                block, first.student.spec, first.student.segments, first.frozen(), files.kind_of_source()
            ),
            self.config.student.batch_rows,
            self.backtest.warm_up_until,
        )
        for block in files.blocks(start, stop, 4096):
            yield from cutter.feed(block)
        yield from cutter.flush()


def build_small_run(folder: Path, *more: str) -> SmallRun:
    """Simulate, train and replay with more settings; a few seconds."""
    events, out = folder / "events", folder / "backtest"
    out.mkdir()
    write_simulation(simulate(SIMULATION), events, "jsonl")
    config = load_config(None, [*SETTINGS, *more])
    files = EventFiles(events)
    return SmallRun(events, files, config, out, run_backtest(config, files, out))
