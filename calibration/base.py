"""Conventions of the package, and what every calibrator offers.

Conventions
-----------
- ``logit``: shape ``(n,)``, float64, the model's link space (natural-log odds). NaN is an error that says
  where; ``-inf`` and ``inf`` count as ``-LOGIT_LIMIT`` and ``LOGIT_LIMIT``.
- ``probability``: shape ``(n,)``, float64, strictly inside (0, 1).
- ``label``: shape ``(n,)``, in [0, 1]; a soft label ``c`` is ``c`` of a positive and ``1 - c`` of a negative.
- ``weight``: shape ``(n,)``, >= 0; a weight of 2 means the row twice, 0 that it is not there. ``None`` means
  1 for every row.
- No space is ever guessed from values: an argument is called ``logit`` or ``probability``.
- No calibrator turns two rows round, and those with ``is_strict`` ties none: no ranking is lost (the one
  exception, by design, is :mod:`calibration.segments`, which moves segments against each other).
- ``state()`` is plain JSON data with a ``kind`` and a ``version``, and ``from_state(state())`` gives an
  object that behaves the same to the bit. A state of another version is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from calibration.link import LOGIT_LIMIT, FloatArray, sigmoid
from calibration.state import digest
from pipelines.errors import DataError

if TYPE_CHECKING:
    from calibration.sketch import LogitSketch

__all__ = [
    "MAXIMUM_WEIGHT",
    "VERSION",
    "Calibrator",
    "check_same_kind",
    "checked_label",
    "checked_logit",
    "checked_probability",
    "checked_rows",
    "checked_weight",
    "row_chunks",
]

# An importance weight of a million is a mistake upstream, and fixed-point sums must have a bound.
MAXIMUM_WEIGHT = 2.0**20
# Of the states of calibrators. States without a version were written before there was one.
VERSION = 2


@runtime_checkable
class Calibrator(Protocol):
    """A map from the model's logit to a calibrated one that never turns two rows round.

    Attributes
    ----------
    kind : str
        Name of the method, in states and in configuration.
    is_strict : bool
        Whether rows of different logits stay different; where not, ranking is lost.
    """

    kind: ClassVar[str]
    is_strict: ClassVar[bool]

    @classmethod
    def fit(cls, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> Self:
        """The calibrator of these rows; in any order. ``DataError`` for bad values or no rows."""

    @classmethod
    def fit_sketch(cls, sketch: LogitSketch) -> Self:
        """The calibrator of a sketch's rows."""

    def update(self, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> None:
        """Learn from further rows, in place: all of them or, on an error, none."""

    def update_sketch(self, sketch: LogitSketch) -> None:
        """Learn from the further rows of a sketch, in place."""

    def merge(self, other: Self) -> Self:
        """The calibrator of the rows of both, a new one; ``DataError`` if they do not belong together."""

    def frozen(self) -> Self:
        """The same map without the rows that only learning needs: what a release carries."""

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``."""

    def transform(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated probability, shape ``(n,)``; the sigmoid of :meth:`transform_logit`."""
        return sigmoid(self.transform_logit(logit))

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as plain JSON data."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The calibrator that :meth:`state` described; ``StaleStateError`` if it did not."""

    def digest(self) -> str:
        """Sha256 of the state: equal digests mean equal calibration, to the bit."""
        return digest(self.state())


def check_same_kind(one: Calibrator, other: Calibrator) -> None:
    """``DataError`` unless both are calibrators of one kind."""
    if type(one) is not type(other):
        raise DataError(
            f"calibration of kind {one.kind!r} can only be merged with its like; got {other.kind!r}."
        )


def _as_vector(values: npt.ArrayLike, name: str) -> FloatArray:
    try:
        vector = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers; got {type(values).__name__}: {error}.") from error
    _check_shape(values, name)
    return vector


def _check_shape(values: npt.ArrayLike, name: str) -> None:
    if np.ndim(values) != 1:
        raise DataError(f"{name} must have shape (n,); got shape {np.shape(values)}.")


def checked_logit(logit: npt.ArrayLike, first_row: int = 0) -> FloatArray:
    """The logits as ``(n,)`` float64 within ``[-LOGIT_LIMIT, LOGIT_LIMIT]``.

    Parameters
    ----------
    logit : array_like, shape (n,)
    first_row : int
        What an error calls the first of these rows.

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
    # The least of numbers is NaN if one of them is: one pass where nothing is wrong.
    if len(vector) and np.isnan(vector.min()):
        broken = np.isnan(vector)
        raise DataError(
            f"logit must not be NaN; got {int(broken.sum())} NaN among {len(vector)} rows, "
            f"first at row {first_row + int(broken.argmax())}.",
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


def checked_label(label: npt.ArrayLike, rows: int, first_row: int = 0) -> FloatArray:
    """The labels as ``(n,)`` float64 in [0, 1]; ``DataError`` otherwise."""
    vector = _as_vector(label, "label")
    _check_length(len(vector), rows, "label")
    # Written so that NaN fails too.
    if rows and not (vector.min() >= 0.0 and vector.max() <= 1.0):
        first = int(((vector >= 0.0) & (vector <= 1.0)).argmin())
        raise DataError(f"label must be in [0, 1]; got {vector[first]} at row {first_row + first}.")
    return vector


def checked_weight(weight: npt.ArrayLike | None, rows: int, first_row: int = 0) -> FloatArray:
    """The weights as ``(n,)`` float64 in [0, MAXIMUM_WEIGHT], ones for ``None``; ``DataError`` otherwise."""
    if weight is None:
        return np.ones(rows)
    vector = _as_vector(weight, "weight")
    _check_length(len(vector), rows, "weight")
    if rows and not (vector.min() >= 0.0 and vector.max() <= MAXIMUM_WEIGHT):
        first = int(((vector >= 0.0) & (vector <= MAXIMUM_WEIGHT)).argmin())
        raise DataError(
            f"weight must be at least 0 and at most {MAXIMUM_WEIGHT:.0f}; got {vector[first]} "
            f"at row {first_row + first}.",
            hint="divide all weights by a common factor, and look where so large a one comes from",
        )
    return vector


def _check_length(found: int, rows: int, name: str) -> None:
    if found != rows:
        raise DataError(f"{name} must have one entry a row; got {found} {name}s for {rows} rows.")


def checked_rows(
    logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Logit, label and weight of the same rows, each checked and of shape ``(n,)``; weights of 0 left in."""
    vector = checked_logit(logit)
    return vector, checked_label(label, len(vector)), checked_weight(weight, len(vector))


def row_chunks(
    logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None, size: int
) -> Iterator[tuple[FloatArray, FloatArray, FloatArray | None]]:
    """The rows of :func:`checked_rows`, ``size`` at a time, so that no copy of all of them is made."""
    z, y, w = np.asarray(logit), np.asarray(label), None if weight is None else np.asarray(weight)
    for name, column in (("logit", z), ("label", y), ("weight", w)):
        if column is not None:
            _check_shape(column, name)
            _check_length(len(column), len(z), name)
    for first in range(0, len(z), size):
        part = slice(first, first + size)
        logits = checked_logit(z[part], first)
        labels = checked_label(y[part], len(logits), first)
        yield logits, labels, None if w is None else checked_weight(w[part], len(logits), first)
