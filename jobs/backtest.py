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
from pipelines.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.online import OnlineLoop
    from jobs.publishing import FirstReleases
    from pipelines.config import Config
    from pipelines.event_files import EventFiles
    from pipelines.feature_spec import FeatureSpec

__all__ = ["Backtest", "command", "run_backtest"]

log = logging.getLogger(__name__)

_BLOCK_ROWS = 8192
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


def run_backtest(
    config: Config, files: EventFiles, out: Path, progress: Progress = lambda stage, done, total: None
) -> Backtest:
    """Replay a log through the online loop; writes predictions, releases and accounting into ``out``.

    Raises
    ------
    DataError
        If the log has too little in it to train on.
    """
    import pyarrow.parquet as pq

    from jobs.online import OnlineLoop
    from jobs.predictions import PredictionLog
    from jobs.prepared import prepare
    from jobs.publishing import publish_student
    from jobs.release import release_name
    from jobs.single_thread import use_one_thread
    from jobs.steps import StepCutter
    from pipelines.config import dump_config

    use_one_thread()
    clock = _StageClock()
    begins_at, warm_rows = warm_up_end(files, config.backtest.warmup)
    spec = feature_spec(config, files, begins_at)
    segments = usable_segments(config, files)
    (out / "feature_spec.toml").write_text(spec.to_toml(), encoding="utf-8")
    (out / "config.toml").write_text(dump_config(config), encoding="utf-8")
    loop = OnlineLoop(config)
    sources = files.kind_of_source()
    clock.lap("read")
    first, skipped = _warm_up(config, files, loop, spec, segments, out, begins_at, warm_rows, progress, clock)
    frozen = first.frozen()
    cutter = StepCutter(
        lambda block: prepare(block, spec, segments, frozen, sources), config.student.batch_rows, begins_at
    )
    predictions = PredictionLog(out / "predictions")
    release, next_release = first.student.name, begins_at + config.backtest.publish_every
    for block in files.blocks(
        warm_rows,
        None,
        _BLOCK_ROWS // config.student.batch_rows * config.student.batch_rows or config.student.batch_rows,
    ):
        for events in cutter.feed(block):
            predictions.add(loop.step(events).predicted, loop.tasks, release)
            if loop.clock >= next_release:
                release = release_name("student", 1, loop.step_number)
                next_release += (loop.clock - next_release) // config.backtest.publish_every * (
                    config.backtest.publish_every
                ) + config.backtest.publish_every
        progress("replay", int(block.offset[-1]) + 1 - warm_rows, files.rows - warm_rows)
    for events in cutter.flush():
        predictions.add(loop.step(events).predicted, loop.tasks, release)
    clock.lap("online")
    publish_student(out / "releases", loop, first, epoch=1, parent=first.student.name, extra={})
    table = predictions.drain()
    if table is None:
        raise DataError(
            "no impression is left to predict after the warm-up.",
            hint="shorten it with --set backtest.warmup=10%",
        )
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


def feature_spec(config: Config, files: EventFiles, before: int) -> FeatureSpec:
    """The spec that the config names, or one inferred from the impressions that arrived before a time."""
    from pipelines.feature_spec import FeatureSpec
    from pipelines.inference import infer_spec

    if config.features.spec is not None:
        return FeatureSpec.read(config.features.spec)
    spec = infer_spec(files.impressions_before(before))
    for left_out in spec.left_out:
        log.info("feature left out name=%s reason=%r", left_out.name, left_out.reason)
    return spec


def usable_segments(config: Config, files: EventFiles) -> tuple[str, ...]:
    """The calibration segments that the log has a column for."""
    columns = files.impressions.column_names
    for name in config.calibration.segments:
        if name not in columns:
            log.info("calibration segment left out name=%s reason='the log has no such column'", name)
    return tuple(name for name in config.calibration.segments if name in columns)


def accounting_report(loop: OnlineLoop) -> dict[str, Any]:
    """What became of every input row, and whether the sum is right."""
    return {
        "read": dict(loop.read),
        "classes": loop.accounting.value(),
        "by_class": loop.accounting.by_class(),
        "difference": loop.accounting.check(loop.read),
    }


def _warm_up(
    config: Config,
    files: EventFiles,
    loop: OnlineLoop,
    spec: FeatureSpec,
    segments: tuple[str, ...],
    out: Path,
    begins_at: int,
    rows: int,
    progress: Progress,
    clock: _StageClock,
) -> tuple[FirstReleases, dict[str, str]]:
    """Join the warm-up, train on it, and let the loop begin."""
    from jobs.prepared import FrozenModels, prepare
    from jobs.publishing import write_first
    from jobs.steps import WARM_UP_ROWS, StepCutter
    from jobs.training import train_models
    from jobs.warm_up import WarmUp

    warm_up, sources = WarmUp(loop), files.kind_of_source()
    cutter = StepCutter(lambda block: prepare(block, spec, segments, FrozenModels(), sources), 1, begins_at)
    for block in files.blocks(0, rows, WARM_UP_ROWS):
        for events in cutter.feed(block):
            warm_up.add(loop.step(events))
        progress("warm-up", int(block.offset[-1]) + 1, rows)
    for events in cutter.flush():
        warm_up.add(loop.step(events))
    clock.lap("warm_up")
    sets = warm_up.training_sets()
    trained = train_models(sets, spec, config)
    for task, reason in trained.skipped.items():
        log.warning("task skipped task=%s reason=%r", task, reason)
    if not trained.models:
        raise DataError(
            "no task can be trained on the warm-up: "
            + "; ".join(f"{task}: {reason}" for task, reason in trained.skipped.items()),
            hint="a longer log or a longer warm-up (--set backtest.warmup=50%) may have enough outcomes",
        )
    first = write_first(
        out / "releases",
        trained.models,
        spec,
        config,
        segments,
        warm_up_until=begins_at,
        rows=max(len(rows_of_task) for rows_of_task in sets.values()),
        figures={task: one.report for task, one in trained.models.items()},
    )
    loop.begin(first.students(), first.calibrators(), first.teachers())
    clock.lap("train")
    return first, dict(trained.skipped)


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
