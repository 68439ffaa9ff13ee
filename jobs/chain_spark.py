"""A calibration chain over Spark rows: the arithmetic of the worker and of serving, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from pipelines.stream_columns import as_matrix

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["calibrated", "segment_keys"]


def calibrated(rows: DataFrame, chains: Mapping[str, CalibrationChain]) -> DataFrame:
    """Add a column of calibrated logits (double) for each chain, under its name.

    Parameters
    ----------
    rows : DataFrame
        With the columns ``logit`` (double, the model's own) and ``segment_key`` (array of bigint).
    chains : mapping of str to CalibrationChain
        They travel as their JSON state; to_json and from_json lose no bit.
    """
    from pyspark.sql.types import DoubleType, StructField, StructType

    schema = StructType([*rows.schema, *(StructField(name, DoubleType()) for name in chains)])
    return rows.mapInArrow(_apply({name: chain.to_json() for name, chain in chains.items()}), schema)


def segment_keys(batch: pa.RecordBatch, chain: CalibrationChain) -> NDArray[np.int64] | None:
    """The column ``segment_key`` as the chain takes it, shape (n, fields); None if it needs none."""
    if chain.segments is None:
        return None
    width = len(chain.segments.config.names)
    keys = as_matrix(batch.column("segment_key"), width, "segment_key")
    return np.asarray(keys.flatten()).reshape(len(batch), width)


def _apply(states: Mapping[str, str]) -> Any:
    def apply(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        chains = {name: _read(state) for name, state in states.items()}
        for batch in batches:
            logit = batch.column("logit").to_numpy()
            for name, chain in chains.items():
                column = pa.array(chain.transform_logit(logit, segment_keys(batch, chain)), pa.float64())
                batch = batch.append_column(name, column)
            yield batch

    return apply


@cache
def _read(state: str) -> CalibrationChain:
    return CalibrationChain.from_json(state)
