"""A checkpoint counts whole or not at all, is read only if intact, and has one writer."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from jobs.checkpoint import CheckpointStore, state_digest
from jobs.cli import cli
from pipelines.errors import SetupError, StaleStateError
from pipelines.synced_files import write_synced


def arrays(step: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(step)
    return {
        "weights": rng.normal(size=(5, 3)).astype(np.float32),
        "strided": rng.integers(0, 9, (4, 6)).T,
        "empty": np.zeros((0, 2), np.int64),
    }


def commit(store: CheckpointStore, step: int) -> str:
    return store.commit(
        step,
        arrays(step),
        {"step": step, "ratio": 0.1 + step},
        cursor=[["clicks", 0, step, 0, -1]],
        outputs=[f"{step}.parquet"],
        volatile={"committed_at": 1.5},
    )


def opened(root: Path, keep: int = 3) -> CheckpointStore:
    store = CheckpointStore(root, keep)
    store.open()
    return store


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_fresh_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert opened(tmp_path / "state").load() is None


def test_what_is_loaded_is_what_was_committed_to_the_bit(tmp_path: Path) -> None:
    digest = commit(opened(tmp_path), 7)
    loaded = opened(tmp_path).load()
    assert loaded is not None
    assert state_digest(loaded.arrays, loaded.plain) == digest == loaded.manifest["digest"]
    assert loaded.plain == {"step": 7, "ratio": 7.1}
    for name, expected in arrays(7).items():
        assert loaded.arrays[name].dtype == expected.dtype
        assert np.array_equal(loaded.arrays[name], expected)
    assert loaded.manifest["cursor"] == [["clicks", 0, 7, 0, -1]]
    assert loaded.manifest["outputs"] == ["7.parquet"]


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({"weights": arrays(1)["weights"].astype(np.float64)}, {}),
        ({"weights": arrays(1)["weights"].reshape(3, 5)}, {}),
        ({"weights": np.nextafter(arrays(1)["weights"], np.float32(9))}, {}),
        ({"more": np.zeros(1)}, {}),
        ({}, {"step": 2}),
    ],
)
def test_the_digest_tells_any_difference_in_bits_types_shapes_and_names(
    change: dict[str, Any], plain: dict[str, Any]
) -> None:
    assert state_digest({**arrays(1), **change}, {"step": 1, **plain}) != state_digest(arrays(1), {"step": 1})


@pytest.mark.parametrize("file", ["shard-00000.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_checkpoint_is_walked_back_from_loudly(
    tmp_path: Path, file: str, missing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)
    for step in (1, 2, 3):
        commit(store, step)
    for name in store.names()[1:]:
        path = store.folder / name / file
        if missing:
            path.unlink()
        else:
            damage(path)
    found = opened(tmp_path).load()
    assert found is not None
    assert found.manifest["step"] == 1
    assert len([record for record in caplog.records if "going back" in record.message]) == 2


def test_with_no_intact_checkpoint_nothing_is_started_from_scratch(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (1, 2):
        commit(store, step)
        damage(store.folder / store.names()[-1] / "state.json")
    with pytest.raises(StaleStateError, match="no intact checkpoint"):
        opened(tmp_path).load()


def test_after_a_walk_back_the_next_commits_count(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (1, 2):
        commit(store, step)
    damage(store.folder / store.names()[-1] / "state.json")
    store = opened(tmp_path)
    found = store.load()
    assert found is not None
    assert found.manifest["step"] == 1
    digest = commit(store, 2)
    again = opened(tmp_path).load()
    assert again is not None
    assert (again.manifest["digest"], again.manifest["epoch"]) == (digest, 2)
    assert again.manifest["parent"] == found.path.name
    later = opened(tmp_path)
    gone = later.collect()
    assert len(gone) == 1
    assert gone[0].startswith(".broken-000000000002-000001-")
    assert later.names() == [found.path.name, again.path.name]


@pytest.mark.parametrize("edit", [{"format": 1}, {"format": 3}])
def test_a_checkpoint_of_another_version_is_refused_and_not_gone_back_over(
    tmp_path: Path, edit: dict[str, int]
) -> None:
    store = opened(tmp_path)
    for step in (1, 2):
        commit(store, step)
    path = store.folder / store.names()[-1] / "MANIFEST.json"
    document = {**json.loads(path.read_text()), **edit}
    del document["seal"]
    if edit["format"] > 1:  # later formats have a seal of the same kind
        document["seal"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(document))
    head = store.head()
    with pytest.raises(StaleStateError, match=f"expected format 2. Received: {edit['format']}"):
        opened(tmp_path).load()
    assert store.head() == head


def test_an_error_that_comes_after_the_head_was_moved_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    commit(store, 1)
    move = store._move_head

    def fails_late(name: str) -> bool:
        move(name)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(store, "_move_head", fails_late)
    with pytest.raises(SetupError, match="disk I/O error"):
        commit(store, 2)
    found = opened(tmp_path).load()
    assert found is not None
    assert found.manifest["step"] == 2


def test_a_collection_that_the_disk_refuses_does_not_undo_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=1, deltas=0)
    store.open()

    def refused(folder: Path, names: list[str]) -> list[str]:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.checkpoint.remove", refused)
        for step in (1, 2, 3):
            commit(store, step)
    assert "not removed: read-only" in caplog.text
    assert len(store.names()) == 3
    commit(store, 4)
    assert [int(name[:12]) for name in store.names()] == [3, 4]


def test_after_a_walk_back_the_intact_checkpoint_is_the_parent_and_is_kept(tmp_path: Path) -> None:
    store = opened(tmp_path, keep=2)
    for step in (1, 2):
        commit(store, step)
    intact, corrupt = store.names()
    damage(store.folder / corrupt / "state.json")
    store = opened(tmp_path, keep=2)
    store.load()
    commit(store, 3)
    head = store.head()
    assert head is not None
    assert store.names() == [intact, head]
    assert store.manifest(head)["parent"] == intact
    commit(store, 4)
    assert store.manifest(store.names()[-1])["parent"] == head


def test_what_never_counted_is_swept_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    commit(store, 1)
    (store.folder / ".tmp-2-abc").mkdir()
    (store.folder / ".tmp-2-abc" / "state.json").write_text("{")

    class Killed(BaseException):
        pass

    def killed(name: str) -> bool:
        raise Killed

    # Renamed into place, but killed before the head moved: a whole checkpoint that does not count.
    monkeypatch.setattr(store, "_move_head", killed)
    with pytest.raises(Killed):
        commit(store, 2)
    assert len(store.names()) == 2
    later = opened(tmp_path)
    found = later.load()
    assert found is not None
    assert found.manifest["step"] == 1
    assert [path.name for path in later.folder.iterdir()] == [later.head()]


def test_a_second_opener_fences_the_first_whose_next_commit_changes_nothing(tmp_path: Path) -> None:
    first = opened(tmp_path)
    commit(first, 1)
    second = opened(tmp_path)
    with pytest.raises(StaleStateError, match="another worker has taken over"):
        commit(first, 2)
    found = second.load()
    assert found is not None
    assert found.manifest["step"] == 1
    commit(second, 5)
    assert [name for name in second.names() if name.startswith("000000000002")] == []
    with pytest.raises(StaleStateError):
        commit(first, 9)
    head = second.head()
    assert head is not None
    assert head.startswith("000000000005")


def test_a_worker_that_is_fenced_while_it_writes_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(tmp_path)
    commit(first, 1)

    def taken_over(path: Path, content: bytes) -> None:
        write_synced(path, content)
        if path.name == "state.json":
            opened(tmp_path)  # sweeps the half-written folder away

    monkeypatch.setattr("jobs.checkpoint_files.write_synced", taken_over)
    with pytest.raises(StaleStateError, match="another worker has taken over"):
        commit(first, 2)


@pytest.mark.parametrize("refused", [1, 2, 3, 4, 5])
def test_a_full_disk_leaves_the_head_where_it_was_and_a_later_try_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    store = opened(tmp_path)
    commit(store, 1)
    head, calls = store.head(), 0
    fsync = os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == refused:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match="No space left"):
        commit(store, 2)
    monkeypatch.undo()
    assert store.head() == head
    assert [path.name for path in store.folder.iterdir()] == [head]
    commit(store, 2)
    found = store.load()
    assert found is not None
    assert found.manifest["step"] == 2


def test_a_full_disk_while_going_back_is_one_clear_error_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    digests = [commit(store, step) for step in (1, 2)]
    damage(store.folder / store.names()[1] / "state.json")
    store = opened(tmp_path)
    with monkeypatch.context() as patch:
        error = sqlite3.OperationalError("database or disk is full")
        patch.setattr(store, "_move_head", Mock(side_effect=error))
        with pytest.raises(SetupError, match=r"cannot go back to checkpoint .* disk is full"):
            store.load()
    again = opened(tmp_path).load()
    assert again is not None
    assert again.manifest["digest"] == digests[0]


def test_a_really_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    commit(store, 1)
    head = store.head()
    # /dev/full answers every write with ENOSPC.
    monkeypatch.setattr(
        "jobs.checkpoint_files.write_synced", lambda path, content: write_synced(Path("/dev/full"), content)
    )
    with pytest.raises(SetupError, match="No space left"):
        commit(store, 2)
    assert store.head() == head


def test_a_reader_that_comes_before_the_first_table_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "head.sqlite").touch()
    assert CheckpointStore(tmp_path).head() is None


def test_garbage_collection_keeps_the_newest(tmp_path: Path) -> None:
    store = opened(tmp_path, keep=2)
    for step in range(1, 6):
        commit(store, step)
    assert [int(name.split("-")[0]) for name in store.names()] == [4, 5]


def test_a_damaged_head_is_told_and_not_overwritten(tmp_path: Path) -> None:
    commit(opened(tmp_path), 1)
    (tmp_path / "head.sqlite").write_bytes(b"this is no database, whatever its name says" * 50)
    with pytest.raises(StaleStateError, match="is damaged"):
        opened(tmp_path)


def test_the_command_lists_verifies_and_prints_the_digest(tmp_path: Path) -> None:
    store = opened(tmp_path)
    digests = [commit(store, step) for step in (1, 2)]
    runner = CliRunner()
    found = runner.invoke(cli, ["checkpoint", "digest", str(tmp_path)])
    assert (found.exit_code, found.stdout.strip()) == (0, digests[1])
    listed = runner.invoke(cli, ["checkpoint", "list", str(tmp_path)]).stdout.splitlines()
    assert [line.split("\t")[1] for line in listed] == ["1", "2"]
    assert listed[1].endswith("head")
    assert runner.invoke(cli, ["checkpoint", "verify", str(tmp_path)]).stdout.count("intact") == 2
    manifest = store.folder / store.names()[0] / "MANIFEST.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "outputs": []}))
    for name in ("verify", "list"):
        failed = runner.invoke(cli, ["checkpoint", name, str(tmp_path)])
        assert failed.exit_code == 1
        assert "corrupt" in failed.stderr


def test_a_folder_that_is_no_state_folder_is_bad_input(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["checkpoint", "digest", str(tmp_path)])
    assert found.exit_code == 3
    assert "head.sqlite" in found.stderr
