"""Which messages of Kafka a micro-batch covers, and where a stream without a checkpoint begins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from pipelines.config_sections import KafkaConfig
from pipelines.errors import DataError
from pipelines.lake import LakeBatch, OffsetRange
from pipelines.storage import Folder

__all__ = ["micro_batch_offsets", "starting_offsets"]

# Spark's word for the first message that a partition still holds.
_EARLIEST = -2


def micro_batch_offsets(checkpoint: Folder, number: int) -> tuple[OffsetRange, ...]:
    """Offsets that a micro-batch covers, from the log that Spark writes before it runs the batch.

    Parameters
    ----------
    checkpoint : Folder
        ``checkpointLocation`` of the query.
    number : int
        Number of the micro-batch.
    """
    stops = _last_line(checkpoint, f"offsets/{number}")
    starts = _last_line(checkpoint, f"offsets/{number - 1}" if number else "sources/0/0")
    return tuple(
        # A partition that Spark has not seen before begins with its first message.
        OffsetRange(topic=topic, partition=int(name), start=starts.get(topic, {}).get(name, 0), stop=stop)
        for topic, partitions in sorted(stops.items())
        for name, stop in sorted(partitions.items(), key=lambda item: int(item[0]))
    )


def _last_line(checkpoint: Folder, name: str) -> dict[str, dict[str, int]]:
    """Offsets by topic and partition: the last line of a file that begins with its version."""
    offsets: dict[str, dict[str, int]] = json.loads(checkpoint.read(name).splitlines()[-1])
    return offsets


def starting_offsets(
    kafka: KafkaConfig, topics: Sequence[str], checkpoint: Folder, batches: Iterable[LakeBatch]
) -> str:
    """Spark's ``startingOffsets`` for a query that may have lost its checkpoint.

    What the manifests say has been ingested is not read again. Spark heeds this only where its checkpoint
    has nothing.

    Raises
    ------
    DataError
        If the lake has messages of a partition that the topic does not have.
    """
    stops = _ingested(batches, topics)
    if not stops or checkpoint.child("offsets").names():
        return "earliest"
    from pipelines.kafka_client import make_admin

    admin = make_admin(kafka)
    try:
        described = admin.describe_topics(sorted(topics))
    finally:
        admin.close()
    begin: dict[str, dict[str, int]] = {}
    for topic in described:
        name, count = str(topic["name"]), len(topic["partitions"])
        known = stops.get(name, {})
        if known and max(known) >= count:
            raise DataError(
                f"the lake has messages of partition {max(known)} of {name}. The topic at "
                f"{kafka.bootstrap_servers} has {count} partitions.",
                hint="is it another broker? Use a new lake",
            )
        begin[name] = {str(number): known.get(number, _EARLIEST) for number in range(count)}
    return json.dumps(begin)


def _ingested(batches: Iterable[LakeBatch], topics: Sequence[str]) -> Mapping[str, dict[int, int]]:
    """First offset that is not in the lake, by topic and partition."""
    stops: dict[str, dict[int, int]] = {}
    for batch in batches:
        for part in batch.offsets:
            if part.topic in topics:
                known = stops.setdefault(part.topic, {})
                known[part.partition] = max(part.stop, known.get(part.partition, 0))
    return stops
