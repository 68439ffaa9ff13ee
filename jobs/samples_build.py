"""``samples build`` and ``samples relabel``: one immutable snapshot of labelled, encoded samples."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.segment_levels import segment_columns
from jobs.snapshot_base import Base, open_base
from jobs.snapshot_changes import write_changes
from jobs.snapshot_delays import DelaySources, fitted_delays
from jobs.snapshot_write import Describer, RowWriter, Workplace, workplace
from pipelines.codec import with_features_from_json
from pipelines.config import Config
from pipelines.delay_model import DelayModel
from pipelines.duration import format_duration
from pipelines.errors import ConfigError, DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.lake import LakeBatch, lake_batches, lake_version, read_lake
from pipelines.sample_counts import count_sums, event_counts
from pipelines.sample_encode import SampleEncoding, TaskWindow
from pipelines.sample_facts import contradictions, find_facts, known_events
from pipelines.sample_join import JOIN_SETTINGS, fact_columns, join_samples
from pipelines.sample_window import SampleWindow
from pipelines.snapshot import MANIFEST_NAME, SAMPLE_SCHEMA, SPEC_NAME
from pipelines.snapshot_manifest import SnapshotManifest, canonical, snapshot_id
from pipelines.snapshot_partitions import PartitionGrid
from pipelines.snapshot_summary import code_version, summarise
from pipelines.spark_session import worker_errors
from pipelines.storage import Folder, open_folder

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["build"]

logger = logging.getLogger(__name__)

# Impressions on which a feature spec is inferred: a few hundred bytes each, on the driver.
_INFERENCE_ROWS = 200_000
# Impressions of a partition that one Spark task joins, encodes and sorts at a time.
_SLICE_ROWS = 2_000_000
# What is read anew with every build costs less than Spark's own choice of a sorting aggregate.
_AGGREGATE_SETTINGS = {
    "spark.sql.objectHashAggregate.sortBased.fallbackThreshold": "500000",
    "spark.sql.maxConcurrentOutputFileWriters": "64",
}


@dataclass(frozen=True)
class _Job:
    """One build: what it reads and makes, and where."""

    spark: SparkSession
    events: DataFrame
    window: SampleWindow
    config: Config
    folder: Folder
    place: Workplace
    slices: int

    def read(self, name: str) -> DataFrame:
        return self.spark.read.parquet(f"{self.place.scratch.location}/{name}")


def build(
    spark: SparkSession,
    lake: str | Path,
    out: str | Path,
    as_of: int,
    window: int,
    config: Config,
    spec: FeatureSpec | None = None,
    *,
    base: str | Path | None = None,
) -> str:
    """Build a snapshot, or return the one that the same inputs have built before.

    1. Find what became of the window's impressions, by native expressions on narrow columns.
    2. Infer the feature spec where none is given.
    3. Fit the delay models on counts of outcomes by delay and follow-up.
    4. Join the facts to the features, encode, and write partition by partition.
    5. Describe every file in the manifest; with it the snapshot is there.

    Parameters
    ----------
    spark : SparkSession
    lake : str or Path
        As `jobs.samples_ingest.ingest` leaves it; path or URI.
    out : str or Path
        Folder of snapshots; path or URI.
    as_of : int
        What had arrived by then is known, ms since the epoch.
    window : int
        Rows are the label windows opened in ``[as_of - window, as_of)``, ms; the beginning is moved back to
        the start of its partition.
    config : Config
        Attribution, tasks, calibration segments, delay model, sampling.
    spec : FeatureSpec, optional
        By default inferred from the latest impressions of the window.
    base : str or Path, optional
        A snapshot in ``out``: its closed partitions are referred to, not built again. Its settings and its
        feature spec are those of the new one.

    Returns
    -------
    str
        Folder of the snapshot.

    Raises
    ------
    DataError
        If nothing was ingested, or the window has no impressions.
    ConfigError
        If the window is empty, or the base does not fit.
    """
    if window <= 0:
        raise ConfigError(f"expected a window longer than 0. Received: {window} ms.")
    grid = PartitionGrid(config.samples.granularity)
    since = grid.start(grid.index(as_of - window))
    whole = SampleWindow.whole(since, as_of, config.attribution, config.labels.tasks, grid)
    batches = lake_batches(lake, spark)
    settings = _settings(config)
    former = None
    if base is not None:
        former = open_base(spark, base, lake, whole, settings, batches)
        spec = former.spec
    version = lake_version(lake, spark)
    inputs = {**settings, "feature_spec": "inferred" if spec is None else spec.digest(), "lake": version}
    name = snapshot_id(as_of, window, inputs)
    location = f"{str(out).rstrip('/')}/{name}"
    folder = open_folder(location, spark)
    if folder.exists(MANIFEST_NAME):
        logger.info("%s exists: the same inputs built it before", location)
        return location
    made = whole if former is None else former.window
    slices = former.manifest.slices if former is not None else _slices(batches, grid)
    with worker_errors(), workplace(folder) as place, _set(spark, {**JOIN_SETTINGS, **_AGGREGATE_SETTINGS}):
        job = _Job(
            spark,
            read_lake(spark, lake, batches=[batch.batch for batch in batches] or None),
            made,
            config,
            folder,
            place,
            slices,
        )
        manifest = _make(job, spec, former, settings).model_copy(
            update={
                "snapshot_id": name,
                "window": window,
                "since": since,
                "lake_version": version,
                "lake_batches": tuple(batch.batch for batch in batches),
            }
        )
        place.publish(manifest)
    return location


def _settings(config: Config) -> dict[str, Any]:
    """All that decides a row, but for time, lake and feature spec."""
    return {
        "attribution": config.attribution.model_dump(mode="json"),
        "tasks": list(config.labels.tasks),
        "segments": list(config.calibration.segments),
        "samples": config.samples.model_dump(mode="json"),
        "delay": config.delay.model_dump(mode="json"),
    }


def _slices(batches: Sequence[LakeBatch], grid: PartitionGrid) -> int:
    """Groups that a partition is spread over, a power of two: none has more impressions than a task bears.

    It goes by what the lake holds, so that the same lake gives the same files.
    """
    rows: Counter[str] = Counter()
    for batch in batches:
        for part in batch.partitions:
            if part.kind == "impression":
                hour = f"T{part.event_hour:02d}" if grid.granularity == "hour" else ""
                rows[part.event_date + hour] += part.rows
    most = max(rows.values(), default=0)
    return 1 << max(0, (most - 1) // _SLICE_ROWS).bit_length()


def _make(
    job: _Job, spec: FeatureSpec | None, former: Base | None, settings: dict[str, Any]
) -> SnapshotManifest:
    losers, events = _write_facts(job)
    if former is None and events["impression"]["used"] == 0:
        raise _no_impressions(job.window, events)
    used = spec if spec is not None else _infer(job)
    sources = DelaySources(job.spark, job.events, job.read("facts"), losers, job.place.scratch)
    delays = fitted_delays(sources, job.window, job.config, used, former, job.folder)
    rows = RowWriter(job.spark, job.place, job.window).write(
        join_samples(
            job.events,
            job.read("facts"),
            job.window,
            slices=job.slices,
            losers=losers,
            negative_rate=job.config.samples.negative_rate,
        ),
        _encoding(job, used, delays.models),
    )
    if former is None and not rows.written:
        raise rows.nothing_fits(used, job.config.samples.negative_rate)
    job.folder.write(SPEC_NAME, used.to_toml().encode())
    parts = Describer(job.spark, job.place, job.window).partitions(job.folder)
    changes = {} if former is None else write_changes(job.spark, job.place, former, parts)
    kept = () if former is None else former.kept
    extra = job.place.describe_extra([SPEC_NAME, *delays.files], job.spark)
    return SnapshotManifest(
        snapshot_id="",
        as_of=job.window.as_of,
        window=0,
        since=job.window.since,
        granularity=job.window.grid.granularity,
        slices=job.slices,
        tasks=summarise([*kept, *parts], job.window, delays.states, rows.misfits),
        partitions=(*kept, *parts),
        events=events,
        base=None if former is None else former.manifest.snapshot_id,
        changes=changes,
        negative_sampling_rate=job.config.samples.negative_rate,
        positive_copies=job.config.samples.positive_copies,
        exploration_copies=job.config.samples.exploration_copies,
        feature_spec_digest=used.digest(),
        feature_spec_inferred=spec is None if former is None else former.manifest.feature_spec_inferred,
        sample_columns={field.name: str(field.type) for field in SAMPLE_SCHEMA},
        segments=segment_columns(job.config.calibration.segments),
        config=job.config.model_dump(mode="json", exclude_none=True),
        settings_digest=hashlib.sha256(canonical(settings)).hexdigest(),
        lake_version="",
        lake_batches=(),
        code_version=code_version(),
        extra_files=extra,
    )


def _write_facts(job: _Job) -> tuple[DataFrame | None, dict[str, dict[str, int]]]:
    """Write the facts, which several passes read; returns copies that do not count, and counts of events.

    A file survives a lost executor and needs no memory, and costs less than Spark's cache.
    """
    losers, repeated = None, 0
    sums = _observed_facts(job, None)
    if sums.pop("spread"):
        path = f"{job.place.scratch.location}/losers"
        contradictions(job.events, job.window).write.parquet(path)
        losers = job.spark.read.parquet(path)
        repeated = int(losers.groupBy().sum("copies").first()[0] or 0)  # type: ignore[index]
        logger.warning("%d copies of impressions name another time than the first: left out", repeated)
        sums = _observed_facts(job, losers)
        sums.pop("spread")
    counts = event_counts(sums)
    for name in ("duplicate", "read"):
        counts["impression"][name] += repeated
    return losers, counts


def _observed_facts(job: _Job, losers: DataFrame | None) -> dict[str, Any]:
    from pyspark.sql import Observation
    from pyspark.sql import functions as F

    observation = Observation("facts")
    facts = find_facts(job.events, job.window, losers)
    observed = facts.observe(observation, *count_sums(facts), F.max("spread").alias("spread"))
    kept = observed.where("has_fact").select(*fact_columns(job.window.tasks))
    kept.write.mode("overwrite").parquet(f"{job.place.scratch.location}/facts")
    return dict(observation.get)


def _no_impressions(window: SampleWindow, events: dict[str, dict[str, int]]) -> DataError:
    return DataError(
        f"expected impressions in the {format_duration(window.as_of - window.since)} before --as-of that had "
        f"arrived by then. Found none ({events['impression']['before_window']} older, "
        f"{events['impression']['late']} late).",
        hint="choose another --as-of or --window, or run `ctrstream samples ingest` first",
    )


def _infer(job: _Job) -> FeatureSpec:
    """Infer a spec from the latest impressions of the window, a bounded number of them."""
    from pyspark.sql import functions as F

    from pipelines.inference import infer_spec

    window = job.window
    inside = known_events(job.events, "impression", [(window.since, window.as_of)], window.as_of)
    total = inside.count()
    if total > _INFERENCE_ROWS:
        cut = inside.agg(F.percentile_approx("event_time", 1.0 - _INFERENCE_ROWS / total)).first()
        inside = inside.where(F.col("event_time") >= (window.since if cut is None else cut[0]))
    columns = ("impression_id", "event_time", "user_id", "item_id", "position", "features")
    sample: pa.Table = inside.select(*columns).dropDuplicates(["impression_id"]).toArrow()
    ordered = sample.sort_by([("event_time", "ascending"), ("impression_id", "ascending")])
    return infer_spec(with_features_from_json(ordered, "features"))


def _encoding(job: _Job, spec: FeatureSpec, delays: dict[Any, DelayModel]) -> SampleEncoding:
    rule, samples = job.config.attribution, job.config.samples
    return SampleEncoding(
        job.window.as_of,
        spec,
        segment_columns(job.config.calibration.segments),
        {
            task: TaskWindow(rule.width(task), rule.allowed_lateness, delays[task])
            for task in job.window.tasks
        },
        samples.negative_rate,
        samples.positive_copies,
        samples.exploration_copies,
        job.window.grid.width,
    )


class _set:
    """Settings of Spark that hold for a while."""

    def __init__(self, spark: SparkSession, settings: dict[str, str]) -> None:
        self.spark, self.settings = spark, settings

    def __enter__(self) -> None:
        self.before = {key: self.spark.conf.get(key, None) for key in self.settings}
        for key, value in self.settings.items():
            self.spark.conf.set(key, value)

    def __exit__(self, *_: object) -> None:
        for key, value in self.before.items():
            if value is None:
                self.spark.conf.unset(key)
            else:
                self.spark.conf.set(key, value)
