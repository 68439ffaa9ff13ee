"""Conventions of all models.

- ``buckets`` is int32 ``(n, columns)``, rows of the embedding table; ``numbers`` is float32 ``(n, k)``:
  see `pipelines.features.Encoded`. So are ``ids``, int64 ``(n, id columns)``, for models that give
  ids rows of their own.
- ``label`` is ``(n,)`` in {0, 1}; ``weight`` is ``(n,)``, > 0.
- ``logit`` is float64 ``(n,)``. Models speak logits only; probabilities exist after `calibration`.
- ``predict_logit`` is pure: it changes nothing and gives the same answer twice.
- ``to_files`` / ``from_files`` hold arrays and text, never code: safetensors and LightGBM's own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Model", "sigmoid"]


class Model(Protocol):
    """What every model of one task can do."""

    def predict_logit(
        self,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """Log-odds of each row, shape (n,)."""
        ...

    def to_files(self) -> Mapping[str, bytes]:
        """Everything needed to predict again, as named files."""
        ...


def sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability of a logit, without overflow.

    Examples
    --------
    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    positive = logit >= 0
    e = np.exp(np.where(positive, -logit, logit))
    return np.where(positive, 1.0 / (1.0 + e), e / (1.0 + e))
