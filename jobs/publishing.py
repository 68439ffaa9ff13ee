"""From models to releases: what trains writes the first ones, what learns online writes the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from jobs.online import OnlineLoop
from jobs.online_state import under
from jobs.prepared import FrozenModels, Teacher
from jobs.release import Release, TaskFiles, point, release_name, write_release
from jobs.release_manifest import ModelKind
from jobs.training import TaskModels
from models.base import Model
from models.student import Student
from pipelines.config import Config, Task, dump_config, parse_config
from pipelines.delay import DelayCurve
from pipelines.feature_spec import FeatureSpec
from pipelines.label_plan import thinned

__all__ = [
    "CalibratedTeacher",
    "FirstReleases",
    "Learned",
    "load_first",
    "publish_student",
    "write_first",
]


@dataclass(frozen=True)
class CalibratedTeacher:
    """A frozen model and its calibrator."""

    model: Model
    calibrator: CalibrationChain

    def calibrated_logit(
        self,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
        ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """Calibrated log-odds, shape (n,)."""
        raw = self.model.predict_logit(buckets, numbers, ids)
        return np.asarray(self.calibrator.transform_logit(raw, segment_key), np.float64)


@dataclass(frozen=True)
class FirstReleases:
    """What the online start needs: the teacher's release and the first student's."""

    teacher: Release
    student: Release

    @property
    def warm_up_until(self) -> int:
        """Arrival time at which online learning begins, ms."""
        return int(self.student.manifest.extra["warm_up_until"])

    def settle(self, config: Config) -> Config:
        """The config with the label policies that training settled, where it leaves them to it."""
        if config.labels.policy != "auto":
            return config
        settled = parse_config(self.student.config_toml, str(self.student.path / "config.toml"))
        return config.model_copy(update={"labels": settled.labels})

    @property
    def late_share(self) -> dict[Task, float]:
        """By task, the share of the outcomes that come after the observation window."""
        return {task: float(share) for task, share in self.student.manifest.extra["late_share"].items()}

    @property
    def delay(self) -> dict[Task, DelayCurve]:
        """By task, how late the outcomes come."""
        curves = self.student.manifest.extra["delay"]
        return {task: DelayCurve.from_state(state) for task, state in curves.items()}

    def teachers(self) -> dict[Task, Teacher]:
        """The teacher of each task."""
        return {
            task: CalibratedTeacher(model, self.teacher.calibrators[task])
            for task, model in self.teacher.models.items()
        }

    def frozen(self) -> FrozenModels:
        """The teachers, and the first students as they were before they learned online."""
        stale: dict[Task, Teacher] = {
            task: CalibratedTeacher(model, self.student.calibrators[task])
            for task, model in self.student.models.items()
        }
        return FrozenModels(self.teachers(), stale)

    def calibrators(self) -> dict[Task, CalibrationChain]:
        """Fresh copies of the first students' calibrators."""
        return {task: chain.copy() for task, chain in self.student.calibrators.items()}

    def begin(self, loop: OnlineLoop) -> None:
        """End the warm-up of a loop: it goes on from these models."""
        loop.begin(
            self.students(),
            self.calibrators(),
            self.teachers(),
            self.late_share,
            self.delay,
            taught_until=self.teacher.last_event_time,
            segments=tuple(self.student.segments),
        )

    def students(self) -> dict[Task, Student]:
        """Fresh students with the release's weights."""
        loaded = Release.load(self.student.path).models
        return {task: model for task, model in loaded.items() if isinstance(model, Student)}


def write_first(
    root: Path,
    models: Mapping[Task, TaskModels],
    spec: FeatureSpec,
    config: Config,
    segments: tuple[str, ...],
    *,
    warm_up_until: int,
    rows: int,
    figures: Mapping[str, Any],
    late_share: Mapping[Task, float],
    delay: Mapping[Task, DelayCurve] | None = None,
) -> FirstReleases:
    """Write the teacher's and the first student's release, and point ``teacher`` and the others at them."""
    common: dict[str, Any] = {
        "spec": spec,
        "config_toml": dump_config(config),
        "segments": segments,
        "last_event_time": warm_up_until,
        "learned_events": rows,
        "extra": {
            "warm_up_until": warm_up_until,
            "quality": dict(figures),
            "late_share": dict(late_share),
            "delay": {task: thinned(curve).state() for task, curve in (delay or {}).items()},
        },
        "epoch": 0,
        "step": 0,
    }
    teacher = write_release(
        root,
        kind="teacher",
        parent=None,
        tasks={task: _teacher_files(one) for task, one in models.items()},
        **common,
    )
    student = write_release(
        root,
        kind="student",
        parent=teacher.name,
        tasks={task: _student_files(one) for task, one in models.items()},
        **common,
    )
    point(root, "teacher", teacher.name, rollback=True)
    for alias in ("CURRENT", "last_good"):
        point(root, alias, student.name, rollback=True)
    return FirstReleases(Release.load(teacher), Release.load(student))


def _teacher_files(models: TaskModels) -> TaskFiles:
    kind: ModelKind = "student" if isinstance(models.teacher, Student) else "gbdt"
    return TaskFiles(kind, models.teacher.to_files(), models.teacher_calibrator.state())


def _student_files(models: TaskModels) -> TaskFiles:
    # With the optimizer's slots: online learning goes on from here.
    return TaskFiles("student", models.student.to_files(slots=True), models.student_calibrator.state())


def load_first(root: Path) -> FirstReleases:
    """Load the releases that `write_first` wrote.

    Raises
    ------
    DataError
        If they are not there.
    StaleStateError
        If a file is not what was written.
    """
    teacher = Release.load(root / release_name("teacher", 0, 0))
    return FirstReleases(teacher, Release.load(root / release_name("student", 0, 0)))


@dataclass(frozen=True)
class Learned:
    """What an online loop had learned at one step: all that a release of it is made from.

    Attributes
    ----------
    students : dict of task to dict of str to bytes
        ``to_files()`` of each.
    calibrators : dict of task to dict
        ``state()`` of each.
    """

    step: int
    last_event_time: int
    learned_events: int
    students: Mapping[Task, Mapping[str, bytes]]
    calibrators: Mapping[Task, Mapping[str, Any]]

    @classmethod
    def now(cls, loop: OnlineLoop) -> Learned:
        """By the loop as it is."""
        return cls(
            loop.step_number,
            loop.last_event_time,
            loop.learned_events,
            {task: student.to_files() for task, student in loop.students.items()},
            {task: chain.state() for task, chain in loop.calibrators.items()},
        )

    @classmethod
    def at_cut(
        cls, loop: OnlineLoop, arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]
    ) -> Learned:
        """By the state of a commit, while the loop runs on."""
        return cls(
            plain["step"],
            plain["last_event_time"],
            plain["learned_events"],
            {
                task: student.to_files(weights=under(arrays, f"student/{task}/weights/"))
                for task, student in loop.students.items()
            },
            plain["calibrators"],
        )


def publish_student(
    root: Path, learned: Learned, first: FirstReleases, *, epoch: int, parent: str, extra: Mapping[str, Any]
) -> str:
    """Write students and calibrators as a release and point ``CURRENT`` at it; returns its name.

    The caller has committed the state before: what is published is never lost by a crash.
    """
    path = write_release(
        root,
        kind="student",
        epoch=epoch,
        step=learned.step,
        parent=parent,
        spec=first.student.spec,
        config_toml=first.student.config_toml,
        segments=first.student.segments,
        tasks={
            task: TaskFiles("student", files, learned.calibrators[task])
            for task, files in learned.students.items()
        },
        last_event_time=learned.last_event_time,
        learned_events=learned.learned_events,
        extra={"warm_up_until": first.warm_up_until, **extra},
    )
    point(root, "CURRENT", path.name)
    return path.name
