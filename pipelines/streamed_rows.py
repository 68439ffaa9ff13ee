"""Training rows that stay in their files, in the order of time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from pipelines.config import Task
from pipelines.sample_stream import SampleStream
from pipelines.snapshot import data_files, read_manifest, read_spec, verify_files
from pipelines.stream_columns import to_training_set
from pipelines.stream_files import DataFile
from pipelines.training_set import TrainingSet

__all__ = ["StreamedRows"]

_LOADED_ROWS = 65_536
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class StreamedRows:
    """Rows ordered by ``(event_time, sample_id)`` of which a few MiB are in memory: a `TrainingRows`.

    Parameters
    ----------
    stream : SampleStream
        Of all columns of a training set, in time order.
    """

    stream: SampleStream

    @classmethod
    def of(cls, files: Sequence[DataFile], matrices: Mapping[str, int]) -> Self:
        """Rows of files that are each sorted; ``matrices`` gives the widths of the three matrices."""
        return cls(SampleStream.of(files, matrices=matrices).in_time_order())

    @classmethod
    def of_snapshot(cls, location: str | Path, task: Task, *, verify: bool = True) -> Self:
        """The rows that `pipelines.snapshot.read_snapshot` loads, in the same order.

        Raises
        ------
        DataError
            If the snapshot is incomplete or altered, or has no rows of the task.
        """
        manifest = read_manifest(location)
        files = data_files(location, task, manifest)
        if verify:
            verify_files(location, manifest, task)
        spec = read_spec(location)
        widths = {
            "buckets": len(spec.column_field),
            "numbers": len(spec.numeric),
            "segment_key": len(manifest.segments),
        }
        return cls.of(files, widths)

    def __len__(self) -> int:
        return self.stream.epoch_rows

    @property
    def segments(self) -> int:
        """Columns of ``segment_key``."""
        return int(self.stream.schema.field("segment_key").type.list_size)

    def batches(self, rows: int) -> Iterable[TrainingSet]:
        """All rows from the first on, so many at a time, decoded ahead of time in a thread."""
        return self.stream.batch(rows).map(to_training_set).prefetch(_BATCHES_AHEAD)

    def filter(self, column: str, low: Any = None, high: Any = None) -> Self:
        """Rows with ``low <= column < high``; None is no bound."""
        return type(self)(self.stream.filter(column, low, high))

    def part(self, first: int, last: int | None = None) -> Self:
        """Rows ``[first, last)``."""
        return type(self)(self.stream.part(first, last))

    def load(self) -> TrainingSet:
        """All rows, in memory."""
        nothing = pa.RecordBatch.from_pylist([], self.stream.schema)
        return to_training_set(pa.concat_batches([nothing, *self.stream.batch(_LOADED_ROWS)]))
