"""The first releases of a log, as training leaves them for a worker."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from jobs.backtest import Backtest, run_backtest
from pipelines.config import Config
from pipelines.event_files import EventFiles

__all__ = ["train_first"]

# Replayed after the warm-up, for a backtest needs something to replay.
_TAIL = 0.02


def train_first(log: Path, config: Config, work: Path, warm_up: float) -> tuple[Path, Backtest]:
    """Train on the first share of a log; returns the folder of releases and the backtest that made them."""
    head, out = work / "head", work / "backtest"
    head.mkdir()
    out.mkdir()
    arrival = pq.read_table(log / "impressions.parquet", columns=["arrival_time"])["arrival_time"].to_numpy()
    begins, ends = np.quantile(arrival, [warm_up, warm_up + _TAIL]).astype(np.int64).tolist()
    for name in ("impressions", "clicks", "conversions"):
        known = pq.read_table(log / f"{name}.parquet", filters=[("arrival_time", "<", ends)])
        pq.write_table(known, head / f"{name}.parquet")
    share = f"{100 * float(np.mean(arrival < begins)) / float(np.mean(arrival < ends)):.3f}%"
    backtest = config.backtest.model_copy(update={"warmup": share})
    result = run_backtest(config.model_copy(update={"backtest": backtest}), EventFiles(head), out)
    releases = work / "first"
    for release in (result.first.teacher, result.first.student):
        shutil.copytree(out / "releases" / release.name, releases / release.name)
    (releases / "teacher").write_text(f"{result.first.teacher.name}\n", encoding="utf-8")
    (releases / "CURRENT").write_text(f"{result.first.student.name}\n", encoding="utf-8")
    return releases, result
