"""Kafka topics into the lake: Structured Streaming, each micro-batch a batch of the lake.

Exactly once by three steps in a row. Spark writes the offsets of a micro-batch into its checkpoint; we commit
the micro-batch to the lake under a name that follows from the query and the number; Spark notes that it is
done. A run that is killed in between begins again with the same offsets and the same name.
"""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event, Lock, current_thread, main_thread
from typing import TYPE_CHECKING, Any

from jobs.kafka_offsets import micro_batch_offsets, starting_offsets
from jobs.topics import answers
from pipelines.arrival_header import ARRIVAL_HEADER
from pipelines.config import resolve_secret
from pipelines.config_sections import KafkaConfig
from pipelines.errors import ConfigError, CtrstreamError, DataError, SetupError, TransientError
from pipelines.events import TOPICS
from pipelines.lake import LakeBatch, checkpoint_folder, committed_batches, ddl
from pipelines.lake_rows import LAKE_SCHEMA, kafka_rows
from pipelines.lake_write import add_kafka_batch
from pipelines.spark_session import worker_errors
from pipelines.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["ingest_kafka", "spark_kafka_options"]

logger = logging.getLogger(__name__)

_POLL_S = 1
_BATCH_PREFIX = "kafka-"
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
    spark: SparkSession, lake: Folder, kafka: KafkaConfig, *, every: int | None = None
) -> tuple[Counter[str], int]:
    """Add what the topics hold beyond the lake's checkpoint; returns rows by kind and messages added.

    Parameters
    ----------
    spark : SparkSession
    lake : Folder
    kafka : KafkaConfig
    every : int, optional
        Go on until interrupted, with a batch every so many ms; by default end with what is there now.

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
    before = committed_batches(lake)
    begin = starting_offsets(kafka, list(_topics(kafka)), checkpoint_folder(lake), before)
    sink = _LakeSink(lake)
    writer = (
        _kafka_stream(spark, kafka, begin)
        .writeStream.foreachBatch(sink)
        .option("checkpointLocation", checkpoint_folder(lake).location)
        .queryName("samples ingest")
    )
    if every is None:
        writer = writer.trigger(availableNow=True)
    else:
        writer = writer.trigger(processingTime=f"{every} milliseconds")
    query = writer.start()
    try:
        with _interrupts() as interrupted:
            while not query.awaitTermination(_POLL_S) and not interrupted.is_set():
                pass
        if every is None and interrupted.is_set():
            # What was committed stays; but a scheduler must not take this for all that there was.
            raise KeyboardInterrupt
    except StreamingQueryException as error:
        raise _explained(error, sink.failure, kafka) from error
    finally:
        query.stop()
    with sink.writing:
        return _added(committed_batches(lake), {batch.batch for batch in before})


def _added(batches: list[LakeBatch], before: set[str]) -> tuple[Counter[str], int]:
    """Rows by kind and messages of the batches that came to the lake from Kafka.

    Counted from what was committed: a stream that is stopped cuts its last micro-batch off anywhere, also
    between its commit and whatever would follow.
    """
    rows: Counter[str] = Counter()
    messages = 0
    for batch in batches:
        if batch.batch not in before and batch.batch.startswith(_BATCH_PREFIX):
            rows.update(batch.rows)
            messages += batch.messages
    return rows, messages


class _LakeSink:
    """Commits each micro-batch."""

    def __init__(self, lake: Folder) -> None:
        self.failure: Exception | None = None
        # A query that is stopped does not wait for us.
        self.writing = Lock()
        self._lake = lake

    def __call__(self, rows: DataFrame, number: int) -> None:
        try:
            with self.writing, worker_errors():
                self._add(rows, number)
        except Exception as error:
            # Spark will tell of it in its own words.
            self.failure = error
            raise

    def _add(self, rows: DataFrame, number: int) -> None:
        session = rows.sparkSession
        # Streams run without it, for the sake of state that this one does not have. The write needs it to
        # bring the rows of an hour together.
        session.conf.set("spark.sql.adaptive.enabled", "true")
        # The id is that of the checkpoint: a query that is started again has it still.
        query = session.sparkContext.getLocalProperty("sql.streaming.queryId")
        offsets = micro_batch_offsets(checkpoint_folder(self._lake), number)
        batch, added = add_kafka_batch(self._lake, f"{_BATCH_PREFIX}{query}-{number:09d}", offsets, rows)
        if not added:
            logger.info("micro-batch %d is in the lake already", number)
            return
        logger.info("micro-batch %d: %d messages, %d rows", number, batch.messages, batch.total_rows)


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


def _topics(kafka: KafkaConfig) -> dict[str, int]:
    """Kind of event by topic."""
    return {getattr(kafka.topics, topic): kind for kind, topic in enumerate(TOPICS)}


def _kafka_stream(spark: SparkSession, kafka: KafkaConfig, begin: str) -> DataFrame:
    from pyspark.errors import AnalysisException

    topics = _topics(kafka)
    messages = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", kafka.bootstrap_servers)
        .option("subscribe", ",".join(topics))
        .option("startingOffsets", begin)
        # Offsets that the broker has dropped are a loss to be told, never to be skipped.
        .option("failOnDataLoss", "true")
        .option("includeHeaders", "true")
        .options(**spark_kafka_options(kafka.options))
    )
    try:
        loaded = messages.load()
    except AnalysisException as error:
        raise SetupError(
            f"Spark has no Kafka connector: {str(error).splitlines()[0]}",
            hint="spark-submit --jars $(ctrstream spark-entry --jars) ...",
        ) from error
    told = f"transform(filter(headers, h -> h.key = '{ARRIVAL_HEADER}'), h -> h.value) AS told"
    source = loaded.selectExpr(
        "topic", "partition", "offset", "unix_millis(timestamp) AS timestamp", "value", told
    )
    return source.mapInArrow(partial(kafka_rows, topics=topics), ddl(LAKE_SCHEMA))


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


def _explained(error: Exception, failure: Exception | None, kafka: KafkaConfig) -> Exception:
    if isinstance(failure, CtrstreamError):
        return failure
    text = str(error if failure is None else failure)
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
