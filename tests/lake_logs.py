"""Small logs with known times, as files and in topics, and what a lake holds of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.topics import ensure_topics
from pipelines.codec import encode_json
from pipelines.config import Config
from pipelines.config_sections import KafkaConfig, TopicsConfig
from pipelines.conform import conform
from pipelines.events import CLICK, CONVERSION, IMPRESSION, TOPICS
from pipelines.lake import read_lake

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.broker import Broker

START = 1_767_571_200_000
HOUR = 3_600_000


def impressions(first: int, n: int) -> pa.Table:
    ids = [f"i{k}" for k in range(first, first + n)]
    columns = {
        "event_id": ids,
        "impression_id": ids,
        "event_time": [START + k * HOUR // 4 for k in range(first, first + n)],
        "user_id": [f"u{k % 7}" for k in range(n)],
        "item_id": [f"t{k % 3}" for k in range(n)],
        "position": [1 + k % 4 for k in range(n)],
        "price": [k / 4 for k in range(n)],
        "tags": [[], ["a"], ["a", 'ä"b']] * (n // 3) + [None] * (n % 3),
    }
    return conform(IMPRESSION, pa.table(columns))


def clicks(first: int, n: int) -> pa.Table:
    columns = {
        "event_id": [f"c{k}" for k in range(first, first + n)],
        "impression_id": [f"i{k}" for k in range(first, first + n)],
        "event_time": [START + k * HOUR // 4 + 5_000 for k in range(first, first + n)],
        "arrival_time": [START + k * HOUR // 4 + 9_000 for k in range(first, first + n)],
    }
    return conform(CLICK, pa.table(columns))


def conversions(first: int, n: int) -> pa.Table:
    columns = {
        "event_id": [f"v{k}" for k in range(first, first + n)],
        "impression_id": [f"i{k}" for k in range(first, first + n)],
        "event_time": [START + k * HOUR // 4 + 60_000 for k in range(first, first + n)],
        "value": [1.5] * n,
        "op": ["assert", "retract"] * (n // 2),
    }
    return conform(CONVERSION, pa.table(columns))


def write_log(folder: Path, suffix: str = ".parquet") -> Path:
    """Nine impressions, six clicks and four conversions; three bad lines more where the files are JSON."""
    folder.mkdir()
    for name, kind, table in (
        ("impressions", IMPRESSION, impressions(0, 9)),
        ("clicks", CLICK, clicks(0, 6)),
        ("conversions", CONVERSION, conversions(0, 4)),
    ):
        if suffix == ".parquet":
            pq.write_table(table, folder / f"{name}.parquet")
        else:
            lines = [*encode_json(kind, table), b"", b'{"event_id": 7}']
            (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def rows_of(spark: SparkSession, lake: str | Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind, by their position in the input."""
    table = read_lake(spark, lake).where(f"kind = '{kind}'").toArrow()
    return sorted(
        table.to_pylist(), key=lambda row: (row["source"], row["partition"], row["offset"], row["row"])
    )


def event_ids(spark: SparkSession, lake: str | Path, kind: str) -> list[str]:
    """Sorted; one that is in the lake twice is there twice."""
    return sorted(row["event_id"] for row in rows_of(spark, lake, kind))


def send(broker: Broker, topic: str, payloads: list[bytes | None]) -> None:
    """Send messages to the two partitions of a topic in turn."""
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    for number, payload in enumerate(payloads):
        producer.send(topic, payload, key=b"k", partition=number % 2)
    producer.flush()
    producer.close()


def kafka_config(broker: Broker, name: str, create: bool = True) -> Config:
    """A configuration with topics of its own."""
    topics = {topic: f"{name}-{topic}" for topic in TOPICS}
    if create:
        ensure_topics(broker.bootstrap_servers, dict.fromkeys(topics.values(), 2))
    return Config(
        kafka=KafkaConfig(bootstrap_servers=broker.bootstrap_servers, topics=TopicsConfig(**topics))
    )
