"""What the student learns from in one online update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.base import sigmoid
from models.losses import distillation_gradient, policy_gradient
from pipelines.errors import DataError

__all__ = ["LearnBatch"]

# A row heavier than this is a mistake upstream; its gradient would end the learning of its table rows.
_LARGEST_GRADIENT = 100.0


@dataclass(frozen=True)
class LearnBatch:
    """Rows to learn from, once.

    Attributes
    ----------
    buckets : ndarray of int32, shape (n, columns)
    numbers : ndarray of float32, shape (n, numeric features)
    label : ndarray, shape (n,)
        In [0, 1], as emitted under ``policy``.
    weight : ndarray, shape (n,)
        Share of the window that the row stands for, times the traffic ratio; > 0.
    first : bool or ndarray of bool, shape (n,)
        First row of its window; only those are distilled.
    teacher_logit : ndarray of float64, shape (n,)
        Calibrated logit of the teacher, NaN where there is none.
    policy : str
        One of `pipelines.config_sections.Policy`.
    distillation_weight : float
        Of the cross entropy to the teacher, beside 1 for the policy's loss.
    late_share : float or ndarray, shape (n,)
        Share of the outcomes that come later than the row: see `models.losses.policy_weights`.
    ids : ndarray of int64, shape (n, id columns), or None
        See `pipelines.features.Encoded`.
    """

    buckets: NDArray[np.int32]
    numbers: NDArray[np.float32]
    label: NDArray[np.floating]
    weight: NDArray[np.floating]
    first: bool | NDArray[np.bool_]
    teacher_logit: NDArray[np.float64]
    policy: str
    distillation_weight: float
    late_share: float | NDArray[np.floating] = 1.0
    ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def gradient(self, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Derivative of each row's weighted loss with respect to the student's logit, shape (n,).

        Raises
        ------
        DataError
            If a label, weight or logit is not a number.
        """
        probability = sigmoid(logit)
        label, late_share = np.asarray(self.label, np.float64), np.asarray(self.late_share, np.float64)
        gradient = policy_gradient(self.policy, label, probability, late_share, self.first)
        distilled = self.first & np.isfinite(self.teacher_logit)
        if self.distillation_weight > 0.0 and distilled.any():
            # Rows without a teacher get a harmless logit and are masked out.
            teacher = sigmoid(np.where(distilled, self.teacher_logit, 0.0))
            pull = distillation_gradient(self.policy, probability, teacher)
            gradient = gradient + self.distillation_weight * np.where(distilled, pull, 0.0)
        gradient = np.asarray(self.weight, np.float64) * gradient
        finite = np.isfinite(gradient)
        if not finite.all():
            row = int(finite.argmin())
            raise DataError(
                f"label, weight and logit must be finite. Received at row {row}: label {self.label[row]}, "
                f"weight {self.weight[row]}, logit {logit[row]}."
            )
        return np.clip(gradient, -_LARGEST_GRADIENT, _LARGEST_GRADIENT)
