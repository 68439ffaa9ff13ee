"""The lake: all events ever ingested, in Parquet by kind, date and hour; only committed files count.

::

    LAKE/
        events/kafka/                kind=.../event_date=.../event_hour=.../*.parquet
            _spark_metadata/         Spark's commit log of the streaming sink
        events/files/batch=ID/       the same, one folder for each run that found new event files
            _MANIFEST.json           written last: the commit
        checkpoints/kafka/           how far the topics have been read

Two folders, because Spark's commit log claims all of a folder: files that another job wrote beside the
stream's would be invisible. `read_lake` gives their union.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import DataError
from pipelines.lake_rows import ALL_KINDS, DEAD_LETTER_KIND, LAKE_SCHEMA

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = [
    "PARTITION_COLUMNS",
    "FileBatch",
    "IngestedFile",
    "checkpoint_folder",
    "commit_batch",
    "committed_batches",
    "count_kinds",
    "ddl",
    "files_folder",
    "kafka_folder",
    "lake_version",
    "read_lake",
    "with_partitions",
]

PARTITION_COLUMNS = ("kind", "event_date", "event_hour")
BATCH_MANIFEST = "_MANIFEST.json"
# Where a dead letter has no time at all (a line of a file).
UNKNOWN_DATE = "unknown"

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


class FileBatch(_Part):
    """What one run took in: files, and rows by kind (``dead_letter`` among them)."""

    batch: str
    files: tuple[IngestedFile, ...]
    rows: dict[str, int]


def kafka_folder(lake: Path) -> Path:
    """Folder that the streaming ingest writes and commits."""
    return lake / "events" / "kafka"


def files_folder(lake: Path) -> Path:
    """Folder of the batches of ingested event files."""
    return lake / "events" / "files"


def checkpoint_folder(lake: Path) -> Path:
    """Folder of the streaming ingest's checkpoint."""
    return lake / "checkpoints" / "kafka"


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


def count_kinds() -> list[Column]:
    """Aggregates for `DataFrame.observe`: rows by kind, counted by the write itself."""
    from pyspark.sql import functions as F

    return [F.count(F.when(F.col("kind") == kind, 1)).alias(kind) for kind in ALL_KINDS]


def commit_batch(folder: Path, batch: FileBatch) -> None:
    """Make a written batch of event files part of the lake."""
    scratch = folder / f".{BATCH_MANIFEST}.{os.getpid()}"
    with scratch.open("w", encoding="utf-8") as handle:
        handle.write(batch.model_dump_json(indent=2) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    scratch.rename(folder / BATCH_MANIFEST)


def committed_batches(lake: Path) -> list[FileBatch]:
    """The batches of event files in the lake, ordered by id.

    Raises
    ------
    DataError
        If a manifest cannot be read.
    """
    batches = []
    for path in sorted(files_folder(lake).glob(f"batch=*/{BATCH_MANIFEST}")):
        try:
            batches.append(FileBatch.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            raise DataError(f"{path} is not a batch manifest: {error.errors()[0]['msg']}.") from error
    return batches


def _committed_streams(lake: Path) -> list[str]:
    """Names of the stream's commits; one is written for each micro-batch, some of them compacted."""
    log = kafka_folder(lake) / "_spark_metadata"
    return sorted(path.name for path in log.glob("[0-9]*")) if log.is_dir() else []


def lake_version(lake: Path) -> str:
    """Digest of what is committed: it changes with every ingest that added something."""
    numbers = [int(name.split(".")[0]) for name in _committed_streams(lake)]
    state: dict[str, Any] = {
        "kafka": max(numbers, default=-1),
        "files": [batch.batch for batch in committed_batches(lake)],
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def read_lake(spark: SparkSession, lake: Path) -> DataFrame:
    """All committed rows: columns of `LAKE_SCHEMA`, ``event_date`` and ``event_hour``.

    Raises
    ------
    DataError
        If nothing has been ingested yet.
    """
    from pyspark.sql import functions as F

    columns = [*LAKE_SCHEMA.names, "event_date", "event_hour"]
    schema = f"{ddl(LAKE_SCHEMA)}, `event_date` string, `event_hour` int"
    frames = []
    if _committed_streams(lake):
        # Spark finds _spark_metadata and lists what the commits name, nothing else.
        frames.append(spark.read.schema(schema).parquet(str(kafka_folder(lake))))
    batches = [str(files_folder(lake) / f"batch={batch.batch}") for batch in committed_batches(lake)]
    if batches:
        reader = spark.read.schema(f"{schema}, `batch` string").option("basePath", str(files_folder(lake)))
        frames.append(reader.parquet(*batches))
    if not frames:
        raise DataError(
            f"expected a lake with ingested events in {lake}. Found none.",
            hint=f"ctrstream samples ingest --lake {lake} --bootstrap-servers HOST:PORT (or --events DIR)",
        )
    selected = [frame.select(*[F.col(name) for name in columns]) for frame in frames]
    return selected[0] if len(selected) == 1 else selected[0].unionByName(selected[1])
