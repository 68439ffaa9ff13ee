"""A mergeable summary of (logit, label, weight): the one thing calibration and its metrics need to keep.

4096 bins of 1/128 logit over [-16, 16). Whatever lies outside goes to the first or last bin. Per bin three
sums in fixed point (int64), each row rounded on its own, so that the sums do not depend on the order or the
batching of rows:

=========== =========================== ============ ====================================
sum         of                          unit         largest sum in one bin
=========== =========================== ============ ====================================
rows        weight                      2**-24       5e11
positives   weight x label              2**-24       5e11
expected    weight x sigmoid(logit)     2**-32       2e9
=========== =========================== ============ ====================================

So ``a + b == b + a`` and ``(a + b) + c == a + (b + c)`` hold to the bit, across Spark partitions, windows
and replays. Keep one sketch per (release, segment, label maturity): the sums of two models must never meet.

The price is resolution, not bias: two rows of one bin differ by at most 1/128 in logit, which costs log
loss at most about 2e-6 and AUC half of the pairs inside one bin.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibration import quality
from calibration.base import checked_rows
from calibration.link import FloatArray, logit_of, sigmoid
from calibration.state import expect_fields
from pipelines.errors import DataError, StaleStateError

__all__ = ["LogitSketch"]

BINS = 4096
LOWEST_LOGIT = -16.0
BINS_PER_LOGIT = 128.0
ROW_UNIT = 2.0**-24
EXPECTED_UNIT = 2.0**-32
# Fixed-point bits of a decay factor: 2**33 (high half of a count) x 2**30 just fits int64.
DECAY_BITS = 30
# A margin below 2**63: sums are checked in float64 before they are made.
_CAPACITY = 2.0**62.9
_LAYOUT = [BINS, int(LOWEST_LOGIT), int(BINS_PER_LOGIT), 24, 32]

_EDGES = LOWEST_LOGIT + np.arange(BINS + 1) / BINS_PER_LOGIT
# Bin representatives stay clear of the edges, so that they increase strictly from bin to bin.
_INSET = 0.01 / BINS_PER_LOGIT


class LogitSketch:
    """Fixed-point sums per bin of logit; mergeable by ``+``, exactly.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(-3.0, 1.0, 20_000)
    >>> label = rng.random(20_000) < sigmoid(logit)
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
        # Rows of this array: rows, positives, expected.
        self._sums = np.zeros((3, BINS), dtype=np.int64)

    # -- adding rows and sketches ------------------------------------------------------------------

    def update(self, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> None:
        """Add rows; conventions of :mod:`calibration.base`.

        Raises
        ------
        DataError
            Bad values (nothing is added then), or more weight than the fixed point holds.
        """
        z, y, w = checked_rows(logit, label, weight)
        if not len(z):
            return
        position = np.floor((z - LOWEST_LOGIT) * BINS_PER_LOGIT)
        index = np.clip(position, 0, BINS - 1).astype(np.int64)
        in_units = (w / ROW_UNIT, w * y / ROW_UNIT, w * sigmoid(z) / EXPECTED_UNIT)
        for sums, amount in zip(self._sums, in_units, strict=True):
            _check_capacity(float(sums.max()) + float(amount.sum()))
        for sums, amount in zip(self._sums, in_units, strict=True):
            # int64 addition, not float bincount: exact whatever the number of rows.
            np.add.at(sums, index, np.rint(amount).astype(np.int64))

    def merge(self, other: LogitSketch) -> None:
        """Add another sketch's rows to this one, exactly."""
        _check_capacity(float(self._sums.max()) + float(other._sums.max()))
        self._sums += other._sums

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
        """Forget: every sum ``c`` becomes ``floor(c * round(factor * 2**30) / 2**30)``, exactly.

        Rounding down makes every bin reach 0 in the end and keeps positives <= rows. The result does not
        depend on the platform's floats. Decay does not commute with :meth:`merge` to the last unit (6e-8 of
        a row a bin).

        Parameters
        ----------
        factor : float
            In [0, 1]; 1 changes nothing.
        """
        if not 0.0 <= factor <= 1.0:
            raise DataError(f"decay factor must be in [0, 1]; got {factor}.")
        scaled = round(factor * 2**DECAY_BITS)
        # c = high * 2**30 + low, so c * scaled >> 30 = high * scaled + (low * scaled >> 30): no overflow.
        high, low = self._sums >> DECAY_BITS, self._sums & (2**DECAY_BITS - 1)
        self._sums = high * scaled + ((low * scaled) >> DECAY_BITS)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def rows(self) -> float:
        """Σ weight: the support of every number read from this sketch."""
        total: int = sum(self._sums[0].tolist())
        return total * ROW_UNIT

    @property
    def positives(self) -> float:
        """Σ weight x label."""
        total: int = sum(self._sums[1].tolist())
        return total * ROW_UNIT

    @property
    def expected(self) -> float:
        """Σ weight x probability, with the probability the model gave."""
        total: int = sum(self._sums[2].tolist())
        return total * EXPECTED_UNIT

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
        rows, positives, expected = self._sums[:, held].tolist()
        return {
            "kind": "logit_sketch",
            "layout": list(_LAYOUT),
            "bins": held.tolist(),
            "rows": rows,
            "positives": positives,
            "expected": expected,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The sketch that :meth:`state` described; ``StaleStateError`` if it cannot be one."""
        expect_fields(state, "logit_sketch", ("layout", "bins", "rows", "positives", "expected"))
        if list(state["layout"]) != _LAYOUT:
            raise StaleStateError(f"expected a sketch of layout {_LAYOUT}; got {state['layout']}.")
        sketch = cls()
        columns = [state[name] for name in ("rows", "positives", "expected")]
        bins = state["bins"]
        in_range = all(isinstance(b, int) and 0 <= b < BINS for b in bins)
        in_order = in_range and all(a < b for a, b in itertools.pairwise(bins))
        whole = all(isinstance(v, int) and 0 <= v < 2**63 for column in columns for v in column)
        if not in_order or not whole or any(len(column) != len(bins) for column in columns):
            raise StaleStateError("logit sketch is damaged: bins must increase and sums be integers >= 0.")
        sketch._sums[:, bins] = np.array(columns, dtype=np.int64).reshape(3, len(bins))
        return sketch

    # -- internals ---------------------------------------------------------------------------------

    def _held(self) -> npt.NDArray[np.intp]:
        return np.flatnonzero(self._sums[0])

    def _floats(self, held: npt.NDArray[np.intp]) -> tuple[FloatArray, FloatArray, FloatArray]:
        rows, positives, expected = self._sums[:, held]
        return rows * ROW_UNIT, positives * ROW_UNIT, expected * EXPECTED_UNIT


def _check_capacity(units: float) -> None:
    if not units < _CAPACITY:
        raise DataError(
            "the sketch is full: one bin may hold 5e11 weighted rows and 2e9 expected positives.",
            hint="decay it, or keep one sketch a day and merge only what is read together",
        )
