"""Event files into the lake: a batch job, once for each file by its content.

Spark's file streams would need a schema of the features before they are read, and remember files by path.
A manifest with the content of each file needs neither, and tells a copy from a new file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from jobs.event_inputs import MALFORMED, EventInput, by_schema, find_inputs
from pipelines.errors import DataError, TransientError
from pipelines.events import KINDS
from pipelines.lake import LakeBatch, VoidBatch, committed_batches, ddl, read_batch_manifest
from pipelines.lake_rows import LAKE_SCHEMA, malformed_rows, parquet_rows, text_rows
from pipelines.lake_write import OvertakenError, add_file_batch
from pipelines.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["add_inputs", "ingest_files"]

# How often a run may find that others were quicker with some of its files. Each time it has fewer left.
_TURNS = 5


def ingest_files(
    spark: SparkSession, lake: Folder, events: Folder
) -> tuple[Counter[str], list[str], list[str]]:
    """Take in the files that are not in the lake yet; returns rows by kind, new files, known files.

    Raises
    ------
    DataError
        If the folder has no impressions, or a file's content has changed since it was taken in.
    TransientError
        If other runs keep taking in the same files.
    """
    return add_inputs(lake, events.location, find_inputs(spark, events), partial(_rows, spark))


def add_inputs(
    lake: Folder,
    where: str,
    inputs: Sequence[EventInput],
    rows: Callable[[Sequence[EventInput]], DataFrame],
    tables: Collection[str] = (),
) -> tuple[Counter[str], list[str], list[str]]:
    """Take in the files that are not in the lake yet, as one batch.

    Parameters
    ----------
    lake : Folder
    where : str
        Where the files are, for messages.
    inputs : sequence of EventInput
    rows : callable
        Rows of the lake from the files that are new.
    tables : collection of str
        Kinds of files that hold no events. Alone they make no batch, and they may change.

    Returns
    -------
    rows : Counter
        Rows added, by kind.
    new, known : list of str
        Names of files.

    Raises
    ------
    DataError
        If a file's content has changed since it was taken in.
    TransientError
        If other runs keep taking in the same files.
    """
    for _ in range(_TURNS):
        fresh, known = _fresh(inputs, committed_batches(lake), tables)
        if all(item.file.kind in tables for item in fresh):
            return Counter(), [], known
        files = [item.file for item in fresh]
        try:
            batch, added = add_file_batch(lake, _batch_id(lake, fresh), files, rows(fresh))
        except OvertakenError:
            continue
        names = [file.name for file in files]
        if not added:
            return Counter(), [], sorted([*known, *names])
        return Counter(batch.rows), names, known
    raise TransientError(
        f"other runs took in files of {where} {_TURNS} times before this one could.",
        hint="let one run at a time ingest a folder",
    )


def _fresh(
    found: Sequence[EventInput], batches: Sequence[LakeBatch], tables: Collection[str]
) -> tuple[list[EventInput], list[str]]:
    """Split files into new ones and names of known ones."""
    taken = {(file.kind, file.sha256) for batch in batches for file in batch.files}
    names = {(file.kind, file.name): file for batch in batches for file in batch.files}
    fresh: list[EventInput] = []
    known: list[str] = []
    for item in found:
        file = item.file
        if (file.kind, file.sha256) in taken:
            known.append(file.name)
            continue
        before = names.get((file.kind, file.name))
        if before is not None and file.kind not in tables:
            raise DataError(
                f"{item.location} was ingested with other content (sha256 {before.sha256[:12]}…, now "
                f"{file.sha256[:12]}…): part of it would be in the lake twice.",
                hint="put new events into new files, as in impressions-2.jsonl",
            )
        taken.add((file.kind, file.sha256))
        fresh.append(item)
    return fresh, known


def _batch_id(lake: Folder, fresh: Sequence[EventInput]) -> str:
    """A name that follows from the content; another one where that batch has been voided."""
    content: list[Any] = sorted((item.file.kind, item.file.sha256) for item in fresh)
    for turn in count():
        body = json.dumps([*content, turn] if turn else content)
        name = f"files-{hashlib.sha256(body.encode()).hexdigest()[:16]}"
        if not isinstance(read_batch_manifest(lake, name), VoidBatch):
            return name
    raise AssertionError  # count() has no end


def _rows(spark: SparkSession, inputs: Sequence[EventInput]) -> DataFrame:
    frames = []
    for kind, name in enumerate(KINDS):
        own = [item for item in inputs if item.file.kind == name]
        texts = [item for item in own if not item.is_parquet]
        if texts:
            frames.append(_text_frame(spark, texts, partial(text_rows, kind=kind)))
        groups = by_schema(spark, [item for item in own if item.is_parquet])
        frames.extend(_parquet_frame(spark, kind, group) for group in groups)
    malformed = [item for item in inputs if item.file.kind == MALFORMED]
    if malformed:
        frames.append(_text_frame(spark, malformed, malformed_rows))
    rows = frames[0]
    for frame in frames[1:]:
        rows = rows.union(frame)
    return rows


def _text_frame(spark: SparkSession, inputs: Sequence[EventInput], read: Callable[..., Any]) -> DataFrame:
    lines = spark.read.text([item.location for item in inputs]).selectExpr(
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


def _parquet_frame(spark: SparkSession, kind: int, inputs: Sequence[EventInput]) -> DataFrame:
    rows = spark.read.parquet(*[item.location for item in inputs]).selectExpr(
        "*", "_metadata.file_name AS _source", "_metadata.row_index AS _offset"
    )
    return rows.mapInArrow(partial(parquet_rows, kind=kind), ddl(LAKE_SCHEMA))
