"""The record of predictions: one row for each impression and task, in Parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.checkpoint import sync_folder
from jobs.online import Predicted
from models.base import sigmoid

__all__ = ["PREDICTION_SCHEMA", "PredictionLog"]

PREDICTION_SCHEMA = pa.schema(
    [
        ("impression_id", pa.string()),
        ("task", pa.dictionary(pa.int8(), pa.string())),
        ("predicted_at", pa.int64()),
        ("logit", pa.float64()),
        ("probability", pa.float64()),
        ("release", pa.dictionary(pa.int32(), pa.string())),
        ("arrived_at", pa.int64()),
        ("user_key", pa.int64()),
        ("teacher_probability", pa.float64()),
        ("stale_probability", pa.float64()),
    ]
)


class PredictionLog:
    """Buffers predictions and writes them as immutable segments.

    Parameters
    ----------
    folder : Path
        Where segments go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[tuple[Predicted, str]] = []
        self._tasks: tuple[str, ...] = ()

    def add(self, predicted: Predicted, tasks: tuple[str, ...], release: str) -> None:
        """Record the predictions of one step, made while ``release`` was the newest one."""
        if predicted.impression_id and tasks:
            self._tasks = tasks
            self._parts.append((predicted, release))

    def drain(self) -> pa.Table | None:
        """What was recorded since the last call, by task and in order of arrival; None if nothing was."""
        if not self._parts:
            return None
        parts, self._parts = self._parts, []
        ids = pa.array([name for part, _ in parts for name in part.impression_id], pa.string())
        event_time = np.concatenate([part.event_time for part, _ in parts])
        arrived_at = np.concatenate([part.arrival_time for part, _ in parts])
        user_key = np.concatenate([part.user_key for part, _ in parts])
        releases = [release for part, release in parts for _ in part.impression_id]
        release = pa.array(releases, pa.string()).dictionary_encode()
        tables = []
        for column, task in enumerate(self._tasks):
            logit = np.concatenate([part.logit[:, column] for part, _ in parts])
            probability = np.concatenate([part.probability[:, column] for part, _ in parts])
            teacher = np.concatenate([part.teacher_logit[:, column] for part, _ in parts])
            stale = np.concatenate([part.stale_logit[:, column] for part, _ in parts])
            tables.append(
                pa.Table.from_arrays(
                    [
                        ids,
                        pa.DictionaryArray.from_arrays(
                            pa.array(np.zeros(len(ids), np.int8)), pa.array([task])
                        ),
                        pa.array(event_time),
                        pa.array(logit),
                        pa.array(probability),
                        release,
                        pa.array(arrived_at),
                        pa.array(user_key),
                        pa.array(sigmoid(teacher)),
                        pa.array(sigmoid(stale)),
                    ],
                    schema=PREDICTION_SCHEMA,
                )
            )
        return pa.concat_tables(tables).unify_dictionaries()

    def write_segment(self, first_step: int, last_step: int) -> str | None:
        """Write what was recorded since the last call; returns the segment's name.

        The name follows from the steps alone, so a segment that is written again after a crash replaces
        the one that no commit has named.
        """
        table = self.drain()
        if table is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{first_step:012d}-{last_step:012d}.parquet"
        temporary = self.folder / f".tmp-{name}"
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(self.folder / name)
        sync_folder(self.folder)
        return name

    def keep_only(self, segments: list[str]) -> None:
        """Remove segments that no commit has named."""
        for path in self.folder.glob("*.parquet"):
            if path.name not in segments:
                path.unlink()

    def read(self, segments: list[str]) -> pa.Table:
        """All predictions of the named segments, in order."""
        tables = [pq.read_table(self.folder / name, schema=PREDICTION_SCHEMA) for name in sorted(segments)]
        return pa.concat_tables(tables) if tables else PREDICTION_SCHEMA.empty_table()
