"""Delays by group: a product-limit estimate for each campaign (say), shrunk towards the curve of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from pipelines.delay import DelayCurve
from pipelines.delay_bins import DelayBins
from pipelines.delay_counts import DelayCounts, Path, combined_keys, path_keys
from pipelines.delay_prior import prior_strength, shrunk_probability
from pipelines.errors import DataError
from pipelines.hashing import HASH_SEED

__all__ = ["MINIMUM_SUPPORT", "DelayGroups", "GroupLevel"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Shrinkage makes smaller groups harmless, but they would fill the table and move nobody.
MINIMUM_SUPPORT = 20.0
_STATE_KIND = "delay_groups"


@dataclass(frozen=True)
class GroupLevel:
    """Groups by the first ``depth`` fields.

    Attributes
    ----------
    depth : int
        From 1.
    key : ndarray of int64, shape (groups,)
        `pipelines.delay_counts.path_keys`, ascending.
    probability : ndarray, shape (groups, bins)
        F at the ends of the bins, shrunk.
    support : ndarray, shape (groups,)
        Outcomes behind each.
    strength : float
        How many outcomes the parent counts for, see `pipelines.delay_prior`.
    """

    depth: int
    key: Ints
    probability: Floats
    support: Floats
    strength: float


@dataclass(frozen=True)
class DelayGroups:
    """F by the values of one or more features: all, then the first field, then the first two, and so on.

    Each group is shrunk towards the one that contains it, the first level towards the common curve. A row
    gets the deepest group that is known; a value never seen, or seen too rarely, gets the parent's.

    Attributes
    ----------
    fields : tuple of str
        What the columns of ``segment_key`` must be.
    bins : DelayBins
    levels : tuple of GroupLevel

    Examples
    --------
    Two campaigns, one quick and one slow, and a third that nobody has seen:

    >>> from pipelines.delay import DelayGrid
    >>> from pipelines.hashing import hash_text
    >>> rng = np.random.default_rng(0)
    >>> hour, slow = 3_600_000, rng.random(4_000) < 0.5
    >>> delay = np.minimum(rng.exponential(np.where(slow, 10.0, 1.0)), 24.0) * hour
    >>> open_for = np.full(4_000, 24 * hour)
    >>> curve = DelayCurve.fit(delay, open_for)
    >>> values = [("slow",) if one else ("quick",) for one in slow]
    >>> counts = DelayCounts.of(DelayGrid(24 * hour, 32), ("campaign_id",), values, delay, open_for)
    >>> groups = DelayGroups.fit(counts, curve)
    >>> key = np.array([[hash_text(name)] for name in ("slow", "quick", "new")], np.uint64).view(np.int64)
    >>> groups.observed_share(np.full(3, hour), key[:, :0], key[:, :0], key).round(2).tolist()
    [0.09, 0.65, 0.37]
    """

    fields: tuple[str, ...]
    bins: DelayBins
    levels: tuple[GroupLevel, ...]

    @classmethod
    def fit(
        cls,
        counts: DelayCounts,
        base: DelayCurve,
        *,
        open_windows: bool = False,
        minimum_support: float = MINIMUM_SUPPORT,
        strength: float | None = None,
        hash_seed: int = HASH_SEED,
    ) -> Self:
        """Estimate all groups.

        Parameters
        ----------
        counts : DelayCounts
        base : DelayCurve
            The curve of all outcomes.
        open_windows : bool
            Use the outcomes of open windows, too. Those need the same delays in young and old windows; those
            of closed windows are complete and need nothing, but are as old as the window is wide.
        minimum_support : float
            A group with fewer outcomes gets its parent's F.
        strength : float, optional
            ``a`` of every level; by default each level's is the most likely one.
        hash_seed : int
            Of the feature spec that encodes the rows.
        """
        used = counts if open_windows else counts.closed()
        bins = DelayBins(counts.grid, base)
        levels: list[GroupLevel] = []
        for depth in range(1, len(counts.fields) + 1):
            one = used.level(depth)
            events, at_risk = one.events_and_risk()
            support = events.sum(axis=1)
            kept = np.flatnonzero(support >= max(minimum_support, 1.0))
            paths = [one.paths[place] for place in kept.tolist()]
            events, at_risk, support = events[kept], at_risk[kept], support[kept]
            table, row = _parents(bins, levels, paths, hash_seed)
            parent = table[row]
            own = prior_strength(events, at_risk, parent) if strength is None else strength
            probability = shrunk_probability(events, at_risk, parent, own)
            key = path_keys(paths, hash_seed) if paths else np.zeros(0, np.int64)
            order = np.argsort(key, kind="stable")
            levels.append(GroupLevel(depth, key[order], probability[order], support[order], own))
        return cls(counts.fields, bins, tuple(levels))

    @property
    def support(self) -> float:
        """Outcomes behind the groups of the first level."""
        return float(self.levels[0].support.sum()) if self.levels else 0.0

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
        """F at each age, shape (n,); ``segment_key`` holds the hashes of `fields`, one column each."""
        table, row = _rows(self.bins, self.levels, self._checked(segment_key))
        return self.bins.cdf(table, row, elapsed)

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
        table, row = _rows(self.bins, self.levels, self._checked(segment_key))
        return self.bins.quantiles(table, row, share)

    def state(self) -> dict[str, Any]:
        """Plain JSON data, without the `arrays`."""
        return {
            "kind": _STATE_KIND,
            "version": 1,
            "fields": list(self.fields),
            "bins": self.bins.state(),
            "strength": [level.strength for level in self.levels],
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """``<depth>.key``, ``<depth>.probability`` and ``<depth>.support`` of each level."""
        return {
            f"{level.depth}.{name}": getattr(level, name)
            for level in self.levels
            for name in ("key", "probability", "support")
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The groups that `state` and `arrays` described; ``DataError`` if they are none."""
        if state.get("kind") != _STATE_KIND or state.get("version") != 1:
            raise DataError(
                f"expected the state of {_STATE_KIND}, version 1. Received: kind={state.get('kind')!r}, "
                f"version={state.get('version')!r}."
            )
        fields, bins = tuple(state["fields"]), DelayBins.from_state(state["bins"])
        levels = []
        for depth, strength in enumerate(state["strength"], start=1):
            names = [f"{depth}.{name}" for name in ("key", "probability", "support")]
            missing = [name for name in names if name not in arrays]
            if missing:
                raise DataError(f"expected arrays of {_STATE_KIND}. Without: {', '.join(missing)}.")
            key, probability, support = (arrays[name] for name in names)
            if probability.shape != (len(key), bins.grid.bins):
                raise DataError(
                    f"expected F of {len(key)} groups at {bins.grid.bins} bins. "
                    f"Received shape {probability.shape}."
                )
            levels.append(GroupLevel(depth, key, probability, support, float(strength)))
        return cls(fields, bins, tuple(levels))

    def _checked(self, segment_key: NDArray[np.int64]) -> Ints:
        if segment_key.ndim != 2 or segment_key.shape[1] != len(self.fields):
            raise DataError(
                f"expected segment keys of {', '.join(self.fields)}, one column each. "
                f"Received shape {segment_key.shape}.",
                hint="encode with the delay model's fields as segments",
            )
        return segment_key


def _parents(bins: DelayBins, levels: list[GroupLevel], paths: list[Path], seed: int) -> tuple[Floats, Ints]:
    """F of the groups that contain the paths: a table, and the row of each path."""
    depth = len(paths[0]) if paths else 1
    if depth == 1:
        return bins.probability[None, :], np.zeros(len(paths), np.int64)
    columns = [path_keys([path[place : place + 1] for path in paths], seed) for place in range(depth - 1)]
    return _rows(bins, tuple(levels), np.stack(columns, axis=1))


def _rows(bins: DelayBins, levels: tuple[GroupLevel, ...], segment_key: Ints) -> tuple[Floats, Ints]:
    """F of all groups as one table, the common curve first, and the deepest row that holds for each key."""
    table = np.concatenate([bins.probability[None, :], *(level.probability for level in levels)])
    row, first = np.zeros(len(segment_key), np.int64), 1
    for level in levels:
        if len(level.key):
            wanted = combined_keys(segment_key, level.depth)
            at = np.minimum(np.searchsorted(level.key, wanted), len(level.key) - 1)
            row = np.where(level.key[at] == wanted, first + at, row)
        first += len(level.key)
    return table, row
