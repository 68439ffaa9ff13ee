"""A block of events made ready for the loop: features encoded, teacher asked, ids and times unpacked.

Nothing here depends on what the student has learned, so it is done for thousands of rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import Task
from pipelines.events import CLICK, CONVERSION, DEAD_LETTER, IMPRESSION, OPERATIONS, DeadLetter, EventBlock
from pipelines.feature_spec import FeatureSpec
from pipelines.features import Encoded, encode
from pipelines.hashing import hash_column
from pipelines.joined import Arrivals, Outcomes

__all__ = ["FrozenModels", "PreparedBlock", "StepEvents", "StepSource", "Teacher", "prepare"]

Ints = NDArray[np.int64]


class Teacher(Protocol):
    """A frozen model with its calibrator."""

    def calibrated_logit(
        self,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: Ints,
        ids: Ints | None = None,
    ) -> NDArray[np.float64]:
        """Calibrated log-odds of each row, shape (n,)."""
        ...


@dataclass(frozen=True)
class FrozenModels:
    """What is asked about every impression and never learns, by task, in the order of the loop's tasks."""

    teachers: Mapping[Task, Teacher] = field(default_factory=dict)
    stale: Mapping[Task, Teacher] = field(default_factory=dict)

    @staticmethod
    def ask(models: Mapping[Task, Teacher], features: Encoded) -> NDArray[np.float64]:
        """Calibrated logits, (n, tasks)."""
        logit = np.full((len(features), len(models)), np.nan)
        if len(features):
            for column, model in enumerate(models.values()):
                logit[:, column] = model.calibrated_logit(
                    features.buckets, features.numbers, features.segment_key, features.ids
                )
        return logit


@dataclass(frozen=True)
class StepSource:
    """Where the rows of a step were read, in order: see `pipelines.events.EventBlock`."""

    partition: NDArray[np.int32]
    offset: Ints
    row: NDArray[np.int32]
    arrival_time: Ints
    produced_at: Ints | None
    event_hash: NDArray[np.uint64] | None


@dataclass(frozen=True)
class StepEvents:
    """One step: up to ``batch_rows`` events in arrival order, by kind; times in ms.

    ``teacher_logit`` and ``stale_logit`` (the first student, never updated) are calibrated, (impressions,
    tasks). ``read`` counts rows by kind, dead letters with
    the kind of their topic. ``clock`` is the arrival time of the last event, -1 if there are only dead
    letters. ``nulls`` says of each feature of the spec which impressions have no value, (impressions,); one
    that all of the block's have is left out. ``raw`` gives the rows as they were read.
    """

    arrivals: Arrivals
    clicks: Outcomes
    conversions: Outcomes
    teacher_logit: NDArray[np.float64]
    stale_logit: NDArray[np.float64]
    dead_letters: list[DeadLetter]
    read: dict[int, int]
    clock: int
    source: StepSource
    nulls: dict[str, NDArray[np.bool_]]
    raw: Callable[[], EventBlock]


@dataclass(frozen=True)
class PreparedBlock:
    """An event block with everything that does not depend on the student."""

    block: EventBlock
    features: Encoded
    teacher_logit: NDArray[np.float64]
    stale_logit: NDArray[np.float64]
    arrivals: Arrivals
    clicks: Outcomes
    conversions: Outcomes
    dead_letter_kind: list[int]
    before: NDArray[np.int64]
    nulls: dict[str, NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.block)

    def step(self, start: int, stop: int) -> StepEvents:
        """Input rows ``[start, stop)`` of the block."""
        (i0, c0, v0, d0), (i1, c1, v1, d1) = self.before[start].tolist(), self.before[stop].tolist()
        read = {IMPRESSION: i1 - i0, CLICK: c1 - c0, CONVERSION: v1 - v0}
        for kind in self.dead_letter_kind[d0:d1]:
            read[kind] += 1
        impressions = slice(i0, i1)
        return StepEvents(
            arrivals=self.arrivals.slice(i0, i1),
            clicks=self.clicks.slice(c0, c1),
            conversions=self.conversions.slice(v0, v1),
            teacher_logit=self.teacher_logit[impressions],
            stale_logit=self.stale_logit[impressions],
            dead_letters=self.block.dead_letters[d0:d1],
            read=read,
            clock=self._clock(start, stop),
            source=self._source(start, stop),
            nulls={name: is_null[impressions] for name, is_null in self.nulls.items()},
            raw=lambda: self.block.slice(start, stop),
        )

    def _clock(self, start: int, stop: int) -> int:
        good = np.flatnonzero(self.block.kind[start:stop] != DEAD_LETTER)
        return int(self.block.arrival_time[start + good[-1]]) if len(good) else -1

    def _source(self, start: int, stop: int) -> StepSource:
        block, rows = self.block, slice(start, stop)
        return StepSource(
            block.partition[rows],
            block.offset[rows],
            block.row[rows],
            block.arrival_time[rows],
            None if block.produced_at is None else block.produced_at[rows],
            None if block.event_hash is None else block.event_hash[rows],
        )


def prepare(
    block: EventBlock,
    spec: FeatureSpec,
    segments: tuple[str, ...],
    frozen: FrozenModels,
    kind_of_source: Mapping[str, int],
) -> PreparedBlock:
    """Encode a block's impressions and ask the frozen models.

    ``kind_of_source`` gives the event kind of each topic or file that a dead letter can come from.
    """
    features = encode(block.tables[IMPRESSION], spec, segments)
    teacher_logit = frozen.ask(frozen.teachers, features)
    arrival = [block.arrival_time[block.kind == kind] for kind in range(3)]
    before = np.zeros((len(block) + 1, 4), np.int64)
    for kind in range(4):
        np.cumsum(block.kind == kind, out=before[1:, kind])
    travelling: dict[str, NDArray[Any]] = {
        "buckets": features.buckets,
        "numbers": features.numbers,
        "segment_key": features.segment_key,
        "user_key": features.user_key,
        "teacher_logit": teacher_logit.astype(np.float32),
    }
    if spec.dynamic:
        travelling["ids"] = features.ids
    impressions = block.tables[IMPRESSION]
    return PreparedBlock(
        block=block,
        features=features,
        teacher_logit=teacher_logit,
        stale_logit=frozen.ask(frozen.stale, features),
        arrivals=Arrivals(
            impressions.column("impression_id").to_pylist(),
            _times(impressions),
            arrival[IMPRESSION],
            travelling,
        ),
        clicks=_outcomes(block, CLICK, arrival[CLICK]),
        conversions=_outcomes(block, CONVERSION, arrival[CONVERSION]),
        dead_letter_kind=[kind_of_source[letter.source] for letter in block.dead_letters],
        before=before,
        nulls=_nulls(impressions, spec),
    )


def _nulls(impressions: pa.Table, spec: FeatureSpec) -> dict[str, NDArray[np.bool_]]:
    """By feature, which rows have no value; features of which all rows have one are left out."""
    rows, found = impressions.num_rows, {}
    names = [part.name for part in spec.categorical]
    names += [*(part.name for part in spec.numeric), *(part.name for part in spec.sequence)]
    for name in names if rows else ():
        if name not in impressions.column_names:
            found[name] = np.ones(rows, np.bool_)
        elif (column := impressions.column(name)).null_count:
            found[name] = column.is_null().to_numpy()
    return found


def _times(table: pa.Table) -> Ints:
    return np.asarray(table.column("event_time").to_numpy(), np.int64)


def _outcomes(block: EventBlock, kind: int, arrival: Ints) -> Outcomes:
    table = block.tables[kind]
    rows = block.kind == kind
    op, credit = np.zeros(table.num_rows, np.int8), np.ones(table.num_rows)
    if kind == CONVERSION and table.num_rows:
        named = pc.index_in(table.column("op"), value_set=pa.array(OPERATIONS))
        op = named.to_numpy().astype(np.int8)
        credit = pc.fill_null(table.column("credit"), 1.0).to_numpy()
    position = np.stack([block.partition[rows], block.offset[rows], block.row[rows]], axis=1)
    return Outcomes(
        table.column("impression_id").to_pylist(),
        _times(table),
        arrival,
        hash_column(table.column("event_id")) if table.num_rows else np.zeros(0, np.uint64),
        op,
        credit,
        position.astype(np.int64),
    )
