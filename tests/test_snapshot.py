"""A snapshot is visible only when complete, and refused when it is not what its manifest says."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest

from jobs.snapshot_write import Workplace, workplace
from pipelines.duration import DAY_MS
from pipelines.errors import DataError
from pipelines.snapshot import (
    MANIFEST_NAME,
    SPEC_NAME,
    data_files,
    read_manifest,
    read_rows,
    read_snapshot,
    split_location,
)
from pipelines.snapshot_manifest import snapshot_id
from pipelines.storage import open_folder
from tests.snapshot_files import AS_OF, Row, sample_rows, write_snapshot

HOST = platform.node().replace(".", "-")


def in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["event_time"], row["sample_id"]))


def test_reading_gives_the_rows_in_order_of_time(tmp_path: Path) -> None:
    rows = sample_rows(300)
    training = read_snapshot(write_snapshot(tmp_path, {"conversion": rows}, files=2), "conversion")
    expected = in_order(rows)
    assert training.event_time.tolist() == [row["event_time"] for row in expected]
    assert training.buckets.tolist() == [row["buckets"] for row in expected]
    assert training.label.tolist() == [row["label"] for row in expected]
    assert training.buckets.dtype == np.int32
    assert training.numbers.ravel() == pytest.approx([row["numbers"][0] for row in expected], rel=1e-6)
    assert training.segment_key.shape == (300, 0)


def test_rows_can_be_read_column_by_column(tmp_path: Path) -> None:
    rows = sample_rows(40)
    table = read_rows(write_snapshot(tmp_path, {"conversion": rows}), "conversion", ["sample_id", "label"])
    assert table.column_names == ["sample_id", "label"]
    assert table.column("sample_id").to_pylist() == [row["sample_id"] for row in in_order(rows)]


def test_partition_of_another_snapshot_is_read_from_where_it_lies(tmp_path: Path) -> None:
    older = write_snapshot(tmp_path, {"conversion": sample_rows(200)}, name="older")
    whole = read_manifest(older)
    referring = tmp_path / "younger"
    referring.mkdir()
    (referring / SPEC_NAME).write_bytes((older / SPEC_NAME).read_bytes())
    text = whole.model_copy(update={"snapshot_id": "younger", "base": "older"}).model_dump_json()
    (referring / MANIFEST_NAME).write_text(text)
    assert {
        Path(file.location).relative_to(tmp_path).parts[0] for file in data_files(referring, "conversion")
    } == {"older"}
    assert read_rows(referring, "conversion").equals(read_rows(older, "conversion"))
    next(older.rglob("*.parquet")).unlink()
    with pytest.raises(DataError, match=r"older/data-t.* not there"):
        read_rows(referring, "conversion")


def test_snapshot_that_was_moved_is_read_under_its_new_name(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path, {"conversion": sample_rows(100)})
    moved = snapshot.rename(tmp_path / "moved")
    assert read_snapshot(moved, "conversion").label.shape == (100,)


@pytest.mark.parametrize("which", ["data", SPEC_NAME])
def test_altered_or_missing_file_is_refused_by_name(tmp_path: Path, which: str) -> None:
    snapshot = write_snapshot(tmp_path, {"conversion": sample_rows(100)})
    file = snapshot / SPEC_NAME if which == SPEC_NAME else sorted(snapshot.rglob("*.parquet"))[0]
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=file.name):
        read_snapshot(snapshot, "conversion")
    file.unlink()
    with pytest.raises(DataError, match=file.name):
        read_snapshot(snapshot, "conversion")


def test_folder_without_manifest_and_task_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=MANIFEST_NAME):
        read_manifest(tmp_path)
    snapshot = write_snapshot(tmp_path, {"conversion": sample_rows(9)})
    with pytest.raises(DataError, match="no samples of the task click"):
        read_snapshot(snapshot, "click")


def test_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path, {"conversion": sample_rows(9)})
    manifest = json.loads((snapshot / MANIFEST_NAME).read_text())
    (snapshot / MANIFEST_NAME).write_text(json.dumps(manifest | {"format_version": 1}))
    with pytest.raises(DataError, match="version 2"):
        read_manifest(snapshot)


def test_id_names_the_window_and_follows_every_input() -> None:
    name = snapshot_id(AS_OF, 7 * DAY_MS, {"rate": 1.0})
    assert name.startswith("20260105T000000Z-7d-")
    assert name == snapshot_id(AS_OF, 7 * DAY_MS, {"rate": 1.0})
    assert name != snapshot_id(AS_OF, 7 * DAY_MS, {"rate": 0.5})
    assert snapshot_id(AS_OF + 1, DAY_MS, {}).startswith("20260105T000000.001Z-1d-")


@pytest.mark.parametrize(
    ("location", "parts"),
    [("a/b/", ("a/b".rpartition("/")[0], "b")), ("b", (".", "b")), ("s3a://x/y/s", ("s3a://x/y", "s"))],
)
def test_location_is_cut_into_folder_and_name(location: str, parts: tuple[str, str]) -> None:
    assert split_location(location) == parts


def some_rows(place: Workplace) -> None:
    place.data.write("part", b"rows")
    place.diff.write("part", b"changes")
    place.scratch.write("part", b"keys")


def test_nothing_is_left_of_a_build_that_failed(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def interrupted() -> None:
        with workplace(open_folder(tmp_path / "s")) as place:
            some_rows(place)
            raise Killed

    with pytest.raises(Killed):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_build_are_swept_those_of_a_living_or_remote_one_are_not(tmp_path: Path) -> None:
    gone = [f"{kind}-{HOST}.4194305.0a" for kind in ("data", "diff", "scratch")]
    others = [f"data-{HOST}.{os.getpid()}.0b", "data-elsewhere.4194305.0c"]
    for name in (*gone, *others):
        (tmp_path / "s" / name).mkdir(parents=True)
    with workplace(open_folder(tmp_path / "s")):
        assert sorted(path.name for path in (tmp_path / "s").iterdir()) == sorted(others)


def test_snapshot_of_whoever_publishes_first_stays(tmp_path: Path) -> None:
    manifest = read_manifest(write_snapshot(tmp_path / "made", {"conversion": sample_rows(9)}))
    folder = open_folder(tmp_path / "s")
    with workplace(folder) as first, workplace(folder) as second:
        some_rows(first)
        some_rows(second)
        first.publish(manifest)
        second.publish(manifest.model_copy(update={"code_version": "other"}))
    assert read_manifest(tmp_path / "s") == manifest
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == sorted([MANIFEST_NAME, f"data-{first.token}", f"diff-{first.token}"])
