"""The delay models of a snapshot, fitted on counts that its partitions carry along."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.snapshot_base import Base
from pipelines.config import Config, Task
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_cells import delay_outcomes, delay_sample
from pipelines.delay_model import DelayModel, from_files, to_files
from pipelines.delay_rows import DelayRows
from pipelines.feature_spec import FeatureSpec
from pipelines.sample_window import SampleWindow
from pipelines.snapshot import DELAYS_NAME
from pipelines.storage import Folder, open_folder

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["DelaySources", "SnapshotDelays", "fitted_delays"]

_CELLS = pa.schema(
    [
        pa.field("task", pa.string()),
        pa.field("partition", pa.int64()),
        pa.field("delay_bin", pa.int32()),
        pa.field("follow_up_bin", pa.int32()),
        pa.field("count", pa.int64()),
    ]
)


@dataclass(frozen=True)
class SnapshotDelays:
    """Delay model of each task, the state of its common curve, and the files that it is kept in."""

    models: dict[Task, DelayModel]
    states: dict[Task, dict[str, Any]]
    files: list[str]


@dataclass(frozen=True)
class DelaySources:
    """What delays are read from: facts and impressions of the partitions that are built."""

    spark: SparkSession
    events: DataFrame
    facts: DataFrame
    losers: DataFrame | None
    scratch: Folder


def fitted_delays(
    sources: DelaySources,
    window: SampleWindow,
    config: Config,
    spec: FeatureSpec,
    base: Base | None,
    folder: Folder,
) -> SnapshotDelays:
    """Fit the delay models on the outcomes of the partitions that are built and of those that are kept.

    Counts of a closed partition do not change any more: its windows have all been followed to their end. A
    model of features (``delay.model`` of ``groups`` or ``hazard``) is fitted by a build; a relabelling goes
    on with that of its base, since it does not look at the features of closed partitions again.
    """
    rule = config.attribution
    grids = {task: DelayGrid(rule.width(task) + rule.allowed_lateness) for task in window.tasks}
    cells = outcome_delays(sources.facts, window, grids).toArrow().cast(_CELLS)
    if base is not None:
        cells = pa.concat_tables([_kept_cells(sources.spark, base, window), cells])
    keys = [(name, "ascending") for name in _CELLS.names[:-1]]
    cells = cells.sort_by(keys)
    folder.write(DELAYS_NAME, _as_parquet(cells))
    curves = {task: _curve(cells, task, grid) for task, grid in grids.items()}
    models, files = dict[Task, DelayModel](curves), [DELAYS_NAME]
    if config.delay.model != "curve":
        if base is None:
            models = _featured(sources, window, config, spec, curves, grids)
        else:
            models = _of_base(sources.spark, base, window)
        files += _kept_in(folder, models)
    return SnapshotDelays(models, {task: curve.state() for task, curve in curves.items()}, files)


def _featured(
    sources: DelaySources,
    window: SampleWindow,
    config: Config,
    spec: FeatureSpec,
    curves: Mapping[Task, DelayCurve],
    grids: Mapping[Task, DelayGrid],
) -> dict[Task, DelayModel]:
    """Models of features, fitted on a bounded sample of the outcomes of closed windows."""
    from models.delay_fit import fit_delay_model

    place = f"{sources.scratch.location}/outcomes"
    delay_outcomes(sources.events, sources.facts, window, sources.losers).write.parquet(place)
    outcomes, groups = sources.spark.read.parquet(place), config.delay.groups
    models: dict[Task, DelayModel] = {}
    for task, grid in grids.items():
        table = delay_sample(outcomes, window.as_of, task, grid.horizon).toArrow()
        rows = DelayRows.from_table(table, spec, groups)
        models[task], _ = fit_delay_model(rows, spec, curves[task], grid.horizon, config.delay.model, groups)
    return models


def _kept_in(folder: Folder, models: Mapping[Task, DelayModel]) -> list[str]:
    names = []
    for task, model in models.items():
        for name, content in to_files(model).items():
            folder.write(f"{task}-{name}", content)
            names.append(f"{task}-{name}")
    return names


def _of_base(spark: SparkSession, base: Base, window: SampleWindow) -> dict[Task, DelayModel]:
    folder = open_folder(base.location, spark)
    return {
        task: from_files(
            {
                name.removeprefix(f"{task}-"): folder.read(name)
                for name in base.manifest.extra_files
                if name.startswith(f"{task}-delay.")
            }
        )
        for task in window.tasks
    }


def outcome_delays(facts: DataFrame, window: SampleWindow, grids: Mapping[Task, DelayGrid]) -> DataFrame:
    """Counts of positives by partition, delay and follow-up: columns of ``delays.parquet``.

    The delay runs from the opening of a window until its outcome was known, the follow-up until ``as_of``.
    """
    from functools import reduce

    from pyspark.sql import functions as F

    frames = []
    for task, grid in grids.items():
        opened = F.col("click_time") if task == "conversion" else F.col("event_time")
        inside = F.lit(False)
        for low, high in window.opened(task):
            inside = inside | ((opened >= low) & (opened < high))
        frames.append(
            facts.where(inside & (F.col(f"{task}_credit") > 0)).select(
                F.lit(task).alias("task"),
                F.floor(opened / window.grid.width).alias("partition"),
                _bin_of(F.col(f"{task}_rose") - opened, grid).alias("delay_bin"),
                _bin_of(F.lit(window.as_of) - opened, grid).alias("follow_up_bin"),
            )
        )
    both = reduce(lambda left, right: left.unionByName(right), frames)
    return both.groupBy("task", "partition", "delay_bin", "follow_up_bin").count()


def _bin_of(duration: Column, grid: DelayGrid) -> Column:
    """`DelayGrid.bin_of` in Spark."""
    from pyspark.sql import functions as F

    x = F.least(F.greatest(duration, F.lit(0)), F.lit(grid.horizon)).cast("double")
    k = F.ceil(F.log1p(x / F.lit(grid.unit)) * F.lit(grid.scale) - F.lit(1e-9))
    return F.least(k, F.lit(grid.bins - 1)).cast("int")


def _kept_cells(spark: SparkSession, base: Base, window: SampleWindow) -> pa.Table:
    content = open_folder(base.location, spark).read(DELAYS_NAME)
    table = pq.read_table(io.BytesIO(content)).cast(_CELLS)
    kept = {(part.task, window.grid.index_of(part.partition)) for part in base.kept}
    rows = zip(table.column("task").to_pylist(), table.column("partition").to_pylist(), strict=True)
    return table.filter(pa.array([row in kept for row in rows], pa.bool_()))


def _curve(cells: pa.Table, task: Task, grid: DelayGrid) -> DelayCurve:
    own = cells.filter(pa.array([name == task for name in cells.column("task").to_pylist()], pa.bool_()))
    edges = grid.edges()
    delay, follow_up = (edges[own.column(name).to_numpy()] for name in ("delay_bin", "follow_up_bin"))
    return DelayCurve.fit(delay, follow_up, own.column("count").to_numpy())


def _as_parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()
