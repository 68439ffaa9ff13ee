"""Teacher and first student of each task, trained, evaluated and calibrated; a pure function of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from calibration.label_origin import LabelOrigin
from calibration.segment_levels import levels_over, segment_columns
from jobs.first_calibration import fit_first_calibrator
from jobs.held_out import figures, progressive_logit
from jobs.training_split import TaskRows, TaskSplit, split_task
from models.gbdt import GbdtModel
from models.student import Student
from pipelines.config import Config, Task
from pipelines.errors import DataError
from pipelines.feature_spec import FeatureSpec
from pipelines.streamed_rows import StreamedRows
from pipelines.training_set import TrainingSet

__all__ = ["TaskModels", "Trained", "train_models"]


@dataclass(frozen=True)
class TaskModels:
    """What one task starts with.

    Attributes
    ----------
    teacher : GbdtModel or Student
        By ``config.teacher.model``.
    teacher_calibrator : CalibrationChain
        Fixed: neither online nor by segment.
    student : Student
    student_calibrator : CalibrationChain
        With the online line and the segments that the configuration asks for.
    report : dict
        Figures on the held-out window, plain data, finite: see `train_models`.
    """

    teacher: GbdtModel | Student
    teacher_calibrator: CalibrationChain
    student: Student
    student_calibrator: CalibrationChain
    report: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """Models by task, and for tasks that cannot be trained the reason."""

    models: dict[Task, TaskModels]
    skipped: dict[str, str]


def train_models(
    sets: Mapping[Task, TaskRows],
    spec: FeatureSpec,
    config: Config,
    *,
    now_split: int | None = None,
    segments: tuple[str, ...] | None = None,
    labels: Mapping[Task, LabelOrigin] | None = None,
) -> Trained:
    """Train, evaluate and calibrate.

    For each task:

    1. Rows of which less than half of the outcomes would be known are left out, and the last fifth of the
       others is held out.
    2. Teacher and student are fitted to the earlier rows; the held-out ones decide when to stop: the number
       of trees and of epochs.
    3. Teacher and student predict the held-out rows. The student does so twice: as it stands
       (``student_frozen``), and progressively, going on to learn each row once its outcome can be known,
       which is how it will be served (``student``).
    4. These logits are evaluated, and the shapes of the calibrators are fitted to them.
    5. The teacher is fitted again, to earlier and held-out rows, with the number of trees of step 2. The
       student is kept as step 3 left it: it has learned the held-out rows, and its calibrator belongs to it.

    Open labels enter everywhere by the cure model. The figures are of uncalibrated logits; step 2 has seen
    the held-out rows, so they are slightly too good.

    Parameters
    ----------
    sets : mapping of task to TrainingSet or StreamedRows
        Rows in time order. Those in files are streamed, but for what is held out; the models are the same.
    spec : FeatureSpec
    config : Config
    now_split : int, optional
        Event time (ms) from which rows are held out.
    segments : tuple of str, optional
        Names of the columns of ``segment_key``; those of ``config.calibration.segments`` without it.
    labels : mapping of task to LabelOrigin, optional
        What the students' calibrators will learn from online.

    Returns
    -------
    Trained
        ``report`` of a task: ``rows, positives, used_rows, held_out_rows, held_out_positives``,
        ``held_out_from`` (ms), ``base_rate`` before it, and by model ``teacher``, ``student``,
        ``student_frozen`` the figures of `jobs.held_out.figures`, with ``rounds`` or ``epochs`` and
        ``calibration``.

    Raises
    ------
    DataError
        If the segments are not the columns of ``segment_key``.
    """
    models: dict[Task, TaskModels] = {}
    skipped: dict[str, str] = {}
    for task, rows in sets.items():
        names = _segment_names(rows, config, segments)
        split = split_task(rows, now_split)
        if isinstance(split, str):
            skipped[task] = split
        else:
            models[task] = _train_task(task, split, spec, config, names, (labels or {}).get(task))
    return Trained(models, skipped)


def _train_task(
    task: Task,
    split: TaskSplit,
    spec: FeatureSpec,
    config: Config,
    segments: tuple[str, ...],
    labels: LabelOrigin | None,
) -> TaskModels:
    delay = _label_delay(task, split.span, config)
    method = config.calibration.method
    train, held_out, report = split.train, split.held_out, dict(split.report)
    base_rate = report["base_rate"]

    teacher, length = _fit_teacher(train, held_out, spec, config, delay)
    logit = teacher.predict_logit(held_out.buckets, held_out.numbers)
    teacher_calibrator = fit_first_calibrator(logit, held_out, method, online=False)
    report["teacher"] = _summary(logit, held_out, base_rate, teacher_calibrator) | length
    teacher, _ = _fit_teacher(split.used, None, spec, config, delay, length)

    student = Student.create(spec, config.student)
    epochs = student.fit(train, held_out).epochs
    frozen_logit = student.predict_logit(held_out.buckets, held_out.numbers, held_out.ids)
    logit = progressive_logit(student, held_out, delay)
    student_calibrator = fit_first_calibrator(
        logit,
        held_out,
        method,
        online=config.calibration.online,
        segments=_levels(segments, config),
        labels=labels,
        traffic=len(train) / max(split.span, 1),
    )
    report["student"] = _summary(logit, held_out, base_rate, student_calibrator) | {"epochs": epochs}
    report["student_frozen"] = figures(frozen_logit, held_out, base_rate) if len(held_out) else {}
    return TaskModels(teacher, teacher_calibrator, student, student_calibrator, report)


def _fit_teacher(
    rows: TaskRows,
    validation: TrainingSet | None,
    spec: FeatureSpec,
    config: Config,
    label_delay: int,
    length: Mapping[str, int] | None = None,
) -> tuple[GbdtModel | Student, dict[str, int]]:
    """The teacher and how long it was trained, ``rounds`` or ``epochs``; ``length`` prescribes it."""
    if config.teacher.model == "network":
        network = Student.create(spec, config.student.hashed())
        done = network.fit(rows, validation, epochs=None if length is None else length["epochs"])
        return network, {"epochs": done.epochs}
    trees = GbdtModel.fit(
        rows,
        spec,
        config.teacher,
        validation,
        seed=config.student.seed,
        rounds=None if length is None else length["rounds"],
        label_delay=label_delay,
    )
    return trees, {"rounds": trees.rounds}


def _summary(
    logit: NDArray[np.float64], held_out: TrainingSet, base_rate: float, calibrator: CalibrationChain
) -> dict[str, Any]:
    found = figures(logit, held_out, base_rate) if len(held_out) else {}
    return {**found, "calibration": calibrator.method}


def _label_delay(task: Task, span: int, config: Config) -> int:
    """Milliseconds after which an outcome is taken as known, for training rows of a span (ms).

    The window of the task; but at most an eighth of the span, or a window as long as the log would leave no
    row with a label to see.
    """
    return min(config.attribution.width(task), span // 8)


def _segment_names(rows: TaskRows, config: Config, segments: tuple[str, ...] | None) -> tuple[str, ...]:
    columns = rows.segments if isinstance(rows, StreamedRows) else rows.segment_key.shape[1]
    names = segment_columns(config.calibration.segments) if segments is None else segments
    if segments is None and columns == 0:
        # The log has none of the configured columns.
        return ()
    if len(names) != columns:
        raise DataError(
            f"expected {len(names)} calibration segments ({', '.join(names)}). "
            f"Received: {columns} columns of segment keys.",
            hint="name the segments that the training set was made with",
        )
    return names


def _levels(columns: tuple[str, ...], config: Config) -> tuple[str, ...]:
    """The configured levels over these columns; of rows that were made with others, a level a column."""
    levels = levels_over(config.calibration.segments, columns)
    return levels if segment_columns(levels) == columns else columns
