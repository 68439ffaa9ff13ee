"""A mergeable summary of (logit, label, weight): the one thing calibration and its metrics need to keep.

4096 bins of 1/128 logit over [-16, 16). Whatever lies outside goes to the first or last bin. Per bin five
sums in fixed point (int64), each row rounded on its own (half to even), so that the sums do not depend on
the order or the batching of rows, nor on the engine (:mod:`calibration.sketch_layout`):

================ ============================ ======= ==================== ===================
sum              of                           unit    largest in one bin   for
================ ============================ ======= ==================== ===================
rows             weight                       2**-24  5e11                 everything
positives        weight x label               2**-24  5e11                 everything
expected         weight x probability         2**-32  2e9                  level, bin's logit
squares          weight x weight              2**-16  1e14                 variances
positive_squares weight x weight x label      2**-16  1e14                 variances
================ ============================ ======= ==================== ===================

So ``a + b == b + a`` and ``(a + b) + c == a + (b + c)`` hold to the bit, across Spark partitions, windows
and replays. Keep one sketch per (release, task, segment, label maturity), in a
:class:`calibration.sketch_book.SketchBook`: the sums of two models must never meet.

Nothing is fitted to the sums of squares, so that a weight of 2 and the row twice give the same calibrator;
they say how much a weighted sum scatters, where twice the weight of one row is not two rows.

The price is resolution, not bias: two rows of one bin differ by at most 1/128 in logit.
What that costs each metric at most, ``monitoring.binned`` says with the metric.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from calibration import quality
from calibration.base import row_chunks
from calibration.fixed_point import DECAY_BITS, add, amounts, check_capacity, scaled
from calibration.link import LOGIT_LIMIT, FloatArray, logit_of
from calibration.sketch_layout import (
    BINS,
    BINS_PER_LOGIT,
    LOWEST_LOGIT,
    SUMS,
    UNITS,
    IntArray,
    cells_of,
    places_of,
)
from calibration.state import expect_fields
from pipelines.errors import DataError, StaleStateError

__all__ = ["BINS", "Bins", "LogitSketch"]

# Small enough that all that is made for a chunk stays in the processor's cache.
_CHUNK_ROWS = 2**16
_LAYOUT = [BINS, int(LOWEST_LOGIT), int(BINS_PER_LOGIT), 24, 24, 32, 16, 16]
# Sums that forget with the square of the factor.
_SQUARES = slice(3, 5)

_EDGES = LOWEST_LOGIT + np.arange(BINS + 1) / BINS_PER_LOGIT
# Bin representatives stay clear of the edges, so that they increase strictly from bin to bin.
_INSET = 0.01 / BINS_PER_LOGIT


class Bins(NamedTuple):
    """The bins that hold rows, in increasing order; arrays of shape ``(bins held,)``.

    Attributes
    ----------
    lower_logit, upper_logit : ndarray
        Edges; the first and last bin reach to the ends of the logits that count.
    rows, positives, expected, squares, positive_squares : ndarray
        The sums, see :mod:`calibration.sketch`.
    """

    lower_logit: FloatArray
    upper_logit: FloatArray
    rows: FloatArray
    positives: FloatArray
    expected: FloatArray
    squares: FloatArray
    positive_squares: FloatArray


class LogitSketch:
    """Fixed-point sums per bin of logit; mergeable by ``+``, exactly.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(-3.0, 1.0, 20_000)
    >>> label = rng.random(20_000) < 1.0 / (1.0 + np.exp(-logit))
    >>> whole, half = LogitSketch(), LogitSketch()
    >>> whole.update(logit, label)
    >>> half.update(logit[:7_000], label[:7_000])
    >>> rest = LogitSketch()
    >>> rest.update(logit[7_000:], label[7_000:])
    >>> half + rest == whole
    True
    >>> round(whole.pcoc(), 2), round(whole.ne(), 3)
    (0.98, 0.89)
    """

    def __init__(self) -> None:
        # Rows of this array: as in SUMS.
        self._sums = np.zeros((len(SUMS), BINS), dtype=np.int64)

    # -- adding rows and sketches ------------------------------------------------------------------

    def update(self, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> None:
        """Add rows; conventions of :mod:`calibration.base`. Takes some 10 MB beside the rows, however many.

        Raises
        ------
        DataError
            Bad values (nothing is added then), or more weight than the fixed point holds.
        """
        sums = self._sums.copy()
        for z, y, w in row_chunks(logit, label, weight, _CHUNK_ROWS):
            cell, offset = cells_of(z)
            place = places_of(cell)
            for one, (amount, largest) in zip(sums, amounts(y, w, cell, offset), strict=True):
                add(one, place, amount, largest)
        self._sums = sums

    @classmethod
    def of(cls, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> Self:
        """A sketch of these rows; arguments of :meth:`update`."""
        sketch = cls()
        sketch.update(logit, label, weight)
        return sketch

    def merge(self, other: LogitSketch) -> None:
        """Add another sketch's rows to this one, exactly."""
        for mine, theirs in zip(self._sums, other._sums, strict=True):
            check_capacity(float(mine.max()) + float(theirs.max()))
        self._sums = self._sums + other._sums

    def subtract(self, other: LogitSketch) -> None:
        """Take out rows that were added before, exactly; ``DataError`` if they were not all there."""
        difference = self._sums - other._sums
        if (difference < 0).any():
            raise DataError("cannot subtract a sketch that is not contained in this one.")
        self._sums = difference

    def __add__(self, other: LogitSketch) -> LogitSketch:
        total = self.copy()
        total.merge(other)
        return total

    def __sub__(self, other: LogitSketch) -> LogitSketch:
        difference = self.copy()
        difference.subtract(other)
        return difference

    def decay(self, factor: float) -> None:
        """Forget: every weight ``w`` becomes about ``factor * w``.

        With ``f = round(factor * 2**30)``, a sum ``c`` becomes ``floor(c f / 2**30)``, exactly, and a sum of
        squares ``floor(floor(c f / 2**30) f / 2**30)``. Rounding down makes every bin reach 0 in the end and
        keeps positives <= rows. The result does not depend on the platform's floats. Decay does not commute
        with :meth:`merge` to the last unit (6e-8 of a row a bin).

        Parameters
        ----------
        factor : float
            In [0, 1]; 1 changes nothing.
        """
        if not 0.0 <= factor <= 1.0:
            raise DataError(f"decay factor must be in [0, 1]; got {factor}.")
        whole = round(factor * 2**DECAY_BITS)
        self._sums = scaled(self._sums, whole)
        self._sums[_SQUARES] = scaled(self._sums[_SQUARES], whole)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def rows(self) -> float:
        """Σ weight: the support of every number read from this sketch."""
        total: int = sum(self._sums[0].tolist())
        return total * UNITS[0]

    @property
    def positives(self) -> float:
        """Σ weight x label."""
        total: int = sum(self._sums[1].tolist())
        return total * UNITS[0]

    @property
    def expected(self) -> float:
        """Σ weight x probability, with the probability the model gave."""
        total: int = sum(self._sums[2].tolist())
        return total * UNITS[2]

    @property
    def effective_rows(self) -> float:
        """``(Σ weight)² / Σ weight²``: how many rows of equal weight tell as much (Kish 1965); 0 without."""
        squares: int = sum(self._sums[3].tolist())
        return self.rows**2 / (squares * UNITS[3]) if squares else 0.0

    def bins(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """The bins that hold rows, in increasing order.

        Returns
        -------
        logit, rows, positives, expected : ndarray, shape (bins held,)
            ``logit`` is the logit of the bin's mean probability, strictly increasing.
        """
        held = self._held()
        rows, positives, expected = self._floats(held)
        logit = logit_of(quality.mean_probability(rows, expected))
        # The first and last bin also hold what lies outside, so only their inner edge binds.
        lower = np.where(held == 0, -np.inf, _EDGES[held] + _INSET)
        upper = np.where(held == BINS - 1, np.inf, _EDGES[held + 1] - _INSET)
        return np.clip(logit, lower, upper), rows, positives, expected

    def binned(self) -> Bins:
        """Every sum of the bins that hold rows, with the bins' edges."""
        held = self._held()
        edges = _EDGES.copy()
        edges[[0, -1]] = -LOGIT_LIMIT, LOGIT_LIMIT
        sums = self._sums[:, held] * np.array(UNITS)[:, None]
        return Bins(edges[held], edges[held + 1], *sums)

    def log_loss(self) -> float:
        """Mean log loss in nats of the probabilities the model gave; ``nan`` without rows."""
        rows, positives, expected = self._floats(self._held())
        return quality.log_loss(rows, positives, quality.mean_probability(rows, expected))

    def ne(self) -> float:
        """Normalised entropy over the sketch's own rows; lower is better, 1 is the base rate."""
        rows, positives, expected = self._floats(self._held())
        return quality.ne(rows, positives, quality.mean_probability(rows, expected))

    def pcoc(self) -> float:
        """Σ predicted ÷ Σ observed; above 1 over-predicts."""
        return self.expected / self.positives if self.positives > 0.0 else float("nan")

    def auc(self) -> float:
        """Area under the ROC curve, rows of a bin counted as ties."""
        rows, positives, _ = self._floats(self._held())
        return quality.auc(rows, positives)

    def reliability(self, groups: int = 20) -> quality.ReliabilityTable:
        """Predicted against observed in ``groups`` groups of nearly equal weight."""
        held = self._held()
        return quality.reliability(*self._floats(held), _EDGES[held], _EDGES[held + 1], groups)

    def ece(self, groups: int = 20) -> float:
        """Expected calibration error over ``groups`` equal-weight groups; a perfect model's is not 0."""
        return quality.ece(self.reliability(groups))

    # -- state -------------------------------------------------------------------------------------

    def copy(self) -> LogitSketch:
        """An independent sketch of the same rows."""
        twin = LogitSketch()
        twin._sums = self._sums.copy()
        return twin

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogitSketch) and bool((self._sums == other._sums).all())

    __hash__ = None  # type: ignore[assignment]  # mutable

    def state(self) -> dict[str, Any]:
        """Plain JSON data: only the bins that hold something, sums as integers in units."""
        held = np.flatnonzero(self._sums.any(axis=0))
        sums = zip(SUMS, self._sums[:, held].tolist(), strict=True)
        return {"kind": "logit_sketch", "layout": list(_LAYOUT), "bins": held.tolist(), **dict(sums)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The sketch that :meth:`state` described; ``StaleStateError`` if it cannot be one."""
        expect_fields(state, "logit_sketch", ("layout", "bins", *SUMS))
        if list(state["layout"]) != _LAYOUT:
            raise StaleStateError(f"expected a sketch of layout {_LAYOUT}; got {state['layout']}.")
        columns = [state[name] for name in SUMS]
        whole = all(isinstance(v, int) and 0 <= v < 2**63 for column in columns for v in column)
        bins = state["bins"]
        if not whole or any(len(column) != len(bins) for column in columns):
            raise StaleStateError(_DAMAGED)
        return cls.from_units(bins, np.array(columns, dtype=np.int64).reshape(len(SUMS), len(bins)))

    def units(self) -> tuple[IntArray, IntArray]:
        """The bins that hold something, increasing, and their sums in units, shape (5, bins)."""
        held = np.flatnonzero(self._sums.any(axis=0))
        return held, self._sums[:, held]

    @classmethod
    def from_units(cls, bins: npt.ArrayLike, units: npt.ArrayLike) -> Self:
        """The sketch of :meth:`units`; ``StaleStateError`` if it cannot be one."""
        sketch, sums = cls(), np.asarray(units)
        in_range = all(isinstance(b, (int, np.integer)) and 0 <= b < BINS for b in np.asarray(bins).tolist())
        in_order = in_range and all(a < b for a, b in itertools.pairwise(np.asarray(bins).tolist()))
        if not in_order or sums.shape != (len(SUMS), len(np.asarray(bins))) or (sums < 0).any():
            raise StaleStateError(_DAMAGED)
        sketch._sums[:, np.asarray(bins, dtype=np.int64)] = sums
        return sketch

    # -- internals ---------------------------------------------------------------------------------

    def _held(self) -> npt.NDArray[np.intp]:
        return np.flatnonzero(self._sums[0])

    def _floats(self, held: npt.NDArray[np.intp]) -> tuple[FloatArray, FloatArray, FloatArray]:
        rows, positives, expected = self._sums[:3, held]
        return rows * UNITS[0], positives * UNITS[1], expected * UNITS[2]


_DAMAGED = "logit sketch is damaged: bins must increase and sums be integers >= 0."
