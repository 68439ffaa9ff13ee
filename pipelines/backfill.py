"""Rows of the lake in place of messages that the broker has deleted.

They are merged with what the broker still has as if they had come from it: what is learned is the same to the
bit. The offsets in the manifests say whether the lake has every message; it is asked before anything is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.conform import conform
from pipelines.cursor import Cursor, TopicPartition
from pipelines.errors import DataError
from pipelines.events import DEAD_LETTER, IMPRESSION, SERVED_COLUMNS, TOPICS, DeadLetter, contract_schema
from pipelines.hashing import hash_column
from pipelines.json_decoding import with_features_from_json
from pipelines.kafka_rows import DecodedBatch, Keyed, Rows
from pipelines.lake import OffsetRange, committed_batches
from pipelines.lake_offsets import find_offsets, tell
from pipelines.lake_rows import DEAD_LETTER_KIND
from pipelines.lake_spool import LakeSpool
from pipelines.merge import UNKNOWN_TIME
from pipelines.storage import open_folder

__all__ = ["Backfill", "PastRows"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backfill:
    """Where to look for messages that the broker has deleted.

    Attributes
    ----------
    lake : str or Path
        Path or URI of a lake that `ctrstream samples ingest` fills from the same topics.
    scratch : Path
        Folder for rows on their way, made and removed.
    """

    lake: str | Path
    scratch: Path

    def past(self, gaps: Sequence[OffsetRange]) -> tuple[LakeSpool, Sequence[OffsetRange]]:
        """The messages of some gaps, in order, and the gaps.

        Raises
        ------
        DataError
            If the lake has not every one of them, naming those that it lacks.
        """
        folder = open_folder(self.lake)
        batches = [batch for batch in committed_batches(folder) if batch.source == "kafka"]
        held, missing = find_offsets(gaps, batches)
        if missing:
            lacking = sum(part.messages for part in missing)
            raise DataError(
                f"the broker has deleted messages that were not read yet, and the lake {self.lake} lacks "
                f"{lacking} of them. {tell(missing)}.",
                hint="is it the lake of these topics? What neither has is lost: train first releases anew "
                "from snapshots that end after these offsets, and start from them with a new --state folder",
            )
        log.info("backfill from %s: %s", self.lake, tell(gaps))
        spool = LakeSpool(folder, batches, held, self.scratch)
        log.info("backfill: %d rows are ready", spool.rows)
        return spool, gaps


class PastRows:
    """Rows of the lake for partitions that the broker cannot give yet, in the form of its own."""

    def __init__(self) -> None:
        self._rows: dict[int, Iterator[Keyed]] = {}
        self._stop: dict[int, int] = {}
        self._spools: list[LakeSpool] = []

    def add(
        self,
        found: tuple[LakeSpool, Sequence[OffsetRange]],
        partitions: Sequence[TopicPartition],
        kinds: Mapping[str, int],
        start: Cursor,
    ) -> None:
        """Take up what `Backfill.past` found.

        Parameters
        ----------
        found : tuple of LakeSpool and sequence of OffsetRange
        partitions : sequence of (str, int)
            A partition's number is its place in it.
        kinds : mapping of str to int
            Kind of event by topic.
        start : Cursor
            Where each gap begins: rows of its first message may have been applied already.
        """
        spool, gaps = found
        self._spools.append(spool)
        for gap in gaps:
            part = gap.topic, gap.partition
            index = partitions.index(part)
            self._rows[index] = _read(spool, index, kinds[gap.topic], gap, start[part].row)
            self._stop[index] = gap.stop

    def indices(self) -> list[int]:
        """Numbers of the partitions that are still to be read here."""
        return list(self._rows)

    def next(self, index: int) -> Keyed | None:
        """The next rows of a partition; None at the end of its gap."""
        return next(self._rows[index], None)

    def finish(self, index: int) -> int:
        """Leave a partition to the broker; the offset from which on."""
        del self._rows[index]
        if not self._rows:
            self.close()
        return self._stop.pop(index)

    def close(self) -> None:
        """Remove what is on disk."""
        while self._spools:
            self._spools.pop().close()


def _read(spool: LakeSpool, index: int, kind: int, gap: OffsetRange, skip: int) -> Iterator[Keyed]:
    for table in spool.read(gap.topic, gap.partition):
        yield _keyed(index, kind, gap, table, skip)


def _keyed(index: int, kind: int, gap: OffsetRange, table: pa.Table, skip: int) -> Keyed:
    """Rows of one partition, as `pipelines.kafka_rows.decode_polled` gives those of messages."""
    offset, row = table.column("offset").to_numpy(), table.column("row").to_numpy()
    is_dead = np.asarray(pc.equal(table.column("kind"), DEAD_LETTER_KIND))
    good, dead = table.filter(pa.array(~is_dead)), table.filter(pa.array(is_dead))
    events, letters = _events(kind, good), _letters(kind, gap, dead)
    kinds = np.where(is_dead, DEAD_LETTER, kind).astype(np.int8)
    place, arrival = np.zeros(len(kinds), np.int64), np.zeros(len(kinds), np.int64)
    hashes = np.zeros(len(kinds), np.uint64)
    place[~is_dead], place[is_dead] = np.arange(len(events)), np.arange(len(letters))
    arrival[~is_dead] = good.column("arrival_time").to_numpy()
    arrival[is_dead] = pc.fill_null(dead.column("told_arrival"), UNKNOWN_TIME).to_numpy()
    hashes[~is_dead] = hash_column(good.column("event_id"))
    # Before the lake kept hashes of payloads: the text's, which is the bytes' where they are text.
    texts = hash_column(pa.array([letter.payload for letter in letters], pa.string())).view(np.int64)
    own = pc.coalesce(dead.column("payload_hash"), pa.array(texts, pa.int64()))
    hashes[is_dead] = own.to_numpy().view(np.uint64)
    received = pc.coalesce(table.column("received_at"), table.column("arrival_time"))
    packed, counts = np.unique(offset[row > 0], return_counts=True)
    rows = Rows(
        DecodedBatch(kind, events, letters), kinds, place, offset, row, pc.fill_null(received, 0).to_numpy()
    )
    begin = int(((offset == gap.start) & (row < skip)).sum())
    return Keyed(
        index,
        rows.rows(begin),
        arrival[begin:],
        hashes[begin:],
        dict(zip(packed.tolist(), (counts + 1).tolist(), strict=True)),
    )


def _events(kind: int, rows: pa.Table) -> pa.Table:
    """Events in the contract's form."""
    names = contract_schema(kind).names
    if kind != IMPRESSION:
        return conform(kind, rows.select(names))
    return conform(
        kind, with_features_from_json(rows.select([*names, *SERVED_COLUMNS, "features"]), "features")
    )


def _letters(kind: int, gap: OffsetRange, rows: pa.Table) -> list[DeadLetter]:
    columns = (rows.column(name).to_pylist() for name in ("offset", "row", "reason", "payload"))
    return [
        # The worker knows by the topic what the lake says before each reason.
        DeadLetter(
            gap.topic, gap.partition, offset, row, reason.removeprefix(f"{TOPICS[kind]}: "), payload or ""
        )
        for offset, row, reason, payload in zip(*columns, strict=True)
    ]
