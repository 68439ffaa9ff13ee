"""Event files into the lake: a batch job, once for each file by its content.

Spark's file streams would need a schema of the features before they are read, and remember files by path.
A manifest with the content of each file needs neither, and tells a copy from a new file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipelines.errors import DataError
from pipelines.event_files import MALFORMED_FILE
from pipelines.events import KINDS, TOPICS
from pipelines.lake import (
    PARTITION_COLUMNS,
    FileBatch,
    IngestedFile,
    commit_batch,
    committed_batches,
    count_kinds,
    ddl,
    files_folder,
    with_partitions,
)
from pipelines.lake_rows import ALL_KINDS, LAKE_SCHEMA, malformed_rows, parquet_rows, text_rows

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["ingest_files"]

_MALFORMED = "malformed"


def ingest_files(spark: SparkSession, lake: Path, events: Path) -> tuple[Counter[str], list[str], list[str]]:
    """Take in the files that are not in the lake yet; returns rows by kind, new files, known files.

    1. Name the batch by the content of its files.
    2. Write its rows; what a killed run of the same batch left is overwritten.
    3. Write the batch's manifest: the commit.

    Raises
    ------
    DataError
        If the folder has no impressions, or a file's content has changed since it was taken in.
    """
    fresh, known = _fresh(_find_files(events), committed_batches(lake))
    if not fresh:
        return Counter(), [], known
    body = json.dumps(sorted((file.kind, file.sha256) for _, file in fresh))
    name = hashlib.sha256(body.encode()).hexdigest()[:16]
    folder = files_folder(lake) / f"batch={name}"
    try:
        counts = _write_batch(spark, fresh, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    rows = {kind: counts[kind] for kind in ALL_KINDS}
    commit_batch(folder, FileBatch(batch=name, files=tuple(file for _, file in fresh), rows=rows))
    return counts, [file.name for _, file in fresh], known


def _fresh(
    found: Sequence[tuple[Path, IngestedFile]], batches: Sequence[FileBatch]
) -> tuple[list[tuple[Path, IngestedFile]], list[str]]:
    """Split files into new ones and names of known ones."""
    taken = {(file.kind, file.sha256) for batch in batches for file in batch.files}
    names = {(file.kind, file.name): file for batch in batches for file in batch.files}
    fresh: list[tuple[Path, IngestedFile]] = []
    known: list[str] = []
    for path, file in found:
        if (file.kind, file.sha256) in taken:
            known.append(file.name)
            continue
        before = names.get((file.kind, file.name))
        if before is not None:
            raise DataError(
                f"{path} was ingested with other content (sha256 {before.sha256[:12]}…, now "
                f"{file.sha256[:12]}…): part of it would be in the lake twice.",
                hint="put new events into new files, as in impressions-2.jsonl",
            )
        taken.add((file.kind, file.sha256))
        fresh.append((path, file))
    return fresh, known


def _find_files(events: Path) -> list[tuple[Path, IngestedFile]]:
    """The files of a log, by the rules of `pipelines.event_files`."""
    try:
        entries = sorted(events.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the event folder {events}: {error.strerror}.") from error
    found = [
        (path, kind)
        for kind, topic in zip(KINDS, TOPICS, strict=True)
        for path in entries
        if path.name.startswith(topic) and path.suffix in (".jsonl", ".parquet") and path.is_file()
    ]
    if not any(kind == KINDS[0] for _, kind in found):
        names = ", ".join(path.name for path in entries[:12])
        raise DataError(
            f"expected impressions*.jsonl or impressions*.parquet in {events}. "
            f"The folder has: {names or '(nothing)'}.",
            hint="`ctrstream simulate --out DIR` writes an example",
        )
    found += [(path, _MALFORMED) for path in entries if path.name == MALFORMED_FILE]
    return [(path, _describe(path, kind)) for path, kind in found]


def _describe(path: Path, kind: str) -> IngestedFile:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return IngestedFile(kind=kind, name=path.name, bytes=path.stat().st_size, sha256=digest)


def _write_batch(
    spark: SparkSession, fresh: Sequence[tuple[Path, IngestedFile]], folder: Path
) -> Counter[str]:
    from pyspark.sql import Observation

    frames = []
    for kind, name in enumerate(KINDS):
        paths = [path for path, file in fresh if file.kind == name]
        texts = [path for path in paths if path.suffix == ".jsonl"]
        if texts:
            frames.append(_text_frame(spark, texts, partial(text_rows, kind=kind)))
        by_schema: dict[str, list[Path]] = {}
        for path in paths:
            if path.suffix == ".parquet":
                by_schema.setdefault(str(pq.read_schema(path).remove_metadata()), []).append(path)
        frames.extend(_parquet_frame(spark, kind, group) for group in by_schema.values())
    malformed = [path for path, file in fresh if file.kind == _MALFORMED]
    if malformed:
        frames.append(_text_frame(spark, malformed, malformed_rows))
    rows = frames[0]
    for frame in frames[1:]:
        rows = rows.union(frame)
    observation = Observation("ingested")
    # One file for each hour, however many tasks read the input.
    counted = with_partitions(rows).observe(observation, *count_kinds()).repartition(*PARTITION_COLUMNS)
    counted.write.mode("overwrite").partitionBy(*PARTITION_COLUMNS).parquet(str(folder))
    return Counter({kind: int(observation.get[kind]) for kind in ALL_KINDS})


def _text_frame(spark: SparkSession, paths: Sequence[Path], read: Callable[..., Any]) -> DataFrame:
    lines = spark.read.text([str(path) for path in paths]).selectExpr(
        "_metadata.file_name AS file", "_metadata.file_block_start AS block", "value"
    )
    # Spark splits large files. Counting the lines of each part first costs one cheap pass and gives every
    # line its number, which is its position in the lake and in dead letters.
    first_line: dict[tuple[str, int], int] = {}
    following: Counter[str] = Counter()
    for part in sorted(lines.groupBy("file", "block").count().collect()):
        first_line[part["file"], part["block"]] = following[part["file"]]
        following[part["file"]] += part["count"]
    return lines.mapInArrow(partial(read, first_line=first_line), ddl(LAKE_SCHEMA))


def _parquet_frame(spark: SparkSession, kind: int, paths: Sequence[Path]) -> DataFrame:
    rows = spark.read.parquet(*[str(path) for path in paths]).selectExpr(
        "*", "_metadata.file_name AS _source", "_metadata.row_index AS _offset"
    )
    return rows.mapInArrow(partial(parquet_rows, kind=kind), ddl(LAKE_SCHEMA))
