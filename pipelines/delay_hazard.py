"""Delays by features: a small network of reverse hazards, applied in numpy.

`models.delay_hazard` trains it; here it is read, stored and applied, so that Spark's workers need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from pipelines.delay import DelayCurve
from pipelines.delay_bins import DelayBins
from pipelines.errors import DataError

__all__ = ["NUMBER_LIMIT", "DelayHazard", "base_logit", "table_rows"]

Floats = NDArray[np.float64]

# Standardised numbers beyond this are errors of the data rather than news of the delay.
NUMBER_LIMIT = 5.0
# Reverse hazards of the common curve stay within these log-odds, so that a network can move every one.
_LOGIT_LIMIT = 12.0
_ROWS_AT_ONCE = 16_384
_STATE_KIND = "delay_hazard"


@dataclass(frozen=True)
class DelayHazard:
    """F of each row from a network that moves the reverse hazards of the common curve.

    With ``b_k`` the log-odds of the common curve's reverse hazard ``P(bin k | bin <= k)`` and ``g_k(x)`` the
    network's output::

        r_k(x) = sigmoid(b_k + scale g_k(x))        F(E_k | x) = prod over j > k of (1 - r_j(x))

    Reverse, because an outcome with delay bin d and follow-up bin u then has the likelihood ``r_d prod over
    d < j <= u of (1 - r_j)``: truncation needs no further term, see `pipelines.delay_prior`. The network is
    an embedding for each column, the numbers beside them, and layers with ReLU between. With ``scale`` 0 it
    is the common curve.

    Attributes
    ----------
    bins : DelayBins
    columns : tuple of int
        Columns of ``buckets`` that it looks at.
    offsets, sizes : tuple of int
        First table row of each column's field in ``buckets``, and the rows that the column has here; a bucket
        beyond them shares one by its remainder.
    embedding : ndarray of float32, shape (sum of sizes, dim)
    layers : tuple of (weight, bias)
        float32, (inputs, units) and (units,); the last has a unit for each bin but the first.
    scale : float
    support : float
        Outcomes that it was trained on.
    spec_digest : str
        Of the feature spec that encodes the rows.
    """

    bins: DelayBins
    columns: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    embedding: NDArray[np.float32]
    layers: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]
    scale: float
    support: float
    spec_digest: str

    @property
    def fields(self) -> tuple[str, ...]:
        """None: the features come by ``buckets`` and ``numbers``."""
        return ()

    @property
    def common(self) -> DelayCurve:
        """The curve of all outcomes together."""
        return self.bins.base

    def observed_share(
        self,
        elapsed: npt.ArrayLike,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """F at each age, shape (n,)."""
        age = np.asarray(elapsed, np.float64)
        found = np.empty(len(age))
        for start in range(0, len(age), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            table = self.table(buckets[part], numbers[part])
            found[part] = self.bins.cdf(table, np.arange(len(table)), age[part])
        return found

    def survival(
        self,
        elapsed: npt.ArrayLike,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """P(delay > elapsed | there is an outcome), shape (n,)."""
        return 1.0 - self.observed_share(elapsed, buckets, numbers, segment_key)

    def quantiles(
        self,
        share: float,
        buckets: NDArray[np.int32],
        numbers: NDArray[np.float32],
        segment_key: NDArray[np.int64],
    ) -> Floats:
        """Age (ms) by which ``share`` of the outcomes have come, shape (n,)."""
        found = np.empty(len(buckets))
        for start in range(0, len(buckets), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            table = self.table(buckets[part], numbers[part])
            found[part] = self.bins.quantiles(table, np.arange(len(table)), share)
        return found

    def table(self, buckets: NDArray[np.int32], numbers: NDArray[np.float32]) -> Floats:
        """F of each row at the ends of the bins, shape (n, bins); the last column is 1."""
        moved = self._base + self.scale * self._network(buckets, numbers).astype(np.float64)
        # log(1 - r) summed from the last bin down; 1 - sigmoid(z) = sigmoid(-z).
        later = np.cumsum(-np.logaddexp(0.0, moved)[:, ::-1], axis=1)[:, ::-1]
        return np.concatenate([np.exp(later), np.ones((len(moved), 1))], axis=1)

    def _network(self, buckets: NDArray[np.int32], numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.columns and max(self.columns) >= buckets.shape[1]:
            raise DataError(
                f"expected buckets with more than {max(self.columns)} columns. Received {buckets.shape[1]}.",
                hint="encode with the feature spec that the delay model was trained with",
            )
        rows = table_rows(buckets, self.columns, self.offsets, self.sizes)
        width = len(self.columns) * self.embedding.shape[1]
        hidden = np.concatenate(
            [
                self.embedding[rows].reshape(len(buckets), width),
                np.clip(numbers, -NUMBER_LIMIT, NUMBER_LIMIT).astype(np.float32, copy=False),
            ],
            axis=1,
        )
        for number, (weight, bias) in enumerate(self.layers):
            hidden = hidden @ weight + bias
            if number + 1 < len(self.layers):
                hidden = np.maximum(hidden, np.float32(0.0))
        return hidden

    @cached_property
    def _base(self) -> Floats:
        return base_logit(self.bins)

    def state(self) -> dict[str, Any]:
        """Plain JSON data, without the `arrays`."""
        return {
            "kind": _STATE_KIND,
            "version": 1,
            "bins": self.bins.state(),
            "columns": list(self.columns),
            "offsets": list(self.offsets),
            "sizes": list(self.sizes),
            "layers": len(self.layers),
            "scale": self.scale,
            "support": self.support,
            "spec_digest": self.spec_digest,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """``embedding``, and ``<layer>.weight``, ``<layer>.bias``."""
        found: dict[str, NDArray[Any]] = {"embedding": self.embedding}
        for number, (weight, bias) in enumerate(self.layers):
            found |= {f"{number}.weight": weight, f"{number}.bias": bias}
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The network that `state` and `arrays` described; ``DataError`` if they are none."""
        if state.get("kind") != _STATE_KIND or state.get("version") != 1:
            raise DataError(
                f"expected the state of {_STATE_KIND}, version 1. Received: kind={state.get('kind')!r}, "
                f"version={state.get('version')!r}."
            )
        names = ["embedding", *(f"{n}.{part}" for n in range(state["layers"]) for part in ("weight", "bias"))]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise DataError(f"expected arrays of {_STATE_KIND}. Without: {', '.join(missing)}.")
        bins = DelayBins.from_state(state["bins"])
        columns, offsets, sizes = (tuple(state[name]) for name in ("columns", "offsets", "sizes"))
        layers = tuple((arrays[f"{n}.weight"], arrays[f"{n}.bias"]) for n in range(state["layers"]))
        if len(arrays["embedding"]) != sum(sizes) or layers[-1][1].shape != (bins.grid.bins - 1,):
            raise DataError("the arrays of the delay network do not fit its columns and bins.")
        return cls(
            bins,
            columns,
            offsets,
            sizes,
            arrays["embedding"],
            layers,
            float(state["scale"]),
            float(state["support"]),
            str(state["spec_digest"]),
        )


def base_logit(bins: DelayBins) -> Floats:
    """Log-odds of the common curve's reverse hazards, of each bin but the first, shape (bins - 1,).

    Examples
    --------
    >>> from pipelines.delay import DelayCurve, DelayGrid
    >>> curve = DelayCurve.fit(np.repeat([0.0, 1e6], 50), np.full(100, 1e6))
    >>> base_logit(DelayBins(DelayGrid(10**6, 2), curve)).tolist()
    [0.0]
    """
    mass, before = np.diff(bins.probability), bins.probability[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logit = np.log(mass) - np.log(before)
    # Nothing there and nothing before: any value will do.
    known = np.nan_to_num(logit, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return np.asarray(np.clip(known, -_LOGIT_LIMIT, _LOGIT_LIMIT), np.float64)


def table_rows(
    buckets: NDArray[np.int32], columns: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> NDArray[np.int64]:
    """Rows of the network's own table, one a column, shape (n, columns).

    Examples
    --------
    >>> table_rows(np.array([[9, 1, 17]], np.int32), (0, 2), (4, 14), (3, 8)).tolist()
    [[2, 6]]
    """
    own = buckets[:, list(columns)].astype(np.int64) - np.asarray(offsets, np.int64)
    start = np.cumsum([0, *sizes])[:-1]
    return np.asarray(own % np.asarray(sizes, np.int64) + start, np.int64)
