"""Level errors of single segments (a campaign, a site), corrected as far as their support allows.

For each level and each of its segments, over the rows seen: ``C`` observed positives, ``E = Σ p`` expected
ones, ``N`` rows, ``V = Σ p (1 - p)``, all weighted and slowly forgotten. The truth is taken to be ``m`` times
the expectation with ``m`` drawn from a Gamma distribution of mean 1 and shape ``a``; given ``C`` (Poisson,
in units of ``φ = V / E``, which is 1 for rare positives) its expectation is ::

    m = (C + φ a) / (E + φ a)

so ``a`` is how many expected positives a segment must show before it is half believed. ``a`` itself is the
value under which the counts of all segments are most likely (:meth:`SegmentCorrection.refit`).

The correction is a shift of log odds that moves the segment's mean probability ``e = E / N`` to ``m e``::

    logit q = logit p + (logit(m e) - logit(e)) / k        k = V / (N e (1 - e))

For rare positives this is ``logit p + ln m``. For conversions it is not: with ``e = 0.2`` and ``m = 1.5`` a
shift by ``ln m`` would end at 0.27 instead of 0.3. ``k`` allows for unlike rows in one segment
(:mod:`calibration.segment_response`).

A level that lies within earlier ones (``advertiser_id*campaign_id`` within ``advertiser_id``, every level
within ``all``) starts from them: its ``E`` is what they leave, worked out from its own four sums when it is
read. So a new campaign has its advertiser's multiplier, and a campaign's prior is its advertiser. Its sums
depend on its own rows only; nothing is learned twice while an ancestor is still finding its level.

Levels of which none lies within the other act in turn: the later one counts as expected what the earlier has
already corrected, as it was when the row came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibration.base import checked_label, checked_logit, checked_probability, checked_weight
from calibration.gamma_poisson import prior_strength
from calibration.link import FloatArray, logit_of, sigmoid
from calibration.segment_config import SegmentConfig
from calibration.segment_levels import segment_levels
from calibration.segment_response import SegmentResponse, Shrunk, shrunk
from calibration.segment_table import SUMS, UNITS, SegmentTable
from calibration.sketch_layout import IntArray
from calibration.state import expect_fields, finite, finite_list
from pipelines.errors import ConfigError, DataError, StaleStateError

__all__ = ["SEGMENTS_VERSION", "SegmentConfig", "SegmentCorrection"]

SEGMENTS_VERSION = 2
_ROWS = SUMS.index("rows")
_ROW_UNIT = float(UNITS[_ROWS, 0])


class SegmentCorrection:
    """Gamma-Poisson shrunk level corrections for the segments of several levels.

    Parameters
    ----------
    config : SegmentConfig

    Attributes
    ----------
    strength : list of float, one a level
        ``a``: expected positives at which a segment is half believed.

    References
    ----------
    Robbins (1956); DuMouchel (1999), Bayesian data mining in large frequency tables (Gamma-Poisson
    shrinkage).

    Examples
    --------
    Advertiser 1 clicks twice as often as the model says. Of its campaigns 7 is known and 9 is new:

    >>> rng = np.random.default_rng(0)
    >>> levels = SegmentConfig(("advertiser_id", "advertiser_id*campaign_id"))
    >>> segments = SegmentCorrection(levels)
    >>> keys, model = np.array([[1, 7]] * 20_000), np.full(20_000, 0.05)
    >>> segments.update(keys, model, rng.random(20_000) < 2.0 * model)
    >>> sigmoid(segments.transform_logit(logit_of([0.05] * 3), [[1, 7], [1, 9], [2, 8]])).round(2).tolist()
    [0.1, 0.1, 0.05]
    """

    def __init__(self, config: SegmentConfig) -> None:
        self.config = config
        self.strength = [config.prior_strength] * len(config.names)
        self._levels = segment_levels(config.names)
        self._table = SegmentTable([len(level.columns) for level in self._levels], config.maximum_segments)
        self._row_units = 0
        # Whether a level needs to know what others than its ancestors have corrected.
        self._in_turn = any(level.before for level in self._levels)

    @property
    def effective_rows(self) -> float:
        """Σ weight of all rows ever counted."""
        return self._row_units * _ROW_UNIT

    # -- applying ---------------------------------------------------------------------------------------

    def transform_logit(self, logit: npt.ArrayLike, keys: npt.ArrayLike) -> FloatArray:
        """Logit corrected for each row's segments.

        Parameters
        ----------
        logit : array_like, shape (n,), logit space
        keys : array_like of int64, shape (n, columns)
            Hashed values, columns as in ``config.columns``.

        Returns
        -------
        ndarray, shape (n,), logit space
        """
        z = checked_logit(logit)
        slots = self._find(self._columns(keys, len(z)))
        corrected: FloatArray = z + self._shifts(self._table.read(slots)).sum(axis=0)
        return corrected

    def segments(self, name: str) -> dict[str, list[Any]]:
        """One level, lists by increasing key.

        ``key``, the sums of ``SUMS``; ``values`` of the level's columns; ``due``, what the ancestors leave to
        be expected (``expected`` without any), and ``prior_shift``, how far they move it; ``dispersion`` of
        the count, ``multiplier`` of ``due``, its ``shift`` (logits) and ``gain``, the log loss that it saves
        over all rows (nats).
        """
        if name not in self.config.names:
            raise ConfigError(f"no segment level {name!r}; expected one of {list(self.config.names)}.")
        level = self.config.names.index(name)
        key, sums = self._table.by_key(level)
        prior = self._prior(level, self._shifts(self._ancestors(level)))
        found = self._shrunk(level, sums, prior)
        numbers = dict(zip(SUMS, sums, strict=True)) | {"prior_shift": prior}
        gain = SegmentResponse.of(*sums[1:]).gain(sums[0], prior, found.shift)
        numbers |= {**found._asdict(), "gain": gain}
        values = self._table.parts(level).T.tolist()
        return {
            "key": key.tolist(),
            "values": values,
            **{column: array.tolist() for column, array in numbers.items()},
        }

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
        keys : array_like of int64, shape (n, columns)
        probability : array_like, shape (n,), probability space
            Calibrated so far, *before* any segment correction.
        label : array_like, shape (n,), in [0, 1]
        weight : array_like, shape (n,), >= 0, optional

        Raises
        ------
        DataError
            Bad values, or more weight than a segment holds; nothing is counted then.
        """
        columns, p, y, w = self._checked(keys, probability, label, weight)
        total = float(w.sum())
        if not len(p):
            return
        self._table.check_room(total)
        slots = self._insert(columns)
        shifts = self._shifts(self._table.read(slots)) if self._in_turn else np.zeros(slots.shape)
        self._count(w)
        self._table.advance(total / self.config.half_life)
        for level in range(len(self._levels)):
            self._add(slots[level], w, y, self._expected(level, p, shifts))
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

        Level by level, so that each sees what the finished earlier ones have corrected, with each level's
        strength refitted on the way. The order of the rows plays no role, to the bit.
        """
        segments = cls(config)
        columns, p, y, w = segments._checked(keys, probability, label, weight)
        segments._table.check_room(float(w.sum()))
        slots = segments._insert(columns)
        shifts = np.zeros(slots.shape)
        for level in range(len(segments._levels)):
            segments._add(slots[level], w, y, segments._expected(level, p, shifts))
            segments._refit_level(level)
            if segments._in_turn:
                shifts[level] = segments._shift(level, segments._table.read(slots[level]), shifts)
        segments._count(w)
        segments._table.evict()
        return segments

    def refit(self) -> None:
        """Set each level's ``strength`` to the value under which its counts are most likely.

        A level without supported segments keeps its strength. Deterministic; tens of milliseconds for a full
        table, so once a release, not once a batch.
        """
        for level in range(len(self._levels)):
            self._refit_level(level)

    def decay(self, factor: float) -> None:
        """Forget at once: every row counted so far counts ``factor`` of what it did; ``factor`` in [0, 1]."""
        if not 0.0 <= factor <= 1.0:
            raise DataError(f"decay factor must be in [0, 1]; got {factor}.")
        self._table.decay(factor)

    def merge(self, other: SegmentCorrection) -> None:
        """Add another one's rows, as of now, and refit.

        Sums are whole numbers and strengths a function of them, so neither order nor grouping of merges
        matters, to the bit. Where no level has others beside its ancestors before it, the fits of two logs
        merge to the fit of both; otherwise later levels keep what each log's own earlier ones left. All
        segments are kept; the next update drops those above ``maximum_segments``.

        Raises
        ------
        ConfigError
            The other has another configuration.
        DataError
            More weight than a segment holds; nothing is merged then.
        """
        if self.config != other.config:
            raise ConfigError(f"cannot merge segments of {other.config} into those of {self.config}.")
        self._table.merge(other._table)
        self._row_units += other._row_units
        self.strength = [self.config.prior_strength] * len(self._levels)
        self.refit()

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain JSON data, the table as lists sorted by key."""
        numbers = {name: float(getattr(self.config, name)) for name in _CONFIG_NUMBERS}
        return {
            "kind": "segments",
            "version": SEGMENTS_VERSION,
            "config": {
                "names": list(self.config.names),
                "maximum_segments": int(self.config.maximum_segments),
                **numbers,
            },
            "strength": [float(strength) for strength in self.strength],
            "row_units": self._row_units,
            "table": self._table.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The correction that :meth:`state` described; ``StaleStateError`` if it is none."""
        expect_fields(state, "segments", ("config", "strength", "row_units", "table"), SEGMENTS_VERSION)
        config = {"kind": "segment_config", **state["config"]}
        expect_fields(config, "segment_config", ("names", "maximum_segments", *_CONFIG_NUMBERS))
        numbers = {name: finite(config, name) for name in _CONFIG_NUMBERS}
        largest = int(finite(config, "maximum_segments"))
        segments = cls(SegmentConfig(tuple(config["names"]), maximum_segments=largest, **numbers))
        count = len(segments.strength)
        segments.strength = finite_list(state["strength"], "strength")
        if len(segments.strength) != count:
            raise StaleStateError(f"expected {count} segment strengths; got {len(segments.strength)}.")
        if not isinstance(state["row_units"], int) or state["row_units"] < 0:
            raise StaleStateError(f"expected segment row_units >= 0; got {state['row_units']!r}.")
        segments._row_units = state["row_units"]
        segments._table = SegmentTable.from_state(state["table"], segments._table.widths, largest)
        return segments

    # -- internals --------------------------------------------------------------------------------------

    def _checked(
        self,
        keys: npt.ArrayLike,
        probability: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None,
    ) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
        """Keys by column, probability, label and weight of the rows that count: those of weight 0 do not."""
        p = checked_probability(probability)
        y, w = checked_label(label, len(p)), checked_weight(weight, len(p))
        columns = self._columns(keys, len(p))
        if len(w) and w.min() == 0.0:
            counts = w > 0.0
            return columns[:, counts], p[counts], y[counts], w[counts]
        return columns, p, y, w

    def _columns(self, keys: npt.ArrayLike, rows: int) -> IntArray:
        """Keys by column, shape (columns, n)."""
        array, names = np.asarray(keys), self.config.columns
        if array.size == 0 and rows == 0:
            return np.zeros((len(names), 0), dtype=np.int64)
        # An empty list of columns has no integers to show.
        if array.shape != (rows, len(names)) or (array.size and array.dtype.kind not in "iu"):
            raise DataError(
                f"segment keys must be integers of shape ({rows}, {len(names)}); "
                f"got {array.dtype} of shape {array.shape}.",
                hint=f"one column for each of {list(names)}",
            )
        return np.ascontiguousarray(array.T, dtype=np.int64)

    def _find(self, columns: IntArray) -> IntArray:
        """Slots, shape (levels, n)."""
        parts = [columns[list(level.columns)] for level in self._levels]
        found = zip(self._levels, parts, strict=True)
        return np.array([self._table.find(i, level.keys(part)) for i, (level, part) in enumerate(found)])

    def _insert(self, columns: IntArray) -> IntArray:
        """Slots, shape (levels, n), of segments that are there from now on."""
        parts = [columns[list(level.columns)] for level in self._levels]
        found = zip(self._levels, parts, strict=True)
        return np.array([self._table.insert(i, level.keys(p), p) for i, (level, p) in enumerate(found)])

    def _count(self, weight: FloatArray) -> None:
        self._row_units += int(np.rint(weight / _ROW_UNIT).astype(np.int64).sum())

    def _expected(self, level: int, probability: FloatArray, shifts: FloatArray) -> FloatArray:
        """What a level counts as expected: corrected by the levels before it, its ancestors left out."""
        before = list(self._levels[level].before)
        return sigmoid(logit_of(probability) + shifts[before].sum(axis=0)) if before else probability

    def _add(self, slots: IntArray, weight: FloatArray, label: FloatArray, expected: FloatArray) -> None:
        due = weight * expected
        self._table.add(slots, np.array([weight * label, due, weight, due * (1.0 - expected)]))

    def _shifts(self, sums: FloatArray) -> FloatArray:
        """Log-odds shift of each level, shape (levels, n), from sums of shape (4, levels, n).

        Where a segment is unknown its sums are 0, and so is its shift.
        """
        shifts = np.zeros(sums.shape[1:])
        for level in range(len(self._levels)):
            shifts[level] = self._shift(level, sums[:, level], shifts)
        return shifts

    def _shift(self, level: int, sums: FloatArray, shifts: FloatArray) -> FloatArray:
        """Shift of one level, given those of the levels before it."""
        return self._shrunk(level, sums, self._prior(level, shifts)).shift

    def _prior(self, level: int, shifts: FloatArray) -> FloatArray:
        prior: FloatArray = shifts[list(self._levels[level].ancestors)].sum(axis=0)
        return prior

    def _shrunk(self, level: int, sums: FloatArray, prior: FloatArray) -> Shrunk:
        has_prior = bool(self._levels[level].ancestors)
        return shrunk(sums, self.strength[level], self.config.minimum_support, prior if has_prior else None)

    def _ancestors(self, level: int) -> FloatArray:
        """Sums of the ancestors of each segment of a level, by key, shape (4, levels, segments); else 0."""
        own, parts = self._levels[level], self._table.parts(level)
        slots = np.full((len(self._levels), parts.shape[1]), -1, dtype=np.int64)
        for ancestor in own.ancestors:
            above = self._levels[ancestor]
            values = parts[[own.columns.index(column) for column in above.columns]]
            slots[ancestor] = self._table.find(ancestor, above.keys(values))
        return self._table.read(slots)

    def _refit_level(self, level: int) -> None:
        """Most likely strength of a level.

        What is expected comes from ancestors without the segment's own rows: with them a large segment would
        be its own prior, and segments would seem to differ less than they do.
        """
        _, sums = self._table.by_key(level)
        ancestors = self._levels[level].ancestors
        rest = np.maximum(self._ancestors(level) - sums[:, None], 0.0)
        found = self._shrunk(level, sums, self._prior(level, self._shifts(rest)))
        supported = (sums[_ROWS] >= self.config.minimum_support) & (found.due > 0.0)
        if ancestors:
            # An only child cannot be told apart from its parent.
            supported &= rest[_ROWS, ancestors[-1]] > 0.0
        if supported.any():
            counts = np.array([sums[0], found.due])[:, supported] / found.dispersion[supported]
            self.strength[level] = prior_strength(*counts)


_CONFIG_NUMBERS = ("half_life", "minimum_support", "prior_strength")
