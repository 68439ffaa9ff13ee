"""Rows that learning touched are all that differs between two cuts; put together they are the whole state."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from jobs.commit_thread import CommitThread
from jobs.online_state import loop_state, take_loop_changes
from jobs.publishing import Learned
from jobs.state_digest import state_digest
from jobs.state_mirror import StateMirror
from models.learn_batch import LearnBatch
from models.student import Student
from pipelines.config import load_config
from pipelines.config_sections import StudentConfig
from pipelines.feature_spec import Categorical, FeatureSpec
from tests.small_run import SETTINGS, SmallRun

SPEC = FeatureSpec(
    categorical=(Categorical(name="item_id", buckets=50), Categorical(name="user_id", buckets=70)),
)


def learn(student: Student, rows: int, rng: np.random.Generator) -> set[int]:
    """One update; the rows of the tables that it is about."""
    buckets = np.column_stack([rng.integers(1, 50, rows), rng.integers(51, 120, rows)]).astype(np.int32)
    numbers = np.zeros((rows, 0), np.float32)
    label, one = rng.integers(0, 2, rows).astype(np.float64), np.ones(rows)
    student.learn(LearnBatch(buckets, numbers, label, one, True, one * np.nan, "wait", 0.0))
    return set(buckets.ravel().tolist())


@pytest.mark.parametrize("model", ["lr", "fm", "deepfm", "dcn"])
@pytest.mark.parametrize("frozen", [(), ("cross", "dense")])
def test_the_changes_of_a_student_are_the_rows_that_it_learned_and_make_up_its_state(
    model: str, frozen: tuple[str, ...]
) -> None:
    config = StudentConfig.model_validate({"model": model, "frozen": frozen, "embedding_dim": 3})
    student, mirror, rng = Student.create(SPEC, config), StateMirror(), np.random.default_rng(4)
    whole, tables = student.take_changes()
    assert all(part.rows is None for (part,) in tables.values())
    mirror.apply(whole, tables)
    for rows, ahead in ((5, ()), (1, (100,)), (17, (3, 0, 4)), (9, (2, 100))):
        before = {name: values.copy() for name, values in mirror.tables.items()}
        learned = learn(student, rows, rng)
        for limit in ahead:
            student.collect_changes(limit)
            learned |= learn(student, 2, rng)
        whole, tables = student.take_changes()
        mirror.apply(whole, tables)
        state = student.state()
        assert mirror.digest({}) == state_digest(state, {})
        for name, parts in tables.items():
            given = {row for part in parts if part.rows is not None for row in part.rows.tolist()}
            assert learned - {0} == given - {0}
            different = np.flatnonzero((state[name] != before[name]).reshape(len(state[name]), -1).any(1))
            assert set(different.tolist()) <= given
    whole, tables = student.take_changes()
    assert all(part.rows is not None and len(part.rows) == 0 for (part,) in tables.values())


@pytest.mark.parametrize("by", ["load_state", "reset_tables"])
def test_what_was_set_by_other_means_than_learning_is_given_whole(by: str) -> None:
    student = Student.create(SPEC, StudentConfig(model="fm"))
    learn(student, 9, np.random.default_rng(1))
    student.take_changes()
    student.load_state(student.state()) if by == "load_state" else student.reset_tables()
    _, tables = student.take_changes()
    assert all(part.rows is None for (part,) in tables.values())


@pytest.mark.parametrize(("policy", "labels"), [("fnw", "delay_model"), ("bidefuse", "matured")])
def test_the_changes_of_a_loop_make_up_its_state_and_its_releases(
    small_run: SmallRun, policy: str, labels: str
) -> None:
    config = load_config(None, [*SETTINGS, f"labels.policy={policy}", f"calibration.labels={labels}"])
    run = replace(small_run, config=config)
    loop, mirror = run.warm_loop(), StateMirror()
    fewest = 1.0
    for number, events in enumerate(run.steps(run.warm_rows)):
        loop.step(events)
        if number % 4 == 0:
            arrays, tables, plain = take_loop_changes(loop)
            mirror.apply(arrays, tables)
            assert mirror.digest(plain) == state_digest(*loop_state(loop))
            shares = [
                len(part.rows) / len(mirror.tables[name])
                for name, parts in tables.items()
                for part in parts
                if part.rows is not None and not name.startswith("joiner/")
            ]
            fewest = min([fewest, *shares])
    assert fewest < 0.5
    arrays, tables, plain = take_loop_changes(loop)
    mirror.apply(arrays, tables)
    now = Learned.now(loop)
    # The release is that of the cut, whatever the loop learns meanwhile.
    for student in loop.students.values():
        student.weights["wide"].add_(1.0)
    assert Learned.at_cut(loop, {**mirror.arrays, **mirror.tables}, plain) == now


def test_rows_of_a_table_that_was_never_given_are_refused() -> None:
    student = Student.create(SPEC, StudentConfig(model="lr"))
    student.take_changes()
    with pytest.raises(ValueError, match="came before the table"):
        StateMirror().apply(*student.take_changes())


def test_what_goes_wrong_beside_learning_is_raised_at_the_next_look() -> None:
    thread, go_on = CommitThread(), threading.Event()

    def fail() -> None:
        go_on.wait(10)
        raise OSError("disk full")

    thread.start(fail)
    assert not thread.is_free()
    go_on.set()
    thread.finish()
    with pytest.raises(OSError, match="disk full"):
        thread.is_free()
    assert thread.is_free()
    thread.start(lambda: time.sleep(0.01))
    thread.wait()
    assert thread.is_free()
