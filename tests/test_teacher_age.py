"""A teacher is not learned from once it has grown too old, to the millisecond and after a restart too."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from jobs.checkpoint import state_digest
from jobs.online import OnlineLoop
from jobs.online_state import load_loop_state, loop_state
from jobs.teacher_age import TeacherAge
from models.student import LearnBatch, Student
from pipelines.config import dump_config, load_config, parse_config
from pipelines.joined import Examples
from tests.small_run import SETTINGS, SmallRun


def test_rows_are_distilled_up_to_the_age_and_not_a_millisecond_beyond(
    caplog: pytest.LogCaptureFixture,
) -> None:
    age = TeacherAge(1_000, taught_until=5_000)
    with caplog.at_level(logging.WARNING):
        assert age.teaches(np.array([1, 6_000])).all()
        assert caplog.records == []
        assert age.teaches(np.array([6_001, 6_000, 10**15])).tolist() == [False, True, False]
        age.teaches(np.array([7_000]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(("max_age", "taught_until"), [("off", 0), (1, None)])
def test_without_an_age_or_a_time_every_row_is_distilled(max_age: int, taught_until: int | None) -> None:
    assert TeacherAge(max_age, taught_until).teaches(np.array([0, 10**15])).all()


def test_the_config_has_a_week_and_can_do_without() -> None:
    assert load_config(None, []).distillation.max_age == 7 * 86_400_000
    off = load_config(None, ["distillation.max_age=off"])
    assert off.distillation.max_age == "off"
    assert parse_config(dump_config(off), "off.toml") == off
    assert load_config(None, ["distillation.max_age=36h"]).distillation.max_age == 36 * 3_600_000


def test_a_loop_masks_the_teacher_of_rows_that_are_too_new_and_goes_on_so_when_restored(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(small_run, config=load_config(None, [*SETTINGS, "distillation.max_age=3h"]))
    last = run.backtest.first.teacher.last_event_time + 3 * 3_600_000
    expected: list[tuple[int, int]] = []
    found: list[tuple[int, int]] = []
    learn_rows, learn = OnlineLoop._learn, Student.learn

    def spy_rows(self: OnlineLoop, task: str, column: int, examples: Examples) -> int:
        taught = (examples.kind == 0) & (examples.event_time <= last)
        expected.append((self.step_number, int(taught.sum())))
        return learn_rows(self, task, column, examples)  # type: ignore[arg-type]

    def spy(self: Student, batch: LearnBatch) -> None:
        assert batch.teacher_logit is not None
        found.append((0, int(np.isfinite(batch.teacher_logit).sum())))
        learn(self, batch)

    steps = [events for _, events in zip(range(60), run.steps(run.warm_rows), strict=False)]
    loop = run.warm_loop()
    assert loop.teacher.last == last
    with monkeypatch.context() as patch:
        patch.setattr(OnlineLoop, "_learn", spy_rows)
        patch.setattr(Student, "learn", spy)
        for events in steps[:30]:
            loop.step(events)
    assert sum(count for _, count in found) == sum(count for _, count in expected) > 0
    middle = loop_state(loop)
    for events in steps[30:]:
        loop.step(events)
    assert loop.last_event_time > last
    restored = run.begun(OnlineLoop(run.config))
    load_loop_state(restored, *middle)
    for events in steps[30:]:
        restored.step(events)
    assert state_digest(*loop_state(restored)) == state_digest(*loop_state(loop))
