"""Progressive validation by segment: which campaigns (sites, ...) the student over- or under-predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitoring.inputs import clipped

__all__ = ["MAXIMUM", "SegmentQuality", "SegmentRow", "key_text"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Arrays = dict[str, NDArray[np.generic]]

# Values of a field that are kept: 200 KB of a checkpoint at most. Room is made by an eighth at a time.
MAXIMUM = 4096
_KEPT_SHARE = 0.875
_ROWS, _POSITIVES, _EXPECTED, _LOG_LOSS, _VARIANCE = range(5)
# Below this variance of the outcomes z is far from normal, and rare outcomes would fill the list.
_ENOUGH_VARIANCE = 10.0


@dataclass(frozen=True)
class SegmentRow:
    """One value of a field: ``z`` is (positives - expected) over the deviation that chance gives it.

    ``key`` is the hash of the value in 16 hexadecimal digits, or ``other``.
    """

    task: str
    field: str
    key: str
    rows: int
    positives: float
    expected: float
    pcoc: float | None
    log_loss: float
    z: float | None


class _Table:
    """Five sums by key, increasing; those of dropped keys are in ``other``."""

    def __init__(self) -> None:
        self.key = np.zeros(0, np.int64)
        self.sums = np.zeros((5, 0))
        self.other = np.zeros(5)

    def add(self, key: Ints, amounts: Floats, maximum: int) -> None:
        place = np.searchsorted(self.key, key)
        is_new = place == len(self.key)
        if len(self.key):
            is_new |= self.key[np.minimum(place, len(self.key) - 1)] != key
        if is_new.any():
            unknown = np.unique(key[is_new])
            before = np.searchsorted(self.key, unknown)
            self.key = np.insert(self.key, before, unknown)
            self.sums = np.insert(self.sums, before, 0.0, axis=1)
            place = np.searchsorted(self.key, key)
        # One count over five blocks of places instead of five counts.
        kept = len(self.key)
        flat = (place + kept * np.arange(5)[:, None]).ravel()
        self.sums += np.bincount(flat, amounts.ravel(), 5 * kept).reshape(5, kept)
        if len(self.key) > maximum:
            self._make_room(int(_KEPT_SHARE * maximum))

    def _make_room(self, kept: int) -> None:
        from_best = np.lexsort((self.key, -self.sums[_ROWS]))
        stays = np.zeros(len(self.key), np.bool_)
        stays[from_best[:kept]] = True
        self.other += self.sums[:, ~stays].sum(axis=1)
        self.key, self.sums = self.key[stays], self.sums[:, stays]


class SegmentQuality:
    """Sums over closed windows by task, calibration field and value of the field.

    What was predicted is the calibrated probability from the moment the impression arrived. A label ``c``
    counts as ``c`` of a positive. At most ``maximum`` values of a field are kept: beyond it the seven eighths
    with most rows stay, of equals the smaller keys, and the rest is added to ``other``. One that comes again
    begins anew. Nothing is forgotten otherwise.

    Parameters
    ----------
    names : tuple of str
        Fields, in the order of the columns of ``segment_key``.
    maximum : int

    Examples
    --------
    >>> quality = SegmentQuality(("campaign_id",))
    >>> key = np.repeat([[7], [8]], 100, axis=0)
    >>> label = np.tile([1.0, 0.0, 0.0, 0.0], 50)
    >>> quality.update("click", key, label, np.where(key[:, 0] == 7, 0.25, 0.5))
    >>> [(row.key[-1], row.pcoc, row.z) for row in quality.worst(2)]
    [('8', 2.0, -5.0), ('7', 1.0, 0.0)]
    """

    def __init__(self, names: tuple[str, ...], maximum: int = MAXIMUM) -> None:
        self.names, self.maximum = names, maximum
        self._tables: dict[tuple[str, str], _Table] = {}

    def update(self, task: str, keys: Ints, label: Floats, probability: Floats) -> None:
        """Add windows of a task; rows without a prediction are left out.

        Parameters
        ----------
        task : str
        keys : ndarray of int64, shape (n, fields)
        label : ndarray, shape (n,), in [0, 1]
        probability : ndarray, shape (n,), NaN without a prediction
        """
        known = np.isfinite(probability)
        if not self.names or not known.any():
            return
        keys, label, p = keys[known], label[known], probability[known].astype(np.float64)
        inside = clipped(p)
        loss = -np.log(inside) * label - np.log(1.0 - inside) * (1.0 - label)
        amounts = np.array([np.ones(len(p)), label, p, loss, p * (1.0 - p)])
        for name, key in zip(self.names, keys.T, strict=True):
            self._tables.setdefault((task, name), _Table()).add(key, amounts, self.maximum)

    def worst(self, limit: int) -> list[SegmentRow]:
        """The values with the largest ``|z|``, of those whose outcomes vary enough (Σp(1 - p) >= 10)."""
        found = [row for table in self._tables.items() for row in _worst_of(*table, limit)]
        found.sort(key=lambda row: (-abs(row.z or 0.0), row.task, row.field, row.key))
        return found[:limit]

    def others(self) -> list[SegmentRow]:
        """What was not kept apart, of each task and field that has such."""
        return [
            _row(task, name, "other", table.other)
            for (task, name), table in sorted(self._tables.items())
            if table.other[_ROWS]
        ]

    def rows(self) -> Iterator[SegmentRow]:
        """Every value that is kept, by task, field and key."""
        for (task, name), table in sorted(self._tables.items()):
            for key, sums in zip(table.key.tolist(), table.sums.T, strict=True):
                yield _row(task, name, key_text(key), sums)

    def state(self) -> Arrays:
        """Arrays by ``task/field/``, copied."""
        arrays: Arrays = {}
        for (task, name), table in sorted(self._tables.items()):
            for part in ("key", "sums", "other"):
                arrays[f"{task}/{name}/{part}"] = getattr(table, part).copy()
        return arrays

    def load_state(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Go on from `state`."""
        self._tables = {}
        for path in arrays:
            task, _, rest = path.partition("/")
            name, _, part = rest.rpartition("/")
            setattr(self._tables.setdefault((task, name), _Table()), part, np.array(arrays[path]))


def _worst_of(place: tuple[str, str], table: _Table, limit: int) -> Iterator[SegmentRow]:
    enough = np.flatnonzero(table.sums[_VARIANCE] >= _ENOUGH_VARIANCE)
    sums = table.sums[:, enough]
    z = np.abs(sums[_POSITIVES] - sums[_EXPECTED]) / np.sqrt(sums[_VARIANCE])
    for one in np.lexsort((table.key[enough], -z))[:limit].tolist():
        yield _row(*place, key_text(int(table.key[enough[one]])), sums[:, one])


def key_text(key: int) -> str:
    """A hash as 16 hexadecimal digits."""
    return f"{key & (1 << 64) - 1:016x}"


def _row(task: str, name: str, key: str, sums: Floats) -> SegmentRow:
    rows, positives, expected, loss, variance = sums.tolist()
    return SegmentRow(
        task,
        name,
        key,
        int(rows),
        positives,
        expected,
        expected / positives if positives else None,
        loss / rows,
        (positives - expected) / variance**0.5 if variance else None,
    )
