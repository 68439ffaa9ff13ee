"""Writing a snapshot: a workplace of its own, rows in partitions, a digest of every file, then the manifest.

Data files are written in a folder that only this build knows, and none is visible before the manifest names
it. So the same holds on POSIX, HDFS and object stores: what the manifest names is there, the rest is swept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from pipelines.codec import with_features_from_json
from pipelines.config import Task
from pipelines.errors import DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.lake import ddl
from pipelines.misfits import find_misfits
from pipelines.sample_encode import WRITTEN_SCHEMA, SampleEncoding, sample_rows
from pipelines.sample_window import SampleWindow
from pipelines.snapshot import MANIFEST_NAME
from pipelines.snapshot_manifest import (
    PartitionSummary,
    SnapshotFile,
    SnapshotManifest,
    content_digest,
)
from pipelines.snapshot_partitions import closes_after
from pipelines.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["Describer", "RowWriter", "Workplace", "WrittenRows", "digests", "is_first_copy", "workplace"]

logger = logging.getLogger(__name__)

_PREFIXES = ("data-", "diff-", "scratch-")
_SELDOM_REPEATED = (
    *("sample_id", "impression_id", "user_id", "event_time", "known_at", "outcome_known_at", "elapsed"),
    *("observed_share", "user_key", "buckets.list.element", "numbers.list.element"),
)
_FILE_OPTIONS = {
    "maxRecordsPerFile": "2000000",
    # Values that seldom repeat: a dictionary of them is built only to be thrown away.
    **{f"parquet.enable.dictionary#{name}": "false" for name in _SELDOM_REPEATED},
    "parquet.compression.codec.zstd.level": "1",
}


@dataclass(frozen=True)
class Workplace:
    """Folders of one build inside the snapshot's folder; ``token`` tells it from other builds of the same."""

    folder: Folder
    token: str

    @property
    def data(self) -> Folder:
        return self.folder.child(f"data-{self.token}")

    @property
    def diff(self) -> Folder:
        return self.folder.child(f"diff-{self.token}")

    @property
    def scratch(self) -> Folder:
        return self.folder.child(f"scratch-{self.token}")

    def describe_extra(self, names: list[str], spark: SparkSession) -> dict[str, SnapshotFile]:
        """Size and digest of files that are no data, label differences among them."""
        found = {}
        for name in names:
            content = self.folder.read(name)
            found[name] = SnapshotFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        if self.diff.exists():
            found |= {f"diff-{self.token}/{name}": file for name, file in digests(spark, self.diff).items()}
        return found

    def publish(self, manifest: SnapshotManifest) -> None:
        """The commit point. If another build has published the same snapshot meanwhile, that one is kept."""
        text = manifest.model_dump_json(indent=2) + "\n"
        if not self.folder.create(MANIFEST_NAME, text.encode()):
            logger.info("%s was published by another build meanwhile", self.folder.location)
            self.data.delete()
            self.diff.delete()


@contextmanager
def workplace(folder: Folder) -> Iterator[Workplace]:
    """A place to build a snapshot in; what was written is removed if it is not published.

    What a killed build of the same snapshot on this machine left behind is swept.
    """
    host = platform.node().replace(".", "-")
    _sweep(folder, host)
    place = Workplace(folder, f"{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        yield place
    except BaseException:
        place.data.delete()
        place.diff.delete()
        raise
    finally:
        place.scratch.delete()
        if not folder.exists(MANIFEST_NAME) and not any(_is_built(name) for name in folder.names()):
            folder.delete()


def _is_built(name: str) -> bool:
    return name.startswith(_PREFIXES)


def _sweep(folder: Folder, host: str) -> None:
    """Remove folders of builds on this machine that have ended without publishing."""
    for name in folder.names():
        if not _is_built(name):
            continue
        machine, process, _ = name.partition("-")[2].rsplit(".", 2)
        if machine == host and not psutil.pid_exists(int(process)):
            logger.info("removing %s/%s, which a build that was cut off has left", folder.location, name)
            folder.delete(name)


@dataclass(frozen=True)
class WrittenRows:
    """How many rows of each task were asked for and written; an example of those that were not."""

    asked: Mapping[Task, int]
    rows: Mapping[Task, int]
    samples: DataFrame

    @property
    def written(self) -> int:
        return sum(self.rows.values())

    @property
    def misfits(self) -> dict[Task, int]:
        """Rows whose impressions do not fit the feature spec."""
        return {task: asked - self.rows[task] for task, asked in self.asked.items()}

    def nothing_fits(self, spec: FeatureSpec, negative_rate: float) -> DataError:
        """Why no row was written at all."""
        if not any(self.asked.values()):
            return DataError(
                f"all rows are negatives, and sampling at rate {negative_rate:g} has kept none.",
                hint="choose a longer --window or a higher --negative-rate",
            )
        first = with_features_from_json(self.samples.select("features").limit(1).toArrow(), "features")
        reason = find_misfits(first, spec).get(0, "no reason")
        return DataError(
            f"no impression of the window fits the feature spec: {reason}",
            hint="make such features categorical in the spec, or mend the producer",
        )


class RowWriter:
    """Encodes joined impressions and writes rows by task, partition and slice."""

    def __init__(self, spark: SparkSession, place: Workplace, window: SampleWindow) -> None:
        self.spark, self.place, self.window = spark, place, window

    def write(self, samples: DataFrame, encoding: SampleEncoding) -> WrittenRows:
        """Write ``task=../date=../[hour=../]slice=../*.parquet``, each file in order of time."""
        from pyspark.sql import Observation
        from pyspark.sql import functions as F

        tasks = self.window.tasks
        asked, written = Observation("asked"), Observation("written")
        opened = [F.count(f"{task}_opened").alias(task) for task in tasks]
        encode = partial(sample_rows, encoding=encoding)
        # A row is asked for once, and counted once however many copies are written of it.
        once = is_first_copy()
        rows = samples.observe(asked, *opened).mapInArrow(encode, ddl(WRITTEN_SCHEMA))
        moment = F.timestamp_millis("event_time")
        placed = rows.select(
            "*", F.col("task").alias("of_task"), F.to_date(moment).alias("date"), F.hour(moment).alias("hour")
        ).withColumnRenamed("stored_in", "slice")
        keys = ["of_task", "date", *(["hour"] if self.window.grid.granularity == "hour" else []), "slice"]
        (
            placed.observe(
                written, *[F.count(F.when((F.col("task") == task) & once, 1)).alias(task) for task in tasks]
            )
            .drop(*({"hour"} - set(keys)))
            .sortWithinPartitions("event_time", "sample_id")
            .write.partitionBy(*keys)
            .options(**_FILE_OPTIONS)
            .parquet(self.place.data.location)
        )
        return WrittenRows(
            {task: int(asked.get[task]) for task in tasks},
            {task: int(written.get[task]) for task in tasks},
            samples,
        )


class Describer:
    """Reads back what was written: a digest of every file, sums of every partition."""

    def __init__(self, spark: SparkSession, place: Workplace, window: SampleWindow) -> None:
        self.spark, self.place, self.window = spark, place, window

    def partitions(self, folder: Folder) -> list[PartitionSummary]:
        """Summaries of the partitions that were written, by task and partition.

        Raises
        ------
        DataError
            If the rows read back are not those of the files.
        """
        own = f"data-{self.place.token}"
        files = digests(self.spark, self.place.data)
        if not files:
            return []
        sums = self._sums()
        if set(sums) != set(files):
            raise DataError(f"files that hold no rows: {', '.join(sorted(set(sums) ^ set(files)))}.")
        groups: dict[tuple[Task, int], list[str]] = {}
        for name, row in sums.items():
            key = row["of_task"], self.window.grid.index(int(row["oldest"]))
            groups.setdefault(key, []).append(name)
        _, origin = folder.location.rstrip("/").rsplit("/", 1)
        return [
            self._summary(
                task,
                index,
                origin,
                {
                    f"{own}/{name}": files[name].model_copy(update={"rows": sums[name]["rows"]})
                    for name in names
                },
                [sums[name] for name in names],
            )
            for (task, index), names in sorted((key, sorted(names)) for key, names in groups.items())
        ]

    def _summary(
        self, task: Task, index: int, origin: str, files: dict[str, SnapshotFile], sums: list[dict[str, Any]]
    ) -> PartitionSummary:
        whole = {name: sum(part[name] or 0 for part in sums) for name in _SUMS}
        end = self.window.grid.start(index + 1)
        return PartitionSummary(
            task=task,
            partition=self.window.grid.name(index),
            closed=end + closes_after(self.window.attribution, task) <= self.window.as_of,
            origin=origin,
            oldest=min(int(part["oldest"]) for part in sums),
            content_digest=content_digest([file.sha256 for _, file in sorted(files.items())]),
            files=files,
            **whole,
        )

    def _sums(self) -> dict[str, dict[str, Any]]:
        """Sums over the rows of each file, by name: a pass over a few narrow columns."""
        from pyspark.sql import functions as F

        width = self.window.grid.width
        label, weight = F.col("label").cast("double"), F.col("weight").cast("double")
        end = (F.floor(F.col("event_time") / width) + 1) * width
        once = is_first_copy()
        rows = self.spark.read.parquet(self.place.data.location)
        grouped = rows.groupBy("of_task", F.col("_metadata.file_path").alias("path")).agg(
            F.count(F.lit(1)).alias("rows"),
            F.count(F.when(F.col("mature"), 1)).alias("mature"),
            F.sum(F.when(once, label)).alias("positives"),
            F.sum(F.when(once & (F.col("outcome_known_at") < end), label)).alias("naive_positives"),
            F.sum(F.when(once & F.col("mature"), label)).alias("mature_positives"),
            F.sum(weight).alias("weight"),
            F.sum(weight * label).alias("positive_weight"),
            F.sum(F.when(F.col("mature"), weight)).alias("mature_weight"),
            F.sum(F.when(F.col("mature"), weight * label)).alias("mature_positive_weight"),
            F.min("event_time").alias("oldest"),
        )
        marker = f"/data-{self.place.token}/"
        return {row["path"].partition(marker)[2]: row.asDict() for row in grouped.collect()}


def is_first_copy() -> Column:
    """Whether a row is no further copy of another: their ids end in ``:TASK#1``, ``:TASK#2``, ..."""
    from pyspark.sql import functions as F

    return F.endswith(F.col("sample_id"), F.concat(F.lit(":"), F.col("task")))


_SUMS = (
    "rows",
    "mature",
    "positives",
    "naive_positives",
    "mature_positives",
    "weight",
    "positive_weight",
    "mature_weight",
    "mature_positive_weight",
)


def digests(spark: SparkSession, folder: Folder) -> dict[str, SnapshotFile]:
    """Size and SHA-256 of all Parquet files below a folder, by relative name; the executors read them."""
    from pyspark.sql import functions as F

    if not any(name.endswith(".parquet") for name in folder.files()):
        return {}
    found = (
        spark.read.format("binaryFile")
        .option("recursiveFileLookup", "true")
        .option("pathGlobFilter", "*.parquet")
        .load(folder.location)
        .select("path", "length", F.sha2("content", 256).alias("sha256"))
    )
    marker = "/" + folder.location.rstrip("/").rsplit("/", 1)[1] + "/"
    return {
        row["path"].partition(marker)[2]: SnapshotFile(bytes=row["length"], sha256=row["sha256"])
        for row in found.collect()
    }
