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
from pipelines.delay_model import DelayModel
from pipelines.feature_spec import FeatureSpec
from pipelines.features import Encoded, encode
from pipelines.misfits import find_misfits
from pipelines.snapshot import SAMPLE_SCHEMA

__all__ = ["WRITTEN_SCHEMA", "SampleEncoding", "TaskWindow", "sample_rows"]

_IMPRESSION = ("user_id", "item_id", "position", "event_time", "features")
# Where a row is stored: slice of its impression, and by how many partitions it lies later than that.
WRITTEN_SCHEMA = SAMPLE_SCHEMA.append(pa.field("stored_in", pa.int32()))
_SPILLS = 100


@dataclass(frozen=True)
class TaskWindow:
    """Label window of a task, ms: its ``width``, how long after it outcomes still count, and their delays."""

    width: int
    lateness: int
    delay: DelayModel

    @property
    def horizon(self) -> int:
        """Age (ms) beyond which nothing more is credited."""
        return self.width + self.lateness


@dataclass(frozen=True)
class SampleEncoding:
    """All that the encoding of a snapshot needs; travels to the Spark workers.

    ``partition_width`` (ms) is the length of a partition; of the negatives the share ``negative_rate`` has
    been kept; positives are written ``positive_copies`` times, impressions with a propensity
    ``exploration_copies`` times, whichever is more.
    """

    as_of: int
    spec: FeatureSpec
    segments: tuple[str, ...]
    tasks: Mapping[Task, TaskWindow]
    negative_rate: float = 1.0
    positive_copies: int = 1
    exploration_copies: int = 1
    partition_width: int = 86_400_000


def sample_rows(batches: Iterable[pa.RecordBatch], encoding: SampleEncoding) -> Iterator[pa.RecordBatch]:
    """Encode joined impressions.

    Parameters
    ----------
    batches : iterable of RecordBatch
        Columns of `pipelines.sample_join.join_samples`, ``features`` as JSON. All copies of an impression
        that were not told apart there are in one iterable.
    encoding : SampleEncoding

    Yields
    ------
    RecordBatch
        Rows of `WRITTEN_SCHEMA`. Impressions that do not fit the spec give none, as in the worker.
    """
    doubled: set[str] = set()
    for batch in batches:
        table = _once(pa.Table.from_batches([batch]), doubled)
        # The task columns stay out of the way of features that bear the same names.
        impressions = with_features_from_json(table.select(_IMPRESSION), "features")
        misfits = find_misfits(impressions, encoding.spec)
        if misfits:
            fits = np.ones(table.num_rows, np.bool_)
            fits[list(misfits)] = False
            table, impressions = table.filter(pa.array(fits)), impressions.filter(pa.array(fits))
        encoded = encode(impressions, encoding.spec, encoding.segments)
        delay_keys = _delay_keys(impressions, encoding, encoded)
        for task, window in encoding.tasks.items():
            rows = np.flatnonzero(table.column(f"{task}_opened").is_valid().to_numpy())
            if len(rows):
                chosen = table.take(pa.array(rows))
                share = _observed_share(task, window, chosen, encoded, delay_keys[task], rows, encoding)
                yield _task_rows(task, window, chosen, encoded, rows, share, encoding)


def _once(table: pa.Table, doubled: set[str]) -> pa.Table:
    """Of copies of an impression that arrived at one instant the first."""
    copies = pc.fill_null(table.column("copies"), 1).to_numpy()
    suspects = np.flatnonzero(copies > 1)
    if len(suspects) == 0:
        return table
    keep = np.ones(table.num_rows, np.bool_)
    for row, name in zip(
        suspects.tolist(), table.column("impression_id").take(pa.array(suspects)).to_pylist(), strict=True
    ):
        keep[row] = name not in doubled
        doubled.add(name)
    return table.filter(pa.array(keep))


def _delay_keys(
    impressions: pa.Table, encoding: SampleEncoding, encoded: Encoded
) -> dict[Task, NDArray[np.int64]]:
    """Hashes of the fields that each task's delay model looks at."""
    fields = {task: window.delay.fields for task, window in encoding.tasks.items()}
    nothing = np.zeros((len(encoded), 0), np.int64)
    plain = FeatureSpec(hash_seed=encoding.spec.hash_seed)
    return {
        task: encode(impressions, plain, names).segment_key if names else nothing
        for task, names in fields.items()
    }


def _observed_share(
    task: Task,
    window: TaskWindow,
    chosen: pa.Table,
    encoded: Encoded,
    keys: NDArray[np.int64],
    rows: NDArray[np.int64],
    encoding: SampleEncoding,
) -> NDArray[np.float64]:
    age = encoding.as_of - chosen.column(f"{task}_opened").to_numpy()
    share = np.ones(len(rows))
    young = np.flatnonzero(age <= window.horizon)
    if len(young):
        at = rows[young]
        share[young] = window.delay.observed_share(
            age[young], encoded.buckets[at], encoded.numbers[at], keys[at]
        )
    return share


def _task_rows(
    task: Task,
    window: TaskWindow,
    chosen: pa.Table,
    encoded: Encoded,
    rows: NDArray[np.int64],
    share: NDArray[np.float64],
    encoding: SampleEncoding,
) -> pa.RecordBatch:
    label = chosen.column(f"{task}_label").to_numpy()
    opened = chosen.column(f"{task}_opened").to_numpy()
    closes = np.maximum(opened + window.horizon, chosen.column(f"{task}_known").to_numpy())
    mature = encoding.as_of > opened + window.horizon
    home = chosen.column("home").to_numpy()
    later = opened // encoding.partition_width - home
    rate, copies = encoding.negative_rate, _copies(chosen, label, encoding)
    # A kept negative stands for 1 / rate of its kind.
    weight = np.where(label > 0, 1.0, 1.0 / rate) / copies
    n = len(rows)
    columns: dict[str, Any] = {
        "sample_id": pc.binary_join_element_wise(chosen.column("impression_id"), task, ":"),
        "task": _repeated(task, n),
        "kind": _repeated("first", n),
        "label": label.astype(np.float32),
        "label_version": chosen.column(f"{task}_version"),
        "event_time": opened,
        "known_at": np.where(mature, closes + 1, encoding.as_of),
        "outcome_known_at": chosen.column(f"{task}_rose"),
        "elapsed": np.minimum(encoding.as_of - opened, window.width),
        "mature": mature,
        "weight": weight.astype(np.float32),
        "negative_sampling_rate": np.full(n, rate, np.float32),
        "copies": copies.astype(np.int32),
        "observed_share": share.astype(np.float32),
        "user_key": encoded.user_key[rows],
        "segment_key": _lists(encoded.segment_key[rows]),
        "buckets": _lists(encoded.buckets[rows]),
        "numbers": _lists(encoded.numbers[rows]),
        "stored_in": (chosen.column("slice").to_numpy() * _SPILLS + later).astype(np.int32),
    }
    columns |= {name: chosen.column(name) for name in ("impression_id", "user_id", "item_id", "position")}
    arrays = [_one_chunk(columns[field.name], field.type) for field in WRITTEN_SCHEMA]
    return _multiplied(pa.RecordBatch.from_arrays(arrays, schema=WRITTEN_SCHEMA), copies)


def _copies(chosen: pa.Table, label: NDArray[np.float64], encoding: SampleEncoding) -> NDArray[np.int64]:
    explored = chosen.column("propensity").is_valid().to_numpy()
    return np.maximum(
        np.where(label > 0, encoding.positive_copies, 1), np.where(explored, encoding.exploration_copies, 1)
    )


def _multiplied(rows: pa.RecordBatch, copies: NDArray[np.int64]) -> pa.RecordBatch:
    """Each row as often as its copies; the ids of further ones end in ``#1``, ``#2``, ..."""
    if (copies == 1).all():
        return rows
    again = np.repeat(np.arange(len(copies)), copies)
    number = np.arange(len(again)) - np.repeat(np.cumsum(copies) - copies, copies)
    names = rows.column("sample_id").take(pa.array(again)).to_pylist()
    marked = [name if k == 0 else f"{name}#{k}" for name, k in zip(names, number.tolist(), strict=True)]
    repeated = rows.take(pa.array(again))
    place = rows.schema.get_field_index("sample_id")
    return repeated.set_column(place, "sample_id", pa.array(marked, pa.string()))


def _repeated(text: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), pa.array([text])).cast(pa.string())


def _one_chunk(values: Any, wanted: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks().cast(wanted)
    return values if isinstance(values, pa.Array) else pa.array(values, wanted)


def _lists(matrix: NDArray[Any]) -> pa.Array:
    n, width = matrix.shape
    ends = pa.array(np.arange(n + 1, dtype=np.int32) * np.int32(width))
    return pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(matrix).reshape(-1)))
