"""Reading one event file: the rows that can be used, and those that cannot, with reasons."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.codec import Decoded, decode_json
from pipelines.conform import conform
from pipelines.errors import DataError
from pipelines.events import IMPRESSION, SERVED_COLUMNS, TOPICS, DeadLetter, contract_schema, feature_names
from pipelines.feature_columns import concat_events
from pipelines.validation import validate

__all__ = ["FileRows", "RejectedRow", "read_event_file", "read_malformed_file", "row_as_json"]

_LINES_AT_ONCE = 16_384


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be used.

    Attributes
    ----------
    letter : DeadLetter
    kind : int
        Kind of the topic or file that it belongs to.
    payload : bytes
        The row as JSON, as it would be sent; no reader of the contract accepts it.
    arrival_time : int
        When it became known, ms; -1 where nothing in its file tells.
    """

    letter: DeadLetter
    kind: int
    payload: bytes
    arrival_time: int


@dataclass(frozen=True)
class FileRows:
    """Rows of one kind from one file, good ones as a conformed table; both in file order."""

    kind: int
    table: pa.Table
    rejected: list[RejectedRow]


def read_event_file(kind: int, path: Path) -> FileRows:
    """Read and validate a ``.jsonl`` or ``.parquet`` file of one kind.

    Raises
    ------
    DataError
        If the file cannot be read, or lacks a column or has one of a wrong type.
    """
    if path.suffix == ".parquet":
        return _read_parquet(kind, path)
    return _read_lines(kind, path)


def _read_parquet(kind: int, path: Path) -> FileRows:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = None if kind == IMPRESSION else [n for n in contract_schema(kind).names if n in names]
            table = file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error}.") from error
    table = conform(kind, table, str(path))
    ok, reasons = validate(kind, table)
    payloads = {row: row_as_json(kind, table, row) for row in reasons}
    good = table if ok.all() else table.filter(pa.array(ok))
    return FileRows(kind, good, _rejected(kind, path.name, good, np.flatnonzero(ok), reasons, payloads))


def _read_lines(kind: int, path: Path) -> FileRows:
    tables: list[pa.Table] = []
    numbers: list[NDArray[np.int64]] = []
    reasons: dict[int, str] = {}
    payloads: dict[int, bytes] = {}
    try:
        for lines in _batches(path):
            number = np.fromiter(lines, np.int64, len(lines))
            texts = [*lines.values()]
            table, row, faults = usable_rows(kind, decode_json(kind, texts))
            tables.append(table)
            numbers.append(number[row])
            reasons |= {int(number[fault]): reason for fault, reason in faults.items()}
            payloads |= {int(number[fault]): texts[fault] for fault in faults}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if not tables:
        return FileRows(kind, contract_schema(kind).empty_table(), [])
    table = concat_events(kind, tables)
    return FileRows(
        kind, table, _rejected(kind, path.name, table, np.concatenate(numbers), reasons, payloads)
    )


def _batches(path: Path) -> Iterator[dict[int, bytes]]:
    """Lines that are not blank by their number, counted from 0."""
    with path.open("rb") as file:
        numbered = enumerate(file)
        while lines := dict(islice(numbered, _LINES_AT_ONCE)):
            filled = {number: line.rstrip(b"\n") for number, line in lines.items() if not line.isspace()}
            if filled:
                yield filled


def usable_rows(kind: int, decoded: Decoded) -> tuple[pa.Table, NDArray[np.int64], dict[int, str]]:
    """Rows that are both readable and valid, their input rows, and why each other row is neither."""
    ok, reasons = validate(kind, decoded.table)
    if ok.all():
        return decoded.table, decoded.row, decoded.rejected
    faults = {int(decoded.row[row]): reason for row, reason in reasons.items()}
    return decoded.table.filter(pa.array(ok)), decoded.row[ok], decoded.rejected | faults


def _rejected(
    kind: int,
    source: str,
    good: pa.Table,
    good_number: NDArray[np.int64],
    reasons: dict[int, str],
    payloads: dict[int, bytes],
) -> list[RejectedRow]:
    """Each became known when the good row before it did; the first ones, when the first good row did."""
    if not reasons:
        return []
    arrival = good.column("arrival_time").to_numpy()
    before = np.searchsorted(good_number, sorted(reasons)) - 1
    known = arrival[np.maximum(before, 0)] if len(arrival) else np.full(len(before), -1)
    return [
        RejectedRow(
            _letter(source, number, reasons[number], payloads[number]), kind, payloads[number], int(time)
        )
        for number, time in zip(sorted(reasons), known, strict=True)
    ]


def _letter(source: str, number: int, reason: str, payload: bytes) -> DeadLetter:
    return DeadLetter(source, 0, number, 0, reason, payload.decode(errors="replace"))


def read_malformed_file(path: Path) -> list[FileRows]:
    """Read raw messages: lines of ``topic``, ``value`` and ``arrival_time``.

    A message that the contract accepts after all is an event like any other.

    Returns
    -------
    list of FileRows
        One for each kind; sources are named ``malformed.jsonl:TOPIC``.
    """
    values: list[list[bytes]] = [[] for _ in TOPICS]
    numbers: list[list[int]] = [[] for _ in TOPICS]
    times: list[list[int]] = [[] for _ in TOPICS]
    for number, line in enumerate(path.read_bytes().splitlines()):
        kind, value, arrival_time = _malformed_line(path, number, line)
        values[kind].append(value)
        numbers[kind].append(number)
        times[kind].append(arrival_time)
    return [
        _malformed_rows(kind, f"{path.name}:{topic}", values[kind], numbers[kind], times[kind])
        for kind, topic in enumerate(TOPICS)
    ]


def _malformed_line(path: Path, number: int, line: bytes) -> tuple[int, bytes, int]:
    try:
        message = orjson.loads(line)
        kind, value, arrival_time = TOPICS.index(message["topic"]), message["value"], message["arrival_time"]
        if isinstance(arrival_time, int) and arrival_time >= 0:
            return kind, value.encode(), arrival_time
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # reported below, like a time that is none
    raise DataError(
        f"{path} line {number + 1}: expected an object with topic (one of {', '.join(TOPICS)}), "
        f"value (text) and arrival_time (ms). Received: {line[:200].decode(errors='replace')}."
    )


def _malformed_rows(
    kind: int, source: str, values: list[bytes], numbers: Sequence[int], times: Sequence[int]
) -> FileRows:
    table, _, faults = usable_rows(kind, decode_json(kind, values))
    rejected = [
        RejectedRow(_letter(source, numbers[row], faults[row], values[row]), kind, values[row], times[row])
        for row in sorted(faults)
    ]
    return FileRows(kind, table, rejected)


def row_as_json(kind: int, table: pa.Table, row: int) -> bytes:
    """One row as the JSON event that it would be, NaN and all: for rows that break the contract."""
    values: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
    event = {name: values[name] for name in contract_schema(kind).names if values[name] is not None}
    if kind == IMPRESSION:
        served = {name[7:]: values[name] for name in SERVED_COLUMNS if values.get(name) is not None}
        event |= {"served": served} if served else {}
        features = feature_names(table)
        event["features"] = {name: values[name] for name in features if values[name] is not None}
    # json, not orjson: NaN stays NaN and the message as unusable as the row.
    return json.dumps(event, separators=(",", ":")).encode()
