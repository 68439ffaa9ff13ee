"""Offline training of the student's layers, on labels that may still change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.base_rate import base_rate_and_weight
from models.losses import cure_derivatives, cured_log_loss
from pipelines.errors import DataError
from pipelines.training_set import TrainingRows, TrainingSet

if TYPE_CHECKING:
    from models.student import Student

__all__ = ["WarmUp", "warm_up"]

# Epochs without a better validation loss before training stops.
_PATIENCE = 2


@dataclass(frozen=True)
class WarmUp:
    """What came of offline training.

    Attributes
    ----------
    epochs : int
        The epoch that was kept, counted from 1.
    validation_log_loss : tuple of float
        After each epoch; empty without a validation set.
    """

    epochs: int
    validation_log_loss: tuple[float, ...]


def warm_up(student: Student, train: TrainingRows, validation: TrainingSet | None, epochs: int) -> WarmUp:
    """Train all layers by the cure-model loss.

    Of the training rows only a batch is needed at a time: rows streamed from files give the same student, bit
    for bit, as the same rows in memory.

    1. The bias starts at the base rate.
    2. Each epoch starts with fresh tables and goes through the rows in time order, in mini-batches, as the
       stream will. So the layers that are frozen later learn from ids as they will meet them, new ones among
       them, and no id is learned by heart: with tables kept, the second epoch already does harm. Cross and
       dense layers are kept from epoch to epoch.
    3. The epoch with the best validation loss is kept, with its optimizer slots; without a validation set the
       last one. Online learning goes on from there.

    Raises
    ------
    DataError
        If there are no rows, or a logit is not finite.

    References
    ----------
    Fresh tables each epoch: Fan et al. (2024), Multi-epoch learning with data augmentation for deep
    click-through rate prediction, arXiv 2407.01607.
    """
    if len(train) == 0:
        raise DataError("no rows to train on.", hint="widen the training window")
    rate, mean_weight = base_rate_and_weight(train)
    student.weights["bias"].fill_(float(np.log(rate / (1.0 - rate))))
    student.thaw()
    losses: list[float] = []
    best: dict[str, NDArray[np.generic]] | None = None
    for epoch in range(epochs):
        student.reset_tables()
        _one_epoch(student, train, mean_weight)
        if validation is None or len(validation) == 0:
            continue
        losses.append(
            cured_log_loss(
                student.predict_logit(validation.buckets, validation.numbers, validation.ids), validation
            )
        )
        if losses[-1] == min(losses):
            best = student.state()
        elif epoch - int(np.argmin(losses)) >= _PATIENCE:
            break
    if best is not None:
        student.load_state(best)
    student.freeze()
    return WarmUp(int(np.argmin(losses)) + 1 if losses else epochs, tuple(losses))


def _one_epoch(student: Student, train: TrainingRows, mean_weight: float) -> None:
    for batch in train.batches(student.config.batch_rows):
        label, share = batch.label.astype(np.float64), batch.observed_share.astype(np.float64)
        weight = batch.weight.astype(np.float64) / mean_weight

        def gradient(
            logit: NDArray[np.float64],
            label: NDArray[np.float64] = label,
            share: NDArray[np.float64] = share,
            weight: NDArray[np.float64] = weight,
        ) -> NDArray[np.float64]:
            return weight * cure_derivatives(logit, label, share)[0]

        student.see(batch.buckets, batch.ids, int(batch.event_time[-1]))
        student.update(batch.buckets, batch.numbers, gradient, batch.ids)
