"""The log of `benchmarks.worker`: 26 categorical and 8 numeric features, clicks by a known logistic model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["CATEGORICAL", "NUMERIC", "write_log"]

CATEGORICAL, NUMERIC = 26, 8
START = 1_767_571_200_000
# Distinct values of the columns: from a few to hundreds of thousands, as in published logs.
_SIZES = np.geomspace(4, 200_000, CATEGORICAL).astype(np.int64)
_PER_S = 50
_CLICK_DELAY_MS = 40_000


def write_log(folder: Path, impressions: int, seed: int = 1) -> None:
    """Write impressions and clicks (about one in five) as Parquet event files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shown = START + np.sort(rng.integers(0, impressions * 1000 // _PER_S, impressions))
    ids = np.char.add("i", np.arange(impressions).astype(str))
    # Zipf-like: the square of a uniform number puts most rows on few values.
    values = (rng.random((impressions, CATEGORICAL)) ** 3 * _SIZES).astype(np.int64)
    numbers = rng.normal(size=(impressions, NUMERIC))
    logit = np.full(impressions, -1.8) + 0.3 * numbers @ rng.normal(size=NUMERIC) / np.sqrt(NUMERIC)
    for column, size in enumerate(_SIZES.tolist()):
        logit += rng.normal(0, 0.25, size)[values[:, column]]
    clicked = np.flatnonzero(rng.random(impressions) < 1 / (1 + np.exp(-logit)))
    delay = 500 + rng.exponential(_CLICK_DELAY_MS, len(clicked)).astype(np.int64)
    columns = {
        "event_id": ids,
        "impression_id": ids,
        "event_time": shown,
        "arrival_time": shown + rng.integers(0, 300, impressions),
        "user_id": np.char.add("u", values[:, -1].astype(str)),
        "item_id": np.char.add("t", values[:, -2].astype(str)),
        **{f"c{k:02d}": np.char.add("v", values[:, k].astype(str)) for k in range(CATEGORICAL - 2)},
        **{f"n{k}": numbers[:, k] for k in range(NUMERIC)},
    }
    pq.write_table(pa.table(columns), folder / "impressions.parquet")
    time = shown[clicked] + delay
    clicks = {
        "event_id": np.char.add("c", ids[clicked]),
        "impression_id": ids[clicked],
        "event_time": time,
        "arrival_time": time + rng.integers(0, 300, len(clicked)),
    }
    pq.write_table(pa.table(clicks), folder / "clicks.parquet")
    nothing = {name: pa.array([], column.type) for name, column in zip(*_empty(), strict=True)}
    pq.write_table(pa.table(nothing), folder / "conversions.parquet")


def _empty() -> tuple[list[str], list[pa.Field]]:
    text, time = pa.string(), pa.int64()
    fields = [
        pa.field("event_id", text),
        pa.field("impression_id", text),
        pa.field("event_time", time),
        pa.field("arrival_time", time),
    ]
    return [field.name for field in fields], fields
