"""A relabelled snapshot has the rows of one built from scratch, and builds only what was open."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs.broker import Broker
from jobs.samples_build import build
from jobs.samples_ingest import ingest
from jobs.samples_relabel import publish_changes, relabel
from pipelines.attribution import Row, labels_as_of
from pipelines.config import with_values
from pipelines.config_sections import KafkaConfig, TopicsConfig
from pipelines.delay_model import from_files
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import ConfigError, DataError
from pipelines.snapshot import read_manifest, read_rows, read_snapshot
from pipelines.snapshot_check import check_snapshot
from pipelines.snapshot_manifest import SnapshotManifest
from tests.test_samples_build import CONFIG, RULE, SPEC, START, events_of, random_events, write_log

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    Tables = tuple[pa.Table, pa.Table, pa.Table]

FIRST, SECOND = START + 2 * DAY_MS + 5 * HOUR_MS, START + 4 * DAY_MS
WINDOW = 3 * DAY_MS


@dataclass(frozen=True)
class Labelled:
    """Snapshots of one lake: as of the first moment, of the second from it, of the second from scratch."""

    log: Tables
    lake: Path
    base: str
    relabelled: str
    scratch: str


@pytest.fixture(scope="module")
def labelled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    folder = tmp_path_factory.mktemp("relabel")
    log, lake = random_events(1_500, seed=4), folder / "lake"
    ingest(spark, lake, CONFIG, events=write_log(folder / "log", log))
    base = build(spark, lake, folder / "snapshots", FIRST, WINDOW, CONFIG, SPEC)
    relabelled = relabel(spark, lake, base, SECOND)
    scratch = build(spark, lake, folder / "scratch", SECOND, WINDOW, CONFIG, SPEC)
    return Labelled(log, lake, base, relabelled, scratch)


def digests(manifest: SnapshotManifest) -> dict[tuple[str, str], str]:
    return {(part.task, part.partition): part.content_digest for part in manifest.partitions}


def expected(log: Tables, as_of: int, task: str) -> dict[str, Row]:
    since = (as_of - WINDOW) // DAY_MS * DAY_MS
    rows = labels_as_of(events_of(log), as_of, RULE)
    return {
        f"{row.impression_id}:{row.task}": row
        for row in rows
        if row.task == task and since <= row.event_time < as_of
    }


def test_relabelled_rows_are_those_of_a_build_from_scratch(labelled: Labelled) -> None:
    relabelled, scratch = read_manifest(labelled.relabelled), read_manifest(labelled.scratch)
    assert digests(relabelled) == digests(scratch)
    assert relabelled.tasks.keys() == scratch.tasks.keys()
    for task, summary in relabelled.tasks.items():
        rows = read_rows(labelled.relabelled, task)
        assert rows.equals(read_rows(labelled.scratch, task))
        assert rows.num_rows == len(expected(labelled.log, SECOND, task)) > 200
        whole = scratch.tasks[task].model_dump(exclude={"misfits"})
        assert summary.model_dump(exclude={"misfits"}) == whole
    assert check_snapshot(Path(labelled.relabelled)) == []


def test_only_open_partitions_are_built_again(labelled: Labelled) -> None:
    base, relabelled = read_manifest(labelled.base), read_manifest(labelled.relabelled)
    closed = {(part.task, part.partition) for part in base.partitions if part.closed}
    assert closed == {("click", "2026-01-05"), ("click", "2026-01-06"), ("conversion", "2026-01-05")}
    origins = {(part.task, part.partition): part.origin for part in relabelled.partitions}
    first = relabelled.since
    assert {key for key, origin in origins.items() if origin == base.snapshot_id} == {
        key for key in closed if key[1] >= "2026-01-06" or first <= START
    }
    own = [part for part in relabelled.partitions if part.origin == relabelled.snapshot_id]
    assert {(part.task, part.partition) for part in own} == set(origins) - closed
    # The files of what was referred to are nowhere but in the base.
    files = list(Path(labelled.relabelled).rglob("*.parquet"))
    data = [path for path in files if "data-" in str(path.relative_to(labelled.relabelled))]
    assert len(data) == sum(len(part.files) for part in own)
    assert relabelled.base == base.snapshot_id


def test_label_changes_are_those_between_the_two_moments(labelled: Labelled, spark: SparkSession) -> None:
    manifest = read_manifest(labelled.relabelled)
    names = [name for name in manifest.extra_files if name.startswith("diff-")]
    table = spark.read.parquet(*[f"{labelled.relabelled}/{name}" for name in names]).toArrow()
    for task in ("click", "conversion"):
        before, after = expected(labelled.log, FIRST, task), expected(labelled.log, SECOND, task)
        changed = {
            name: (before[name].label, row.label, row.label_version)
            for name, row in after.items()
            if name in before and before[name].label_version != row.label_version
        }
        late = {name for name, row in after.items() if name not in before and row.event_time < FIRST}
        own = table.filter(pc.equal(table.column("task"), task)).to_pylist()
        told = {
            row["sample_id"]: (row["label_before"], row["label"], row["label_version"])
            for row in own
            if row["label_before"] is not None
        }
        assert told == changed
        assert {row["sample_id"] for row in own if row["label_before"] is None} == late
        counts = manifest.changes[task]
        assert counts.late == len(late)
        assert counts.raised == sum(old == 0 < new for old, new, _ in changed.values())
        assert counts.lowered == sum(old > 0 == new for old, new, _ in changed.values())
    assert manifest.changes["conversion"].raised > 5


def test_label_changes_are_sent_to_kafka(spark: SparkSession, labelled: Labelled, broker: Broker) -> None:
    from kafka import KafkaConsumer

    topics = TopicsConfig(labels="relabel-labels")
    kafka = KafkaConfig(bootstrap_servers=broker.bootstrap_servers, topics=topics)
    sent = publish_changes(spark, labelled.relabelled, kafka)
    consumer = KafkaConsumer(
        topics.labels,
        bootstrap_servers=broker.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=3_000,
    )
    received = [json.loads(message.value) | {"key": message.key.decode()} for message in consumer]
    consumer.close()
    assert len(received) == sent > 10
    assert all(
        (row["key"] == row["impression_id"] and row["label_version"] > 0) or "label_before" not in row
        for row in received
    )


def test_events_ingested_late_open_closed_partitions_again(
    spark: SparkSession, labelled: Labelled, tmp_path: Path
) -> None:
    lake, out = tmp_path / "lake", tmp_path / "snapshots"
    shutil.copytree(labelled.lake, lake)
    shutil.copytree(Path(labelled.base).parent, out)
    # A conversion of the first day that had arrived long ago, but reaches the lake only now.
    rows = expected(labelled.log, FIRST, "conversion")
    row = next(
        row
        for row in rows.values()
        if row.label == 0 and row.label_version == 0 and row.event_time < START + DAY_MS
    )
    moment = row.event_time + HOUR_MS
    one = {"event_id": ["late"], "impression_id": [row.impression_id], "event_time": [moment]}
    new = (labelled.log[0].slice(0, 1), labelled.log[1].slice(0, 1), pa.table(one))
    ingest(spark, lake, CONFIG, events=_renamed(write_log(tmp_path / "log", new)))
    base = out / Path(labelled.base).name
    relabelled = read_manifest(relabel(spark, lake, base, SECOND, SECOND - START))
    scratch = read_manifest(build(spark, lake, tmp_path / "scratch", SECOND, SECOND - START, CONFIG, SPEC))
    assert digests(relabelled) == digests(scratch)
    assert relabelled.changes["conversion"].raised >= 1
    rebuilt = {part.partition for part in relabelled.of_task("conversion") if part.origin != Path(base).name}
    assert "2026-01-05" in rebuilt


def _renamed(folder: Path) -> Path:
    for path in folder.iterdir():
        path.rename(path.with_name(path.name.replace(".parquet", "-late.parquet")))
    return folder


def test_a_base_that_does_not_fit_is_refused(spark: SparkSession, labelled: Labelled, tmp_path: Path) -> None:
    out = Path(labelled.base).parent
    other = with_values(CONFIG, "attribution", {"attribution_window": "2d"})
    with pytest.raises(ConfigError, match="built with other settings"):
        build(spark, labelled.lake, out, SECOND, WINDOW, other, base=labelled.base)
    with pytest.raises(ConfigError, match="later time"):
        relabel(spark, labelled.lake, labelled.base, FIRST - HOUR_MS)
    log = random_events(60, seed=9)
    ingest(spark, tmp_path / "lake", CONFIG, events=write_log(tmp_path / "log", log))
    with pytest.raises(DataError, match="from another lake"):
        relabel(spark, tmp_path / "lake", labelled.base, SECOND)
    with pytest.raises(DataError, match="MANIFEST"):
        relabel(spark, labelled.lake, out / "nothing", SECOND)


def test_hourly_partitions_and_copies_keep_the_totals(
    spark: SparkSession, labelled: Labelled, tmp_path: Path
) -> None:
    sampling: dict[str, Any] = {"granularity": "hour", "positive_copies": 3, "negative_rate": 0.5}
    config = with_values(CONFIG, "samples", sampling)
    made = build(spark, labelled.lake, tmp_path, FIRST, 6 * HOUR_MS, config, SPEC)
    manifest = read_manifest(made)
    parts = manifest.of_task("click")
    assert [part.partition for part in parts] == [
        f"2026-01-0{6 + (23 + k) // 24}T{(23 + k) % 24:02d}" for k in range(6)
    ]
    rows = read_rows(made, "click").to_pylist()
    positives = [row for row in rows if row["label"] > 0]
    assert {row["copies"] for row in positives} == {3}
    assert [row["weight"] for row in positives] == pytest.approx([1 / 3] * len(positives))
    assert {(row["copies"], row["weight"]) for row in rows if row["label"] == 0} == {(1, 2.0)}
    names = {row["sample_id"] for row in rows}
    assert len(names) == len(rows)
    once = {name for name in names if name.endswith(":click")}
    assert {name[:-2] for name in names - once} == {row["sample_id"] for row in positives} & once
    whole = expected(labelled.log, FIRST, "click")
    since = manifest.since
    true = [row.label for row in whole.values() if row.event_time >= since]
    assert manifest.tasks["click"].positives == sum(true)
    assert manifest.tasks["click"].label_rate == pytest.approx(sum(true) / len(true), rel=0.25)
    assert check_snapshot(Path(made)) == []


def test_a_delay_model_of_features_is_fitted_by_a_build_and_kept_by_a_relabelling(
    spark: SparkSession, labelled: Labelled, tmp_path: Path
) -> None:
    config = with_values(CONFIG, "delay", {"model": "hazard", "groups": ["campaign_id"]})
    base = build(spark, labelled.lake, tmp_path, FIRST, WINDOW, config, SPEC)
    later = relabel(spark, labelled.lake, base, SECOND)
    manifests = read_manifest(base), read_manifest(later)
    for task in ("click", "conversion"):
        first, second = ({n: f for n, f in m.extra_files.items() if n.startswith(task)} for m in manifests)
        assert first == second
        model = from_files(
            {name.removeprefix(f"{task}-"): (Path(base) / name).read_bytes() for name in first}
        )
        rows = read_snapshot(base, task)
        young = np.flatnonzero(~rows.mature)
        age = (FIRST - rows.event_time)[young]
        # The segments of the configuration are the fields of the model.
        keys = rows.segment_key[young] if model.fields else np.zeros((len(young), 0), np.int64)
        share = model.observed_share(age, rows.buckets[young], rows.numbers[young], keys)
        np.testing.assert_allclose(rows.observed_share[young], share, atol=1e-6)
        assert (rows.observed_share[rows.mature] == 1).all()
    assert check_snapshot(Path(later)) == []
