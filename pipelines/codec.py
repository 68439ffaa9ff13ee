"""Events on the wire: UTF-8 JSON, one event a message, or packed, one Arrow record batch a message.

A topic may hold both, message by message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        Its input rows count through all messages; ``decoded.row`` may be in any order.
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
    packed = [index for index, payload in enumerate(payloads) if is_packed(payload)]
    if not packed:
        decoded = decode_json(kind, payloads)
        return Messages(decoded, np.arange(decoded.rows), np.zeros(decoded.rows, np.int32))
    is_pack = np.zeros(len(payloads), np.bool_)
    is_pack[packed] = True
    single = np.flatnonzero(~is_pack)
    size = np.ones(len(payloads), np.int64)
    parts: list[tuple[NDArray[np.int64], Decoded]] = []
    if len(single):
        parts.append((single, decode_json(kind, [payloads[index] for index in single.tolist()])))
    for indices, part in _decode_packs(kind, {index: payloads[index] or b"" for index in packed}, size):
        parts.append((indices, part))
    message = np.repeat(np.arange(len(size)), size)
    first = np.cumsum(size) - size
    row_in_message = np.arange(len(message)) - np.repeat(first, size)
    return Messages(_join(kind, parts, first, size), message, row_in_message.astype(np.int32))


def _decode_packs(
    kind: int, payloads: dict[int, bytes], size: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Decoded]]:
    """Decode packed messages, those of one schema together; notes the number of rows of each in ``size``."""
    by_schema: dict[pa.Schema | None, list[int]] = {}
    tables: dict[int, pa.Table] = {}
    for index, payload in payloads.items():
        try:
            tables[index] = _read_packed(kind, payload)
            by_schema.setdefault(tables[index].schema, []).append(index)
        except DataError:
            by_schema.setdefault(None, []).append(index)
    for schema, indices in by_schema.items():
        together = None if schema is None else _conform_together(kind, [tables[index] for index in indices])
        if together is not None:
            size[indices] = [tables[index].num_rows for index in indices]
            rows = together.num_rows
            yield np.array(indices), Decoded(together, np.arange(rows), {}, rows)
            continue
        for index in indices:
            part = decode_packed(kind, payloads[index])
            size[index] = part.rows
            yield np.array([index]), part


def _conform_together(kind: int, tables: list[pa.Table]) -> pa.Table | None:
    """One conformed table, or None where a value does not fit its column."""
    try:
        return conform(kind, pa.concat_tables(tables))
    except DataError:
        return None  # the culprit is found message by message


def _join(
    kind: int,
    parts: list[tuple[NDArray[np.int64], Decoded]],
    first: NDArray[np.int64],
    size: NDArray[np.int64],
) -> Decoded:
    """Parts that hold the rows of some messages each, as one; rows count through all messages."""
    row: list[NDArray[np.int64]] = []
    rejected: dict[int, str] = {}
    for indices, part in parts:
        begins = np.cumsum(size[indices]) - size[indices]
        flat = np.arange(part.rows) + np.repeat(first[indices] - begins, size[indices])
        row.append(flat[part.row])
        rejected |= {int(flat[own]): reason for own, reason in part.rejected.items()}
    table = concat_events(kind, [part.table for _, part in parts])
    return Decoded(table, np.concatenate(row), rejected, int(size.sum()))


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
