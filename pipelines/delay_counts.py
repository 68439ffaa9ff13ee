"""Counts of outcomes by group, delay and follow-up: all that the delay of a group is estimated from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.delay import DelayGrid
from pipelines.errors import DataError
from pipelines.hashing import HASH_SEED, hash_column, mix

__all__ = ["DelayCounts", "Path", "path_keys"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Values of the first fields, from the first on: texts, or their hashes where only those are known; None is a
# null. Outcomes whose further values are too rare to be counted apart stand under a shorter path.
Path = tuple[str | int | None, ...]


@dataclass(frozen=True)
class DelayCounts:
    """Outcomes seen, counted by group, delay bin and follow-up bin. Counts of two logs add up by `merge`.

    Attributes
    ----------
    grid : DelayGrid
    fields : tuple of str
        Features whose values make the groups; the second divides the groups of the first.
    paths : tuple of tuple
        Values of each group, at most one a field.
    group : ndarray of int64, shape (cells,)
        Place in ``paths``.
    delay_bin : ndarray of int64, shape (cells,)
        `DelayGrid.bin_of` the delay.
    follow_up_bin : ndarray of int64, shape (cells,)
        `DelayGrid.whole_bins` of the follow-up; the last bin where the window has closed.
    count : ndarray of float64, shape (cells,)
    """

    grid: DelayGrid
    fields: tuple[str, ...]
    paths: tuple[Path, ...]
    group: Ints
    delay_bin: Ints
    follow_up_bin: Ints
    count: Floats

    @classmethod
    def of(
        cls,
        grid: DelayGrid,
        fields: tuple[str, ...],
        values: Sequence[Path],
        delay: npt.ArrayLike,
        follow_up: npt.ArrayLike,
    ) -> Self:
        """Count rows at hand.

        Parameters
        ----------
        grid : DelayGrid
        fields : tuple of str
        values : sequence of tuple, length n
            Values of the fields of each outcome.
        delay, follow_up : array_like, shape (n,)
            ms; ``0 <= delay <= follow_up``. From the horizon on the window has closed.

        Raises
        ------
        DataError
            If a delay is negative or larger than its follow-up.
        """
        seen, age = np.asarray(delay, np.float64), np.asarray(follow_up, np.float64)
        bad = np.flatnonzero(~((seen >= 0) & (seen <= age)))
        if len(bad):
            first = bad[0]
            raise DataError(
                f"expected 0 <= delay <= follow-up. Received delay={seen[first]:g} ms, "
                f"follow-up={age[first]:g} ms (row {first})."
            )
        place: dict[Path, int] = {}
        group = np.fromiter((place.setdefault(path, len(place)) for path in values), np.int64, len(seen))
        return cls._summed(grid, fields, tuple(place), group, grid.bin_of(seen), grid.whole_bins(age))

    @classmethod
    def from_table(cls, table: pa.Table, grid: DelayGrid, fields: tuple[str, ...]) -> Self:
        """Counts as `pipelines.delay_cells.group_delays` gives them, of one task."""
        columns = [table.column(f"value_{place}").to_pylist() for place in range(len(fields))]
        levels = table.column("level").to_pylist()
        place: dict[Path, int] = {}
        group = np.fromiter(
            (
                place.setdefault(tuple(column[row] for column in columns[:level]), len(place))
                for row, level in enumerate(levels)
            ),
            np.int64,
            table.num_rows,
        )
        bins = [
            np.asarray(table.column(name).to_numpy(), np.int64) for name in ("delay_bin", "follow_up_bin")
        ]
        count = np.asarray(table.column("count").to_numpy(), np.float64)
        return cls._summed(grid, fields, tuple(place), group, bins[0], bins[1], count)

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """Counts of several logs as one.

        Raises
        ------
        DataError
            If there are none, or they differ in grid or fields.
        """
        found = list(parts)
        if not found or any((one.grid, one.fields) != (found[0].grid, found[0].fields) for one in found):
            raise DataError("expected counts of delays on one grid and of the same fields.")
        place: dict[Path, int] = {}
        groups = []
        for one in found:
            moved = [place.setdefault(path, len(place)) for path in one.paths]
            groups.append(np.asarray(moved, np.int64)[one.group])
        joined = [
            np.concatenate([getattr(one, name) for one in found])
            for name in ("delay_bin", "follow_up_bin", "count")
        ]
        first = found[0]
        return cls._summed(first.grid, first.fields, tuple(place), np.concatenate(groups), *joined)

    @classmethod
    def _summed(
        cls,
        grid: DelayGrid,
        fields: tuple[str, ...],
        paths: tuple[Path, ...],
        group: Ints,
        delay_bin: Ints,
        follow_up_bin: Ints,
        count: Floats | None = None,
    ) -> Self:
        """Cells in a fixed order, each once: equal data give equal counts, whatever their order."""
        order = sorted(
            range(len(paths)), key=lambda place: [(part is not None, str(part)) for part in paths[place]]
        )
        rank = np.empty(len(paths), np.int64)
        rank[order] = np.arange(len(paths))
        key = (rank[group] * grid.bins + delay_bin) * grid.bins + follow_up_bin
        cell, inverse = np.unique(key, return_inverse=True)
        total = np.bincount(inverse, count, len(cell)).astype(np.float64)
        rest, follow_up = np.divmod(cell, grid.bins)
        own, delay = np.divmod(rest, grid.bins)
        return cls(grid, fields, tuple(paths[place] for place in order), own, delay, follow_up, total)

    def closed(self) -> Self:
        """Only outcomes of closed windows: the delays of a closed window are complete."""
        return self._where(self.follow_up_bin == self.grid.bins - 1)

    def level(self, depth: int) -> Self:
        """Groups by their first ``depth`` values; outcomes under a shorter path are not among them."""
        known = np.array([len(path) >= depth for path in self.paths], np.bool_)
        own = self._where(known[self.group])
        cut = [path[:depth] for path in own.paths]
        place: dict[Path, int] = {}
        moved = np.array([place.setdefault(path, len(place)) for path in cut], np.int64)
        group = moved[own.group] if len(moved) else own.group
        return self._summed(
            self.grid, self.fields, tuple(place), group, own.delay_bin, own.follow_up_bin, own.count
        )

    def events_and_risk(self) -> tuple[Floats, Floats]:
        """Per group and bin: outcomes, and outcomes at risk; both (groups, bins).

        At risk at bin k is who came by the end of bin k and has a follow-up that reaches it: the denominators
        of Lynden-Bell's product, `pipelines.delay`. An outcome in the last, unfinished bin of its own
        follow-up is left out: its fellows of that bin have not all been seen.
        """
        shape = (len(self.paths), self.grid.bins)
        whole = self.delay_bin <= self.follow_up_bin
        row, count = self.group[whole] * self.grid.bins, self.count[whole]
        size = shape[0] * shape[1]
        events: Floats = (
            np.bincount(row + self.delay_bin[whole], count, size).astype(np.float64).reshape(shape)
        )
        leaving: Floats = np.bincount(row + self.follow_up_bin[whole], count, size).astype(np.float64)
        leaving = leaving.reshape(shape)
        gone = np.cumsum(leaving, axis=1) - leaving
        # A difference of sums of fractions could end a little below what it contains.
        at_risk: Floats = np.maximum(np.cumsum(events, axis=1) - gone, events)
        return events, at_risk

    def _where(self, cells: NDArray[np.bool_]) -> Self:
        used, group = np.unique(self.group[cells], return_inverse=True)
        paths = tuple(self.paths[place] for place in used.tolist())
        return type(self)(
            self.grid,
            self.fields,
            paths,
            group.astype(np.int64),
            self.delay_bin[cells],
            self.follow_up_bin[cells],
            self.count[cells],
        )


def path_keys(paths: Sequence[Path], seed: int = HASH_SEED) -> Ints:
    """Key of each path (all of one length), shape (n,): what `combined_keys` makes of the hashed values."""
    depth = len(paths[0]) if paths else 0
    columns = [_hashed([path[place] for path in paths], seed) for place in range(depth)]
    return combined_keys(np.stack(columns, axis=1), depth)


def _hashed(values: list[str | int | None], seed: int) -> Ints:
    texts = pa.array([value if isinstance(value, str) else None for value in values], pa.string())
    known = np.array([value if isinstance(value, int) else 0 for value in values], np.int64)
    # A null hashes to 0, and so does what is no text here.
    return hash_column(texts, seed).view(np.int64) | known


def combined_keys(segment_key: Ints, depth: int) -> Ints:
    """One key for the first ``depth`` hashed values of each row, shape (n,)."""
    columns = np.asarray(segment_key, np.int64).view(np.uint64)
    key = columns[:, 0]
    for place in range(1, depth):
        key = mix(key, columns[:, place])
    return np.ascontiguousarray(key).view(np.int64)
