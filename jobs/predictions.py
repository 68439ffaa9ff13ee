"""The record of predictions: one row for each impression and task, in Parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.disk_errors import disk_errors
from jobs.online import Predicted
from models.base import sigmoid
from pipelines.synced_files import replacing

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

    def take(self) -> list[tuple[Predicted, str]]:
        """What was recorded since the last call, for `write_segment`."""
        parts, self._parts = self._parts, []
        return parts

    def drain(self) -> pa.Table | None:
        """What was recorded since the last call, by task and in order of arrival; None if nothing was."""
        return self._table(self.take())

    def _table(self, parts: list[tuple[Predicted, str]]) -> pa.Table | None:
        if not parts:
            return None
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
        return _once(pa.concat_tables(tables).unify_dictionaries())

    def write_segment(
        self, parts: list[tuple[Predicted, str]], first_step: int, last_step: int, epoch: int
    ) -> str | None:
        """Make what `take` gave durable; returns the segment's name.

        A worker of another ``epoch`` writes files of its own, so that one that has been fenced, and does not
        know it yet, replaces nothing that a commit has named.

        Raises
        ------
        SetupError
            If the disk refuses the write.
        """
        table = self._table(parts)
        if table is None:
            return None
        name = f"{first_step:012d}-{last_step:012d}-{epoch:06d}.parquet"
        temporary = self.folder / f".tmp-{name}"
        with disk_errors("predictions", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / name, temporary):
                pq.write_table(table, temporary, compression="zstd")
        return name

    def keep_only(self, segments: list[str]) -> None:
        """Remove segments that no commit has named, whole or half-written."""
        for path in (*self.folder.glob("*.parquet"), *self.folder.glob(".tmp-*")):
            if path.name not in segments:
                path.unlink(missing_ok=True)

    def read(self, segments: list[str]) -> pa.Table:
        """All predictions of the named segments, in order, each impression once for each task."""
        tables = [pq.read_table(self.folder / name, schema=PREDICTION_SCHEMA) for name in sorted(segments)]
        return _once(pa.concat_tables(tables)) if tables else PREDICTION_SCHEMA.empty_table()


def _once(table: pa.Table) -> pa.Table:
    """Without the later ones of several predictions of an impression: one redelivered long after."""
    keys = pa.table({"impression_id": table["impression_id"], "task": pc.cast(table["task"], pa.string())})
    keys = keys.append_column("row", pa.array(np.arange(table.num_rows)))
    first = keys.group_by(["impression_id", "task"]).aggregate([("row", "min")])["row_min"].to_numpy()
    return table if len(first) == table.num_rows else table.take(pa.array(np.sort(first)))
