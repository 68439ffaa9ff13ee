"""Deltas: whatever changed, was killed or collected, the files give back the exact state and its digest."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from jobs.checkpoint import Checkpoint, CheckpointStore, state_digest
from jobs.checkpoint_files import read_arrays
from jobs.checkpoint_head import Head
from jobs.cli import cli
from jobs.state_digest import BLOCK_BYTES, BlockHashes
from jobs.tensor_file import write_tensors
from pipelines.errors import StaleStateError
from pipelines.table_rows import TableRows

ROWS = 300
Arrays = dict[str, NDArray[Any]]


class Learner:
    """Tables that change by rows, and small arrays and plain data that change each time."""

    def __init__(self) -> None:
        self.tables: Arrays = {
            "weights": np.zeros((ROWS, 3), np.float32),
            "slots": np.ones((ROWS, 3), np.float32),
            "wide": np.zeros(ROWS, np.float64),
        }
        self.small: Arrays = {"layer": np.zeros((2, 2), np.float32)}
        self.plain: dict[str, Any] = {"seen": 0}
        self._touched: set[int] | None = None

    def touch(self, rows: list[int]) -> None:
        self.plain = {"seen": self.plain["seen"] + 1}
        self.small = {"layer": self.small["layer"] + np.float32(0.5)}
        for table in self.tables.values():
            table[rows] += self.plain["seen"]
        if self._touched is not None:
            self._touched.update(rows)

    def take(self) -> dict[str, list[TableRows]]:
        rows = None if self._touched is None else np.array(sorted(self._touched), np.int64)
        self._touched = set()
        return {
            name: [TableRows(rows, table.copy() if rows is None else table[rows])]
            for name, table in self.tables.items()
        }

    def digest(self) -> str:
        return state_digest({**self.tables, **self.small}, self.plain)

    @classmethod
    def restored(cls, found: Checkpoint | None) -> Learner:
        learner = cls()
        if found is not None:
            learner.tables = {name: found.arrays[name].copy() for name in learner.tables}
            learner.small = {"layer": found.arrays["layer"].copy()}
            learner.plain = found.plain
        return learner


def commit(store: CheckpointStore, learner: Learner, step: int) -> str:
    return store.commit(
        step,
        learner.small,
        learner.plain,
        tables=learner.take(),
        cursor=[step],
        outputs=[],
        volatile={},
    )


def opened(root: Path, keep: int = 3, deltas: int = 3) -> CheckpointStore:
    store = CheckpointStore(root, keep, deltas)
    store.open()
    return store


def filled(root: Path, commits: int, keep: int = 100, deltas: int = 3) -> dict[str, str]:
    """A store with some commits; digest by name."""
    store, learner, found = opened(root, keep, deltas), Learner(), {}
    for step in range(1, commits + 1):
        learner.touch([step, 2 * step, ROWS - 1])
        digest = commit(store, learner, step)
        head = store.head()
        assert head is not None
        assert digest == learner.digest()
        found[head] = digest
    return found


class Killed(BaseException):
    """Stands for SIGKILL: from then on the process changes nothing on the disk."""


@contextmanager
def killed_at(count: int) -> Iterator[None]:
    """The ``count``-th of all calls that change the disk, and every one after it, does nothing."""
    calls = 0

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= count:
                raise Killed
            return original(*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (os, "rename"),
            (Path, "rename"),
            (shutil, "rmtree"),
            (Head, "move"),
        ):
            patch.setattr(owner, name, deadly(getattr(owner, name)))
        yield


ACTIONS = st.one_of(
    st.tuples(st.just("touch"), st.lists(st.integers(0, ROWS - 1), max_size=12)),
    st.tuples(st.just("touch"), st.just(list(range(0, ROWS)))),
    st.tuples(st.just("commit"), st.just(0)),
    st.tuples(st.just("commit"), st.just(0)),
    st.tuples(st.just("kill"), st.integers(1, 12)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("gc"), st.integers(1, 3)),
)


@settings(max_examples=40)
@given(actions=st.lists(ACTIONS, max_size=25), deltas=st.integers(0, 3), keep=st.integers(1, 3))
def test_any_history_of_updates_commits_kills_and_collections_restores_the_exact_state(
    actions: list[tuple[str, Any]], deltas: int, keep: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store, learner, step = opened(root, keep, deltas), Learner(), 0
        expected: str | None = None
        for what, argument in actions:
            if what == "touch":
                learner.touch(argument)
            elif what == "commit":
                step += 1
                expected = commit(store, learner, step)
                assert expected == learner.digest()
            elif what == "gc":
                CheckpointStore(root, argument).collect()
            else:
                if what == "kill":
                    step += 1
                    wanted, head = learner.digest(), store.head()
                    try:
                        with killed_at(argument):
                            commit(store, learner, step)
                    except Killed:
                        pass
                    # It counts if and only if the head has moved.
                    expected = expected if store.head() == head else wanted
                store = opened(root, keep, deltas)
                learner = Learner.restored(store.load())
                assert learner.digest() == (Learner().digest() if expected is None else expected)
        found = CheckpointStore(root).load()
        assert (None if found is None else found.manifest["digest"]) == expected
        assert Learner.restored(found).digest() == (Learner().digest() if expected is None else expected)
        if found is not None:
            assert len(found.manifest["chain"]) <= deltas


# The digest ----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(0, 2000),
    st.sampled_from([(), (1,), (3, 5), (700,)]),
    st.sampled_from(["<f4", "<f8", "|b1", "<i8"]),
    st.lists(st.integers(0, 1_999), max_size=30),
)
def test_rehashing_the_rows_that_changed_gives_the_digest_of_the_whole(
    rows: int, row_shape: tuple[int, ...], dtype: str, touched: list[int]
) -> None:
    table = np.zeros((rows, *row_shape), dtype)
    hashes = BlockHashes(table)
    chosen = np.array(sorted({row for row in touched if row < rows}), np.int64)
    before = hashes.digest()
    table[chosen] = 1
    hashes.rehash(chosen)
    assert hashes.digest() == BlockHashes(table.copy()).digest()
    assert (hashes.digest() != before) == bool(len(chosen))


def test_a_change_of_any_one_row_is_seen_at_the_edges_of_blocks() -> None:
    table = np.zeros((BLOCK_BYTES // 4 * 2 + 3, 4), np.uint8)
    seen = {BlockHashes(table).digest()}
    for row in (0, 511, 512, 1023, 1024, len(table) - 1):
        changed = table.copy()
        changed[row, 3] = 1
        seen.add(BlockHashes(changed).digest())
    assert len(seen) == 7


# Chains --------------------------------------------------------------------------------------------------


def test_a_chain_is_bounded_and_a_base_begins_the_next(tmp_path: Path) -> None:
    names = list(filled(tmp_path, 9, deltas=3))
    store = CheckpointStore(tmp_path)
    manifests = [store.manifest(name) for name in names]
    assert [len(one["chain"]) for one in manifests] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert [one["base"] for one in manifests] == [names[index // 4 * 4] for index in range(9)]
    assert [one["parent"] for one in manifests] == [None, *names[:-1]]
    assert [link["name"] for link in manifests[6]["chain"]] == names[4:6]


def test_a_delta_is_as_large_as_what_changed(tmp_path: Path) -> None:
    names = list(filled(tmp_path, 2))
    sizes = [os.path.getsize(tmp_path / "checkpoints" / name / "shard-00000.safetensors") for name in names]
    assert sizes[0] > ROWS * (12 + 12 + 8) > 5 * sizes[1]


def test_when_most_rows_change_a_base_is_written(tmp_path: Path) -> None:
    store, learner = opened(tmp_path), Learner()
    commit(store, learner, 1)
    learner.touch(list(range(0, ROWS, 4)))
    commit(store, learner, 2)
    learner.touch(list(range(0, ROWS, 4)) + list(range(1, ROWS, 2)))
    commit(store, learner, 3)
    assert [len(store.manifest(name)["chain"]) for name in store.names()] == [0, 1, 0]


def test_what_a_failed_commit_did_not_write_is_in_the_next_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.errors import SetupError

    store, learner = opened(tmp_path), Learner()
    commit(store, learner, 1)
    learner.touch([5])

    def full(*given: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.checkpoint_files.write_synced", full)
        with pytest.raises(SetupError, match="No space left"):
            commit(store, learner, 2)
    learner.touch([9])
    commit(store, learner, 3)
    found = opened(tmp_path).load()
    assert found is not None
    assert len(found.manifest["chain"]) == 1
    assert Learner.restored(found).digest() == learner.digest()


def test_the_same_step_is_not_committed_twice(tmp_path: Path) -> None:
    store, learner = opened(tmp_path), Learner()
    commit(store, learner, 1)
    with pytest.raises(ValueError, match="committed before"):
        commit(store, learner, 1)


def test_a_table_may_lie_in_several_shards(tmp_path: Path) -> None:
    table, other = np.arange(10.0).reshape(5, 2), np.arange(3)
    for file, arrays in (
        ("a", {"table": table[3:]}),
        ("b", {"table": table[:3], "other": other, "same": other * 2}),
        ("c", {"@rows/0": np.array([4]), "table": -table[4:]}),
        ("d", {"@rows/0": np.array([0, 2]), "table": -table[[0, 2]], "other": other + 1}),
    ):
        write_tensors(tmp_path / file, arrays)

    def shard(rank: int, file: str, part: dict[str, Any], *unchanged: str) -> dict[str, Any]:
        return {"rank": rank, "file": file, "tables": {"table": part}, "unchanged": list(unchanged)}

    base = {"shards": [shard(1, "a", {"first": 3}), shard(0, "b", {"first": 0})]}
    delta = {"shards": [shard(1, "c", {"index": "@rows/0"}), shard(0, "d", {"index": "@rows/0"}, "same")]}
    found = read_arrays([(tmp_path, base), (tmp_path, delta)])
    assert sorted(found) == ["other", "same", "table"]
    assert np.array_equal(found["same"], other * 2)
    assert np.array_equal(found["table"], table * np.array([-1, 1, -1, 1, -1])[:, None])
    assert np.array_equal(found["other"], other + 1)


def test_a_delta_leaves_out_arrays_that_are_the_same_objects_as_before(tmp_path: Path) -> None:
    store, table, same = opened(tmp_path), np.zeros((100, 2)), np.arange(5.0)
    for step in (1, 2, 3):
        rows = None if step == 1 else np.array([step])
        table[step] = step
        values = table.copy() if rows is None else table[rows]
        arrays: dict[str, Any] = {"same": same, "copy": same.copy(), "parts": [same, same + step]}
        store.commit(
            step,
            arrays,
            {"step": step},
            tables={"table": [TableRows(rows, values)]},
            cursor=[],
            outputs=[],
            volatile={},
        )
        found = store.load()
        assert found is not None
        expected = {"same": same, "copy": same, "parts": np.append(same, same + step), "table": table}
        assert found.arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found.arrays[name], array)
        (shard,) = found.manifest["shards"]
        assert shard["unchanged"] == ([] if step == 1 else ["same"])


# Faults --------------------------------------------------------------------------------------------------

FILES = ("shard-00000.safetensors", "state.json", "MANIFEST.json")


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("link", range(7))
def test_a_broken_link_takes_with_it_all_that_stand_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, link: int, file: str, missing: bool
) -> None:
    # Two chains: 0 1 2 3 and 4 5 6.
    digests = filled(tmp_path, 7)
    names = list(digests)
    path = tmp_path / "checkpoints" / names[link] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if missing else path.write_bytes(content)
    store = opened(tmp_path)
    if link == 0:
        assert_head(store, digests[names[-1]])
        return
    whole = names[link - 1] if link >= 4 else names[-1]
    with caplog.at_level(logging.ERROR):
        assert_head(store, digests[whole])
    back = [record.getMessage() for record in caplog.records if "going back" in record.getMessage()]
    assert len(back) == (7 - link if link >= 4 else 0)
    assert all(file in message and names[link] in message for message in back)
    # The worker goes on from there, and its next commits count.
    assert store.head() == whole
    learner = Learner.restored(store.load())
    learner.touch([1])
    digest = commit(store, learner, 100)
    assert_head(opened(tmp_path), digest)


def assert_head(store: CheckpointStore, digest: str) -> None:
    found = store.load()
    assert found is not None
    assert found.manifest["digest"] == digest == Learner.restored(found).digest()


def test_a_link_that_was_replaced_by_another_whole_checkpoint_is_noticed(tmp_path: Path) -> None:
    names = list(filled(tmp_path / "one", 3))
    store, learner = opened(tmp_path / "two"), Learner()
    for step in (1, 2):
        learner.touch([7])
        commit(store, learner, step)
    other = tmp_path / "two" / "checkpoints" / names[1]
    shutil.rmtree(tmp_path / "one" / "checkpoints" / names[1])
    other.rename(tmp_path / "one" / "checkpoints" / names[1])
    with pytest.raises(StaleStateError, match="not the one that was built on"):
        CheckpointStore(tmp_path / "one").read(names[2])


def test_what_was_gone_back_over_is_set_aside_until_it_is_collected(tmp_path: Path) -> None:
    digests = filled(tmp_path, 7)
    names = list(digests)
    (tmp_path / "checkpoints" / names[5] / "state.json").unlink()
    assert_head(opened(tmp_path), digests[names[4]])
    aside = sorted(path.name for path in (tmp_path / "checkpoints").glob(".broken-*"))
    assert [name[len(".broken-") : -9] for name in aside] == names[5:]
    printed = CliRunner().invoke(cli, ["checkpoint", "gc", str(tmp_path), "--keep", "9"]).stdout.splitlines()
    assert printed == aside
    assert CheckpointStore(tmp_path).names() == names[:5]


# Collection ----------------------------------------------------------------------------------------------


def test_collection_keeps_what_the_kept_stand_on_and_one_on_another_base(tmp_path: Path) -> None:
    names = list(filled(tmp_path, 14, keep=2, deltas=3))
    # Chains begin at 0, 4, 8, 12. Kept: 13 and 12; 11 is the newest on another base.
    assert CheckpointStore(tmp_path).names() == names[8:]


def test_a_broken_base_never_leaves_nothing_to_go_back_to(tmp_path: Path) -> None:
    digests = filled(tmp_path, 11, keep=1, deltas=3)
    names = list(digests)
    (tmp_path / "checkpoints" / names[8] / "shard-00000.safetensors").unlink()
    assert_head(opened(tmp_path), digests[names[7]])


def test_collection_refuses_while_the_head_is_broken(tmp_path: Path) -> None:
    names = list(filled(tmp_path, 7))
    (tmp_path / "checkpoints" / names[4] / "MANIFEST.json").unlink()
    found = CliRunner().invoke(cli, ["checkpoint", "gc", str(tmp_path), "--keep", "1"])
    assert found.exit_code == 1
    assert "nothing is removed" in found.stderr
    assert CheckpointStore(tmp_path).names() == names


def test_a_chain_that_lost_a_link_is_left_behind_by_a_new_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, learner = opened(tmp_path, deltas=9), Learner()
    for step in (1, 2, 3):
        learner.touch([step])
        commit(store, learner, step)
    shutil.rmtree(store.folder / store.names()[0])
    for step in (4, 5):
        learner.touch([step])
        commit(store, learner, step)
    assert "The next checkpoint will be a base" in caplog.text
    assert_head(opened(tmp_path), learner.digest())


def test_the_commands_know_of_chains(tmp_path: Path) -> None:
    names = list(digests := filled(tmp_path, 6))
    runner = CliRunner()

    def run(*words: str) -> Any:
        return runner.invoke(cli, ["checkpoint", words[0], str(tmp_path), *words[1:]])

    listed = [line.split("\t") for line in run("list").stdout.splitlines()]
    assert [line[0] for line in listed] == names
    assert [line[3] for line in listed[:5]] == [
        "base",
        *(f"delta {n} on {names[0]}" for n in (1, 2, 3)),
        "base",
    ]
    assert [line[4] for line in listed] == [""] * 5 + ["head"]
    assert run("digest").stdout.strip() == digests[names[-1]]
    assert run("verify").stdout.count("intact") == 6
    (tmp_path / "checkpoints" / names[1] / "state.json").write_text("{}")
    verified = run("verify")
    assert verified.exit_code == 1
    assert [line.split("\t")[1] for line in verified.stdout.splitlines()] == [
        "intact", "broken", "broken", "broken", "intact", "intact",
    ]  # fmt: skip
    assert f"stands on {names[1]}, of which state.json is corrupt" in verified.stderr
    assert run("gc", "--keep", "1").stdout == ""
    assert run("digest").stdout.strip() == digests[names[-1]]
