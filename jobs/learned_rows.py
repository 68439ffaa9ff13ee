"""Which impressions were learned from, in which step, with which label: what the ledger keeps of each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.online import OnlineLoop
from pipelines.joined import Joined
from pipelines.joiner import TASKS

__all__ = ["LEARNED_SCHEMA", "LearnedRows"]

LEARNED_SCHEMA = pa.schema(
    [
        ("key_low", pa.uint64()),
        ("key_high", pa.uint64()),
        ("outcome", pa.uint64()),
        ("step", pa.int64()),
        ("task", pa.int8()),
        ("said", pa.int8()),
        ("label", pa.float32()),
    ]
)


class LearnedRows:
    """Collects the rows of steps until a commit takes them."""

    def __init__(self) -> None:
        self._parts: list[pa.RecordBatch] = []

    def add(self, joined: Joined, loop: OnlineLoop) -> None:
        """Note what the step that the loop has just made has learned."""
        for task in loop.tasks:
            index = TASKS.index(task)
            rows = joined.examples[index]
            if len(rows) == 0:
                continue
            keys = loop.joiner.keys_of(rows.slot)
            # What an outcome is told apart by; a row without one has none.
            first = loop.joiner.windows[index].first_hash[rows.slot]
            columns = [
                keys[:, 0],
                keys[:, 1],
                np.where(rows.label > 0, first, np.uint64(0)),
                np.full(len(rows), loop.step_number - 1),
                np.full(len(rows), index, np.int8),
                rows.kind.astype(np.int8),
                rows.label.astype(np.float32),
            ]
            self._parts.append(pa.record_batch(columns, schema=LEARNED_SCHEMA))

    def take(self) -> list[pa.RecordBatch]:
        """What was noted since the last call."""
        parts, self._parts = self._parts, []
        return parts
