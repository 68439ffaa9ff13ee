"""``samples relabel``: a snapshot brought up to a later time, at the cost of its open partitions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.samples_build import build
from jobs.samples_kafka import spark_kafka_options
from jobs.snapshot_changes import as_messages
from jobs.topics import ensure_topics
from pipelines.config import Config, resolve_secret
from pipelines.config_sections import KafkaConfig
from pipelines.snapshot import read_manifest, split_location
from pipelines.storage import open_folder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["publish_changes", "relabel"]


def relabel(
    spark: SparkSession, lake: str | Path, base: str | Path, as_of: int, window: int | None = None
) -> str:
    """Bring a snapshot up to a later time.

    Partitions that were closed in the base, and that no event ingested since belongs to, are referred to.
    The others are built again, and new ones are added. The rows are those of `jobs.samples_build.build`
    with the base's feature spec.

    Parameters
    ----------
    spark : SparkSession
    lake : str or Path
        The lake that the base was built from.
    base : str or Path
        A snapshot.
    as_of : int
        ms since the epoch, not before the base's.
    window : int, optional
        ms; the base's by default.

    Returns
    -------
    str
        Folder of the new snapshot, beside the base.

    Raises
    ------
    DataError, ConfigError
        As `jobs.samples_build.build` does.
    """
    manifest = read_manifest(base, open_folder(base, spark))
    out, _ = split_location(base)
    config = Config.model_validate(manifest.config)
    return build(spark, lake, out, as_of, window or manifest.window, config, base=base)


def publish_changes(spark: SparkSession, snapshot: str, kafka: KafkaConfig) -> int:
    """Send the label changes of a snapshot to Kafka; returns how many.

    Sent again they say the same: a reader drops what it has seen by ``sample_id`` and ``label_version``.

    Raises
    ------
    TransientError
        If no broker answers.
    SetupError
        If the topic has another number of partitions than ``kafka.partitions``.
    """
    manifest = read_manifest(snapshot, open_folder(snapshot, spark))
    # One row a change, however its label has moved in between.
    files = [f"{snapshot}/{name}" for name in manifest.extra_files if name.startswith("diff-")]
    if not files:
        return 0
    options = {key: resolve_secret(value) for key, value in kafka.options.items()}
    ensure_topics(kafka.bootstrap_servers, {kafka.topics.labels: kafka.partitions}, options)
    changes = spark.read.parquet(*files)
    (
        as_messages(changes)
        .write.format("kafka")
        .option("kafka.bootstrap.servers", kafka.bootstrap_servers)
        .option("topic", kafka.topics.labels)
        .options(**spark_kafka_options(kafka.options))
        .save()
    )
    return changes.count()
