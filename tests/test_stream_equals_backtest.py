"""The worker over Kafka and the backtest over the same files end in the same state to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.broker import Broker
from jobs.checkpoint import CheckpointStore, state_digest
from jobs.online_state import loop_state
from jobs.predictions import PredictionLog
from jobs.produce import produce
from jobs.worker import Worker
from tests.small_run import SmallRun
from tests.workers import with_topics

_COMPARED = ("impression_id", "task", "predicted_at", "logit", "probability", "teacher_probability")


def without_positions(plain: dict[str, Any]) -> dict[str, Any]:
    """The state without what only a worker has, and without where rows were read."""
    plain = copy.deepcopy(plain)
    for name in ("cursor", "first_release", "breaker"):
        plain.pop(name, None)
    for held in plain["joiner"]["orphans"].values():
        for orphan in held:
            orphan[5] = None
    return plain


def test_stream_over_two_partitions_ends_where_the_backtest_over_files_does(
    small_run: SmallRun, broker: Broker, tmp_path: Path
) -> None:
    config = with_topics(small_run.config, broker.bootstrap_servers, "equals")
    produce(small_run.files, config)
    worker = Worker(
        config, small_run.first_releases(tmp_path / "releases"), tmp_path / "state", until_end=True
    )
    worker.run()
    found = CheckpointStore(tmp_path / "state").load()
    assert found is not None
    arrays, plain = loop_state(small_run.backtest.loop)
    assert without_positions(found.plain) == without_positions(plain)
    assert state_digest(found.arrays, without_positions(found.plain)) == state_digest(
        arrays, without_positions(plain)
    )

    streamed = PredictionLog(tmp_path / "state" / "predictions").read(found.manifest["outputs"])
    assert by_key(streamed) == by_key(small_run.backtest.predictions)


def by_key(predictions: pa.Table) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """(impression, task) to the rest of each row."""
    rows = zip(*(predictions[name].to_pylist() for name in _COMPARED), strict=True)
    found = {row[:2]: row[2:] for row in rows}
    assert len(found) == predictions.num_rows
    return found
