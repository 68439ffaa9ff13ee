"""Releases: written once and whole, verified when loaded, pointed to forwards, collected with care."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from calibration.chain import CalibrationChain
from jobs.cli import cli
from jobs.release import (
    Release,
    TaskFiles,
    garbage_collect,
    list_releases,
    point,
    pointed,
    release_name,
    write_release,
)
from jobs.release_pointer import Pointer, read_pointer
from models.gbdt import GbdtModel
from pipelines.config_sections import TeacherConfig
from pipelines.errors import ConfigError, DataError, SetupError, StaleStateError
from pipelines.features import encode_rows
from pipelines.training_set import TrainingSet
from tests.releases import SEGMENTS, SPEC, impressions, publish, trained


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("releases"), 1234)


def bare(root: Path, step: int, epoch: int = 1, content: bytes = b"x", **changes: Any) -> Path:
    """A release whose model is never loaded."""
    arguments: dict[str, Any] = {
        "kind": "student",
        "epoch": epoch,
        "step": step,
        "parent": None,
        "spec": SPEC,
        "config_toml": "",
        "segments": SEGMENTS,
        "tasks": {"click": TaskFiles("student", {"student.json": content}, {"kind": "any"})},
        "last_event_time": 5,
        "learned_events": 7,
    }
    return write_release(root, **{**arguments, **changes})


# ---- writing and loading ----


def test_a_loaded_release_predicts_to_the_bit_what_its_model_and_calibrator_do(published: Path) -> None:
    release = Release.load(published)
    encoded = encode_rows(list(impressions(100, seed=5)), SPEC, SEGMENTS)
    for task, seed in (("click", 1234), ("conversion", 1235)):
        student, chain = trained(seed)
        logit = student.predict_logit(encoded.buckets, encoded.numbers)
        scored = release.score(encoded)[task]  # type: ignore[index]
        np.testing.assert_array_equal(scored.logit, logit)
        np.testing.assert_array_equal(scored.probability, chain.transform(logit, encoded.segment_key))
    np.testing.assert_array_equal(release.logit(encoded)["click"], release.score(encoded)["click"].logit)
    np.testing.assert_array_equal(
        release.probability(encoded)["click"], release.score(encoded)["click"].probability
    )


def test_manifest_says_what_the_release_is(published: Path) -> None:
    release = Release.load(published)
    assert published.name == release.name == "student-0001-0000001234"
    assert (release.kind, release.epoch, release.step, release.tasks) == (
        "student",
        1,
        1234,
        ("click", "conversion"),
    )
    assert release.spec == SPEC
    assert release.segments == SEGMENTS
    manifest = json.loads((published / "MANIFEST.json").read_text())
    assert manifest["format"] == 1
    assert manifest["learned_events"] == 1234 * 256
    assert manifest["feature_spec_digest"] == SPEC.digest()
    assert manifest["tasks"]["click"] == {"model": "student", "sampling": {"negative_sampling_rate": 1.0}}
    assert manifest["extra"] == {"produced_at": {"partition-0": 1_700_000_000_000}}
    assert set(manifest["files"]) == {
        str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()
    } - {"MANIFEST.json"}


def test_a_release_of_trees_is_loaded_without_torch(tmp_path: Path) -> None:
    n = 400
    encoded = encode_rows(list(impressions(n)), SPEC, SEGMENTS)
    one = np.ones(n, np.float32)
    train = TrainingSet(
        **{name: getattr(encoded, name) for name in ("buckets", "numbers", "user_key", "segment_key")},
        label=(np.arange(n) % 3 == 0).astype(np.float32),
        weight=one,
        event_time=np.arange(n),
        mature=np.ones(n, np.bool_),
        observed_share=one,
    )
    model = GbdtModel.fit(train, SPEC, TeacherConfig(rounds=5))
    tasks = {"click": TaskFiles("gbdt", model.to_files(), CalibrationChain().state())}
    path = bare(tmp_path, 3, kind="teacher", tasks=tasks)
    assert path.name == "teacher-0001-0000000003"
    np.testing.assert_array_equal(
        Release.load(path).logit(encoded)["click"], model.predict_logit(encoded.buckets, encoded.numbers)
    )
    program = (
        "import sys; from pathlib import Path; from jobs.release import Release\n"
        f"Release.load(Path({str(path)!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_same_release_written_again_is_the_one_that_is_there(tmp_path: Path) -> None:
    first = bare(tmp_path, 1, extra={"produced_at": 1})
    before = (first / "MANIFEST.json").stat()
    again = bare(tmp_path, 1, extra={"produced_at": 2})  # notes of the writer are not what it is
    assert again == first
    after = (again / "MANIFEST.json").stat()
    # Reading it may change the time of its last access, and nothing else.
    for name in ("st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, name) == getattr(before, name)


@pytest.mark.parametrize(
    "change",
    [{"content": b"other"}, {"learned_events": 8}, {"segments": ()}, {"config_toml": "x = 1"}],
    ids=["model", "events", "segments", "config"],
)
def test_another_release_of_the_same_name_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    first = bare(tmp_path, 1)
    digest = json.loads((first / "MANIFEST.json").read_text())["digest"]
    with pytest.raises(StaleStateError, match="a different release named student-0001-0000000001"):
        bare(tmp_path, 1, **change)
    assert json.loads((first / "MANIFEST.json").read_text())["digest"] == digest


def test_nothing_but_whole_releases_is_ever_seen_under_a_release_name(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from tests.test_release import bare\n"
        f"bare(Path({str(tmp_path)!r}), 1, content=b'x' * 50_000_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    while not list(tmp_path.glob(".tmp-*")) and writer.poll() is None:
        time.sleep(0.001)
    writer.kill()
    writer.wait()
    assert all((tmp_path / name / "MANIFEST.json").exists() for name in list_releases(tmp_path))
    path = bare(tmp_path, 1, content=b"x" * 50_000_000)
    assert json.loads((path / "MANIFEST.json").read_text())["name"] == path.name


def test_writing_a_release_of_twenty_megabytes_leaves_no_temporary_files(tmp_path: Path) -> None:
    bare(tmp_path, 1, content=os.urandom(20_000_000))
    assert [entry.name for entry in tmp_path.iterdir()] == ["student-0001-0000000001"]


def test_a_folder_that_cannot_be_written_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot write the release"):
        bare(tmp_path / "file", 1)


def test_a_pointer_that_the_disk_refuses_is_an_error_and_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bare(tmp_path, 1), bare(tmp_path, 2)
    point(tmp_path, "CURRENT", first.name)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match=f"cannot move CURRENT .* to {second.name}: No space left"):
        point(tmp_path, "CURRENT", second.name)
    assert pointed(tmp_path, "CURRENT") == first.name
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_model_file_cannot_leave_its_folder(tmp_path: Path) -> None:
    tasks = {"click": TaskFiles("student", {"../../evil": b""}, {})}
    with pytest.raises(DataError, match="plain file name"):
        bare(tmp_path, 1, tasks=tasks)


# ---- damage ----


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit_manifest(path: Path, key: str, value: object) -> None:
    document = json.loads((path / "MANIFEST.json").read_text())
    document[key] = value
    (path / "MANIFEST.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda path: _flip(path / "click" / "student.safetensors"),
            "click/student.safetensors: expected the sha256",
        ),
        (lambda path: _flip(path / "conversion" / "calibrator.json"), "conversion/calibrator.json"),
        (lambda path: _flip(path / "feature_spec.toml"), "feature_spec.toml"),
        (
            lambda path: (path / "click" / "student.json").unlink(),
            "click/student.json is in the manifest but missing",
        ),
        (
            lambda path: (path / "click" / "extra.bin").write_bytes(b""),
            "not in its manifest: click/extra.bin",
        ),
        (lambda path: _edit_manifest(path, "step", 1235), "was changed after it was written"),
        (lambda path: _edit_manifest(path, "format", 2), "not a manifest of format 1: format"),
        (lambda path: (path / "MANIFEST.json").write_text("{"), "not a manifest of format 1"),
        (lambda path: path.rename(path.with_name("student-0002-0000000001")), "no MANIFEST.json"),
    ],
    ids=["weights", "calibrator", "spec", "missing", "added", "manifest", "format", "torn manifest", "gone"],
)
def test_damage_is_found_when_a_release_is_loaded_and_named(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    path = publish(tmp_path, 7)
    damage(path)
    with pytest.raises((StaleStateError, DataError), match=named):
        Release.load(path)


def test_a_release_under_another_name_is_refused(tmp_path: Path) -> None:
    path = bare(tmp_path, 1)
    moved = path.rename(path.with_name("student-0009-0000000001"))
    with pytest.raises(
        StaleStateError, match=r"expected the release student-0009-0000000001 .* Found student-0001"
    ):
        Release.load(moved)


# ---- pointers ----


def test_current_moves_forward_in_epoch_and_step_and_back_only_when_told(tmp_path: Path) -> None:
    for epoch, step in ((1, 5), (1, 9), (2, 3)):
        bare(tmp_path, step, epoch)
    assert pointed(tmp_path, "CURRENT") is None
    for epoch, step in ((1, 5), (1, 9), (2, 3)):
        point(tmp_path, "CURRENT", release_name("student", epoch, step))
    with pytest.raises(StaleStateError, match=r"points to student-0002-0000000003; it does not go back"):
        point(tmp_path, "CURRENT", release_name("student", 1, 9))
    assert pointed(tmp_path, "CURRENT") == release_name("student", 2, 3)
    point(tmp_path, "CURRENT", release_name("student", 1, 9), rollback=True)
    assert read_pointer(tmp_path, "CURRENT") == Pointer(release_name("student", 1, 9), rollback=True)
    point(tmp_path, "CURRENT", release_name("student", 2, 3))
    assert read_pointer(tmp_path, "CURRENT") == Pointer(release_name("student", 2, 3), rollback=False)


def test_other_pointers_go_where_they_are_told(tmp_path: Path) -> None:
    new, old = bare(tmp_path, 9), bare(tmp_path, 5)
    point(tmp_path, "last_good", new.name)
    point(tmp_path, "last_good", old.name)
    assert pointed(tmp_path, "last_good") == old.name


def test_a_pointer_names_only_releases_that_are_there(tmp_path: Path) -> None:
    bare(tmp_path, 1)
    with pytest.raises(DataError, match="there is no release student-0001-0000000002"):
        point(tmp_path, "CURRENT", "student-0001-0000000002")
    with pytest.raises(ConfigError, match="CURRENT, last_good, teacher"):
        point(tmp_path, "latest", "student-0001-0000000001")
    (tmp_path / "CURRENT").write_text("../../etc\n")
    with pytest.raises(StaleStateError, match="does not name a release"):
        pointed(tmp_path, "CURRENT")


# ---- garbage collection ----


def test_garbage_collection_keeps_the_newest_and_what_a_pointer_names(tmp_path: Path) -> None:
    names = [bare(tmp_path, step).name for step in range(8)]
    point(tmp_path, "CURRENT", names[2])
    point(tmp_path, "last_good", names[1])
    point(tmp_path, "teacher", names[7])
    assert garbage_collect(tmp_path, keep=2) == [names[0], *names[3:6]]
    assert list_releases(tmp_path) == [names[1], names[2], names[6], names[7]]
    assert garbage_collect(tmp_path, keep=2) == []
    with pytest.raises(ConfigError, match="at least one release"):
        garbage_collect(tmp_path, keep=0)


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    bare(tmp_path, 1)
    for name in (".tmp-student-old", ".tmp-student-new"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".tmp-student-old", (0, 0))
    garbage_collect(tmp_path, keep=1)
    assert [path.name for path in tmp_path.glob(".tmp-*")] == [".tmp-student-new"]


# ---- the command ----


def test_commands_list_show_promote_and_roll_back(tmp_path: Path) -> None:
    old, new = publish(tmp_path, 1), publish(tmp_path, 2)
    point(tmp_path, "last_good", old.name)

    def run(*arguments: str) -> tuple[int, str]:
        command, *rest = arguments
        outcome = CliRunner().invoke(cli, ["release", command, "--releases", str(tmp_path), *rest])
        return outcome.exit_code, outcome.output

    assert run("promote", new.name) == (0, f"CURRENT -> {new.name}\n")
    code, listing = run("list")
    assert code == 0
    assert [line.split()[0] for line in listing.splitlines()[1:]] == [old.name, new.name]
    assert "CURRENT" in listing.splitlines()[2]
    code, shown = run("show", "CURRENT")
    assert (code, json.loads(shown)["name"]) == (0, new.name)
    code, refused = run("promote", old.name)
    assert code == 1
    assert "rollback" in refused
    assert run("rollback") == (0, f"CURRENT -> {old.name}\n")
    assert read_pointer(tmp_path, "CURRENT") == Pointer(old.name, rollback=True)
    code, rows = run("list", "--json")
    assert json.loads(rows)[0]["aliases"] == ["CURRENT", "last_good"]


def test_commands_refuse_what_is_not_there_or_damaged_with_the_documented_codes(tmp_path: Path) -> None:
    def run(*arguments: str) -> int:
        command, *rest = arguments
        return CliRunner().invoke(cli, ["release", command, "--releases", str(tmp_path), *rest]).exit_code

    assert run("list") == 3
    assert run("show", "student-1") == 3
    assert run("rollback") == 3
    path = publish(tmp_path, 1)
    _flip(path / "click" / "student.safetensors")
    assert run("promote", path.name) == 1
    assert pointed(tmp_path, "CURRENT") is None
