"""Level errors of single segments (a campaign, a site), corrected as far as their support allows.

For each field and each of its values ``s``, over the rows seen: ``C`` observed positives, ``E`` expected
ones, ``N`` rows, all weighted and slowly forgotten. The truth is taken to be ``m`` times the expectation
with ``m`` drawn from a Gamma distribution of mean 1 and shape ``a``; given ``C`` (Poisson) its expectation
is ::

    m = (C + a) / (E + a)

so ``a`` is how many expected positives a segment must show before it is half believed. ``a`` itself is the
value under which the counts of all segments are most likely (:meth:`SegmentCorrection.refit`).

The correction is applied as a shift of log odds that moves the segment's mean probability ``e = E / N`` to
``m e``::

    logit q = logit p + ln m + ln((1 - e) / (1 - m e))

For rare positives this is ``logit p + ln m``; the second term matters for conversions, where ``ln m`` alone
would leave a segment with ``e = 0.2``, ``m = 1.5`` at 0.27 instead of 0.3. Fields act in turn: the second
one expects what the first has already corrected.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_label, checked_logit, checked_probability, checked_weight
from calibration.gamma_poisson import prior_strength
from calibration.link import FloatArray, logit_of, sigmoid
from calibration.state import expect_fields, finite, finite_list
from pipelines.errors import ConfigError, DataError, StaleStateError

__all__ = ["SegmentConfig", "SegmentCorrection"]

IntArray = npt.NDArray[np.int64]

# Sums are kept at the scale of the first row: a new row weighs 2**(rows / half_life) instead of the old
# ones being multiplied down. Every 32 half-lives all are multiplied by 2**-32, which is exact.
_RESCALE_HALF_LIVES = 32
# Room is made by an eighth at a time: evicting one by one would sort the table for each new segment.
_KEPT_SHARE = 0.875
_LARGEST_MEAN = 1.0 - 1e-12


@dataclass(frozen=True, slots=True)
class SegmentConfig:
    """Which segments, and how fast they are learned and forgotten.

    Attributes
    ----------
    names : tuple of str
        Names of the fields, in the order in which they act; one column of keys each.
    half_life : float, effective rows
        After so much Σ weight (over all segments) a row counts half.
    minimum_support : float, effective rows
        A segment with less is not corrected.
    maximum_segments : int
        Per field; beyond it the least supported are dropped.
    prior_strength : float, expected positives
        ``a`` until the first :meth:`SegmentCorrection.refit`.

    Raises
    ------
    ConfigError
        A value outside its range.
    """

    names: tuple[str, ...]
    half_life: float = 2_000_000.0
    minimum_support: float = 100.0
    maximum_segments: int = 8192
    prior_strength: float = 50.0

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ConfigError(f"segments need one or more distinct field names; got {list(self.names)}.")
        for name in ("half_life", "prior_strength"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ConfigError(f"segments: {name} must be finite and above 0; got {getattr(self, name)}.")
        if not (math.isfinite(self.minimum_support) and self.minimum_support >= 0.0):
            raise ConfigError(f"segments: minimum_support must be >= 0; got {self.minimum_support}.")
        if self.maximum_segments < 8:
            raise ConfigError(f"segments: maximum_segments must be at least 8; got {self.maximum_segments}.")


class SegmentCorrection:
    """Gamma-Poisson shrunk level corrections for the values of several fields.

    Parameters
    ----------
    config : SegmentConfig

    Attributes
    ----------
    strength : list of float, one a field
        ``a``: expected positives at which a segment is half believed.

    References
    ----------
    Robbins (1956); DuMouchel (1999), Bayesian data mining in large frequency tables (Gamma-Poisson
    shrinkage).

    Examples
    --------
    Segment 7 clicks twice as often as the model says, segment 8 has hardly been seen:

    >>> rng = np.random.default_rng(0)
    >>> segments = SegmentCorrection(SegmentConfig(("campaign_id",)))
    >>> key = np.where(rng.random(20_000) < 0.99, 7, 8)
    >>> model = np.full(20_000, 0.05)
    >>> segments.update(key[:, None], model, rng.random(20_000) < 2.0 * model)
    >>> sigmoid(segments.transform_logit(logit_of([0.05, 0.05]), [[7], [8]])).round(2).tolist()
    [0.1, 0.06]
    """

    def __init__(self, config: SegmentConfig) -> None:
        self.config = config
        self.strength = [config.prior_strength] * len(config.names)
        self.effective_rows = 0.0
        self._half_lives = 0.0
        # One table for all fields; each field finds its own rows of it.
        self._slots: list[dict[int, int]] = [{} for _ in config.names]
        self._sums = np.zeros((3, 256))  # C, E, N at the scale of _half_lives = 0
        self._used = 0
        self._free: list[int] = []

    # -- applying ---------------------------------------------------------------------------------------

    def transform_logit(self, logit: npt.ArrayLike, keys: npt.ArrayLike) -> FloatArray:
        """Logit corrected for each row's segments.

        Parameters
        ----------
        logit : array_like, shape (n,), logit space
        keys : array_like of int64, shape (n, fields)
            Hashed segment values, columns as in ``config.names``.

        Returns
        -------
        ndarray, shape (n,), logit space
        """
        z = checked_logit(logit)
        corrected: FloatArray = z + self._shifts(self._find(self._columns(keys, len(z)))).sum(axis=0)
        return corrected

    def segments(self, name: str) -> dict[str, list[float] | list[int]]:
        """One field by key: columns ``key``, ``positives``, ``expected``, ``rows``, ``multiplier``."""
        if name not in self.config.names:
            raise ConfigError(f"no segment field {name!r}; expected one of {list(self.config.names)}.")
        field = self.config.names.index(name)
        key, sums = self._table(field)
        c, e, n = sums * 0.5**self._half_lives
        multiplier = self._multiplier(c, e, n, np.full(len(key), self.strength[field]))
        columns = {"positives": c, "expected": e, "rows": n, "multiplier": multiplier}
        return {"key": key.tolist(), **{column: values.tolist() for column, values in columns.items()}}

    # -- learning ---------------------------------------------------------------------------------------

    def update(
        self,
        keys: npt.ArrayLike,
        probability: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
    ) -> None:
        """Count one batch; predict before.

        Parameters
        ----------
        keys : array_like of int64, shape (n, fields)
        probability : array_like, shape (n,), probability space
            Calibrated so far, *before* any segment correction.
        label : array_like, shape (n,), in [0, 1]
        weight : array_like, shape (n,), > 0, optional

        Raises
        ------
        DataError
            Bad values; nothing is counted then.
        """
        p = checked_probability(probability)
        y, w = checked_label(label, len(p)), checked_weight(weight, len(p))
        columns = self._columns(keys, len(p))
        if not len(p):
            return
        slots = self._find(columns)
        # What each field finds expected: its predecessors' corrections, none of its own.
        shifts = self._shifts(slots)
        expected = sigmoid(logit_of(p) + np.cumsum(shifts, axis=0) - shifts)
        slots = self._insert(columns, slots).ravel()
        total = float(w.sum())
        self.effective_rows += total
        self._half_lives += total / self.config.half_life
        scaled = w * 2.0**self._half_lives
        count = len(self.config.names)
        self._add(slots, np.tile(scaled, count), np.tile(y, count), expected.ravel())
        self._rescale()
        self._evict()

    @classmethod
    def fit(
        cls,
        config: SegmentConfig,
        keys: npt.ArrayLike,
        probability: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
    ) -> Self:
        """Fit to rows at hand, all of one age; arguments as in :meth:`update`.

        Field by field, so that the second sees what the finished first has corrected, with each field's
        strength refitted on the way.
        """
        segments = cls(config)
        p = checked_probability(probability)
        y, w = checked_label(label, len(p)), checked_weight(weight, len(p))
        columns = segments._columns(keys, len(p))
        slots = segments._insert(columns, segments._find(columns))
        logit = logit_of(p)
        for field in range(len(config.names)):
            expected = sigmoid(logit)
            segments._add(slots[field], w, y, expected)
            segments._refit_field(field)
            logit = logit + segments._shifts(slots)[field]
        segments.effective_rows = float(w.sum())
        segments._evict()
        return segments

    def refit(self) -> None:
        """Set each field's ``strength`` to the value under which its counts are most likely.

        A field without supported segments keeps its strength. Deterministic; tens of milliseconds for a full
        table, so once a release, not once a batch.
        """
        for field in range(len(self.config.names)):
            self._refit_field(field)

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain JSON data: for each field four lists, sorted by key."""
        tables = []
        for field in range(len(self.config.names)):
            key, sums = self._table(field)
            tables.append([key.tolist(), *sums.tolist()])
        return {
            "kind": "segments",
            "config": {**asdict(self.config), "names": list(self.config.names)},
            "strength": list(self.strength),
            "effective_rows": self.effective_rows,
            "half_lives": self._half_lives,
            "tables": tables,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The correction that :meth:`state` described; ``StaleStateError`` if it is none."""
        expect_fields(state, "segments", ("config", "strength", "effective_rows", "half_lives", "tables"))
        config = {"kind": "segment_config", **state["config"]}
        expect_fields(config, "segment_config", [field.name for field in fields(SegmentConfig)])
        numbers = {name: finite(config, name) for name in ("half_life", "minimum_support", "prior_strength")}
        largest = int(finite(config, "maximum_segments"))
        segments = cls(SegmentConfig(tuple(config["names"]), maximum_segments=largest, **numbers))
        clock = finite_list([state["effective_rows"], state["half_lives"]], "segment clock")
        segments.effective_rows, segments._half_lives = clock
        segments.strength = finite_list(state["strength"], "strength")
        if len(segments.strength) != len(segments._slots) or len(state["tables"]) != len(segments._slots):
            raise StaleStateError("segment state must hold one strength and one table for each field.")
        for slots, table in zip(segments._slots, state["tables"], strict=True):
            segments._load(slots, *_checked_table(table))
        return segments

    # -- internals --------------------------------------------------------------------------------------

    def _add(self, slots: IntArray, weight: FloatArray, label: FloatArray, expected: FloatArray) -> None:
        np.add.at(self._sums[0], slots, weight * label)
        np.add.at(self._sums[1], slots, weight * expected)
        np.add.at(self._sums[2], slots, weight)

    def _refit_field(self, field: int) -> None:
        _, sums = self._table(field)
        positives, expected, rows = sums * 0.5**self._half_lives
        supported = (rows >= self.config.minimum_support) & (expected > 0.0)
        if supported.any():
            self.strength[field] = prior_strength(positives[supported], expected[supported])

    def _columns(self, keys: npt.ArrayLike, rows: int) -> IntArray:
        """Keys by field, shape (fields, n)."""
        array = np.asarray(keys)
        if array.size == 0 and rows == 0:
            return np.zeros((len(self.config.names), 0), dtype=np.int64)
        if array.dtype.kind not in "iu" or array.shape != (rows, len(self.config.names)):
            raise DataError(
                f"segment keys must be integers of shape ({rows}, {len(self.config.names)}); "
                f"got {array.dtype} of shape {array.shape}.",
                hint=f"one column for each of {list(self.config.names)}",
            )
        return np.ascontiguousarray(array.T, dtype=np.int64)

    def _find(self, columns: IntArray) -> npt.NDArray[np.int64]:
        """Slot of each key, -1 where it is unknown, shape (fields, n)."""
        found = np.empty(columns.shape, dtype=np.int64)
        for row, slots, column in zip(found, self._slots, columns, strict=True):
            row[:] = list(map(slots.get, column.tolist(), itertools.repeat(-1)))
        return found

    def _shifts(self, slots: IntArray) -> FloatArray:
        """Log-odds shift of each field for each row, shape (fields, n); 0 where the segment is unknown."""
        known = slots >= 0
        # Slot -1 would read some other segment's sums.
        c, e, n = np.where(known, self._sums[:, slots] * 0.5**self._half_lives, 0.0)
        multiplier = self._multiplier(c, e, n, np.array(self.strength)[:, None])
        # Below 1 in exact arithmetic, with and without m; rounding must not say otherwise.
        mean = np.minimum(e / np.where(known, n, 1.0), _LARGEST_MEAN)
        corrected = np.minimum(multiplier * mean, _LARGEST_MEAN)
        shift: FloatArray = np.log(multiplier) + np.log1p(-mean) - np.log1p(-corrected)
        return shift

    def _multiplier(self, c: FloatArray, e: FloatArray, n: FloatArray, strength: FloatArray) -> FloatArray:
        """``m``, and 1 below the minimum support."""
        multiplier: FloatArray = np.where(
            n >= self.config.minimum_support, (c + strength) / (e + strength), 1.0
        )
        return multiplier

    def _insert(self, columns: IntArray, slots: IntArray) -> IntArray:
        """Give unknown keys a slot, in order of first appearance."""
        for row, table, column in zip(slots, self._slots, columns, strict=True):
            unknown = row < 0
            if not unknown.any():
                continue
            keys = column[unknown].tolist()
            for key in keys:
                if key not in table:
                    table[key] = self._free.pop() if self._free else self._append()
            row[unknown] = [table[key] for key in keys]
        return slots

    def _load(self, slots: dict[int, int], key: list[int], sums: FloatArray) -> None:
        slots.update((k, self._append()) for k in key)
        self._sums[:, self._used - len(key) : self._used] = sums

    def _append(self) -> int:
        if self._used == self._sums.shape[1]:
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)], axis=1)
        self._used += 1
        return self._used - 1

    def _table(self, field: int) -> tuple[IntArray, FloatArray]:
        """Keys in increasing order and their sums (C, E, N), shape (3, segments), at the stored scale."""
        key, slot = self._pairs(field)
        order = np.argsort(key)
        return key[order], self._sums[:, slot[order]]

    def _pairs(self, field: int) -> tuple[IntArray, IntArray]:
        slots = self._slots[field]
        key = np.fromiter(slots.keys(), dtype=np.int64, count=len(slots))
        return key, np.fromiter(slots.values(), dtype=np.int64, count=len(slots))

    def _rescale(self) -> None:
        while self._half_lives >= _RESCALE_HALF_LIVES:
            self._half_lives -= _RESCALE_HALF_LIVES
            self._sums *= 2.0**-_RESCALE_HALF_LIVES

    def _evict(self) -> None:
        """Where a field is over its bound, keep the best supported (of equals, the smaller keys)."""
        for field, slots in enumerate(self._slots):
            if len(slots) <= self.config.maximum_segments:
                continue
            key, slot = self._pairs(field)
            dropped = np.lexsort((key, -self._sums[2, slot]))[
                int(_KEPT_SHARE * self.config.maximum_segments) :
            ]
            self._sums[:, slot[dropped]] = 0.0
            for gone in key[dropped].tolist():
                self._free.append(slots.pop(gone))


def _checked_table(table: Any) -> tuple[list[int], FloatArray]:
    """Keys and sums of one field's state; ``StaleStateError`` unless they can be one."""
    key, *sums = table
    columns = [finite_list(column, "segment sums") for column in sums]
    if len(columns) != 3 or any(len(column) != len(key) for column in columns):
        raise StaleStateError("a segment table must be four lists of one length.")
    whole = all(isinstance(k, int) and -(2**63) <= k < 2**63 for k in key)
    if not whole or any(a >= b for a, b in itertools.pairwise(key)):
        raise StaleStateError("the keys of a segment table must be increasing 64-bit integers.")
    return key, np.array(columns, dtype=np.float64).reshape(3, len(key))
