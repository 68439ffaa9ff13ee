"""The lake: all events ever ingested, in Parquet by kind, date and hour; only committed batches count.

::

    LAKE/
        events/batch=ID/
            attempt=HEX/kind=.../event_date=.../event_hour=.../*.parquet
            _PLAN.json               which event files a run is about to take in
            _MANIFEST.json           written last, by the first run to get there: the commit
        checkpoints/kafka/           how far the topics have been read

A batch is what one run over event files took in, or one micro-batch from Kafka. It is never changed or
added to: events that come late lie in older dates and hours of a batch of their own. The manifest names the
attempt that counts, so that what a killed run left, or a second one wrote at the same time, is not seen.
See docs/samples.md. `pipelines.lake_write` writes batches, `read_lake` reads their union.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipelines.errors import DataError
from pipelines.lake_rows import DEAD_LETTER_KIND, LAKE_SCHEMA
from pipelines.storage import Folder, open_folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = [
    "BATCH_MANIFEST",
    "PARTITION_COLUMNS",
    "IngestedFile",
    "KindTimes",
    "LakeBatch",
    "LakePartition",
    "OffsetRange",
    "VoidBatch",
    "batch_folder",
    "batches_version",
    "checkpoint_folder",
    "committed_batches",
    "ddl",
    "events_folder",
    "lake_batches",
    "lake_version",
    "read_batch_manifest",
    "read_lake",
    "with_partitions",
]

PARTITION_COLUMNS = ("kind", "event_date", "event_hour")
BATCH_MANIFEST = "_MANIFEST.json"
# Where a dead letter has no time at all (a line of a file).
UNKNOWN_DATE = "unknown"
_BATCH_PREFIX = "batch="
# Manifests read at once: on an object store each costs a round trip of tens of milliseconds.
_READERS = 16

_SQL_TYPES = {
    pa.string(): "string",
    pa.bool_(): "boolean",
    pa.int8(): "tinyint",
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.float64(): "double",
    pa.list_(pa.int32()): "array<int>",
    pa.list_(pa.int64()): "array<bigint>",
    pa.list_(pa.float32()): "array<float>",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IngestedFile(_Part):
    """An event file that is in the lake, by content: a renamed copy is the same file."""

    kind: str
    name: str
    bytes: int
    sha256: str


class OffsetRange(_Part):
    """Messages of a topic's partition: offsets in ``[start, stop)``."""

    topic: str
    partition: int
    start: int
    stop: int

    @property
    def messages(self) -> int:
        """How many there are."""
        return self.stop - self.start


class KindTimes(_Part):
    """First and last time of a kind's rows, ms since the epoch; None where no row has one."""

    event_time: tuple[int, int] | None
    arrival_time: tuple[int, int] | None


class LakePartition(_Part):
    """Rows of one kind and one hour of event time."""

    kind: str
    event_date: str
    event_hour: int
    rows: int


class LakeBatch(_Part):
    """Manifest of a committed batch.

    Attributes
    ----------
    batch : str
        Its id: of event files by their content, of Kafka by the query's id and the micro-batch's number.
    source : "files" or "kafka"
    attempt : str
        The run whose rows count.
    rows : dict of str to int
        Rows by kind (``dead_letter`` among them), as stored: repeated events are in them.
    times : dict of str to KindTimes
        By kind, for kinds with rows.
    partitions : tuple of LakePartition
        What the batch touches, ordered.
    files : tuple of IngestedFile
    offsets : tuple of OffsetRange
        What it took in, ordered.
    """

    batch: str
    source: Literal["files", "kafka"]
    attempt: str
    rows: dict[str, int]
    times: dict[str, KindTimes]
    partitions: tuple[LakePartition, ...]
    files: tuple[IngestedFile, ...] = ()
    offsets: tuple[OffsetRange, ...] = ()

    @property
    def total_rows(self) -> int:
        """Rows of all kinds."""
        return sum(self.rows.values())

    @property
    def messages(self) -> int:
        """Messages of Kafka that it was made from."""
        return sum(part.messages for part in self.offsets)


class VoidBatch(_Part):
    """Manifest of a batch that never will be: another run has committed some of its files first."""

    batch: str
    overtaken_by: str


_MANIFEST: TypeAdapter[LakeBatch | VoidBatch] = TypeAdapter(LakeBatch | VoidBatch)


def events_folder(lake: Folder) -> Folder:
    """Folder of the batches."""
    return lake.child("events")


def batch_folder(lake: Folder, batch: str) -> Folder:
    """Folder of one batch."""
    return events_folder(lake).child(f"{_BATCH_PREFIX}{batch}")


def checkpoint_folder(lake: Folder) -> Folder:
    """Folder of the streaming ingest's checkpoint."""
    return lake.child("checkpoints", "kafka")


def ddl(schema: pa.Schema) -> str:
    """The Arrow schema in Spark's words.

    Examples
    --------
    >>> ddl(pa.schema([("label", pa.int8()), ("buckets", pa.list_(pa.int32()))]))
    '`label` tinyint, `buckets` array<int>'
    """
    return ", ".join(f"`{field.name}` {_SQL_TYPES[field.type]}" for field in schema)


def with_partitions(rows: DataFrame) -> DataFrame:
    """Add ``event_date`` (``yyyy-MM-dd``) and ``event_hour`` (UTC).

    A dead letter goes by the date of its arrival, all hours together: there should be few.
    """
    from pyspark.sql import functions as F

    moment = F.timestamp_millis(F.coalesce("event_time", "arrival_time"))
    hour = F.when(F.col("kind") == DEAD_LETTER_KIND, 0).otherwise(F.hour(moment))
    return rows.withColumn(
        "event_date", F.coalesce(F.date_format(moment, "yyyy-MM-dd"), F.lit(UNKNOWN_DATE))
    ).withColumn("event_hour", hour)


def read_batch_manifest(lake: Folder, batch: str) -> LakeBatch | VoidBatch | None:
    """What became of a batch; None where nothing has been decided yet.

    Raises
    ------
    DataError
        If the manifest cannot be read.
    """
    folder = batch_folder(lake, batch)
    try:
        return _MANIFEST.validate_json(folder.read(BATCH_MANIFEST))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(
            f"{folder.location}/{BATCH_MANIFEST} is not a batch manifest: {error.errors()[0]['msg']}."
        ) from error


def batch_names(lake: Folder) -> list[str]:
    """Ids of all batches that have been begun, ordered.

    Raises
    ------
    DataError
        If the lake is of the layout that Spark's file sink wrote.
    """
    names = events_folder(lake).names()
    if "kafka" in names or "files" in names:
        raise DataError(
            f"expected batches in {events_folder(lake).location}. The lake has the former layout "
            "(events/kafka, events/files), which this version neither reads nor adds to.",
            hint="ingest the topics or event files into a new --lake",
        )
    return [name.removeprefix(_BATCH_PREFIX) for name in names if name.startswith(_BATCH_PREFIX)]


def committed_batches(lake: Folder) -> list[LakeBatch]:
    """The batches that are in a lake, ordered by id; none where nothing has been ingested.

    Parameters
    ----------
    lake : Folder
        The lake itself, as `pipelines.storage.open_folder` opens it.

    Raises
    ------
    DataError
        If a manifest cannot be read, or the lake is of the former layout.
    """
    names = batch_names(lake)
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: read_batch_manifest(lake, name), names)
        return [batch for batch in found if isinstance(batch, LakeBatch)]


def lake_batches(lake: str | Path, spark: SparkSession | None = None) -> list[LakeBatch]:
    """`committed_batches` of a location. Without Spark, a URI is read by Arrow."""
    return committed_batches(open_folder(lake, spark))


def batches_version(batches: Iterable[LakeBatch]) -> str:
    """Digest of a set of batches, 16 hex digits.

    Examples
    --------
    >>> batches_version([])
    '4f53cda18c2baa0c'
    """
    names = sorted(batch.batch for batch in batches)
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def lake_version(lake: str | Path, spark: SparkSession | None = None) -> str:
    """Digest of what is committed: it changes with every ingest that added something."""
    return batches_version(lake_batches(lake, spark))


def read_lake(spark: SparkSession, lake: str | Path, *, batches: Collection[str] | None = None) -> DataFrame:
    """Rows of the committed batches: columns of `LAKE_SCHEMA`, ``event_date`` and ``event_hour``.

    Parameters
    ----------
    spark : SparkSession
    lake : str or Path
        Path or URI.
    batches : collection of str, optional
        Ids of the batches to read, such as those that came in since another snapshot; by default all.

    Raises
    ------
    DataError
        If nothing has been ingested yet, or a batch asked for is not in the lake.
    """
    from pyspark.sql import functions as F

    folder = open_folder(lake, spark)
    found = {batch.batch: batch for batch in committed_batches(folder)}
    if not found:
        raise DataError(
            f"expected a lake with ingested events in {lake}. Found none.",
            hint=f"ctrstream samples ingest --lake {lake} --bootstrap-servers HOST:PORT (or --events DIR)",
        )
    missing = sorted(set(batches or ()) - set(found))
    if missing:
        raise DataError(f"expected the batch {missing[0]} in the lake {lake}. Found {len(found)} others.")
    schema = f"{ddl(LAKE_SCHEMA)}, `event_date` string, `event_hour` int"
    chosen = found.values() if batches is None else [found[name] for name in sorted(set(batches))]
    # A batch without rows may have no folder: object stores have none that are empty.
    places = [attempt_folder(folder, batch.batch, batch.attempt) for batch in chosen if batch.total_rows]
    if not places:
        return spark.createDataFrame([], schema)
    reader = spark.read.schema(f"{schema}, `batch` string, `attempt` string")
    rows = reader.option("basePath", events_folder(folder).location).parquet(
        *[place.location for place in places]
    )
    return rows.select(*[F.col(name) for name in (*LAKE_SCHEMA.names, "event_date", "event_hour")])


def attempt_folder(lake: Folder, batch: str, attempt: str) -> Folder:
    """Folder of the rows that one attempt at a batch wrote."""
    return batch_folder(lake, batch).child(f"attempt={attempt}")
