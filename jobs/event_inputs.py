"""The event files that a Spark job is to read, on any file system: which there are, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import DataError
from pipelines.event_files import MALFORMED_FILE
from pipelines.events import KINDS, TOPICS
from pipelines.lake import IngestedFile
from pipelines.storage import Folder, LocalFolder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["MALFORMED", "EventInput", "by_schema", "describe_files", "file_sizes", "find_inputs"]

MALFORMED = "malformed"
# Files hashed at once: reading is what takes the time, and hashing runs outside Python's lock.
_READERS = 8


@dataclass(frozen=True)
class EventInput:
    """An event file: where it is, and what it is."""

    location: str
    file: IngestedFile

    @property
    def is_parquet(self) -> bool:
        return self.file.name.endswith(".parquet")


def find_inputs(spark: SparkSession, events: Folder) -> list[EventInput]:
    """The files of a log with their digests, by the rules of `pipelines.event_files`.

    Raises
    ------
    DataError
        If the folder has no impressions, or a file cannot be read.
    """
    sizes = file_sizes(events)
    found = [
        (name, kind)
        for kind, topic in zip(KINDS, TOPICS, strict=True)
        for name in sizes
        if name.startswith(topic) and name.endswith((".jsonl", ".parquet"))
    ]
    if not any(kind == KINDS[0] for _, kind in found):
        raise DataError(
            f"expected impressions*.jsonl or impressions*.parquet in {events.location}. "
            f"The folder has: {', '.join(list(sizes)[:12]) or '(nothing)'}.",
            hint="`ctrstream simulate --out DIR` writes an example",
        )
    found += [(name, MALFORMED) for name in sizes if name == MALFORMED_FILE]
    return describe_files(spark, events, sizes, found)


def file_sizes(events: Folder) -> dict[str, int]:
    """Files right in a folder by name, with their sizes in bytes.

    Raises
    ------
    DataError
        If the folder cannot be read.
    """
    try:
        return {name: size for name, size in events.files().items() if "/" not in name}
    except OSError as error:
        raise DataError(f"cannot read the event folder {events.location}: {error.strerror}.") from error


def describe_files(
    spark: SparkSession, events: Folder, sizes: Mapping[str, int], found: Sequence[tuple[str, str]]
) -> list[EventInput]:
    """Files of a folder with their digests.

    Parameters
    ----------
    spark : SparkSession
    events : Folder
    sizes : mapping of str to int
        See `file_sizes`.
    found : sequence of (str, str)
        Name and kind of each file.

    Raises
    ------
    DataError
        If a file cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        digests = pool.map(lambda item: _sha256(spark, events, item[0]), found)
        return [
            EventInput(
                f"{events.location.rstrip('/')}/{name}",
                IngestedFile(kind=kind, name=name, bytes=sizes[name], sha256=digest),
            )
            for (name, kind), digest in zip(found, digests, strict=True)
        ]


def by_schema(spark: SparkSession, inputs: Iterable[EventInput]) -> list[list[EventInput]]:
    """Parquet files in groups that have the same columns; read from their footers by the driver.

    Raises
    ------
    DataError
        If a file is not Parquet.
    """
    groups: dict[str, list[EventInput]] = {}
    for item in inputs:
        groups.setdefault(_schema(spark, item), []).append(item)
    return list(groups.values())


def _sha256(spark: SparkSession, events: Folder, name: str) -> str:
    if isinstance(events, LocalFolder):
        try:
            with (events.path / name).open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {events.location}/{name}: {error.strerror}.") from error
    # In Java, since bytes on their way into Python would be slow.
    jvm, path = _hadoop_path(spark, f"{events.location.rstrip('/')}/{name}")
    stream = path.getFileSystem(_configuration(spark)).open(path)
    try:
        return str(jvm.org.apache.commons.codec.digest.DigestUtils.sha256Hex(stream))
    finally:
        stream.close()


def _schema(spark: SparkSession, item: EventInput) -> str:
    from py4j.protocol import Py4JJavaError

    jvm, path = _hadoop_path(spark, item.location)
    parquet = jvm.org.apache.parquet.hadoop
    try:
        reader = parquet.ParquetFileReader.open(
            parquet.util.HadoopInputFile.fromPath(path, _configuration(spark))
        )
    except Py4JJavaError as error:
        what = str(error.java_exception.getMessage()).splitlines()[0]
        raise DataError(f"cannot read {item.location}: {what}.") from error
    try:
        return str(reader.getFileMetaData().getSchema().toString())
    finally:
        reader.close()


def _hadoop_path(spark: SparkSession, location: str) -> tuple[Any, Any]:
    jvm: Any = spark.sparkContext._jvm
    return jvm, jvm.org.apache.hadoop.fs.Path(location)


def _configuration(spark: SparkSession) -> Any:
    return spark.sparkContext._jsc.hadoopConfiguration()
