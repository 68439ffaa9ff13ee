"""Releases carry exactly the models and calibrators that were there when they were cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.publishing import Learned, load_first, publish_student
from jobs.release import Release, list_releases, pointed
from models.student import Student
from pipelines.errors import DataError, StaleStateError
from tests.small_run import SmallRun


def test_the_first_releases_come_back_as_they_were_written(small_run: SmallRun, tmp_path: Path) -> None:
    first = load_first(small_run.first_releases(tmp_path / "releases"))
    assert first.warm_up_until == small_run.backtest.warm_up_until
    assert first.student.digest() == small_run.backtest.first.student.digest()
    assert (
        set(first.students()) == set(first.calibrators()) == set(first.teachers()) == {"click", "conversion"}
    )


def test_students_and_calibrators_are_copies_that_learn_apart_from_the_release(small_run: SmallRun) -> None:
    first = small_run.backtest.first
    one, other = first.students()["click"], first.students()["click"]
    one.weights["bias"].add_(1.0)
    assert float(other.weights["bias"]) + 1.0 == pytest.approx(float(one.weights["bias"]))
    logit, keys = np.zeros(3), np.zeros((3, 1), np.int64)
    chain = first.calibrators()["click"]
    before = first.calibrators()["click"].transform(logit, keys)
    chain.update(logit, np.ones(3), np.ones(3) * 50, keys)
    assert not np.array_equal(chain.transform(logit, keys), before)
    assert np.array_equal(first.calibrators()["click"].transform(logit, keys), before)


def test_a_published_student_scores_as_the_loop_does(small_run: SmallRun, tmp_path: Path) -> None:
    root, loop = small_run.first_releases(tmp_path / "releases"), small_run.backtest.loop
    first = load_first(root)
    name = publish_student(
        root, Learned.now(loop), first, epoch=3, parent=first.student.name, extra={"note": 1}
    )
    assert pointed(root, "CURRENT") == name
    release = Release.load(root / name)
    assert (release.epoch, release.step, release.manifest.parent) == (3, loop.step_number, first.student.name)
    assert release.manifest.extra == {"warm_up_until": first.warm_up_until, "note": 1}
    events = next(small_run.steps(small_run.warm_rows))
    features = events.arrivals.features
    for task in release.tasks:
        student = loop.students[task]
        served = release.models[task]
        assert isinstance(served, Student)
        logit = student.predict_logit(features["buckets"], features["numbers"])
        assert np.array_equal(served.predict_logit(features["buckets"], features["numbers"]), logit)
        keys = features["segment_key"]
        assert np.array_equal(
            release.calibrators[task].transform(logit, keys), loop.calibrators[task].transform(logit, keys)
        )


def test_publishing_the_same_state_again_changes_nothing(small_run: SmallRun, tmp_path: Path) -> None:
    root, loop = small_run.first_releases(tmp_path / "releases"), small_run.backtest.loop
    first = load_first(root)
    for _ in range(2):
        publish_student(root, Learned.now(loop), first, epoch=1, parent=first.student.name, extra={})
    assert len(list_releases(root)) == 3


def test_a_worker_of_an_older_epoch_cannot_move_the_pointer_back(small_run: SmallRun, tmp_path: Path) -> None:
    root, loop = small_run.first_releases(tmp_path / "releases"), small_run.backtest.loop
    first = load_first(root)
    newer = publish_student(root, Learned.now(loop), first, epoch=2, parent=first.student.name, extra={})
    with pytest.raises(StaleStateError):
        publish_student(root, Learned.now(loop), first, epoch=1, parent=first.student.name, extra={})
    assert pointed(root, "CURRENT") == newer


def test_missing_first_releases_are_bad_input_and_damaged_ones_are_refused(
    small_run: SmallRun, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="expected a release"):
        load_first(tmp_path / "nothing")
    root = small_run.first_releases(tmp_path / "releases")
    weights = next((root / small_run.backtest.first.student.name).rglob("student.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StaleStateError, match="sha256"):
        load_first(root)
