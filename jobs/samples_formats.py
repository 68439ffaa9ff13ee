"""Logs of published or mapped formats into the lake: a batch job, once for each file by its content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.event_inputs import EventInput, describe_files, file_sizes
from jobs.samples_files import add_inputs
from pipelines.adapters import Adapter, adapted_rows, log_files
from pipelines.errors import DataError
from pipelines.lake import committed_batches
from pipelines.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["ingest_format"]


def ingest_format(
    spark: SparkSession, lake: Folder, events: Folder, adapter: Adapter
) -> tuple[Counter[str], list[str], list[str]]:
    """Take in a log's files that are not in the lake yet; returns rows by kind, new files, known files.

    Raises
    ------
    DataError
        If the folder lacks the format's files, a file has not its columns, a file's content has changed
        since it was taken in, or it was taken in with other options.
    ConfigError
        If a mapping does not fit the files.
    TransientError
        If other runs keep taking in the same files.
    """
    sizes = file_sizes(events)
    found = log_files(adapter, list(sizes), events.location)
    inputs = describe_files(
        spark, events, sizes, [(name, adapter.kind(role)) for role, names in found.items() for name in names]
    )
    tables = [adapter.kind(role) for role in adapter.tables]
    _refuse_other_options(lake, adapter, [item for item in inputs if item.file.kind not in tables])

    def rows(fresh: Sequence[EventInput]) -> DataFrame:
        paths = {
            role: [
                item.location
                for item in (inputs if role in adapter.tables else fresh)
                if item.file.kind == adapter.kind(role)
            ]
            for role in found
        }
        new = {item.file.name for item in fresh}
        known = [item.file.name for item in inputs if item.file.kind in tables and item.file.name not in new]
        return adapted_rows(spark, adapter, paths, known)

    return add_inputs(lake, events.location, inputs, rows, tables)


def _refuse_other_options(lake: Folder, adapter: Adapter, logs: Sequence[EventInput]) -> None:
    """The same file read in another way would put its events into the lake twice."""
    taken = {file.sha256: file for batch in committed_batches(lake) for file in batch.files if file.bytes}
    for item in logs:
        before = taken.get(item.file.sha256)
        if before is not None and not before.kind.startswith(adapter.family):
            raise DataError(
                f"{item.location} was ingested as {before.kind}, and would be now as {item.file.kind}: its "
                "events would be in the lake twice.",
                hint="use the format and the options of the first time, or a new --lake",
            )
