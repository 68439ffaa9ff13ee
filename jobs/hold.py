"""Rows that wait on disk: steps that were read but are not to be learned yet, as they were read.

Steps are collected in memory and sealed into segments, which are written and synced, beside the thread that
reads on, before a checkpoint names them. A segment is five Arrow streams one behind the other: the rows'
places, impressions, clicks, conversions, dead letters. What a crash leaves that no checkpoint names is
removed at the next start.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.disk_errors import disk_errors
from pipelines.errors import StaleStateError
from pipelines.events import DeadLetter, EventBlock
from pipelines.synced_files import replacing

__all__ = ["HeldSegment", "HeldSteps", "Hold"]

# A segment is sealed, and written at once, when this many rows have been collected; or when a commit is due.
_SEGMENT_ROWS = 65_536
_COLUMNS = ("kind", "arrival_time", "partition", "offset", "row", "produced_at", "event_hash")
_LETTERS = pa.schema(
    [
        pa.field(field.name, pa.int64() if field.name in ("partition", "offset", "row") else pa.string())
        for field in fields(DeadLetter)
    ]
)
Partitions = Sequence[tuple[str, int]]


@dataclass
class HeldSegment:
    """Held steps that never change: in memory until they are written, from then on a file.

    Attributes
    ----------
    steps, rows : int
        How many of each.
    sha256 : str or None
        Of the file; None before there is one.
    """

    name: str
    steps: int
    rows: int
    sha256: str | None = None
    _blocks: Sequence[EventBlock] | None = None
    _partitions: Partitions = ()

    @classmethod
    def sealed(cls, name: str, blocks: Sequence[EventBlock], partitions: Partitions) -> HeldSegment:
        """Of the steps ``blocks``, which are not on disk yet."""
        return cls(name, len(blocks), sum(map(len, blocks)), None, blocks, list(partitions))

    def in_memory(self) -> HeldSteps | None:
        """The steps, if they are not on disk yet."""
        blocks = self._blocks
        return None if blocks is None else HeldSteps(EventBlock.concat(blocks), _ends(blocks))

    def write(self, folder: Path) -> None:
        """Make the steps durable; nothing is done a second time.

        Raises
        ------
        SetupError
            If the disk refuses the write; the steps stay in memory.
        """
        if self._blocks is None:
            return
        content = _encode(self._blocks, self._partitions)
        temporary = folder / f".tmp-{self.name}"
        with disk_errors("held rows", folder):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / self.name, temporary):
                temporary.write_bytes(content)
        self.sha256 = hashlib.sha256(content).hexdigest()
        # Last: whoever finds nothing in memory finds the file.
        self._blocks = None

    def told(self) -> dict[str, Any]:
        """What a checkpoint says of the file."""
        return {"name": self.name, "steps": self.steps, "rows": self.rows, "sha256": self.sha256}


@dataclass(frozen=True)
class HeldSteps:
    """Steps of one segment: their rows in order, and where in them each step ends."""

    block: EventBlock
    ends: list[int]


class Hold:
    """Held steps, first in first out.

    Parameters
    ----------
    folder : Path
        Created with the first segment.

    Attributes
    ----------
    segments : list of HeldSegment
        In order; the steps of ``pending`` come behind them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.segments: list[HeldSegment] = []
        self._pending: list[EventBlock] = []

    @property
    def steps(self) -> int:
        """Steps that are held, in segments and in memory."""
        return sum(segment.steps for segment in self.segments) + len(self._pending)

    def add(self, block: EventBlock) -> bool:
        """Hold the rows of one step; whether it is time to `seal` and to write."""
        self._pending.append(block)
        return sum(map(len, self._pending)) >= _SEGMENT_ROWS

    def seal(self, name: str, partitions: Partitions) -> None:
        """Make a segment of the steps that are in none.

        Parameters
        ----------
        name : str
            One that no other segment has.
        partitions : sequence of (str, int)
            Topic and number of the partitions that ``EventBlock.partition`` counts through.
        """
        if self._pending:
            self.segments.append(HeldSegment.sealed(name, self._pending, partitions))
            self._pending = []

    def read(self, segment: HeldSegment, partitions: Partitions) -> HeldSteps:
        """The steps of one segment.

        Raises
        ------
        StaleStateError
            If the file is missing or is not what the checkpoint names, or a partition in it is not read any
            more.
        """
        return segment.in_memory() or _decode(self._content(segment), partitions)

    def has_id(self, segment: HeldSegment, name: str) -> bool:
        """Whether an event with this id, or of the impression with this id, is held in a segment."""
        tables = _tables(self._content(segment))[1:4]
        columns = [table.column(column) for table in tables for column in ("event_id", "impression_id")]
        return any(pc.any(pc.equal(column, name)).as_py() for column in columns if len(column))

    def _content(self, segment: HeldSegment) -> bytes:
        path = self.folder / segment.name
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() != segment.sha256:
            raise StaleStateError(
                f"the held rows in {path} are missing or corrupt.",
                hint="restore the state folder from a backup, or discard what is held: "
                "`ctrstream breaker discard`",
            )
        return content

    def clear(self) -> None:
        """Forget all steps; files go when no checkpoint needs them (`keep_only`)."""
        self.segments, self._pending = [], []

    def keep_only(self, names: Collection[str]) -> None:
        """Remove files that neither a checkpoint (``names``) nor this hold needs."""
        needed = {*names, *(segment.name for segment in self.segments)}
        for path in (*self.folder.glob("*.arrow"), *self.folder.glob(".tmp-*")):
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continue from what a checkpoint tells of each segment (`HeldSegment.told`)."""
        self.segments, self._pending = [HeldSegment(**segment) for segment in state], []


def _ends(steps: Sequence[EventBlock]) -> list[int]:
    return [int(end) for end in np.cumsum([len(step) for step in steps])]


def _encode(steps: Sequence[EventBlock], partitions: Partitions) -> bytes:
    block = EventBlock.concat(steps)
    told = {
        "partitions": [list(partition) for partition in partitions],
        "ends": _ends(steps),
    }
    columns = {name: getattr(block, name) for name in _COLUMNS if getattr(block, name) is not None}
    letters = [asdict(letter) for letter in block.dead_letters]
    places = pa.table(columns).replace_schema_metadata({"hold": json.dumps(told)})
    sink = io.BytesIO()
    for table in (places, *block.tables, pa.Table.from_pylist(letters, _LETTERS)):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _tables(content: bytes) -> list[pa.Table]:
    source = io.BytesIO(content)
    return [pa.ipc.open_stream(source).read_all() for _ in range(5)]


def _decode(content: bytes, partitions: Partitions) -> HeldSteps:
    places, *tables, letters = _tables(content)
    told = json.loads(places.schema.metadata[b"hold"])
    columns = {name: places.column(name).to_numpy() for name in places.column_names}
    known = {partition: index for index, partition in enumerate(partitions)}
    written = [(str(topic), int(partition)) for topic, partition in told["partitions"]]
    missing = [written[index] for index in np.unique(columns["partition"]) if written[index] not in known]
    if missing:
        raise StaleStateError(
            f"held rows are of partitions that are not read any more: {missing}.",
            hint="name the topics that they were read from in [kafka.topics]",
        )
    # Partitions may have been added since: they are told by name.
    place_of = np.array([known.get(partition, -1) for partition in written], np.int32)
    columns["partition"] = place_of[columns["partition"]]
    block = EventBlock(
        tables=(tables[0], tables[1], tables[2]),
        dead_letters=[DeadLetter(**letter) for letter in letters.to_pylist()],
        **columns,
    )
    return HeldSteps(block, [int(end) for end in told["ends"]])
