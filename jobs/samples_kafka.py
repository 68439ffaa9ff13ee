"""Kafka topics into the lake: Structured Streaming, exactly once by Spark's own checkpoint and commit log."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import TYPE_CHECKING, Any

from jobs.topics import answers
from pipelines.config import resolve_secret
from pipelines.config_sections import KafkaConfig
from pipelines.errors import ConfigError, DataError, TransientError
from pipelines.events import TOPICS
from pipelines.lake import (
    PARTITION_COLUMNS,
    checkpoint_folder,
    count_kinds,
    ddl,
    kafka_folder,
    with_partitions,
)
from pipelines.lake_rows import ALL_KINDS, LAKE_SCHEMA, kafka_rows

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming.listener import StreamingQueryProgress

__all__ = ["ingest_kafka", "spark_kafka_options"]

_POLL_S = 1
# kafka-python's names of the options that Spark's Kafka client needs, too.
_KAFKA_OPTIONS = {
    "security_protocol": "kafka.security.protocol",
    "sasl_mechanism": "kafka.sasl.mechanism",
    "ssl_cafile": "kafka.ssl.truststore.location",
    "client_id": "kafka.client.id",
    "request_timeout_ms": "kafka.request.timeout.ms",
}
_SASL_MODULES = {
    "PLAIN": "org.apache.kafka.common.security.plain.PlainLoginModule",
    "SCRAM-SHA-256": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "SCRAM-SHA-512": "org.apache.kafka.common.security.scram.ScramLoginModule",
}


def ingest_kafka(
    spark: SparkSession, lake: Path, kafka: KafkaConfig, *, continuous: bool
) -> tuple[Counter[str], int]:
    """Add what the topics hold beyond the lake's checkpoint; returns rows by kind and messages read.

    Raises
    ------
    TransientError
        If no broker answers.
    DataError
        If a topic is missing, or the broker no longer holds the next offsets.
    """
    from pyspark.errors import StreamingQueryException

    if not answers(kafka.bootstrap_servers, {key: resolve_secret(v) for key, v in kafka.options.items()}):
        raise TransientError(
            f"no Kafka broker answers at {kafka.bootstrap_servers}.",
            hint="start one with `ctrstream broker up`, or name another with --bootstrap-servers",
        )
    writer = (
        _kafka_stream(spark, kafka)
        .writeStream.format("parquet")
        .option("path", str(kafka_folder(lake)))
        .option("checkpointLocation", str(checkpoint_folder(lake)))
        .partitionBy(*PARTITION_COLUMNS)
        .queryName("samples ingest")
    )
    # Once a minute when continuous: more often would litter the lake with small files.
    writer = writer.trigger(processingTime="1 minute") if continuous else writer.trigger(availableNow=True)
    query, totals = writer.start(), _Totals()
    try:
        with _interrupts() as interrupted:
            while not query.awaitTermination(_POLL_S) and not interrupted.is_set():
                totals.add(query.lastProgress)
    except StreamingQueryException as error:
        raise _explained(error, kafka) from error
    finally:
        query.stop()
    for progress in query.recentProgress:
        totals.add(progress)
    return totals.rows, totals.messages


class _Totals:
    """Sums over the batches of a query, each once: Spark remembers the last hundred only."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.messages = 0
        self._last = -1

    def add(self, progress: StreamingQueryProgress | None) -> None:
        observed = None if progress is None else progress.observedMetrics.get("ingested")
        if progress is None or observed is None or progress.batchId <= self._last:
            return
        self._last = progress.batchId
        self.messages += progress.numInputRows
        self.rows.update({kind: int(observed[kind]) for kind in ALL_KINDS})


@contextmanager
def _interrupts() -> Iterator[Event]:
    """An event that SIGINT and SIGTERM set, so that a query is stopped between two calls into Java.

    A batch that is cut off is not committed; the next run reads it again.
    """
    interrupted = Event()
    if current_thread() is not main_thread():  # signals reach the main thread only
        yield interrupted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kafka_stream(spark: SparkSession, kafka: KafkaConfig) -> DataFrame:
    topics = {getattr(kafka.topics, topic): kind for kind, topic in enumerate(TOPICS)}
    source = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", kafka.bootstrap_servers)
        .option("subscribe", ",".join(topics))
        .option("startingOffsets", "earliest")
        # Offsets that the broker has dropped are a loss to be told, never to be skipped.
        .option("failOnDataLoss", "true")
        .options(**spark_kafka_options(kafka.options))
        .load()
        .selectExpr("topic", "partition", "offset", "unix_millis(timestamp) AS timestamp", "value")
    )
    rows = source.mapInArrow(partial(kafka_rows, topics=topics), ddl(LAKE_SCHEMA))
    # One file for each hour and kind: without it, each partition of the topics would write its own.
    return with_partitions(rows).observe("ingested", *count_kinds()).repartition(*PARTITION_COLUMNS)


def spark_kafka_options(options: dict[str, Any]) -> dict[str, str]:
    """Translate kafka-python's connection options into those of Spark's source.

    Raises
    ------
    ConfigError
        If an option has no counterpart.

    Examples
    --------
    >>> spark_kafka_options({"security_protocol": "SSL", "ssl_cafile": "/etc/ca.pem"})
    {'kafka.security.protocol': 'SSL', 'kafka.ssl.truststore.location': '/etc/ca.pem', \
'kafka.ssl.truststore.type': 'PEM'}
    """
    given = {key: str(resolve_secret(value)) for key, value in options.items()}
    user, password = given.pop("sasl_plain_username", None), given.pop("sasl_plain_password", None)
    unknown = sorted(set(given) - set(_KAFKA_OPTIONS))
    if unknown:
        raise ConfigError(
            f"kafka.options.{unknown[0]} has no counterpart in Spark's Kafka source.",
            hint=f"known here: {', '.join([*_KAFKA_OPTIONS, 'sasl_plain_username', 'sasl_plain_password'])}",
        )
    translated = {_KAFKA_OPTIONS[key]: value for key, value in given.items()}
    if "ssl_cafile" in given:
        translated["kafka.ssl.truststore.type"] = "PEM"
    if user is not None and password is not None:
        mechanism = given.get("sasl_mechanism", "PLAIN")
        if mechanism not in _SASL_MODULES:
            raise ConfigError(
                f"sasl_mechanism must be one of {', '.join(_SASL_MODULES)}. Received: {mechanism}."
            )
        quoted = [part.replace("\\", "\\\\").replace('"', '\\"') for part in (user, password)]
        translated["kafka.sasl.jaas.config"] = (
            f'{_SASL_MODULES[mechanism]} required username="{quoted[0]}" password="{quoted[1]}";'
        )
    return translated


def _explained(error: Exception, kafka: KafkaConfig) -> Exception:
    text = str(error)
    if "UnknownTopicOrPartition" in text:
        return DataError(
            f"expected the topics {', '.join(getattr(kafka.topics, name) for name in TOPICS)} at "
            f"{kafka.bootstrap_servers}. At least one is missing.",
            hint="create them (`ctrstream produce` does), or set kafka.topics",
        )
    if "failOnDataLoss" in text or "data may have been lost" in text.lower() or "was changed from" in text:
        return DataError(
            f"the broker at {kafka.bootstrap_servers} no longer holds the next offsets of this lake: "
            f"{text.strip().splitlines()[0]}",
            hint="is it another broker, or its retention too short? Use a new lake, or ingest event files",
        )
    return error
