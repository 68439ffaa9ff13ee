"""Small snapshots written without Spark; their manifest is summed up row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import Config, Task
from pipelines.config_sections import AttributionConfig
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.feature_spec import Categorical, FeatureSpec, Numeric
from pipelines.snapshot import MANIFEST_NAME, SAMPLE_SCHEMA, SPEC_NAME
from pipelines.snapshot_manifest import (
    PartitionSummary,
    SnapshotFile,
    SnapshotManifest,
    TaskSummary,
    content_digest,
)
from pipelines.snapshot_partitions import PartitionGrid, closes_after

AS_OF = 1_767_571_200_000
DAYS = 3
RULE = AttributionConfig(click_window=30 * MINUTE_MS, attribution_window=DAY_MS)
CONFIG = Config(attribution=RULE)
SPEC = FeatureSpec(
    categorical=(Categorical(name="user_id", buckets=50), Categorical(name="item_id", buckets=9)),
    numeric=(Numeric(name="price", low=0, high=9, mean=4, std=2),),
)
Row = dict[str, Any]


def sample_rows(
    n: int, task: Task = "conversion", seed: int = 0, *, as_of: int = AS_OF, days: int = DAYS
) -> list[Row]:
    """Rows as a build labels them: exponential delays, labels and maturity as of a moment."""
    noise = np.random.default_rng(seed)
    width, lateness = RULE.width(task), RULE.allowed_lateness
    found = []
    for k, opened in enumerate(np.sort(as_of - noise.integers(1, days * DAY_MS, n)).tolist()):
        known = opened + int(noise.exponential(width / 4))
        has = bool(noise.random() < 0.3) and known <= min(as_of, opened + width)
        mature = as_of > opened + width + lateness
        found.append(
            {
                "sample_id": f"i{seed}.{k}:{task}",
                "impression_id": f"i{seed}.{k}",
                "task": task,
                "kind": "first",
                "label": float(has),
                "label_version": int(has),
                "event_time": opened,
                "known_at": opened + width + lateness + 1 if mature else as_of,
                "outcome_known_at": known if has else None,
                "elapsed": min(as_of - opened, width),
                "mature": mature,
                "weight": 1.0,
                "negative_sampling_rate": 1.0,
                "copies": 1,
                "observed_share": 1.0 if mature else 0.5,
                "user_key": 7,
                "segment_key": [],
                "buckets": [1 + int(noise.integers(0, 50)), 51 + int(noise.integers(0, 9))],
                "numbers": [float(noise.normal())],
                "user_id": "u",
                "item_id": "i",
                "position": None,
            }
        )
    return found


def write_snapshot(
    out: Path,
    rows: Mapping[Task, Sequence[Row]],
    *,
    name: str = "s",
    as_of: int = AS_OF,
    days: int = DAYS,
    spec: FeatureSpec = SPEC,
    config: Config = CONFIG,
    files: int = 1,
    group_rows: int = 64,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write rows by day, each day in so many files; ``changes`` to the manifest come last."""
    folder = out / name
    folder.mkdir(parents=True)
    (folder / SPEC_NAME).write_text(spec.to_toml())
    grid, parts = PartitionGrid("day"), []
    for task, own in rows.items():
        for index in sorted({grid.index(row["event_time"]) for row in own}):
            day = [row for row in own if grid.index(row["event_time"]) == index]
            written = {}
            for number in range(files):
                place = f"data-t/of_task={task}/date={grid.name(index)}/part-{number}.parquet"
                written[place] = _write(folder / place, day[number::files], group_rows)
            parts.append(_summary(task, index, day, written, name, as_of))
    tasks = {task: _total(own, [part for part in parts if part.task == task]) for task, own in rows.items()}
    manifest = SnapshotManifest(
        snapshot_id=name,
        as_of=as_of,
        window=days * DAY_MS,
        since=as_of - days * DAY_MS,
        granularity="day",
        slices=1,
        tasks=tasks,
        partitions=tuple(parts),
        events={},
        negative_sampling_rate=config.samples.negative_rate,
        positive_copies=1,
        exploration_copies=1,
        feature_spec_digest=spec.digest(),
        feature_spec_inferred=False,
        sample_columns={field.name: str(field.type) for field in SAMPLE_SCHEMA},
        segments=(),
        config=config.model_dump(mode="json", exclude_none=True),
        settings_digest="",
        lake_version="",
        lake_batches=(),
        code_version="",
        extra_files={SPEC_NAME: _described(folder / SPEC_NAME)},
    )
    changed = manifest.model_copy(update=dict(changes or {}))
    (folder / MANIFEST_NAME).write_text(changed.model_dump_json())
    return folder


def _write(path: Path, rows: Sequence[Row], group_rows: int) -> SnapshotFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=SAMPLE_SCHEMA)
    pq.write_table(table, path, row_group_size=group_rows)
    return _described(path).model_copy(update={"rows": len(rows)})


def _described(path: Path) -> SnapshotFile:
    content = path.read_bytes()
    return SnapshotFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _summary(
    task: Task, index: int, rows: Sequence[Row], files: dict[str, SnapshotFile], origin: str, as_of: int
) -> PartitionSummary:
    grid = PartitionGrid("day")
    end = grid.start(index + 1)
    once = [row for row in rows if "#" not in row["sample_id"]]
    mature = [row for row in rows if row["mature"]]
    naive = [row for row in once if row["outcome_known_at"] is not None and row["outcome_known_at"] < end]
    return PartitionSummary(
        task=task,
        partition=grid.name(index),
        closed=end + closes_after(RULE, task) <= as_of,
        origin=origin,
        rows=len(rows),
        mature=len(mature),
        positives=sum(row["label"] for row in once),
        naive_positives=sum(row["label"] for row in naive),
        mature_positives=sum(row["label"] for row in once if row["mature"]),
        weight=sum(map(_weight, rows)),
        positive_weight=sum(_weight(row) * row["label"] for row in rows),
        mature_weight=sum(map(_weight, mature)),
        mature_positive_weight=sum(_weight(row) * row["label"] for row in mature),
        oldest=min(row["event_time"] for row in rows),
        content_digest=content_digest([file.sha256 for _, file in sorted(files.items())]),
        files=files,
    )


def _total(rows: Sequence[Row], parts: Sequence[PartitionSummary]) -> TaskSummary:
    weight = sum(map(_weight, rows))
    return TaskSummary(
        rows=len(rows),
        positives=sum(part.positives for part in parts),
        mature=sum(part.mature for part in parts),
        label_rate=sum(part.positive_weight for part in parts) / weight,
        mature_label_rate=None,
        kinds={"first": len(rows)},
        misfits=0,
        content_digest=content_digest([f"{part.partition} {part.content_digest}" for part in parts]),
        delay_curve={},
        largest_follow_up=DAY_MS,
    )


def _weight(row: Row) -> float:
    """As it is stored."""
    return float(np.float32(row["weight"]))


def hour_of(time: int) -> int:
    """Number of the hour since the epoch."""
    return time // HOUR_MS
