"""Event blocks as Kafka messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipelines.arrival_header import ARRIVAL_HEADER
from pipelines.codec import encode_json, encode_packed
from pipelines.event_file_reading import RejectedRow
from pipelines.event_files import EventFiles
from pipelines.events import DEAD_LETTER, EventBlock
from pipelines.hashing import HASH_SEED, hash_column

__all__ = ["Message", "block_messages"]

_PACKED_ROWS = 256


class Message(NamedTuple):
    """One Kafka message, with the number of rows in it."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]] | None = None
    rows: int = 1

    def send(self, producer: Any) -> Any:
        """Hand the message to a producer; returns kafka-python's future."""
        return producer.send(self.topic, self.value, self.key, self.headers, self.partition)


def block_messages(
    files: EventFiles,
    block: EventBlock,
    topics: Sequence[str],
    partitions: int,
    form: Literal["json", "packed"],
) -> Iterator[Message]:
    """The messages of a block of ``files``; those of one partition come in the block's order.

    Parameters
    ----------
    files : EventFiles
        Has the rows that are no events as they were found.
    block : EventBlock
    topics : sequence of str
        Name of the topic of each kind.
    partitions : int
        Number of partitions of each topic.
    form : {"json", "packed"}
    """
    letters = int(np.count_nonzero(files.kind[: block.offset[0]] == DEAD_LETTER))
    rejected = files.rejected[letters : letters + len(block.dead_letters)]
    dead = [_dead_message(row, topics, partitions) for row in rejected]
    partition = [_partition(table.column("impression_id"), partitions) for table in block.tables]
    if form == "json":
        yield from _single(block, topics, partition, dead)
    else:
        yield from _packed(block, topics, partition, dead)


def _partition(impression_id: pa.ChunkedArray, partitions: int) -> NDArray[np.int64]:
    return (hash_column(impression_id, HASH_SEED) % np.uint64(partitions)).astype(np.int64)


def _single(
    block: EventBlock,
    topics: Sequence[str],
    partition: list[NDArray[np.int64]],
    dead: list[Message],
) -> Iterator[Message]:
    ready: list[Iterator[Message]] = [
        map(
            Message,
            [topics[kind]] * table.num_rows,
            partition[kind].tolist(),
            table.column("impression_id").cast(pa.binary()).to_pylist(),
            encode_json(kind, table),
        )
        for kind, table in enumerate(block.tables)
    ]
    ready.append(iter(dead))
    for kind in block.kind.tolist():
        yield next(ready[kind])


def _packed(
    block: EventBlock,
    topics: Sequence[str],
    partition: list[NDArray[np.int64]],
    dead: list[Message],
) -> Iterator[Message]:
    dead_place = np.flatnonzero(block.kind == DEAD_LETTER).tolist()
    for kind, table in enumerate(block.tables):
        own_place = np.flatnonzero(block.kind == kind)
        alone = [
            (at, message)
            for at, message in zip(dead_place, dead, strict=True)
            if message.topic == topics[kind]
        ]
        for number in sorted({*partition[kind].tolist(), *(message.partition for _, message in alone)}):
            rows = np.flatnonzero(partition[kind] == number)
            start = 0
            # A message that is no event stands alone, between the packs before and after it.
            for at, message in alone:
                if message.partition == number:
                    stop = int(np.searchsorted(own_place[rows], at))
                    yield from _packs(kind, table, rows[start:stop], topics[kind], number)
                    yield message
                    start = stop
            yield from _packs(kind, table, rows[start:], topics[kind], number)


def _packs(kind: int, table: pa.Table, rows: NDArray[np.int64], topic: str, number: int) -> Iterator[Message]:
    for start in range(0, len(rows), _PACKED_ROWS):
        pack = rows[start : start + _PACKED_ROWS]
        value = encode_packed(kind, table.take(pa.array(pack)))
        yield Message(topic, number, None, value, None, len(pack))


def _dead_message(row: RejectedRow, topics: Sequence[str], partitions: int) -> Message:
    key = _impression_id(row.payload)
    number = xxhash.xxh64_intdigest(row.payload if key is None else key, HASH_SEED) % partitions
    headers = [(ARRIVAL_HEADER, b"%d" % row.arrival_time)]
    return Message(topics[row.kind], number, key, row.payload, headers)


def _impression_id(payload: bytes) -> bytes | None:
    """The impression that a message which is no event belongs to, if it says so."""
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    name = event.get("impression_id") if isinstance(event, dict) else None
    return name.encode() if isinstance(name, str) and name else None
