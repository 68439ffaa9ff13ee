"""What the figures are made from, checked once at the door.

Conventions of this package
---------------------------
- ``label`` has shape ``(n,)`` and holds 0 or 1; it is passed on as bool.
- ``probability`` has shape ``(n,)`` and lies in [0, 1]; ``logit`` is its log-odds. Neither is guessed from
  values.
- ``weight`` has shape ``(n,)``, is finite and positive or zero; absent means 1 for every row.
- ``event_time`` is int64, milliseconds since the epoch, UTC.
- A figure that the rows cannot give is ``None``, never 0 and never NaN.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError

__all__ = [
    "PROBABILITY_FLOOR",
    "BoolArray",
    "FloatArray",
    "IntArray",
    "binary_label",
    "clipped",
    "feature_column",
    "key_codes",
    "log_odds",
    "probability_array",
    "time_array",
    "weight_array",
]

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

# A probability of exactly 0 or 1 would make one wrong row infinitely dear; the machine epsilon keeps the
# loss finite (at most 36.04 nats a row) and is what scikit-learn's log_loss clips float64 at, so both give
# the same number.
PROBABILITY_FLOOR = float(np.finfo(np.float64).eps)


def _one_dimensional(name: str, values: npt.NDArray[np.generic], rows: int | None) -> None:
    if values.ndim != 1:
        raise DataError(f"expected `{name}` with shape (n,), received shape {values.shape}.")
    if rows is not None and values.shape[0] != rows:
        raise DataError(
            f"expected `{name}` with {rows} rows, as many as the labels, received {values.shape[0]}.",
            hint="join both sides on impression_id and task before comparing them",
        )


def binary_label(label: npt.ArrayLike) -> BoolArray:
    """Labels ``(n,)`` in {0, 1} as bool.

    Raises
    ------
    DataError
        If a value is neither 0 nor 1, or the array is not one-dimensional.
    """
    values = np.asarray(label)
    _one_dimensional("label", values, None)
    if values.dtype == np.bool_:
        return values.astype(np.bool_, copy=False)
    if values.size == 0:
        return np.zeros(0, dtype=np.bool_)
    positive = values == 1
    wrong = ~(positive | (values == 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"expected labels 0 or 1, received {values[row]!r} in row {row}.")
    return np.asarray(positive, dtype=np.bool_)


def probability_array(probability: npt.ArrayLike, rows: int, name: str = "probability") -> FloatArray:
    """Probabilities ``(rows,)`` in [0, 1] as float64.

    Raises
    ------
    DataError
        If a value is NaN or outside [0, 1], or the length is not ``rows``.
    """
    values = np.asarray(probability, dtype=np.float64)
    _one_dimensional(name, values, rows)
    wrong = ~((values >= 0.0) & (values <= 1.0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"expected `{name}` in [0, 1], received {values[row]} in row {row}.",
            hint="a logit becomes a probability by the calibrator (or the sigmoid) first",
        )
    return values


def weight_array(weight: npt.ArrayLike | None, rows: int) -> FloatArray | None:
    """Weights ``(rows,)``, finite and >= 0, as float64; None stays None and means 1.

    Raises
    ------
    DataError
        If a weight is negative, NaN or infinite, or the length is not ``rows``.
    """
    if weight is None:
        return None
    values = np.asarray(weight, dtype=np.float64)
    _one_dimensional("weight", values, rows)
    wrong = ~(np.isfinite(values) & (values >= 0.0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"expected finite weights >= 0, received {values[row]} in row {row}.")
    return values


def time_array(name: str, time: npt.ArrayLike, rows: int) -> IntArray:
    """Times ``(rows,)`` as int64 milliseconds since the epoch, UTC; DataError if they are not integers."""
    values = np.asarray(time)
    _one_dimensional(name, values, rows)
    if values.size and values.dtype.kind not in "iu":
        raise DataError(f"expected `{name}` as int64 milliseconds since the epoch, received {values.dtype}.")
    return values.astype(np.int64, copy=False)


def feature_column(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Values of one feature, ``(n,)``; DataError if a row holds more than one value."""
    column = np.asarray(values)
    if column.ndim != 1:
        raise DataError(
            f"expected feature `{name}` with shape (n,), received shape {column.shape}.",
            hint="flatten lists into one value a row before summarising",
        )
    return column


def clipped(probability: FloatArray) -> FloatArray:
    """Probabilities moved off 0 and 1 by `PROBABILITY_FLOOR`, so that logarithms are finite."""
    return np.clip(probability, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)


def log_odds(probability: FloatArray) -> FloatArray:
    """Logit of probabilities ``(n,)``; 0 and 1 give the finite logits of `PROBABILITY_FLOOR`."""
    inside = clipped(probability)
    return np.log(inside) - np.log1p(-inside)


def key_codes(keys: npt.ArrayLike, rows: int, name: str = "user_key") -> tuple[IntArray, int]:
    """Number the distinct keys of a column from 0.

    Parameters
    ----------
    keys : (rows,) int or str array, or object array with None as null

    Returns
    -------
    codes : (rows,) int64
        -1 where the key is null.
    distinct : int

    Examples
    --------
    >>> key_codes(np.array(["b", "a", None, "b"], dtype=object), 4)[0].tolist()
    [0, 1, -1, 0]
    """
    values = np.asarray(keys)
    _one_dimensional(name, values, rows)
    if values.dtype.kind in "iub":
        found, codes = np.unique(values, return_inverse=True)
        return codes.astype(np.int64, copy=False), int(found.shape[0])
    # A dictionary numbers a million strings three times faster than sorting them would.
    table: dict[object, int] = {None: -1}
    codes = np.fromiter((table.setdefault(key, len(table) - 1) for key in values.tolist()), np.int64, rows)
    return codes, len(table) - 1
