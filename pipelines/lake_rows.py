"""From messages and file rows to rows of the lake; what cannot be used becomes a dead letter.

The Spark jobs run these functions through ``mapInArrow``. They call the codec and the validation that the
worker calls, so that both agree on every byte (docs/adr/0002-one-parsing-code.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.arrival_header import told_arrival
from pipelines.codec import Decoded, decode_json, decode_messages, features_to_json, is_packed
from pipelines.conform import conform
from pipelines.errors import DataError
from pipelines.event_file_reading import row_as_json
from pipelines.events import IMPRESSION, KINDS, TOPICS, contract_schema
from pipelines.hashing import hash_column
from pipelines.merge import UNKNOWN_TIME
from pipelines.validation import validate

__all__ = [
    "ALL_KINDS",
    "DEAD_LETTER_KIND",
    "LAKE_SCHEMA",
    "kafka_rows",
    "malformed_rows",
    "parquet_rows",
    "text_rows",
]

DEAD_LETTER_KIND = "dead_letter"
ALL_KINDS = (*KINDS, DEAD_LETTER_KIND)

# All kinds in one schema; what a kind does not have is null. `source`, `partition`, `offset` and `row` are
# the position in the input (topic or file; row inside a packed message); `reason` and `payload` say what
# was wrong with a dead letter, whose `arrival_time` is the message's timestamp. Any row from Kafka has the
# message's timestamp as `received_at`. A dead letter from there also has `told_arrival`, the time in its
# header, and `payload_hash`, the XXH64 of its bytes: its place in the order of events follows from these.
LAKE_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        *contract_schema(IMPRESSION),
        pa.field("value", pa.float64()),
        pa.field("op", pa.string()),
        pa.field("credit", pa.float64()),
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
        pa.field("received_at", pa.int64()),
        pa.field("told_arrival", pa.int64()),
        pa.field("payload_hash", pa.int64()),
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
    told: Sequence[int] | None = None

    def columns(self, rows: NDArray[np.int64]) -> dict[str, pa.Array]:
        received = {} if self.told is None else {"received_at": pa.array(self._received(rows), pa.int64())}
        return received | {
            "source": pa.array([self.source] * len(rows), pa.string()),
            "partition": pa.array(self.partition[rows], pa.int32()),
            "offset": pa.array(self.offset[rows], pa.int64()),
            "row": pa.array(self.row[rows], pa.int32()),
        }

    def place_of_dead(self, rows: NDArray[np.int64], payloads: Sequence[bytes | None]) -> dict[str, pa.Array]:
        """Columns of dead letters alone: what their place in the order of a topic follows from."""
        if self.received is None:
            return {}
        columns = {"arrival_time": pa.array(self._received(rows), pa.int64())}
        if self.told is not None:
            told = [None if self.told[row] == UNKNOWN_TIME else self.told[row] for row in rows.tolist()]
            hashes = hash_column(pa.array([payload or b"" for payload in payloads], pa.binary()))
            columns["told_arrival"] = pa.array(told, pa.int64())
            columns["payload_hash"] = pa.array(hashes.view(np.int64), pa.int64())
        return columns

    def _received(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros(0, np.int64) if self.received is None else self.received[rows]


def kafka_rows(batches: Iterable[pa.RecordBatch], topics: Mapping[str, int]) -> Iterator[pa.RecordBatch]:
    """Decode Kafka messages, JSON and packed ones mixed.

    Parameters
    ----------
    batches : iterable of RecordBatch
        ``topic, partition, offset, timestamp`` (ms), ``value`` (binary) and ``told`` (values of the header
        that tells the time, a list of binary).
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
                    [told_arrival(values or ()) for values in _of_messages(part, "told", messages.message)],
                )
                raw = [payloads[message] for message in messages.message]
                yield from _lake_rows(kind, messages.decoded, origin, raw)


def _of_messages(batch: pa.RecordBatch, name: str, message: NDArray[np.int64]) -> list[Any]:
    values = batch.column(name).to_pylist()
    return [values[index] for index in message.tolist()]


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
    for file, number, lines in _numbered_lines(batches, first_line):
        zeros = np.zeros(len(lines), np.int32)
        decoded = decode_messages(kind, lines).decoded
        yield from _lake_rows(kind, decoded, _Origin(file, zeros, number, zeros), lines)


def malformed_rows(
    batches: Iterable[pa.RecordBatch], first_line: Mapping[tuple[str, int], int]
) -> Iterator[pa.RecordBatch]:
    """Decode raw messages of all topics: lines of ``topic``, ``value`` and ``arrival_time``.

    Sources are named ``FILE:TOPIC``, as `pipelines.event_files` does. Parameters as for `text_rows`.

    Raises
    ------
    DataError
        If a line is not of that form.
    """
    for file, number, lines in _numbered_lines(batches, first_line):
        raw = [_raw_message(file, n, line) for n, line in zip(number.tolist(), lines, strict=True)]
        for kind, topic in enumerate(TOPICS):
            rows = np.array([row for row, message in enumerate(raw) if message[0] == kind], np.int64)
            values: list[bytes | None] = [raw[row][1] for row in rows]
            zeros, received = np.zeros(len(rows), np.int32), np.array([raw[row][2] for row in rows], np.int64)
            origin = _Origin(f"{file}:{topic}", zeros, number[rows], zeros, received)
            yield from _lake_rows(kind, decode_json(kind, values), origin, values)


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
        for start, stop in _runs(batch.column("_source")):
            part = pa.Table.from_batches([batch.slice(start, stop - start)])
            name, n = part.column("_source")[0].as_py(), stop - start
            zeros = np.zeros(n, np.int32)
            origin = _Origin(name, zeros, part.column("_offset").to_numpy(), zeros)
            conformed = conform(kind, part.drop_columns(["_source", "_offset"]), name)
            yield from _lake_rows(kind, Decoded(conformed, np.arange(n), {}, n), origin, [None] * n)


def _runs(*columns: pa.Array) -> Iterator[tuple[int, int]]:
    """Stretches of rows, ``[start, stop)``, in which no column changes."""
    n = len(columns[0])
    changes = np.zeros(max(n - 1, 0), np.bool_)
    for column in columns:
        values = column.to_numpy(zero_copy_only=False)
        changes |= values[1:] != values[:-1]
    ends = [0, *(np.flatnonzero(changes) + 1).tolist(), n]
    return ((start, stop) for start, stop in pairwise(ends) if start < stop)


def _numbered_lines(
    batches: Iterable[pa.RecordBatch], first_line: Mapping[tuple[str, int], int]
) -> Iterator[tuple[str, NDArray[np.int64], list[bytes | None]]]:
    """File, line numbers and lines, stretch by stretch; lines without text are left out."""
    following = dict(first_line)
    for batch in batches:
        for start, stop in _runs(batch.column("file"), batch.column("block")):
            place = batch.column("file")[start].as_py(), batch.column("block")[start].as_py()
            number = following[place] + np.arange(stop - start)
            following[place] += stop - start
            lines = batch.column("value").slice(start, stop - start).cast(pa.binary()).to_pylist()
            filled = np.array([bool(line.strip()) for line in lines], np.bool_)
            yield place[0], number[filled], list(compress(lines, filled))


def _raw_message(file: str, number: int, line: bytes | None) -> tuple[int, bytes, int]:
    try:
        message = orjson.loads(line or b"")
        return TOPICS.index(message["topic"]), message["value"].encode(), int(message["arrival_time"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} line {number + 1}: expected an object with topic (one of {', '.join(TOPICS)}), value "
            f"(text) and arrival_time (ms). Received: {(line or b'')[:200].decode(errors='replace')}."
        ) from error


def _lake_rows(
    kind: int, decoded: Decoded, origin: _Origin, payloads: Sequence[bytes | None]
) -> Iterator[pa.RecordBatch]:
    """Valid rows, then dead letters; ``payloads`` by input row, None where the row has no text of its own."""
    ok, reasons = validate(kind, decoded.table)
    table = decoded.table if ok.all() else decoded.table.filter(pa.array(ok))
    columns = {name: table.column(name) for name in table.column_names if name in LAKE_SCHEMA.names}
    if kind == IMPRESSION:
        columns["features"] = features_to_json(table)
    columns |= origin.columns(decoded.row[ok])
    yield from _as_lake(KINDS[kind], table.num_rows, columns)

    dead = {row: (reason, payloads[row]) for row, reason in decoded.rejected.items()}
    for index, reason in reasons.items():
        row = int(decoded.row[index])
        own = payloads[row]
        # A row of a packed message or of a Parquet file is told as the JSON event that it would be.
        written = row_as_json(kind, decoded.table, index) if own is None or is_packed(own) else own
        dead[row] = reason, written
    if not dead:
        return
    rows = np.array(sorted(dead), np.int64)
    columns = origin.columns(rows)
    columns["reason"] = pa.array([f"{TOPICS[kind]}: {dead[int(row)][0]}" for row in rows], pa.string())
    texts = [dead[int(row)][1] for row in rows]
    columns["payload"] = pa.array(
        [None if text is None else text.decode(errors="replace") for text in texts], pa.string()
    )
    columns |= origin.place_of_dead(rows, texts)
    yield from _as_lake(DEAD_LETTER_KIND, len(rows), columns)


def _as_lake(kind: str, rows: int, columns: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    if rows == 0:
        return
    filled = {"kind": pa.array([kind] * rows, pa.string()), **columns}
    arrays = [
        filled[field.name] if field.name in filled else pa.nulls(rows, field.type) for field in LAKE_SCHEMA
    ]
    yield from pa.table(arrays, schema=LAKE_SCHEMA).combine_chunks().to_batches()
