"""Cut a stream of event blocks into steps of a fixed number of input rows.

Where steps are cut decides what is learned together, so it must follow from the log alone and not from
how the blocks happened to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from jobs.prepared import PreparedBlock, StepEvents
from pipelines.events import DEAD_LETTER, EventBlock

__all__ = ["WARM_UP_ROWS", "StepCutter"]

# Nothing is learned during the warm-up, so its steps may be long.
WARM_UP_ROWS = 4096


class StepCutter:
    """Cuts blocks into steps.

    Parameters
    ----------
    prepare : callable
        Makes a block ready (`jobs.prepared.prepare`).
    batch_rows : int
        Events of a step once learning has begun; dead letters are not counted.
    begins_at : int
        Arrival time at which learning begins, ms: a step ends there.
    """

    def __init__(
        self, prepare: Callable[[EventBlock], PreparedBlock], batch_rows: int, begins_at: int
    ) -> None:
        self._prepare, self._batch_rows, self.begins_at = prepare, batch_rows, begins_at
        self._left: EventBlock | None = None

    def feed(self, block: EventBlock, *, is_last: bool = False) -> Iterator[StepEvents]:
        """Steps that are complete; ``is_last`` gives what is left as well."""
        if self._left is not None:
            block = EventBlock.concat([self._left, block])
            self._left = None
        begin = int(np.searchsorted(block.arrival_time, self.begins_at, side="left"))
        is_warm = begin < len(block) or is_last
        yield from self._cut(block.slice(0, begin), WARM_UP_ROWS, is_whole=is_warm)
        if begin < len(block):
            yield from self._cut(block.slice(begin, len(block)), self._batch_rows, is_whole=is_last)

    def flush(self) -> Iterator[StepEvents]:
        """What is left, as a short step: the log has ended, or has been silent for too long to wait."""
        if self._left is not None:
            left, self._left = self._left, None
            yield from self.feed(left, is_last=True)

    def _cut(self, block: EventBlock, rows: int, *, is_whole: bool) -> Iterator[StepEvents]:
        # Dead letters do not count: where they stand must not decide what is learned together.
        good = np.cumsum(block.kind != DEAD_LETTER)
        total = int(good[-1]) if len(block) else 0
        ends = (np.searchsorted(good, np.arange(rows, total + 1, rows)) + 1).tolist()
        if is_whole and (not ends or ends[-1] < len(block)):
            ends.append(len(block))
        end = ends[-1] if ends else 0
        if end:
            prepared = self._prepare(block.slice(0, end))
            for start, stop in zip([0, *ends[:-1]], ends, strict=True):
                if stop > start:
                    yield prepared.step(start, stop)
        if end < len(block):
            self._left = block.slice(end, len(block))
