"""Conventions of the package, and what every calibrator offers.

Conventions
-----------
- ``logit``: shape ``(n,)``, float64, the model's link space (natural-log odds). NaN is an error that says
  where; ``-inf`` and ``inf`` count as ``-LOGIT_LIMIT`` and ``LOGIT_LIMIT``.
- ``probability``: shape ``(n,)``, float64, strictly inside (0, 1).
- ``label``: shape ``(n,)``, in [0, 1]; a soft label ``c`` is ``c`` of a positive and ``1 - c`` of a negative.
- ``weight``: shape ``(n,)``, > 0; a weight of 2 means the row twice. ``None`` means 1 for every row.
- No space is ever guessed from values: an argument is called ``logit`` or ``probability``.
- Calibrators are strictly increasing in the logit: no ranking is lost (the one exception, by design, is
  :mod:`calibration.segments`, which moves segments against each other).
- ``state()`` is plain JSON data, and ``from_state(state())`` gives an object that behaves the same to the
  bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from calibration.link import LOGIT_LIMIT, FloatArray
from pipelines.errors import DataError

__all__ = [
    "MAXIMUM_WEIGHT",
    "Calibrator",
    "checked_label",
    "checked_logit",
    "checked_probability",
    "checked_rows",
    "checked_weight",
]

# An importance weight of a million is a mistake upstream, and fixed-point sums must have a bound.
MAXIMUM_WEIGHT = 2.0**20


@runtime_checkable
class Calibrator(Protocol):
    """A strictly increasing map from the model's logit to a calibrated one."""

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""

    def transform(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated probability, shape ``(n,)``; the sigmoid of :meth:`transform_logit`."""

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as plain JSON data."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The calibrator that :meth:`state` described; ``StaleStateError`` if it did not."""


def _as_vector(values: npt.ArrayLike, name: str) -> FloatArray:
    try:
        vector = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers; got {type(values).__name__}: {error}.") from error
    if np.ndim(values) != 1:
        raise DataError(f"{name} must have shape (n,); got shape {np.shape(values)}.")
    return vector


def checked_logit(logit: npt.ArrayLike) -> FloatArray:
    """The logits as ``(n,)`` float64 within ``[-LOGIT_LIMIT, LOGIT_LIMIT]``.

    Raises
    ------
    DataError
        A NaN, a shape other than ``(n,)``, or something that is not numbers.

    Examples
    --------
    >>> checked_logit([0.0, -np.inf]).tolist()
    [0.0, -34.0]
    >>> checked_logit([0.0, np.nan])
    Traceback (most recent call last):
        ...
    pipelines.errors.DataError: logit must not be NaN; got 1 NaN among 2 rows, first at row 1.
    hint: a NaN logit means that the model or its features are broken; calibration cannot repair it
    """
    vector = _as_vector(logit, "logit")
    broken = np.isnan(vector)
    if broken.any():
        raise DataError(
            f"logit must not be NaN; got {int(broken.sum())} NaN among {len(vector)} rows, "
            f"first at row {int(broken.argmax())}.",
            hint="a NaN logit means that the model or its features are broken; calibration cannot repair it",
        )
    clipped: FloatArray = np.clip(vector, -LOGIT_LIMIT, LOGIT_LIMIT)
    return clipped


def checked_probability(probability: npt.ArrayLike) -> FloatArray:
    """The probabilities as ``(n,)`` float64 strictly inside (0, 1); ``DataError`` otherwise."""
    vector = _as_vector(probability, "probability")
    good = (vector > 0.0) & (vector < 1.0)
    if not good.all():
        first = int(good.argmin())
        raise DataError(f"probability must be strictly between 0 and 1; got {vector[first]} at row {first}.")
    return vector


def checked_label(label: npt.ArrayLike, rows: int) -> FloatArray:
    """The labels as ``(n,)`` float64 in [0, 1]; ``DataError`` otherwise."""
    vector = _as_vector(label, "label")
    if len(vector) != rows:
        raise DataError(f"label must have one entry a row; got {len(vector)} labels for {rows} rows.")
    # Written so that NaN fails too.
    good = (vector >= 0.0) & (vector <= 1.0)
    if not good.all():
        first = int(good.argmin())
        raise DataError(f"label must be in [0, 1]; got {vector[first]} at row {first}.")
    return vector


def checked_weight(weight: npt.ArrayLike | None, rows: int) -> FloatArray:
    """The weights as ``(n,)`` float64 in (0, MAXIMUM_WEIGHT], ones for ``None``; ``DataError`` otherwise."""
    if weight is None:
        return np.ones(rows)
    vector = _as_vector(weight, "weight")
    if len(vector) != rows:
        raise DataError(f"weight must have one entry a row; got {len(vector)} weights for {rows} rows.")
    good = (vector > 0.0) & (vector <= MAXIMUM_WEIGHT)
    if not good.all():
        first = int(good.argmin())
        raise DataError(
            f"weight must be above 0 and at most {MAXIMUM_WEIGHT:.0f}; got {vector[first]} at row {first}.",
            hint="leave rows of weight 0 out",
        )
    return vector


def checked_rows(
    logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Logit, label and weight of the same rows, each checked and of shape ``(n,)``."""
    vector = checked_logit(logit)
    return vector, checked_label(label, len(vector)), checked_weight(weight, len(vector))
