"""`ctrstream backtest`: the online loop over event files, in arrival order.

The first part of the log trains the teacher and the first student; from there on every impression is
predicted before anything that came later is known.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import config_options, output_option
from pipelines.duration import parse_duration
from pipelines.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.online import OnlineLoop
    from jobs.publishing import FirstReleases
    from pipelines.config import Config, Task
    from pipelines.delay import DelayCurve
    from pipelines.event_files import EventFiles
    from pipelines.feature_spec import FeatureSpec

__all__ = ["Backtest", "command", "run_backtest"]

log = logging.getLogger(__name__)

_BLOCK_ROWS = 8192
# In a folder of releases: a backtest has made it and may empty it.
_MARK = ".backtest"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Backtest:
    """What a backtest leaves, besides the files in its folder.

    ``seconds`` holds the wall time of each stage, ``events`` how many input rows were learned from online.
    """

    loop: OnlineLoop
    first: FirstReleases
    predictions: pa.Table
    warm_up_until: int
    seconds: dict[str, float]
    events: int
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Plan:
    """What is fixed once the log has been looked at; ``warm_rows`` input rows arrive before ``begins_at``."""

    config: Config
    files: EventFiles
    out: Path
    spec: FeatureSpec
    segments: tuple[str, ...]
    begins_at: int
    warm_rows: int
    progress: Progress
    clock: _StageClock


def run_backtest(
    config: Config, files: EventFiles, out: Path, progress: Progress = lambda stage, done, total: None
) -> Backtest:
    """Replay a log through the online loop; writes predictions, releases and accounting into ``out``.

    Raises
    ------
    DataError
        If the log has too little in it to train on, or nothing to predict after the warm-up.
    """
    import pyarrow.parquet as pq

    from jobs.online import OnlineLoop
    from jobs.publishing import Learned, publish_student
    from jobs.single_thread import use_one_thread
    from pipelines.config import dump_config
    from pipelines.label_plan import settle_labels

    use_one_thread()
    clock = _StageClock()
    begins_at, warm_rows = warm_up_end(files, config.backtest.warmup)
    config = settle_labels(config, delay_curves(files, config, begins_at - 1))
    spec, segments = feature_spec(config, files, begins_at), usable_segments(config, files)
    plan = _Plan(config, files, out, spec, segments, begins_at, warm_rows, progress, clock)
    _fresh_releases(out / "releases")
    (out / "feature_spec.toml").write_text(spec.to_toml(), encoding="utf-8")
    (out / "config.toml").write_text(dump_config(config), encoding="utf-8")
    clock.lap("read")
    loop = OnlineLoop(config)
    first, skipped = _warm_up(plan, loop)
    table = _replay(plan, loop, first)
    publish_student(out / "releases", Learned.now(loop), first, epoch=1, parent=first.student.name, extra={})
    pq.write_table(table, out / "predictions.parquet", compression="zstd")
    _write_json(out / "accounting.json", accounting_report(loop))
    clock.lap("write")
    return Backtest(loop, first, table, begins_at, clock.seconds, files.rows - warm_rows, skipped)


def warm_up_end(files: EventFiles, warmup: str) -> tuple[int, int]:
    """Arrival time at which learning begins (ms), and how many input rows arrive before it.

    A share is a share of the impressions.

    Raises
    ------
    DataError
        If nothing is left on either side of it.
    """
    import numpy as np

    arrival = files.impression_arrival_time
    if warmup.endswith("%"):
        begins_at = int(arrival[int(len(arrival) * float(warmup[:-1]) / 100)])
    else:
        begins_at = int(arrival[0]) + parse_duration(warmup)
    rows = int(np.searchsorted(files.arrival_time, begins_at, side="left"))
    if not 0 < rows < files.rows:
        raise DataError(
            f"a warm-up of {warmup} leaves {rows} of {files.rows} events to train on and the rest to replay; "
            "both must be more than none.",
            hint="give a share or a duration inside the log: --set backtest.warmup=25%",
        )
    return begins_at, rows


def delay_curves(files: EventFiles, config: Config, as_of: int) -> dict[Task, DelayCurve]:
    """How late the outcomes of each task come, from what was known at ``as_of`` (arrival time, ms)."""
    import numpy as np

    from pipelines.delay import DelayCurve
    from pipelines.outcomes import outcomes_as_of

    curves: dict[Task, DelayCurve] = {}
    for task, outcome in outcomes_as_of(files.tables, config.attribution, as_of).items():
        positive = outcome.label > 0
        follow_up = np.minimum(as_of - outcome.opened, config.attribution.width(task))
        curves[task] = DelayCurve.fit(outcome.outcome_delay[positive], follow_up[positive])
    return curves


def feature_spec(config: Config, files: EventFiles, before: int) -> FeatureSpec:
    """The spec that the config names, or one inferred from the impressions that arrived before a time."""
    from pipelines.feature_spec import FeatureSpec
    from pipelines.inference import infer_spec

    if config.features.spec is not None:
        return FeatureSpec.read(config.features.spec).with_dynamic(config.features.dynamic)
    spec = infer_spec(files.impressions_before(before)).with_dynamic(config.features.dynamic)
    for left_out in spec.left_out:
        log.info("feature left out name=%s reason=%r", left_out.name, left_out.reason)
    return spec


def usable_segments(config: Config, files: EventFiles) -> tuple[str, ...]:
    """The columns of those calibration segments that the log has columns for."""
    from calibration.segment_levels import levels_over, segment_columns

    names = config.calibration.segments
    usable = levels_over(names, files.impressions.column_names)
    for name in names:
        if name not in usable:
            log.info("calibration segment left out name=%s reason='the log has no such column'", name)
    return segment_columns(usable)


def accounting_report(loop: OnlineLoop) -> dict[str, Any]:
    """What became of every input row, and whether the sum is right."""
    return {
        "read": dict(loop.read),
        "classes": loop.accounting.value(),
        "by_class": loop.accounting.by_class(),
        "difference": loop.accounting.check(loop.read),
    }


def _warm_up(plan: _Plan, loop: OnlineLoop) -> tuple[FirstReleases, dict[str, str]]:
    """Join the warm-up, train on it, and let the loop begin."""
    from jobs.prepared import FrozenModels, prepare
    from jobs.publishing import write_first
    from jobs.steps import WARM_UP_ROWS, StepCutter
    from jobs.training import train_models
    from jobs.warm_up import WarmUp
    from pipelines.misfits import set_aside_misfits

    files, spec, segments = plan.files, plan.spec, plan.segments
    warm_up, sources = WarmUp(loop), files.kind_of_source()
    cutter = StepCutter(
        lambda block: prepare(block, spec, segments, FrozenModels(), sources), 1, plan.begins_at
    )
    for block in files.blocks(0, plan.warm_rows, WARM_UP_ROWS):
        for events in cutter.feed(set_aside_misfits(block, spec, files.partitions)):
            warm_up.add(loop.step(events))
        plan.progress("warm-up", int(block.offset[-1]) + 1, plan.warm_rows)
    for events in cutter.flush():
        warm_up.add(loop.step(events))
    plan.clock.lap("warm_up")
    sets = warm_up.training_sets()
    trained = train_models(sets, spec, plan.config, segments=segments, labels=warm_up.labels)
    for task, reason in trained.skipped.items():
        log.warning("task skipped task=%s reason=%r", task, reason)
    if not trained.models:
        raise DataError(
            "no task can be trained on the warm-up: "
            + "; ".join(f"{task}: {reason}" for task, reason in trained.skipped.items()),
            hint="a longer log or a longer warm-up (--set backtest.warmup=50%) may have enough outcomes",
        )
    first = write_first(
        plan.out / "releases",
        trained.models,
        spec,
        plan.config,
        segments,
        warm_up_until=plan.begins_at,
        rows=max(len(rows_of_task) for rows_of_task in sets.values()),
        figures={task: one.report for task, one in trained.models.items()},
        late_share=warm_up.late_share,
        delay=warm_up.delay,
    )
    first.begin(loop)
    plan.clock.lap("train")
    return first, dict(trained.skipped)


def _replay(plan: _Plan, loop: OnlineLoop, first: FirstReleases) -> pa.Table:
    """Run the rest of the log through the loop; returns what was predicted on the way."""
    from jobs.predictions import PredictionLog
    from jobs.prepared import prepare
    from jobs.release import release_name
    from jobs.steps import StepCutter
    from pipelines.misfits import set_aside_misfits

    files, batch_rows, every = plan.files, plan.config.student.batch_rows, plan.config.backtest.publish_every
    frozen, sources = first.frozen(), files.kind_of_source()
    cutter = StepCutter(
        lambda block: prepare(block, plan.spec, plan.segments, frozen, sources), batch_rows, plan.begins_at
    )
    predictions = PredictionLog(plan.out / "predictions")
    release, next_release = first.student.name, plan.begins_at + every
    for block in files.blocks(plan.warm_rows, None, max(_BLOCK_ROWS // batch_rows, 1) * batch_rows):
        for events in cutter.feed(set_aside_misfits(block, plan.spec, files.partitions)):
            predictions.add(loop.step(events).predicted, loop.tasks, release)
            if loop.clock >= next_release:
                release = release_name("student", 1, loop.step_number)
                next_release += ((loop.clock - next_release) // every + 1) * every
        plan.progress("replay", int(block.offset[-1]) + 1 - plan.warm_rows, files.rows - plan.warm_rows)
    for events in cutter.flush():
        predictions.add(loop.step(events).predicted, loop.tasks, release)
    plan.clock.lap("online")
    table = predictions.drain()
    if table is None:
        raise DataError(
            "no impression is left to predict after the warm-up.",
            hint="shorten it with --set backtest.warmup=10%",
        )
    return table


def _fresh_releases(folder: Path) -> None:
    """Make the folder of releases, without those of an earlier backtest: they carry the same names.

    Raises
    ------
    ConfigError
        If somebody else's releases are in it.
    """
    import shutil

    mark = folder / _MARK
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists():
            raise ConfigError(
                f"{folder} holds releases that no backtest has written.",
                hint="name another folder with --out",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


class _StageClock:
    """Seconds of each stage, by the monotonic clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.option(
    "--events",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder with impressions*.parquet or .jsonl, clicks*, conversions*.",
)
@output_option()
@config_options
def command(folder: Path, out: Path, config: Config) -> None:
    """Replay an event log: predict, then learn, hour by hour."""
    from jobs.backtest_report import finish_backtest
    from jobs.terminal import progress_bar
    from pipelines.event_files import EventFiles

    files = EventFiles(folder)
    with progress_bar() as progress:
        result = run_backtest(config, files, out, progress)
    finish_backtest(result, files, config, out)
