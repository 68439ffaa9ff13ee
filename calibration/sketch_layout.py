"""Where a logit lies in a sketch, and what one row adds there: the definition, to the bit, for every engine.

A logit ``z`` has a cell of 1/128 logit over the whole range that counts, ``[-34, 34]``::

    q = (z + 34) * 128        cell = min(floor(q), 8703)        d = (q - cell - 0.5) / 128

and a bin, the cell moved to ``[-16, 16)``; what lies outside goes to the first or last bin. The probability
of a row is a Taylor polynomial about the middle of its cell, by Horner's rule::

    p = ((t3 * d + t2) * d + t1) * d + t0

Nothing but IEEE additions and multiplications and four tables, which are made of whole numbers: numpy and
the JVM come to the same bits on every machine, which ``exp`` does not promise. It differs from the true
sigmoid by less than 3e-12 (``|p''''| / 24 / 256**4``).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from calibration.link import LOGIT_LIMIT, FloatArray

__all__ = [
    "BINS",
    "BINS_PER_LOGIT",
    "CELLS",
    "FIRST_CELL",
    "LOWEST_LOGIT",
    "SUMS",
    "UNITS",
    "IntArray",
    "Taylor",
    "cells_of",
    "places_of",
    "probability_of",
    "taylor",
]

IntArray = npt.NDArray[np.int64]

BINS = 4096
LOWEST_LOGIT = -16.0
BINS_PER_LOGIT = 128.0
CELLS = int(2 * LOGIT_LIMIT * BINS_PER_LOGIT)
# The cell that is the first bin.
FIRST_CELL = int((LOWEST_LOGIT + LOGIT_LIMIT) * BINS_PER_LOGIT)

# What is summed in each bin, and the unit of its fixed point. With weight w and label y of a row:
#   rows              w            positives           w y
#   expected          w p          squares             w w         positive_squares    w w y
SUMS = ("rows", "positives", "expected", "squares", "positive_squares")
UNITS = (2.0**-24, 2.0**-24, 2.0**-32, 2.0**-16, 2.0**-16)

# Bits of the whole numbers from which the tables are made: e**-34 is 2**-49, and 128 digits remain.
_BITS = 192


class Taylor(NamedTuple):
    """The sigmoid's value and its derivatives over their factorials, in the middle of each cell."""

    t0: FloatArray
    t1: FloatArray
    t2: FloatArray
    t3: FloatArray


@cache
def taylor() -> Taylor:
    """The tables, shape (CELLS,) each; correctly rounded, because Python divides whole numbers so.

    With ``E = exp(-c)`` at the middle ``c`` of a cell: ``p = 1 / (1 + E)``, ``p' = E / (1 + E)**2``,
    ``p'' = E (E - 1) / (1 + E)**3`` and ``p''' = E (1 - 4 E + E**2) / (1 + E)**4``.

    Examples
    --------
    >>> tables = taylor()
    >>> len(tables.t0), float(tables.t0[0] + tables.t0[-1])
    (8704, 1.0)
    """
    one = 1 << _BITS
    half_cell = _exp_of_minus_one_over(256)
    step = half_cell * half_cell >> _BITS
    upper: list[tuple[float, ...]] = []
    lower: list[tuple[float, ...]] = []
    e = half_cell
    for _ in range(CELLS // 2):
        s = one + e
        first = e * one / (s * s)
        second = e * (e - one) * one / (2 * s**3)
        third = e * (one * one - 4 * e * one + e * e) * one / (6 * s**4)
        upper.append((one / s, first, second, third))
        lower.append((e / s, first, -second, third))
        e = e * step >> _BITS
    return Taylor(*np.array([*lower[::-1], *upper]).T.copy())


def _exp_of_minus_one_over(whole: int) -> int:
    """``exp(-1 / whole)`` in units of 2**-192, by its series."""
    total, term, count = 0, 1 << _BITS, 0
    while term:
        total += term
        count += 1
        term = -(term // (whole * count))
    return total


def cells_of(logit: FloatArray) -> tuple[IntArray, FloatArray]:
    """Cell of each logit, and where it lies in it.

    Parameters
    ----------
    logit : ndarray, shape (n,)
        Within ``[-LOGIT_LIMIT, LOGIT_LIMIT]``.

    Returns
    -------
    cell : ndarray of int64, shape (n,), in [0, CELLS)
    offset : ndarray, shape (n,), logits from the middle of the cell
    """
    q = (logit + LOGIT_LIMIT) * BINS_PER_LOGIT
    # q >= 0, so that cutting off is rounding down.
    cell = np.minimum(q.astype(np.int64), CELLS - 1)
    q -= cell
    q -= 0.5
    q /= BINS_PER_LOGIT
    return cell, q


def places_of(cell: IntArray) -> IntArray:
    """The bin of each cell, in [0, BINS)."""
    return np.clip(cell - FIRST_CELL, 0, BINS - 1)


def probability_of(cell: IntArray, offset: FloatArray) -> FloatArray:
    """The probability that a sketch counts for a logit, shape (n,); arguments of :func:`cells_of`.

    Examples
    --------
    >>> probability_of(*cells_of(np.array([0.0, -2.0]))).round(6).tolist()
    [0.5, 0.119203]
    """
    table = taylor()
    p = table.t3.take(cell)
    for higher in (table.t2, table.t1, table.t0):
        p *= offset
        p += higher.take(cell)
    return p
