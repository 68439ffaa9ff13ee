"""``samples build``: one immutable snapshot of labelled, encoded samples, as known at a moment."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.codec import with_features_from_json
from pipelines.config import Config, Task
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.duration import format_duration
from pipelines.errors import ConfigError, DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.lake import ddl, lake_version, read_lake
from pipelines.misfits import find_misfits
from pipelines.sample_encode import SampleEncoding, TaskWindow, sample_rows
from pipelines.sample_join import (
    JoinWindow,
    count_sums,
    event_counts,
    join_samples,
    outcome_delays,
    sampled,
    with_rows,
)
from pipelines.snapshot import (
    DATA_NAME,
    MANIFEST_NAME,
    SAMPLE_SCHEMA,
    SPEC_NAME,
    SnapshotFile,
    SnapshotManifest,
    TaskSummary,
    describe_file,
    finish,
    snapshot_id,
    staging,
)
from pipelines.spark_session import worker_errors

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["build"]

logger = logging.getLogger(__name__)

# Impressions on which a feature spec is inferred: a few hundred bytes each, on the driver.
_INFERENCE_ROWS = 200_000


def build(
    spark: SparkSession,
    lake: Path,
    out: Path,
    as_of: int,
    window: int,
    config: Config,
    spec: FeatureSpec | None = None,
    *,
    negative_rate: float = 1.0,
) -> Path:
    """Build a snapshot, or return the one that the same inputs have built before.

    1. Join and label the window's events by native expressions; count what became of each event.
    2. Infer the feature spec where none is given.
    3. Fit the delay curves on counts of outcomes by delay and follow-up.
    4. Encode and write the rows into a hidden folder.
    5. Describe every file in the manifest, flush, rename.

    Parameters
    ----------
    spark : SparkSession
    lake : Path
        As `jobs.samples_ingest.ingest` leaves it.
    out : Path
        Folder of snapshots.
    as_of : int
        What had arrived by then is known, ms since the epoch.
    window : int
        Rows are the label windows opened in ``[as_of - window, as_of)``, ms.
    config : Config
        Attribution, tasks, calibration segments.
    spec : FeatureSpec, optional
        By default inferred from the latest impressions of the window.
    negative_rate : float
        Share of the negatives that is kept, in (0, 1]; each stands for ``1 / rate`` by its weight.

    Returns
    -------
    Path
        Folder of the snapshot.

    Raises
    ------
    DataError
        If nothing was ingested, or the window has no impressions.
    ConfigError
        If ``window`` or ``negative_rate`` is out of range.
    """
    if not 0 < negative_rate <= 1:
        raise ConfigError(f"expected a negative rate in (0, 1]. Received: {negative_rate:g}.")
    if window <= 0:
        raise ConfigError(f"expected a window longer than 0. Received: {window} ms.")
    inputs = {
        "attribution": config.attribution.model_dump(mode="json"),
        "tasks": list(config.labels.tasks),
        "segments": list(config.calibration.segments),
        "negative_sampling_rate": negative_rate,
        "feature_spec": "inferred" if spec is None else spec.digest(),
        "lake": lake_version(lake),
    }
    name = snapshot_id(as_of, window, inputs)
    target = out / name
    if (target / MANIFEST_NAME).is_file():
        logger.info("%s exists: the same inputs built it before", target)
        return target
    join = JoinWindow(as_of - window, as_of, config.attribution)
    with worker_errors(), staging(out, name) as staged:
        joined = staged / "joined"
        events = _join(spark, lake, joined, join)
        samples = spark.read.parquet(str(joined))
        manifest = _write(samples, staged, join, events, config, spec, negative_rate)
        shutil.rmtree(joined)
        identity = {"snapshot_id": name, "lake_version": inputs["lake"]}
        return finish(staged, target, manifest.model_copy(update=identity))


def _join(spark: SparkSession, lake: Path, joined: Path, join: JoinWindow) -> dict[str, dict[str, int]]:
    """Write the joined, labelled impressions, which three passes read; returns the counts of events.

    A file survives a lost executor and needs no memory, and costs less than Spark's cache.
    """
    from pyspark.sql import Observation

    observation = Observation("events")
    samples = join_samples(read_lake(spark, lake), join)
    observed = samples.observe(observation, *count_sums(samples))
    with_rows(observed).write.parquet(str(joined))
    events = event_counts(observation.get)
    if events["impression"]["used"] == 0:
        raise DataError(
            f"expected impressions in the {format_duration(join.as_of - join.since)} before --as-of that had "
            f"arrived by then. Found none ({events['impression']['before_window']} older, "
            f"{events['impression']['late']} late).",
            hint="choose another --as-of or --window, or run `ctrstream samples ingest` first",
        )
    return events


def _write(
    samples: DataFrame,
    staged: Path,
    join: JoinWindow,
    events: dict[str, dict[str, int]],
    config: Config,
    spec: FeatureSpec | None,
    negative_rate: float,
) -> SnapshotManifest:
    used = spec if spec is not None else _infer(samples, join, events["impression"]["used"])
    curves = _delay_curves(samples, join, config)
    encoding = SampleEncoding(
        join.as_of,
        used,
        config.calibration.segments,
        {task: _task_window(config, task, curve) for task, curve in curves.items()},
        negative_rate,
    )
    totals = _write_rows(samples, staged, encoding)
    (staged / SPEC_NAME).write_text(used.to_toml(), encoding="utf-8")
    files = {path.relative_to(staged).as_posix(): file for path, file in _describe(staged)}
    tasks = {task: _summary(task, totals, files, curves[task], join) for task in config.labels.tasks}
    return SnapshotManifest(
        snapshot_id="",
        as_of=join.as_of,
        window=join.as_of - join.since,
        since=join.since,
        tasks=tasks,
        events=events,
        negative_sampling_rate=negative_rate,
        feature_spec_digest=used.digest(),
        feature_spec_inferred=spec is None,
        sample_columns={field.name: str(field.type) for field in SAMPLE_SCHEMA},
        segments=config.calibration.segments,
        config=config.model_dump(mode="json", exclude_none=True),
        lake_version="",
        code_version=_code_version(),
        files=files,
    )


def _infer(samples: DataFrame, join: JoinWindow, impressions: int) -> FeatureSpec:
    """Infer a spec from the latest impressions of the window, a bounded number of them."""
    from pyspark.sql import functions as F

    from pipelines.inference import infer_spec

    inside = samples.where(F.col("click_opened").isNotNull())
    if impressions > _INFERENCE_ROWS:
        share = 1.0 - _INFERENCE_ROWS / impressions
        cut = inside.agg(F.percentile_approx("event_time", share)).first()
        inside = inside.where(F.col("event_time") >= (join.since if cut is None else cut[0]))
    columns = ("impression_id", "event_time", "user_id", "item_id", "position", "features")
    sample: pa.Table = inside.select(*columns).toArrow()
    ordered = sample.sort_by([("event_time", "ascending"), ("impression_id", "ascending")])
    return infer_spec(with_features_from_json(ordered, "features"))


def _task_window(config: Config, task: Task, curve: DelayCurve) -> TaskWindow:
    rule = config.attribution
    return TaskWindow(rule.width(task), rule.allowed_lateness, curve)


def _delay_curves(samples: DataFrame, join: JoinWindow, config: Config) -> dict[Task, DelayCurve]:
    nothing = DelayCurve.fit([], [])
    grids = {task: DelayGrid(_task_window(config, task, nothing).horizon) for task in config.labels.tasks}
    cells = outcome_delays(samples, join.as_of, grids).toArrow()
    task_of = cells.column("task").to_numpy()
    delay, follow_up, count = (
        cells.column(name).to_numpy() for name in ("delay_bin", "follow_up_bin", "count")
    )
    curves = {}
    for task, grid in grids.items():
        own, edges = task_of == task, grid.edges()
        curves[task] = DelayCurve.fit(edges[delay[own]], edges[follow_up[own]], count[own])
    return curves


def _write_rows(samples: DataFrame, staged: Path, encoding: SampleEncoding) -> Mapping[str, Any]:
    """Write ``data/<task>-<number>.parquet``; returns sums over what was written, see `_observed`."""
    from pyspark.sql import Observation
    from pyspark.sql import functions as F

    columns = ["impression_id", "user_id", "item_id", "position", "event_time", "features"]
    kept = samples
    for task in encoding.tasks:
        sample_id = F.concat("impression_id", F.lit(f":{task}"))
        is_kept = sampled(F.col(f"{task}_label"), sample_id, encoding.negative_rate)
        kept = kept.withColumn(f"{task}_opened", F.when(is_kept, F.col(f"{task}_opened")))
        columns += [f"{task}_{part}" for part in ("opened", "label", "known", "mature")]
    kept = kept.where(F.coalesce(*[F.col(f"{task}_opened") for task in encoding.tasks]).isNotNull())
    asked, observation = Observation("asked"), Observation("samples")
    opened = [F.count(f"{task}_opened").alias(f"{task}_asked") for task in encoding.tasks]
    encode = partial(sample_rows, encoding=encoding)
    rows = kept.select(*columns).observe(asked, *opened).mapInArrow(encode, ddl(SAMPLE_SCHEMA))
    written = staged / "written"
    (
        rows.observe(observation, *_observed(list(encoding.tasks)))
        .withColumn("of_task", F.col("task"))
        .sortWithinPartitions("of_task", "event_time", "sample_id")
        .write.partitionBy("of_task")
        .parquet(str(written))
    )
    data = staged / DATA_NAME
    data.mkdir()
    totals = {**asked.get, **observation.get}
    if not any(totals[f"{task}_asked"] for task in encoding.tasks):
        raise DataError(
            f"all rows are negatives, and sampling at rate {encoding.negative_rate:g} has kept none.",
            hint="choose a longer --window or a higher --negative-rate",
        )
    if not any(totals[f"{task}_rows"] for task in encoding.tasks):
        raise _nothing_fits(samples, encoding.spec)
    for task in encoding.tasks:
        for number, path in enumerate(sorted((written / f"of_task={task}").glob("*.parquet"))):
            path.rename(data / f"{task}-{number:05d}.parquet")
    shutil.rmtree(written)
    return totals


def _nothing_fits(samples: DataFrame, spec: FeatureSpec) -> DataError:
    first = with_features_from_json(samples.select("features").limit(1).toArrow(), "features")
    return DataError(
        f"no impression of the window fits the feature spec: {find_misfits(first, spec).get(0, 'no reason')}",
        hint="make such features categorical in the spec, or mend the producer",
    )


def _observed(tasks: list[Task]) -> list[Any]:
    """Sums that the write itself takes: no second pass over the data."""
    from pyspark.sql import functions as F

    sums = []
    for task in tasks:
        own, mature = F.col("task") == task, (F.col("task") == task) & F.col("mature")
        # Single precision would lose whole rows in the sum of millions of weights.
        weight = F.col("weight").cast("double")
        positive = weight * F.col("label")
        sums += [
            F.count(F.when(own, 1)).alias(f"{task}_rows"),
            F.coalesce(F.sum(F.when(own, F.col("label"))), F.lit(0)).alias(f"{task}_positives"),
            F.count(F.when(mature, 1)).alias(f"{task}_mature"),
            F.sum(F.when(own, weight)).alias(f"{task}_weight"),
            F.sum(F.when(own, positive)).alias(f"{task}_positive_weight"),
            F.sum(F.when(mature, weight)).alias(f"{task}_mature_weight"),
            F.sum(F.when(mature, positive)).alias(f"{task}_mature_positive_weight"),
            F.min(F.when(own, F.col("event_time"))).alias(f"{task}_oldest"),
            F.bit_xor(F.when(own, F.xxhash64(*SAMPLE_SCHEMA.names))).alias(f"{task}_digest"),
        ]
    return sums


def _summary(
    task: Task,
    totals: Mapping[str, Any],
    files: Mapping[str, SnapshotFile],
    curve: DelayCurve,
    join: JoinWindow,
) -> TaskSummary:
    rows = int(totals[f"{task}_rows"])
    misfits = int(totals[f"{task}_asked"]) - rows
    if misfits:
        logger.warning("%d %s rows left out: their impressions do not fit the feature spec", misfits, task)
    stored = sum(file.rows for file in files.values() if file.task == task)
    if stored != rows:
        raise DataError(f"expected {rows} {task} rows in the files written. Found {stored}.")

    def ratio(numerator: str, denominator: str) -> float | None:
        below = totals[f"{task}_{denominator}"]
        return float(totals[f"{task}_{numerator}"]) / float(below) if below else None

    oldest = totals[f"{task}_oldest"]
    return TaskSummary(
        rows=rows,
        positives=int(totals[f"{task}_positives"]),
        mature=int(totals[f"{task}_mature"]),
        label_rate=ratio("positive_weight", "weight") or 0.0,
        mature_label_rate=ratio("mature_positive_weight", "mature_weight"),
        kinds={"first": rows},
        misfits=misfits,
        content_digest=f"{int(totals[f'{task}_digest'] or 0) & ((1 << 64) - 1):016x}",
        delay_curve=curve.state(),
        largest_follow_up=0 if oldest is None else join.as_of - int(oldest),
    )


def _describe(staged: Path) -> list[tuple[Path, SnapshotFile]]:
    described = [(staged / SPEC_NAME, describe_file(staged / SPEC_NAME))]
    for path in sorted((staged / DATA_NAME).iterdir()):
        task: Task = "click" if path.name.startswith("click-") else "conversion"
        described.append((path, describe_file(path, task)))
    return described


def _code_version() -> str:
    try:
        return version("ctrstream")
    except PackageNotFoundError:
        return "unknown"
