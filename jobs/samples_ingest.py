"""``samples ingest``: Kafka topics or event files into the lake, each offset and each event file once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import Config
from pipelines.events import KINDS
from pipelines.lake import batches_version, committed_batches
from pipelines.lake_rows import DEAD_LETTER_KIND
from pipelines.spark_session import worker_errors
from pipelines.storage import Folder, open_folder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.adapters import Adapter

__all__ = ["IngestReport", "ingest"]


@dataclass(frozen=True)
class IngestReport:
    """What one run added to the lake.

    Attributes
    ----------
    rows : dict of str to int
        Rows by kind, duplicates included: they are dropped when samples are built.
    dead_letters : int
        Rows that could not be used; they are in the lake with reason and position.
    messages : int
        Kafka messages added (a packed message holds many rows), by their offsets.
    files, files_known : list of str
        Event files taken in by this run; those that were in the lake already.
    lake_version : str
        `pipelines.lake.lake_version` afterwards.
    """

    rows: dict[str, int]
    dead_letters: int
    messages: int = 0
    files: list[str] = field(default_factory=list)
    files_known: list[str] = field(default_factory=list)
    lake_version: str = ""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def ingest(
    spark: SparkSession,
    lake: str | Path,
    config: Config,
    *,
    bootstrap_servers: str | None = None,
    events: str | Path | None = None,
    adapter: Adapter | None = None,
    every: int | None = None,
) -> IngestReport:
    """Add new events to the lake.

    Parameters
    ----------
    spark : SparkSession
        For Kafka, with its connector jars.
    lake : str or Path
        Path or URI.
    config : Config
        Topics and options of Kafka.
    bootstrap_servers : str, optional
        Kafka to read; by default the configured one. Not with ``events``.
    events : str or Path, optional
        Folder (path or URI) with ``impressions*``, ``clicks*`` and ``conversions*`` files (.jsonl, .parquet).
    adapter : Adapter, optional
        Format of the files in ``events``, if they are not event files (docs/formats.md).
    every : int, optional
        Kafka only: go on until interrupted, with a batch every so many ms, instead of ending with what is
        there now.

    Raises
    ------
    DataError
        If the folder has no event files, a file's content changed since it was ingested, a topic is
        missing, the broker no longer holds the next offsets, or the lake has the former layout.
    TransientError
        If no broker answers, or other runs keep taking in the same files.
    """
    folder, messages = open_folder(lake, spark), 0
    files: list[str] = []
    known: list[str] = []
    if events is not None:
        counts, files, known = _ingest_folder(spark, folder, open_folder(events, spark), adapter)
    else:
        from jobs.samples_kafka import ingest_kafka

        kafka = config.kafka
        if bootstrap_servers is not None:
            kafka = kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
        counts, messages = ingest_kafka(spark, folder, kafka, every=every)
    return IngestReport(
        rows={kind: counts[kind] for kind in KINDS},
        dead_letters=counts[DEAD_LETTER_KIND],
        messages=messages,
        files=files,
        files_known=known,
        lake_version=batches_version(committed_batches(folder)),
    )


def _ingest_folder(
    spark: SparkSession, lake: Folder, events: Folder, adapter: Adapter | None
) -> tuple[Counter[str], list[str], list[str]]:
    """Rows added by kind, names of new and of known files."""
    with worker_errors():
        if adapter is None:
            from jobs.samples_files import ingest_files

            return ingest_files(spark, lake, events)
        from jobs.samples_formats import ingest_format

        return ingest_format(spark, lake, events, adapter)
