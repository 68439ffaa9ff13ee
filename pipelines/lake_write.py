"""Adding a batch to the lake: whole or not at all, once, whoever else tries at the same time.

1. Event files only: say in ``_PLAN.json`` which files the batch takes in.
2. Write the rows into an attempt of their own.
3. Event files only: look for other batches with some of the same files. One that is committed has overtaken
   this one. One that is not is voided: its manifest is made, and says so.
4. Make the manifest, if there is none: the commit.

Of two batches that share a file, at most one is committed: each has written its plan before it looks for
others, so that at least one of them sees the other, and between a commit and a voiding the first one wins.
A plan that a killed run has left is voided in the same way; nobody has to wait for it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pipelines.errors import CtrstreamError, TransientError
from pipelines.lake import (
    BATCH_MANIFEST,
    PARTITION_COLUMNS,
    IngestedFile,
    KindTimes,
    LakeBatch,
    LakePartition,
    OffsetRange,
    VoidBatch,
    attempt_folder,
    batch_folder,
    batch_names,
    ddl,
    read_batch_manifest,
    with_partitions,
)
from pipelines.lake_rows import ALL_KINDS, LAKE_SCHEMA
from pipelines.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["OvertakenError", "add_file_batch", "add_kafka_batch"]

logger = logging.getLogger(__name__)

BATCH_PLAN = "_PLAN.json"


class OvertakenError(CtrstreamError):
    """Another run has committed some of the same files first."""


class BatchPlan(BaseModel):
    """The event files that a batch means to take in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[IngestedFile, ...]

    def shares(self, other: Collection[IngestedFile]) -> bool:
        """Whether both have a file in common, by kind and content."""
        return not {(file.kind, file.sha256) for file in self.files}.isdisjoint(
            (file.kind, file.sha256) for file in other
        )


def add_file_batch(
    lake: Folder, batch: str, files: Sequence[IngestedFile], rows: DataFrame
) -> tuple[LakeBatch, bool]:
    """Add the rows of event files.

    Parameters
    ----------
    lake : Folder
    batch : str
        Id, the same for the same files.
    files : sequence of IngestedFile
    rows : DataFrame
        Columns of `LAKE_SCHEMA`.

    Returns
    -------
    batch : LakeBatch
        As it is in the lake.
    added : bool
        False if another run committed this very batch first; nothing of this one's is left then.

    Raises
    ------
    OvertakenError
        If another run has committed some of these files in a batch of other files.
    """
    plan = BatchPlan(files=tuple(files))
    batch_folder(lake, batch).write(BATCH_PLAN, plan.model_dump_json(indent=2).encode())
    return _Attempt(lake, batch, plan).add(rows, {"source": "files", "files": plan.files})


def add_kafka_batch(
    lake: Folder, batch: str, offsets: Sequence[OffsetRange], rows: DataFrame
) -> tuple[LakeBatch, bool]:
    """Add the rows of a micro-batch from Kafka; parameters and result as those of `add_file_batch`.

    One that is in the lake already, because a run was killed before Spark's checkpoint had it, is not
    written again.
    """
    return _Attempt(lake, batch).add(rows, {"source": "kafka", "offsets": tuple(offsets)})


@dataclass(frozen=True)
class _Attempt:
    """One run's try at a batch."""

    lake: Folder
    batch: str
    plan: BatchPlan | None = None

    @property
    def _folder(self) -> Folder:
        return batch_folder(self.lake, self.batch)

    def add(self, rows: DataFrame, inputs: dict[str, Any]) -> tuple[LakeBatch, bool]:
        decided = self._decided()
        if decided is not None:
            return decided, False
        attempt = secrets.token_hex(8)
        data = attempt_folder(self.lake, self.batch, attempt)
        try:
            batch = LakeBatch(batch=self.batch, attempt=attempt, **inputs, **_written(rows, data))
            if self.plan is not None:
                self._void_rivals(self.plan)
            added = self._folder.create(BATCH_MANIFEST, _json(batch))
        except BaseException as error:
            _discard(data)
            # The winner clears away what others wrote, which can be what has just failed.
            decided = self._decided() if isinstance(error, Exception) else None
            if decided is None:
                raise
            return decided, False
        if added:
            self._clear_up(attempt)
            return batch, True
        _discard(data)
        decided = self._decided()
        if decided is None:
            raise TransientError(
                f"the manifest of the batch {self.batch} was there and is gone.",
                hint="does something else delete files of the lake?",
            )
        return decided, False

    def _decided(self) -> LakeBatch | None:
        """The batch as another run committed it."""
        found = read_batch_manifest(self.lake, self.batch)
        if isinstance(found, VoidBatch):
            raise OvertakenError(
                f"the batch {self.batch} was overtaken by {found.overtaken_by}, which has some of its files."
            )
        return found

    def _void_rivals(self, plan: BatchPlan) -> None:
        for name in batch_names(self.lake):
            if name == self.batch:
                continue
            found = read_batch_manifest(self.lake, name)
            if found is None:
                found = self._void(name, plan)
            if isinstance(found, LakeBatch) and plan.shares(found.files):
                self._folder.create(BATCH_MANIFEST, _json(VoidBatch(batch=self.batch, overtaken_by=name)))
                raise OvertakenError(
                    f"the batch {self.batch} was overtaken by {name}, which has some of its files."
                )

    def _void(self, name: str, plan: BatchPlan) -> LakeBatch | VoidBatch | None:
        """Void a batch that is not committed, if it means to take in some of our files."""
        rival = batch_folder(self.lake, name)
        try:
            other = BatchPlan.model_validate_json(rival.read(BATCH_PLAN))
        except FileNotFoundError:
            return None  # of Kafka
        if not plan.shares(other.files):
            return None
        if not rival.create(BATCH_MANIFEST, _json(VoidBatch(batch=name, overtaken_by=self.batch))):
            return read_batch_manifest(self.lake, name)
        logger.info("voided the batch %s, begun and not committed by another run", name)
        for child in rival.names():
            if child not in (BATCH_MANIFEST, BATCH_PLAN):
                rival.delete(child)
        return None

    def _clear_up(self, attempt: str) -> None:
        """Remove what killed or slower runs wrote at the same batch."""
        for child in self._folder.names():
            if child not in (BATCH_MANIFEST, BATCH_PLAN, f"attempt={attempt}"):
                self._folder.delete(child)


def _written(rows: DataFrame, data: Folder) -> dict[str, Any]:
    """Write rows, read back what is stored, and describe it.

    Counts that the write itself takes (Spark's observations) are too high after an executor was lost and its
    tasks were run again. Two columns of what has just been written are cheap to read.
    """
    from pyspark.sql import functions as F

    # One file for each kind and hour, or several of a good size where an hour holds more than that.
    spread = with_partitions(rows).hint("rebalance", *[F.col(name) for name in PARTITION_COLUMNS])
    spread.write.partitionBy(*PARTITION_COLUMNS).parquet(data.location)
    parts = _parts(rows.sparkSession, data)
    times = {}
    for kind in ALL_KINDS:
        own = [part for part in parts if part["kind"] == kind]
        if own:
            times[kind] = KindTimes(
                event_time=_range(own, "event_time"), arrival_time=_range(own, "arrival_time")
            )
    return {
        "rows": {kind: sum(part["rows"] for part in parts if part["kind"] == kind) for kind in ALL_KINDS},
        "times": times,
        "partitions": tuple(
            LakePartition(**{name: part[name] for name in (*PARTITION_COLUMNS, "rows")}) for part in parts
        ),
    }


def _parts(spark: SparkSession, data: Folder) -> list[dict[str, Any]]:
    """Rows and range of times of each kind and hour, ordered."""
    from pyspark.sql import functions as F

    if not data.files():
        return []
    stored = spark.read.schema(f"{ddl(LAKE_SCHEMA)}, `event_date` string, `event_hour` int").parquet(
        data.location
    )
    found = stored.groupBy(*PARTITION_COLUMNS).agg(
        F.count("*").alias("rows"),
        *[
            summary(name).alias(f"{name}_{summary.__name__}")
            for name in ("event_time", "arrival_time")
            for summary in (F.min, F.max)
        ],
    )
    return sorted(
        (row.asDict() for row in found.collect()), key=lambda part: [part[name] for name in PARTITION_COLUMNS]
    )


def _range(parts: Sequence[dict[str, Any]], name: str) -> tuple[int, int] | None:
    filled = [part for part in parts if part[f"{name}_min"] is not None]
    if not filled:
        return None
    return min(part[f"{name}_min"] for part in filled), max(part[f"{name}_max"] for part in filled)


def _discard(data: Folder) -> None:
    try:
        data.delete()
    except Exception as error:  # the file system may be what has failed
        logger.warning("%s could not be removed and is of no use: %s", data.location, error)


def _json(manifest: BaseModel) -> bytes:
    return (manifest.model_dump_json(indent=2) + "\n").encode()
