"""From messages and file rows to rows of the lake; what cannot be used becomes a dead letter.

The Spark jobs run these functions through ``mapInArrow``. They call the codec and the validation that the
worker calls, so that both agree on every byte (docs/adr/0002-one-parsing-code.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.codec import Decoded, decode_messages, features_to_json
from pipelines.conform import conform
from pipelines.events import IMPRESSION, KINDS, TOPICS, contract_schema
from pipelines.validation import validate

__all__ = ["ALL_KINDS", "DEAD_LETTER_KIND", "LAKE_SCHEMA", "kafka_rows", "parquet_rows", "text_rows"]

DEAD_LETTER_KIND = "dead_letter"
ALL_KINDS = (*KINDS, DEAD_LETTER_KIND)

# All kinds in one schema; what a kind does not have is null. `source`, `partition`, `offset` and `row` are
# the position in the input (topic or file; row inside a packed message); `reason` and `payload` say what
# was wrong with a dead letter, whose `arrival_time` is the message's timestamp.
LAKE_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        *contract_schema(IMPRESSION),
        pa.field("value", pa.float64()),
        pa.field("op", pa.string()),
        pa.field("served_release", pa.string()),
        pa.field("served_logit", pa.float64()),
        pa.field("served_probability", pa.float64()),
        pa.field("served_position", pa.int32()),
        pa.field("features", pa.string()),
        pa.field("source", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("row", pa.int32()),
        pa.field("reason", pa.string()),
        pa.field("payload", pa.string()),
    ]
)


@dataclass(frozen=True)
class _Origin:
    """Where each input row of a run came from: one source, the rest per row."""

    source: str
    partition: NDArray[np.int32]
    offset: NDArray[np.int64]
    row: NDArray[np.int32]
    received: NDArray[np.int64] | None = None

    def columns(self, rows: NDArray[np.int64]) -> dict[str, pa.Array]:
        return {
            "source": pa.array([self.source] * len(rows), pa.string()),
            "partition": pa.array(self.partition[rows], pa.int32()),
            "offset": pa.array(self.offset[rows], pa.int64()),
            "row": pa.array(self.row[rows], pa.int32()),
        }


def kafka_rows(batches: Iterable[pa.RecordBatch], topics: Mapping[str, int]) -> Iterator[pa.RecordBatch]:
    """Decode Kafka messages, JSON and packed ones mixed.

    Parameters
    ----------
    batches : iterable of RecordBatch
        ``topic, partition, offset, timestamp`` (ms) and ``value`` (binary).
    topics : mapping of str to int
        Kind of event by topic.
    """
    for batch in batches:
        topic = batch.column("topic").to_numpy(zero_copy_only=False)
        for name, kind in topics.items():
            rows = np.flatnonzero(topic == name)
            if len(rows):
                part = batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))
                payloads = part.column("value").to_pylist()
                messages = decode_messages(kind, payloads)
                origin = _Origin(
                    name,
                    part.column("partition").to_numpy()[messages.message],
                    part.column("offset").to_numpy()[messages.message],
                    messages.row_in_message,
                    part.column("timestamp").to_numpy()[messages.message],
                )
                raw = [payloads[message] for message in messages.message] if messages.decoded.rejected else []
                yield from _lake_rows(kind, messages.decoded, origin, raw)


def text_rows(
    batches: Iterable[pa.RecordBatch], kind: int, first_line: Mapping[tuple[str, int], int]
) -> Iterator[pa.RecordBatch]:
    """Decode the lines of JSON files.

    Parameters
    ----------
    batches : iterable of RecordBatch
        ``file, block`` (first byte of the part of the file that a task reads) and ``value`` (text), lines of
        a block in order.
    kind : int
        IMPRESSION, CLICK or CONVERSION.
    first_line : mapping of (str, int) to int
        Number of the first line of each block.
    """
    following = dict(first_line)
    for batch in batches:
        files = batch.column("file").to_numpy(zero_copy_only=False)
        blocks = batch.column("block").to_numpy()
        changes = np.flatnonzero((files[1:] != files[:-1]) | (blocks[1:] != blocks[:-1])) + 1
        for start, stop in zip([0, *changes], [*changes, len(files)], strict=True):
            if stop == start:
                continue
            place = str(files[start]), int(blocks[start])
            line = following[place] + np.arange(stop - start)
            following[place] += stop - start
            payloads = batch.column("value").slice(start, stop - start).cast(pa.binary()).to_pylist()
            filled = np.array([bool(payload and payload.strip()) for payload in payloads])
            payloads = [payload for payload, is_filled in zip(payloads, filled, strict=True) if is_filled]
            decoded = decode_messages(kind, payloads).decoded
            zeros = np.zeros(len(payloads), np.int32)
            yield from _lake_rows(kind, decoded, _Origin(place[0], zeros, line[filled], zeros), payloads)


def parquet_rows(batches: Iterable[pa.RecordBatch], kind: int) -> Iterator[pa.RecordBatch]:
    """Conform the rows of Parquet files.

    Parameters
    ----------
    batches : iterable of RecordBatch
        Columns of the event files, and ``_source`` and ``_offset``: file and row number.
    kind : int
        IMPRESSION, CLICK or CONVERSION.
    """
    for batch in batches:
        table = pa.Table.from_batches([batch])
        source = table.column("_source").to_numpy()
        changes = np.flatnonzero(source[1:] != source[:-1]) + 1
        for start, stop in zip([0, *changes], [*changes, len(source)], strict=True):
            if stop > start:
                part = table.slice(start, stop - start)
                name = str(source[start])
                zeros = np.zeros(stop - start, np.int32)
                origin = _Origin(name, zeros, part.column("_offset").to_numpy(), zeros)
                conformed = conform(kind, part.drop_columns(["_source", "_offset"]), name)
                yield from _lake_rows(
                    kind, Decoded(conformed, np.arange(stop - start), {}, stop - start), origin, []
                )


def _lake_rows(
    kind: int, decoded: Decoded, origin: _Origin, payloads: Sequence[bytes | None]
) -> Iterator[pa.RecordBatch]:
    """Valid rows, then dead letters; ``payloads`` by input row, empty where there is no text to keep."""
    ok, reasons = validate(kind, decoded.table)
    table = decoded.table if ok.all() else decoded.table.filter(pa.array(ok))
    columns = {name: table.column(name) for name in table.column_names if name in LAKE_SCHEMA.names}
    if kind == IMPRESSION:
        columns["features"] = features_to_json(table)
    columns |= origin.columns(decoded.row[ok])
    yield from _as_lake(KINDS[kind], table.num_rows, columns)

    invalid = np.array(sorted(reasons), np.int64)
    dead = {row: (reason, payloads[row] if payloads else None) for row, reason in decoded.rejected.items()}
    for index, written in zip(invalid, _written(decoded.table, invalid), strict=True):
        row = int(decoded.row[index])
        dead[row] = reasons[int(index)], (payloads[row] if payloads else written)
    if not dead:
        return
    rows = np.array(sorted(dead), np.int64)
    columns = origin.columns(rows)
    columns["reason"] = pa.array([f"{TOPICS[kind]}: {dead[int(row)][0]}" for row in rows], pa.string())
    columns["payload"] = pa.array([_as_text(dead[int(row)][1]) for row in rows], pa.string())
    if origin.received is not None:
        columns["arrival_time"] = pa.array(origin.received[rows], pa.int64())
    yield from _as_lake(DEAD_LETTER_KIND, len(rows), columns)


def _as_lake(kind: str, rows: int, columns: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    if rows == 0:
        return
    filled = {"kind": pa.array([kind] * rows, pa.string()), **columns}
    arrays = [
        filled[field.name] if field.name in filled else pa.nulls(rows, field.type) for field in LAKE_SCHEMA
    ]
    yield from pa.table(arrays, schema=LAKE_SCHEMA).combine_chunks().to_batches()


def _written(table: pa.Table, rows: NDArray[np.int64]) -> list[bytes]:
    """Rows of a table as text, for dead letters that have no message of their own."""
    return [orjson.dumps(row, default=str) for row in table.take(pa.array(rows)).to_pylist()]


def _as_text(payload: bytes | None) -> str | None:
    return None if payload is None else payload.decode("utf-8", errors="replace")
