"""From joined impressions to sample rows: the one extraction code, run by Spark through ``mapInArrow``.

Labels are native Spark's; Python sees a batch of joined impressions, encodes each once and emits a row for
each of its tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.codec import with_features_from_json
from pipelines.config import Task
from pipelines.delay import DelayCurve
from pipelines.feature_spec import FeatureSpec
from pipelines.features import Encoded, encode
from pipelines.misfits import find_misfits
from pipelines.snapshot import SAMPLE_SCHEMA

__all__ = ["SampleEncoding", "TaskWindow", "sample_rows"]

_IMPRESSION = ("user_id", "item_id", "position", "event_time", "features")


@dataclass(frozen=True)
class TaskWindow:
    """Label window of a task, ms: its ``width``, and how long after it outcomes still count; their delays."""

    width: int
    lateness: int
    curve: DelayCurve

    @property
    def horizon(self) -> int:
        """Age (ms) beyond which nothing more is credited."""
        return self.width + self.lateness


@dataclass(frozen=True)
class SampleEncoding:
    """All that the encoding of a snapshot needs; travels to the Spark workers."""

    as_of: int
    spec: FeatureSpec
    segments: tuple[str, ...]
    tasks: Mapping[Task, TaskWindow]
    negative_rate: float


def sample_rows(batches: Iterable[pa.RecordBatch], encoding: SampleEncoding) -> Iterator[pa.RecordBatch]:
    """Encode joined impressions.

    Parameters
    ----------
    batches : iterable of RecordBatch
        ``impression_id, user_id, item_id, position, event_time, features`` (JSON) and for each task
        ``<task>_opened`` (null: no row), ``<task>_label``, ``<task>_known``, ``<task>_mature``, as
        `pipelines.sample_join.join_samples` gives them.
    encoding : SampleEncoding

    Yields
    ------
    RecordBatch
        Rows of `pipelines.snapshot.SAMPLE_SCHEMA`. Impressions that do not fit the spec give none, as in
        the worker.
    """
    for batch in batches:
        table = pa.Table.from_batches([batch])
        # The task columns stay out of the way of features that bear the same names.
        impressions = with_features_from_json(table.select(_IMPRESSION), "features")
        misfits = find_misfits(impressions, encoding.spec)
        if misfits:
            fits = np.ones(table.num_rows, np.bool_)
            fits[list(misfits)] = False
            table, impressions = table.filter(pa.array(fits)), impressions.filter(pa.array(fits))
        encoded = encode(impressions, encoding.spec, encoding.segments)
        for task, window in encoding.tasks.items():
            rows = np.flatnonzero(table.column(f"{task}_opened").is_valid().to_numpy())
            if len(rows):
                yield _task_rows(task, window, table, encoded, rows, encoding)


def _task_rows(
    task: Task,
    window: TaskWindow,
    table: pa.Table,
    encoded: Encoded,
    rows: NDArray[np.int64],
    encoding: SampleEncoding,
) -> pa.RecordBatch:
    n, chosen = len(rows), table.take(pa.array(rows))
    label = chosen.column(f"{task}_label").to_numpy()
    opened = chosen.column(f"{task}_opened").to_numpy()
    mature = chosen.column(f"{task}_mature").to_numpy()
    age = encoding.as_of - opened
    share = np.where(mature, 1.0, window.curve.cdf(np.minimum(age, window.horizon)))
    rate = encoding.negative_rate
    columns: dict[str, Any] = {
        "sample_id": pc.binary_join_element_wise(chosen.column("impression_id"), task, ":"),
        "task": pa.array([task] * n, pa.string()),
        "kind": pa.array(["first"] * n, pa.string()),
        "label": label.astype(np.int8),
        "label_version": np.zeros(n, np.int32),
        "event_time": opened,
        "known_at": np.full(n, encoding.as_of, np.int64),
        "outcome_known_at": chosen.column(f"{task}_known"),
        "elapsed": np.minimum(age, window.width),
        "mature": mature,
        # A kept negative stands for 1 / rate of its kind.
        "weight": np.where(label == 1, 1.0, 1.0 / rate).astype(np.float32),
        "negative_sampling_rate": np.full(n, rate, np.float32),
        "observed_share": share.astype(np.float32),
        "user_key": encoded.user_key[rows],
        "segment_key": _lists(encoded.segment_key[rows]),
        "buckets": _lists(encoded.buckets[rows]),
        "numbers": _lists(encoded.numbers[rows]),
    }
    columns |= {name: chosen.column(name) for name in ("impression_id", "user_id", "item_id", "position")}
    arrays = [_one_chunk(columns[field.name], field.type) for field in SAMPLE_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SAMPLE_SCHEMA)


def _one_chunk(values: Any, wanted: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks().cast(wanted)
    return values if isinstance(values, pa.Array) else pa.array(values, wanted)


def _lists(matrix: NDArray[Any]) -> pa.Array:
    n, width = matrix.shape
    ends = pa.array(np.arange(n + 1, dtype=np.int32) * np.int32(width))
    return pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(matrix).reshape(-1)))
