"""The second head of Bi-DEFUSE: which share of the outcomes comes after the observation window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.base import sigmoid
from models.learn_batch import LearnBatch
from models.losses import head_gradients
from models.student import Student
from models.table_rows import TableRows
from pipelines.config_sections import StudentConfig
from pipelines.feature_spec import FeatureSpec

__all__ = ["LateHead"]

# A share that is learned never starts at 0 or 1, whence it could not move.
_LEAST_SHARE = 0.01


class LateHead:
    """P(late | outcome) by features: a logistic regression on the student's own inputs, learned beside it.

    The student predicts the probability ``p`` of an outcome, in time or late; with the late share ``s`` the
    two heads of Bi-DEFUSE are ``p (1 - s)`` and ``p s`` (see `models.losses.head_gradients`). What is served
    is the student alone.

    Parameters
    ----------
    spec : FeatureSpec
    config : StudentConfig
        Of the student.
    late_share : float
        Where every row starts.

    Examples
    --------
    >>> from pipelines.feature_spec import Categorical
    >>> spec = FeatureSpec(categorical=(Categorical(name="item_id", buckets=8),))
    >>> head = LateHead(spec, StudentConfig(), late_share=0.25)
    >>> rows, none, one = np.full((64, 1), 3, np.int32), np.zeros((64, 0), np.float32), np.ones(64)
    >>> head.share(rows[:1], none[:1]).round(3).tolist()
    [0.25]
    >>> late = LearnBatch(rows, none, one, one, False, one * np.nan, "bidefuse", 0.0, head.share(rows, none))
    >>> head.learn(late, 0.2 * one)
    >>> bool(head.share(rows[:1], none[:1])[0] > 0.25)
    True
    """

    def __init__(self, spec: FeatureSpec, config: StudentConfig, late_share: float) -> None:
        self._student = Student.create(spec, config.model_copy(update={"model": "lr"}))
        start = min(max(late_share, _LEAST_SHARE), 1.0 - _LEAST_SHARE)
        self._student.weights["bias"].fill_(float(np.log(start / (1.0 - start))))

    def share(self, buckets: NDArray[np.int32], numbers: NDArray[np.float32]) -> NDArray[np.float64]:
        """The late share of each row, shape (n,)."""
        return sigmoid(self._student.predict_logit(buckets, numbers))

    def learn(self, batch: LearnBatch, probability: NDArray[np.float64]) -> None:
        """One update from rows whose outcome the student gives ``probability``, shape (n,)."""
        label, weight = np.asarray(batch.label, np.float64), np.asarray(batch.weight, np.float64)

        def gradient(logit: NDArray[np.float64]) -> NDArray[np.float64]:
            return weight * head_gradients(label, probability, sigmoid(logit), batch.first)[1]

        self._student.update(batch.buckets, batch.numbers, gradient)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Weights and optimizer slots: copies, exact."""
        return self._student.state()

    def take_changes(self) -> tuple[dict[str, NDArray[np.generic]], dict[str, TableRows]]:
        """What changed of the state since the last call: see `Student.take_changes`."""
        return self._student.take_changes()

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from what ``state`` gave."""
        self._student.load_state(state)
