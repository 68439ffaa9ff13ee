"""A snapshot is visible only when complete, and refused when it is not what its manifest says."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import Config
from pipelines.duration import DAY_MS
from pipelines.errors import DataError
from pipelines.feature_spec import Categorical, FeatureSpec
from pipelines.snapshot import (
    DATA_NAME,
    MANIFEST_NAME,
    SAMPLE_SCHEMA,
    SPEC_NAME,
    SnapshotManifest,
    TaskSummary,
    describe_file,
    finish,
    read_manifest,
    read_rows,
    read_snapshot,
    snapshot_id,
    staging,
)
from pipelines.snapshot_check import check_snapshot

AS_OF = 1_767_571_200_000
SPEC = FeatureSpec(
    categorical=(Categorical(name="user_id", buckets=9), Categorical(name="item_id", buckets=5))
)


def rows(n: int = 40, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    opened = AS_OF - rng.integers(1, DAY_MS, n)
    width = Config().attribution.click_window
    label = rng.integers(0, 2, n)
    known = opened + rng.integers(0, 60_000, n)
    known = np.minimum(known, AS_OF)
    elapsed = np.minimum(AS_OF - opened, width)
    columns = {
        "sample_id": [f"i{k}:click" for k in range(n)],
        "impression_id": [f"i{k}" for k in range(n)],
        "task": ["click"] * n,
        "kind": ["first"] * n,
        "label": label,
        "label_version": [0] * n,
        "event_time": opened,
        "known_at": [AS_OF] * n,
        "outcome_known_at": pa.array(known, mask=label == 0),
        "elapsed": elapsed,
        "mature": elapsed >= width,
        "weight": [1.0] * n,
        "negative_sampling_rate": [1.0] * n,
        "observed_share": [1.0] * n,
        "user_key": rng.integers(-5, 5, n),
        "segment_key": [[7]] * n,
        "buckets": [[1 + k % 9, 10 + k % 5] for k in range(n)],
        "numbers": [[]] * n,
        "user_id": ["u"] * n,
        "item_id": ["i"] * n,
        "position": [None] * n,
    }
    arrays = [
        columns[field.name].cast(field.type)
        if isinstance(columns[field.name], pa.Array)
        else pa.array(columns[field.name], field.type)
        for field in SAMPLE_SCHEMA
    ]
    return pa.table(arrays, schema=SAMPLE_SCHEMA)


def stage(staged: Path, table: pa.Table) -> SnapshotManifest:
    (staged / DATA_NAME).mkdir()
    (staged / SPEC_NAME).write_text(SPEC.to_toml())
    half = table.num_rows // 2
    pq.write_table(table.slice(half), staged / DATA_NAME / "click-00000.parquet")
    pq.write_table(table.slice(0, half), staged / DATA_NAME / "click-00001.parquet")
    files = {SPEC_NAME: describe_file(staged / SPEC_NAME)}
    for path in sorted((staged / DATA_NAME).iterdir()):
        files[f"{DATA_NAME}/{path.name}"] = describe_file(path, "click")
    positives = int(table.column("label").to_numpy().sum())
    summary = TaskSummary(
        rows=table.num_rows,
        positives=positives,
        mature=0,
        label_rate=positives / table.num_rows,
        mature_label_rate=None,
        kinds={"first": table.num_rows},
        misfits=0,
        content_digest="0",
        delay_curve={},
        largest_follow_up=DAY_MS,
    )
    return SnapshotManifest(
        snapshot_id="s",
        as_of=AS_OF,
        window=DAY_MS,
        since=AS_OF - DAY_MS,
        tasks={"click": summary},
        events={},
        negative_sampling_rate=1.0,
        feature_spec_digest=SPEC.digest(),
        feature_spec_inferred=False,
        sample_columns={field.name: str(field.type) for field in SAMPLE_SCHEMA},
        segments=("campaign_id",),
        config=Config().model_dump(mode="json", exclude_none=True),
        lake_version="",
        code_version="",
        files=files,
    )


def publish(out: Path, table: pa.Table, name: str = "s") -> Path:
    with staging(out, name) as staged:
        return finish(staged, out / name, stage(staged, table))


def test_reading_gives_the_rows_in_order_of_time(tmp_path: Path) -> None:
    table = rows()
    training = read_snapshot(publish(tmp_path, table), "click")
    order = np.lexsort([table.column("sample_id").to_pylist(), table.column("event_time").to_numpy()])
    assert training.event_time.tolist() == table.column("event_time").to_numpy()[order].tolist()
    assert training.buckets.tolist() == [table.column("buckets").to_pylist()[row] for row in order]
    assert training.label.tolist() == table.column("label").to_numpy()[order].tolist()
    assert training.buckets.dtype == np.int32
    assert training.numbers.shape == (40, 0)
    assert training.segment_key.shape == (40, 1)


def test_nothing_is_visible_before_the_rename_and_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def interrupted() -> None:
        with staging(tmp_path, "s") as staged:
            stage(staged, rows())
            assert staged.name.startswith(".")
            assert not (tmp_path / "s").exists()
            raise Killed

    with pytest.raises(Killed):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_build_are_swept_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    host = platform.node().replace(".", "-")
    gone, alive = tmp_path / f".s.{host}.4194305.0a", tmp_path / f".s.{host}.1.0b"
    gone.mkdir()
    alive.mkdir()
    publish(tmp_path, rows())
    assert not gone.exists()
    assert alive.exists()


def test_second_build_of_the_same_snapshot_keeps_the_first(tmp_path: Path) -> None:
    first = publish(tmp_path, rows())
    before = (first / MANIFEST_NAME).read_bytes()
    assert publish(tmp_path, rows(seed=1)) == first
    assert (first / MANIFEST_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    with staging(tmp_path, "s") as staged:
        manifest = stage(staged, rows())
        (staged / DATA_NAME / "stray.parquet").touch()
        with pytest.raises(DataError, match="stray"):
            finish(staged, tmp_path / "s", manifest)


@pytest.mark.parametrize("name", ["data/click-00001.parquet", SPEC_NAME])
def test_altered_or_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    snapshot = publish(tmp_path, rows())
    file = snapshot / name
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=Path(name).name):
        read_snapshot(snapshot, "click")
    file.unlink()
    with pytest.raises(DataError, match=Path(name).name):
        read_snapshot(snapshot, "click")


def test_folder_without_manifest_and_task_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=MANIFEST_NAME):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="no samples of the task conversion"):
        read_snapshot(publish(tmp_path, rows()), "conversion")


def test_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    snapshot = publish(tmp_path, rows())
    manifest = json.loads((snapshot / MANIFEST_NAME).read_text())
    (snapshot / MANIFEST_NAME).write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(DataError, match="version 1"):
        read_manifest(snapshot)


def test_id_names_the_window_and_follows_every_input() -> None:
    name = snapshot_id(AS_OF, 7 * DAY_MS, {"rate": 1.0})
    assert name.startswith("20260105T000000Z-7d-")
    assert name == snapshot_id(AS_OF, 7 * DAY_MS, {"rate": 1.0})
    assert name != snapshot_id(AS_OF, 7 * DAY_MS, {"rate": 0.5})
    assert snapshot_id(AS_OF + 1, DAY_MS, {}).startswith("20260105T000000.001Z-1d-")


def test_sound_snapshot_has_no_findings(tmp_path: Path) -> None:
    assert check_snapshot(publish(tmp_path, rows())) == []


def replaced(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    index = table.column_names.index(column)
    return table.set_column(
        index, SAMPLE_SCHEMA.field(column), pa.array(values, SAMPLE_SCHEMA.field(column).type)
    )


@pytest.mark.parametrize(
    ("column", "value", "finding"),
    [
        ("known_at", AS_OF + 1, "known_at lies after as_of"),
        ("sample_id", "i1:click", "appears more than once"),
        ("outcome_known_at", AS_OF + 5, "the outcome became known after known_at"),
        ("outcome_known_at", 1, "before the window opened"),
        ("event_time", AS_OF, "outside the snapshot's window"),
        ("observed_share", 0.5, "mature but observed_share is not 1"),
        ("elapsed", 3, "elapsed is not the age"),
        ("weight", 0.0, "weight is not above 0"),
    ],
)
def test_leak_or_duplicate_is_found(tmp_path: Path, column: str, value: object, finding: str) -> None:
    table = rows()
    row = int(np.flatnonzero((table.column("label").to_numpy() == 1) & table.column("mature").to_numpy())[2])
    findings = check_snapshot(publish(tmp_path, replaced(table, column, row, value)))
    assert any(finding in found for found in findings), findings


def test_rows_can_be_read_column_by_column(tmp_path: Path) -> None:
    table = read_rows(publish(tmp_path, rows()), "click", ["sample_id", "label"])
    assert table.column_names == ["sample_id", "label"]
    assert table.num_rows == 40
