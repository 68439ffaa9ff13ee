"""The teacher, fitted again at every hour of a log to all that was known by then."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from jobs.first_calibration import fit_first_calibrator
from jobs.release import Release
from jobs.training import _fit_teacher, _label_delay
from jobs.training_split import split_task
from models.base import Model
from pipelines.config import Config, Task
from pipelines.delay import DelayCurve
from pipelines.event_files import EventFiles
from pipelines.features import Encoded, encode
from pipelines.outcomes import Outcome, outcomes_as_of
from pipelines.training_set import TrainingSet

__all__ = ["retrained_probability"]


def retrained_probability(
    own: pa.Table, files: EventFiles, first: Release, config: Config, task: Task, every: int
) -> tuple[NDArray[np.float64], int]:
    """Calibrated probability of each recorded prediction, by the latest fit before it arrived.

    Parameters
    ----------
    own : pa.Table, (n,)
        Predictions of one task: ``impression_id, predicted_at`` are used.
    every : int
        Event time between two fits, ms.

    Returns
    -------
    ndarray, shape (n,)
        NaN where no fit was possible.
    int
        How many fits.
    """
    shown = files.impressions
    ids = shown["impression_id"].combine_chunks()
    features = encode(shown, first.spec, first.segments)
    place = np.asarray(pc.index_in(own["impression_id"].cast(ids.type), value_set=ids).to_numpy())
    at = own["predicted_at"].to_numpy()
    probability, fits = np.full(own.num_rows, np.nan), 0
    for start in range(int(at.min()), int(at.max()) + 1, every):
        rows = np.flatnonzero((at >= start) & (at < start + every))
        if len(rows) == 0:
            continue
        found = _fit(_known(files, features, ids, config, task, start - 1), first, config, task)
        if found is None:
            continue
        teacher, calibrator = found
        chosen = place[rows]
        logit = teacher.predict_logit(features.buckets[chosen], features.numbers[chosen])
        probability[rows] = calibrator.transform(logit)
        fits += 1
    return probability, fits


def _known(
    files: EventFiles, features: Encoded, ids: pa.Array, config: Config, task: Task, as_of: int
) -> TrainingSet:
    """All rows of the task that had been opened by a moment, with the labels known then."""
    outcome: Outcome = outcomes_as_of(files.tables, config.attribution, as_of)[task]
    order = np.argsort(outcome.opened, kind="stable")
    place = np.asarray(pc.index_in(outcome.impression_id, value_set=ids).to_numpy())[order]
    opened, label = outcome.opened[order], outcome.label[order]
    elapsed = np.minimum(as_of - opened, config.attribution.width(task))
    positive = label > 0
    curve = DelayCurve.fit(outcome.outcome_delay[order][positive], elapsed[positive])
    mature = outcome.mature[order]
    return TrainingSet(
        buckets=features.buckets[place],
        numbers=features.numbers[place],
        user_key=features.user_key[place],
        segment_key=features.segment_key[place],
        label=label.astype(np.float32),
        weight=np.ones(len(order), np.float32),
        event_time=opened,
        mature=mature,
        observed_share=np.where(mature, 1.0, curve.cdf(elapsed)).astype(np.float32),
    )


def _fit(
    rows: TrainingSet, first: Release, config: Config, task: Task
) -> tuple[Model, CalibrationChain] | None:
    """As `jobs.training.train_models` fits a teacher; None while there is too little to fit to."""
    split = split_task(rows)
    if isinstance(split, str):
        return None
    delay = _label_delay(task, split.span, config)
    held_out = split.held_out
    teacher, length = _fit_teacher(split.train, held_out, first.spec, config, delay)
    logit = teacher.predict_logit(held_out.buckets, held_out.numbers)
    calibrator = fit_first_calibrator(logit, held_out, config.calibration.method, online=False)
    teacher, _ = _fit_teacher(split.used, None, first.spec, config, delay, length)
    return teacher, calibrator
