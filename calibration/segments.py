"""Level errors of single segments (a campaign, a site), corrected as far as their support allows.

For each field and each of its values, over the rows seen: ``C`` observed positives, ``E = Σ p`` expected
ones, ``N`` rows, ``V = Σ p (1 - p)``, all weighted and slowly forgotten. The truth is taken to be ``m`` times
the expectation with ``m`` drawn from a Gamma distribution of mean 1 and shape ``a``; given ``C`` (Poisson)
its expectation is ::

    m = (C + a) / (E + a)

so ``a`` is how many expected positives a segment must show before it is half believed. ``a`` itself is the
value under which the counts of all segments are most likely (:meth:`SegmentCorrection.refit`).

The correction is a shift of log odds that moves the segment's mean probability ``e = E / N`` to ``m e``::

    logit q = logit p + (logit(m e) - logit(e)) / k        k = V / (N e (1 - e))

For rare positives this is ``logit p + ln m``. For conversions it is not: with ``e = 0.2`` and ``m = 1.5`` a
shift by ``ln m`` would end at 0.27 instead of 0.3. ``k`` allows for unlike rows in one segment: a shift moves
their mean less than each row's log odds (``k`` is the ratio of the two for a small shift, 1 for equal rows).

Fields act in turn: the second one expects what the first has already corrected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_label, checked_logit, checked_probability, checked_weight
from calibration.gamma_poisson import prior_strength
from calibration.link import FloatArray, logit_of, sigmoid
from calibration.segment_table import SUMS, IntArray, SegmentTable
from calibration.state import expect_fields, finite, finite_list
from pipelines.errors import ConfigError, DataError, StaleStateError

__all__ = ["SegmentConfig", "SegmentCorrection"]

_LARGEST_MEAN = 1.0 - 1e-12
# Rows of one segment that are split between nearly 0 and nearly 1 would ask for shifts without bound.
_SMALLEST_RESPONSE = 0.25


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
        self._table = SegmentTable(len(config.names), config.maximum_segments)

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
        slots = self._table.find(self._columns(keys, len(z)))
        corrected: FloatArray = z + self._shifts(slots).sum(axis=0)
        return corrected

    def segments(self, name: str) -> dict[str, list[float] | list[int]]:
        """One field: lists ``key``, the sums of ``SUMS``, ``multiplier``, ``shift`` (logits), by key."""
        if name not in self.config.names:
            raise ConfigError(f"no segment field {name!r}; expected one of {list(self.config.names)}.")
        field = self.config.names.index(name)
        key, sums = self._table.by_key(field)
        multiplier, shift = self._shrunk(sums, np.array(self.strength[field]))
        values = dict(zip(SUMS, sums, strict=True)) | {"multiplier": multiplier, "shift": shift}
        return {"key": key.tolist(), **{column: array.tolist() for column, array in values.items()}}

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
        slots = self._table.insert(columns)
        # What each field finds expected: its predecessors' corrections, none of its own.
        shifts = self._shifts(slots)
        expected = sigmoid(logit_of(p) + np.cumsum(shifts, axis=0) - shifts)
        total = float(w.sum())
        self.effective_rows += total
        self._table.advance(total / self.config.half_life)
        count = len(self.config.names)
        self._add(slots.ravel(), np.tile(w, count), np.tile(y, count), expected.ravel())
        self._table.evict()

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
        slots = segments._table.insert(columns)
        logit = logit_of(p)
        for field in range(len(config.names)):
            expected = sigmoid(logit)
            segments._add(slots[field], w, y, expected)
            segments._refit_field(field)
            logit = logit + segments._shifts(slots)[field]
        segments.effective_rows = float(w.sum())
        segments._table.evict()
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
        """Plain JSON data, the table as lists sorted by key."""
        numbers = {name: float(getattr(self.config, name)) for name in _CONFIG_NUMBERS}
        return {
            "kind": "segments",
            "config": {
                "names": list(self.config.names),
                "maximum_segments": int(self.config.maximum_segments),
                **numbers,
            },
            "strength": [float(strength) for strength in self.strength],
            "effective_rows": self.effective_rows,
            "table": self._table.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The correction that :meth:`state` described; ``StaleStateError`` if it is none."""
        expect_fields(state, "segments", ("config", "strength", "effective_rows", "table"))
        config = {"kind": "segment_config", **state["config"]}
        expect_fields(config, "segment_config", ("names", "maximum_segments", *_CONFIG_NUMBERS))
        numbers = {name: finite(config, name) for name in _CONFIG_NUMBERS}
        largest = int(finite(config, "maximum_segments"))
        segments = cls(SegmentConfig(tuple(config["names"]), maximum_segments=largest, **numbers))
        count = len(segments.strength)
        segments.strength = finite_list(state["strength"], "strength")
        if len(segments.strength) != count:
            raise StaleStateError(f"expected {count} segment strengths; got {len(segments.strength)}.")
        segments.effective_rows = finite(state, "effective_rows")
        segments._table = SegmentTable.from_state(state["table"], count, largest)
        return segments

    # -- internals --------------------------------------------------------------------------------------

    def _add(self, slots: IntArray, weight: FloatArray, label: FloatArray, expected: FloatArray) -> None:
        expected_clicks = weight * expected
        self._table.add(slots, (weight * label, expected_clicks, weight, expected_clicks * (1.0 - expected)))

    def _refit_field(self, field: int) -> None:
        _, (positives, expected, rows, _) = self._table.by_key(field)
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

    def _shifts(self, slots: IntArray) -> FloatArray:
        """Log-odds shift of each field for each row, shape (fields, n); 0 where the segment is unknown."""
        return self._shrunk(self._table.read(slots), np.array(self.strength)[:, None])[1]

    def _shrunk(self, sums: FloatArray, strength: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Multiplier and log-odds shift for the four sums along the first axis."""
        c, e, n, v = sums
        supported = (n >= self.config.minimum_support) & (n > 0.0)
        multiplier = np.where(supported, (c + strength) / (e + strength), 1.0)
        # Both below 1 in exact arithmetic; rounding must not say otherwise.
        mean = np.minimum(e / np.where(n > 0.0, n, 1.0), _LARGEST_MEAN)
        corrected = np.minimum(multiplier * mean, _LARGEST_MEAN)
        variance = n * mean * (1.0 - mean)
        response = np.clip(v / np.where(variance > 0.0, variance, 1.0), _SMALLEST_RESPONSE, 1.0)
        return multiplier, (np.log(multiplier) + np.log1p(-mean) - np.log1p(-corrected)) / response


_CONFIG_NUMBERS = ("half_life", "minimum_support", "prior_strength")
