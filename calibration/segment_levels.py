"""Levels of segments: which columns make them, which level stands above which, and the keys of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.sketch_layout import IntArray
from pipelines.errors import ConfigError

__all__ = ["ALL", "SegmentLevel", "levels_over", "segment_columns", "segment_levels"]

# The level that all rows belong to, with the one key 0.
ALL = "all"
_CROSS = "*"


@dataclass(frozen=True, slots=True)
class SegmentLevel:
    """One level of segments.

    Attributes
    ----------
    name : str
        ``all``, a column, or columns joined by ``*``: ``advertiser_id*campaign_id``.
    columns : tuple of int
        Places of its columns among those of the keys; none for ``all``.
    ancestors : tuple of int
        Places of the earlier levels whose columns are among its own. A segment lies within one segment of
        each, which is where it starts from.
    before : tuple of int
        Places of the other earlier levels: it expects what they leave.
    """

    name: str
    columns: tuple[int, ...]
    ancestors: tuple[int, ...]
    before: tuple[int, ...]

    def keys(self, values: IntArray) -> IntArray:
        """One key a row: the value of a single column, the mixed hashes of several, 0 for ``all``.

        Parameters
        ----------
        values : ndarray of int64, shape (columns of the level, n)

        Returns
        -------
        ndarray of int64, shape (n,)
        """
        if len(self.columns) > 1:
            # Imported here: it brings pyarrow, which serving without crossed levels can do without.
            from pipelines.delay_counts import combined_keys

            return combined_keys(values.T, len(values))
        return values[0] if self.columns else np.zeros(values.shape[1], np.int64)


def segment_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that the named levels are made of, each once, in order of appearance.

    Examples
    --------
    >>> segment_columns(["all", "advertiser_id", "advertiser_id*campaign_id", "site"])
    ('advertiser_id', 'campaign_id', 'site')
    """
    return tuple(dict.fromkeys(column for name in names for column in _columns_of(name)))


def levels_over(names: Iterable[str], columns: Sequence[str]) -> tuple[str, ...]:
    """Those of the named levels whose columns are all there.

    Examples
    --------
    >>> levels_over(["all", "campaign_id", "campaign_id*site"], ["campaign_id"])
    ('all', 'campaign_id')
    """
    return tuple(name for name in names if set(_columns_of(name)) <= set(columns))


def segment_levels(names: Sequence[str]) -> tuple[SegmentLevel, ...]:
    """The levels of these names, which act in this order: coarse ones first.

    Raises
    ------
    ConfigError
        No level, one twice, an empty column name, or a level after one that lies within it.

    Examples
    --------
    >>> for level in segment_levels(["all", "advertiser_id", "site", "advertiser_id*campaign_id"]):
    ...     print(level.name, level.columns, level.ancestors, level.before)
    all () () ()
    advertiser_id (0,) (0,) ()
    site (1,) (0,) (1,)
    advertiser_id*campaign_id (0, 2) (0, 1) (2,)
    """
    sets = [frozenset(_columns_of(name)) for name in names]
    if not names or len(set(sets)) != len(sets):
        raise ConfigError(f"segments need one or more distinct levels; got {list(names)}.")
    places = {column: place for place, column in enumerate(segment_columns(names))}
    levels = []
    for place, name in enumerate(names):
        within = [earlier for earlier in range(place) if sets[place] < sets[earlier]]
        if within:
            raise ConfigError(
                f"segments: {name!r} must come before {names[within[0]]!r}, which divides it.",
                hint="name coarse levels first",
            )
        ancestors = tuple(earlier for earlier in range(place) if sets[earlier] < sets[place])
        before = tuple(earlier for earlier in range(place) if earlier not in ancestors)
        columns = tuple(places[column] for column in _columns_of(name))
        levels.append(SegmentLevel(name, columns, ancestors, before))
    return tuple(levels)


def _columns_of(name: str) -> tuple[str, ...]:
    columns = () if name == ALL else tuple(name.split(_CROSS))
    if len(set(columns)) != len(columns) or not all(columns):
        raise ConfigError(
            f"segments: expected 'all', a column, or distinct columns joined by '*'; got {name!r}."
        )
    return columns
