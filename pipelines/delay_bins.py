"""A few delay bins that are filled by a finer curve: how delays that depend on features are written down.

A group of outcomes, or a network, says how much falls into each of some 30 bins; how it lies inside a bin is
the common curve's affair. So a group costs 30 numbers, and still has the resolution of the curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from pipelines.delay import DelayCurve, DelayGrid
from pipelines.errors import DataError

__all__ = ["GROUP_BINS", "DelayBins"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Neighbouring edges then differ by a third: the curve fills in the rest.
GROUP_BINS = 30


@dataclass(frozen=True)
class DelayBins:
    """Bins of delays, and the common curve inside them.

    With ``F_0`` the common curve, ``E_k`` the upper ends of the bins and ``F`` given at those, an age ``e``
    in bin k has ::

        F(e) = F(E_{k-1}) + (F(E_k) - F(E_{k-1})) (F_0(e) - F_0(E_{k-1})) / (F_0(E_k) - F_0(E_{k-1}))

    Where the curve has nothing in a bin, ``F`` is linear in time there. So ``F`` is monotone, and equals
    ``F_0`` wherever its bins do.

    Attributes
    ----------
    grid : DelayGrid
    base : DelayCurve
        The common curve; its values at the ends of the bins are `probability`.

    Examples
    --------
    >>> hour = 3_600_000
    >>> curve = DelayCurve.fit(hour * np.linspace(0.0, 1.0, 101), np.full(101, hour))
    >>> bins = DelayBins(DelayGrid(hour, 8), curve)
    >>> table = np.stack([bins.probability, bins.probability**2])
    >>> bins.cdf(table, np.array([0, 1]), [hour / 2, hour / 2]).round(2).tolist()
    [0.5, 0.37]
    """

    grid: DelayGrid
    base: DelayCurve

    @cached_property
    def edges(self) -> Floats:
        """Upper end of each bin, ms, shape (bins,)."""
        return self.grid.edges()

    @cached_property
    def probability(self) -> Floats:
        """The common curve at the end of each bin, shape (bins,); the last is 1."""
        return np.append(self._common(self.edges[:-1]), 1.0)

    def place(self, elapsed: npt.ArrayLike) -> tuple[Ints, Floats]:
        """Bin of each age (ms), and which part of the bin's outcomes has come by then, in [0, 1]."""
        age = np.clip(np.asarray(elapsed, np.float64), 0.0, float(self.grid.horizon))
        k = self.grid.bin_of(age)
        before = np.maximum(k - 1, 0)
        low, high = self.probability[before], self.probability[k]
        begin, end = self.edges[before], self.edges[k]
        with np.errstate(divide="ignore", invalid="ignore"):
            by_curve = (self._common(age) - low) / (high - low)
            by_time = (age - begin) / (end - begin)
        part = np.where(high > low, by_curve, by_time)
        # Bin 0 is the instant 0: whoever is there has all of it.
        return k, np.where(k == 0, 1.0, np.clip(part, 0.0, 1.0))

    def cdf(self, table: Floats, row: Ints, elapsed: npt.ArrayLike) -> Floats:
        """F at each age.

        Parameters
        ----------
        table : ndarray, shape (rows, bins)
            F at the ends of the bins; the last column is 1.
        row : ndarray of int64, shape (n,)
            Which row of the table holds for each age.
        elapsed : array_like, shape (n,)
            Ages, ms. F is 0 before 0, and 1 from the horizon on.
        """
        age = np.asarray(elapsed, np.float64)
        k, part = self.place(age)
        high = table[row, k]
        low = np.where(k > 0, table[row, np.maximum(k - 1, 0)], 0.0)
        return np.where(age < 0, 0.0, np.where(age >= self.grid.horizon, 1.0, low + part * (high - low)))

    def quantiles(self, table: Floats, row: Ints, share: float) -> Floats:
        """Age (ms) by which ``share`` of the outcomes have come, shape (n,): the inverse of `cdf`."""
        rows, inverse = np.unique(row, return_inverse=True)
        found = np.array([self._quantile(table[one], share) for one in rows.tolist()], np.float64)
        return found[inverse] if len(found) else np.zeros(0)

    def _common(self, age: Floats) -> Floats:
        # What the curve saw beyond the horizon is not credited.
        return self.base.cdf(age) / max(self._at_horizon, 1e-300)

    @cached_property
    def _at_horizon(self) -> float:
        return float(self.base.cdf([self.grid.horizon])[0])

    def _quantile(self, values: Floats, share: float) -> float:
        k = int(np.searchsorted(values, share, side="left"))
        if k == 0:
            return 0.0
        part = (share - values[k - 1]) / (values[k] - values[k - 1])
        low, high = self.probability[k - 1], self.probability[k]
        if high > low:
            inside = float(self.base.inverse([self._at_horizon * (low + part * (high - low))])[0])
            return float(np.clip(inside, self.edges[k - 1], self.edges[k]))
        return float(self.edges[k - 1] + part * (self.edges[k] - self.edges[k - 1]))

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"horizon": self.grid.horizon, "bins": self.grid.bins, "base": self.base.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The bins that `state` described; ``DataError`` if it is none."""
        missing = [name for name in ("horizon", "bins", "base") if name not in state]
        if missing:
            raise DataError(f"expected the state of delay bins. Without: {', '.join(missing)}.")
        grid = DelayGrid(int(state["horizon"]), int(state["bins"]))
        return cls(grid, DelayCurve.from_state(state["base"]))
