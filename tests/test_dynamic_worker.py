"""A worker with dynamic tables, killed at any moment: the same ids have rows, and the same ones have none."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from jobs.broker import Broker
from jobs.checkpoint import CheckpointStore
from jobs.release import Release, list_releases, pointed
from models.student import Student
from tests.small_run import SmallRun
from tests.test_worker import MOMENTS
from tests.workers import Killed, Produced, crash, finished


@pytest.fixture(scope="module")
def produced(dynamic_run: SmallRun, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Produced:
    return Produced.to(broker, "dynamic-worker", dynamic_run, tmp_path_factory.mktemp("reference"))


def ids_of(release: Release) -> set[int]:
    student = release.models["click"]
    assert isinstance(student, Student)
    assert student.ids is not None
    return set(student.ids.keys[student.ids.keys != 0].tolist())


def test_a_worker_killed_at_one_moment_after_the_other_ends_in_the_same_state(
    produced: Produced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 0
    for after, moment in enumerate(sorted(MOMENTS)):
        worker = produced.worker(tmp_path)
        with monkeypatch.context() as patch:
            MOMENTS[moment](worker, patch, after % 3)
            patch.setattr(worker, "close", lambda: None)
            try:
                worker.run()
            except Killed:
                kills += 1
            finally:
                crash(worker)
    assert kills >= 2
    assert finished(produced.worker(tmp_path)) == produced.digest


def test_releases_hold_the_ids_that_are_alive_and_no_others(produced: Produced) -> None:
    root = produced.reference / "releases"
    students = [name for name in list_releases(root) if name.startswith("student")]
    alive = [ids_of(Release.load(root / name)) for name in students]
    gone = set[int]()
    for before, after in itertools.pairwise(alive):
        gone |= before - after
    assert len(gone) > 100
    assert gone - alive[-1]
    newest = pointed(root, "CURRENT")
    assert newest is not None
    found = CheckpointStore(produced.reference / "state").load()
    assert found is not None
    keys = found.arrays["student/click/weights/ids"]
    assert ids_of(Release.load(root / newest)) == set(keys[keys != 0].tolist())
    # What stood in the rows of ids that have gone is gone as well.
    for name in ("weights", "accumulator"):
        table = found.arrays[f"student/click/{name}/embedding"]
        assert not table[len(table) - len(keys) :][keys == 0].any()
    assert np.count_nonzero(keys) <= 300
