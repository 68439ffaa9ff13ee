"""Events on the wire: UTF-8 JSON, one event a message, or packed, one Arrow record batch a message.

A topic may hold both, message by message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.conform import conform
from pipelines.errors import DataError
from pipelines.events import KINDS, contract_schema
from pipelines.feature_columns import concat_events
from pipelines.json_decoding import Decoded, decode_json, with_features_from_json
from pipelines.json_encoding import encode_json, features_to_json

__all__ = [
    "Decoded",
    "Messages",
    "decode_json",
    "decode_messages",
    "decode_packed",
    "encode_json",
    "encode_packed",
    "features_to_json",
    "is_packed",
    "with_features_from_json",
]

# An Arrow IPC stream begins with this marker; JSON never does.
_CONTINUATION = b"\xff\xff\xff\xff"
_HEADER = (b"ctrstream", b"kind")  # schema metadata: version of the form, kind of the events
_VERSION = "1"


@dataclass(frozen=True)
class Messages:
    """Rows of a run of messages, JSON and packed ones mixed.

    Attributes
    ----------
    decoded : Decoded
        Its input rows count through all messages.
    message : ndarray of int64, shape (decoded.rows,)
        For each input row, the index of its message.
    row_in_message : ndarray of int32, shape (decoded.rows,)
        For each input row, its place in its message.
    """

    decoded: Decoded
    message: NDArray[np.int64]
    row_in_message: NDArray[np.int32]


def is_packed(payload: bytes | None) -> bool:
    """Whether a message is packed (an Arrow IPC stream) rather than JSON."""
    return payload is not None and payload[:4] == _CONTINUATION


def encode_packed(kind: int, table: pa.Table) -> bytes:
    """Pack rows of one kind into one message: an Arrow IPC stream of one record batch."""
    header = dict(zip(_HEADER, (_VERSION, KINDS[kind]), strict=True))
    schema = table.schema.with_metadata(header)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def decode_packed(kind: int, payload: bytes) -> Decoded:
    """Decode one packed message; one that cannot be read counts as one rejected row."""
    try:
        table = conform(kind, _read_packed(kind, payload), "packed message")
    except DataError as error:
        return Decoded(contract_schema(kind).empty_table(), np.zeros(0, np.int64), {0: error.message}, 1)
    return Decoded(table, np.arange(table.num_rows), {}, table.num_rows)


def decode_messages(kind: int, payloads: Sequence[bytes | None]) -> Messages:
    """Decode a run of messages of one kind, JSON and packed ones mixed.

    Examples
    --------
    >>> row = b'{"event_id": "c1", "impression_id": "i1", "event_time": 5}'
    >>> pack = encode_packed(1, decode_json(1, [row, row]).table)
    >>> messages = decode_messages(1, [row, pack, b"{"])
    >>> messages.message.tolist(), messages.row_in_message.tolist(), list(messages.decoded.rejected)
    ([0, 1, 1, 2], [0, 0, 1, 0], [3])
    """
    parts: list[Decoded] = []
    sizes: list[NDArray[np.int64]] = []
    for packed, run in groupby(payloads, is_packed):
        if packed:
            for part, size in _decode_packed_run(kind, [payload or b"" for payload in run]):
                parts.append(part)
                sizes.append(size)
        else:
            parts.append(decode_json(kind, list(run)))
            sizes.append(np.ones(parts[-1].rows, np.int64))
    if not parts:
        parts, sizes = [decode_json(kind, [])], [np.zeros(0, np.int64)]
    size = np.concatenate(sizes)
    message = np.repeat(np.arange(len(size)), size)
    row_in_message = np.arange(len(message)) - np.repeat(np.cumsum(size) - size, size)
    return Messages(_join(kind, parts), message, row_in_message.astype(np.int32))


def _decode_packed_run(kind: int, payloads: list[bytes]) -> Iterator[tuple[Decoded, NDArray[np.int64]]]:
    """Decode packed messages, neighbours of the same schema together; yields the rows of each message too."""
    read: list[tuple[bytes, pa.Table | None]] = []
    for payload in payloads:
        try:
            read.append((payload, _read_packed(kind, payload)))
        except DataError:
            read.append((payload, None))
    for _, run in groupby(read, lambda pair: None if pair[1] is None else pair[1].schema):
        group = list(run)
        tables = [table for _, table in group if table is not None]
        together = _conform_together(kind, tables)
        if together is not None:
            size = np.array([table.num_rows for table in tables], np.int64)
            yield Decoded(together, np.arange(together.num_rows), {}, together.num_rows), size
            continue
        for payload, _ in group:
            part = decode_packed(kind, payload)
            yield part, np.array([part.rows], np.int64)


def _conform_together(kind: int, tables: list[pa.Table]) -> pa.Table | None:
    """One conformed table, or None where there is none or a value does not fit its column."""
    try:
        return conform(kind, pa.concat_tables(tables)) if tables else None
    except DataError:
        return None  # the culprit is found message by message


def _join(kind: int, parts: list[Decoded]) -> Decoded:
    starts = np.cumsum([0, *(part.rows for part in parts)])
    return Decoded(
        concat_events(kind, [part.table for part in parts]),
        np.concatenate([part.row + start for part, start in zip(parts, starts, strict=False)]),
        {
            int(row + start): reason
            for part, start in zip(parts, starts, strict=False)
            for row, reason in part.rejected.items()
        },
        int(starts[-1]),
    )


def _read_packed(kind: int, payload: bytes) -> pa.Table:
    try:
        with pa.ipc.open_stream(payload) as reader:
            metadata = reader.schema.metadata or {}
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"expected an Arrow IPC stream. Received bytes that are none: {error}.") from error
    version, packed_kind = (metadata.get(key, b"none").decode(errors="replace") for key in _HEADER)
    if version != _VERSION or packed_kind != KINDS[kind]:
        raise DataError(
            f"expected packed {KINDS[kind]}s of version {_VERSION}. "
            f"Received: kind {packed_kind}, version {version}."
        )
    return table.replace_schema_metadata(None)
