"""Segment corrections fitted by Spark: each task counts its own rows, and the sums merge to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from calibration.link import sigmoid
from calibration.segment_config import SegmentConfig
from calibration.segment_levels import segment_levels
from calibration.segments import SegmentCorrection
from calibration.state import canonical_json
from pipelines.spark_session import worker_errors
from pipelines.stream_columns import as_matrix

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["fit_segments"]


def fit_segments(rows: DataFrame, column: str, config: SegmentConfig) -> SegmentCorrection:
    """Fit to rows, whatever their partitions; the same as `SegmentCorrection.fit` on all of them, to the bit.

    Levels that lie beside each other act in turn: the later one has to know what the finished earlier one
    corrects. Their rows are counted by one task, in memory.

    Parameters
    ----------
    rows : DataFrame
        With the columns ``segment_key``, ``label`` and ``weight``, and ``column``.
    column : str
        Calibrated logits before any segment correction.
    config : SegmentConfig
    """
    import json

    needed = rows.select("segment_key", "label", "weight", column)
    if any(level.before for level in segment_levels(config.names)):
        needed = needed.coalesce(1)
    with worker_errors():
        parts = needed.mapInArrow(_counter(column, config), "state string").collect()
    total = SegmentCorrection(config)
    for part in parts:
        total.merge(SegmentCorrection.from_state(json.loads(part["state"])))
    return total


def _counter(column: str, config: SegmentConfig) -> Any:
    def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        table = pa.Table.from_batches(batches, pa.schema(list(_schema(column))))
        keys = as_matrix(table["segment_key"].combine_chunks(), len(config.columns), "segment_key")
        logit, label, weight = (table[name].to_numpy() for name in (column, "label", "weight"))
        fitted = SegmentCorrection.fit(
            config,
            np.asarray(keys.flatten()).reshape(len(table), len(config.columns)),
            sigmoid(logit),
            label,
            weight,
        )
        yield pa.record_batch({"state": [canonical_json(fitted.state())]})

    return count


def _schema(column: str) -> Iterator[pa.Field]:
    yield pa.field("segment_key", pa.list_(pa.int64()))
    for name in ("label", "weight", column):
        yield pa.field(name, pa.float64())
