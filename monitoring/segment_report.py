"""The segments that a model is most certainly wrong about: by how much, within which bounds, at what cost.

A count of rare positives that a right model expects to be ``E`` is Poisson. One of frequent positives varies
less, by the dispersion ``φ = Σ p (1 - p) / Σ p``; in units of ``φ`` it has a Poisson count's mean and
variance. With tails by the incomplete Gamma functions (``C`` may be weighted, and so no whole number) ::

    P(X >= C) = P(c - 1/φ + 1, e)     P(X <= C) = Q(c + 1/φ, e)     c = C / φ    e = E / φ

exactly the Poisson tails for ``φ = 1``. Ratios of small segments are large by chance: segments are ordered by
these probabilities, and those are called off of which Benjamini and Hochberg's procedure over all segments
lets at most a given share be called so wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monitoring.inputs import FloatArray, IntArray
from monitoring.null_distributions import benjamini_hochberg
from pipelines.errors import ConfigError, DataError

__all__ = ["SegmentCounts", "SegmentFinding", "worst_segments"]


@dataclass(frozen=True)
class SegmentCounts:
    """One level of segments: what was seen, and what was expected by all that stands above it.

    Attributes
    ----------
    level : str
    key : ndarray of int64, shape (segments,)
    rows : ndarray
        Effective rows.
    positives, expected : ndarray
        Weights above 1 make them vary more, and probabilities too small; weights below 1 (old rows that are
        being forgotten) make them too large.
    dispersion : ndarray, in (0, 1]
        ``φ``.
    gain : ndarray, nats
        Log loss that the shrunk correction of each segment saves over all its rows.
    strength : float
        Shape ``a`` of the Gamma distribution of multipliers over segments.
    """

    level: str
    key: IntArray
    rows: FloatArray
    positives: FloatArray
    expected: FloatArray
    dispersion: FloatArray
    gain: FloatArray
    strength: float

    def __post_init__(self) -> None:
        columns = (self.rows, self.positives, self.expected, self.dispersion, self.gain)
        if any(np.shape(column) != np.shape(self.key) for column in columns):
            raise DataError(f"level {self.level!r}: expected columns of one length.")
        if (np.asarray(self.dispersion) <= 0.0).any() or self.strength <= 0.0:
            raise DataError(f"level {self.level!r}: dispersion and strength must be above 0.")


@dataclass(frozen=True)
class SegmentFinding:
    """What is known of one segment.

    Attributes
    ----------
    level : str
    place : int
        Among the segments of its level.
    key : int
    rows, positives, expected : float
    pcoc : float or None
        ``expected / positives``: above 1 it is over-predicted; None without positives.
    multiplier, lower, upper : float
        What ``expected`` must be multiplied by: posterior mean and bounds, of Gamma(c + a, e + a).
    lost_log_loss : float, nats
        What leaving the segment alone costs over its rows, as far as the multiplier is believed.
    p_value : float
        Probability of a count at least as far off, twice the smaller tail, if nothing were wrong.
    q_value : float
        Smallest false discovery rate at which it is called off.
    is_off : bool
        ``q_value`` is at most the rate that was asked for.
    """

    level: str
    place: int
    key: int
    rows: float
    positives: float
    expected: float
    pcoc: float | None
    multiplier: float
    lower: float
    upper: float
    lost_log_loss: float
    p_value: float
    q_value: float
    is_off: bool


def worst_segments(
    levels: Sequence[SegmentCounts], *, false_discovery_rate: float = 0.05, coverage: float = 0.95
) -> list[SegmentFinding]:
    """All segments that were expected to have positives, the most certainly wrong ones first.

    Of equal probabilities (both may be too small for a float) the one that costs more comes first.

    Parameters
    ----------
    levels : sequence of SegmentCounts
    false_discovery_rate : float, in (0, 1)
    coverage : float, in (0, 1)
        Of the bounds of multipliers.

    Examples
    --------
    One is off by a half and large; another by the factor four, but of hardly any clicks:

    >>> c, e = np.array([300.0, 4.0, 100.0]), np.array([200.0, 1.0, 101.0])
    >>> level = SegmentCounts("site", np.array([7, 8, 9]), 50 * e, c, e, np.ones(3), np.zeros(3), 20.0)
    >>> for one in worst_segments([level]):
    ...     print(one.key, round(one.multiplier, 2), round(one.lower, 2), round(one.upper, 2), one.is_off)
    7 1.45 1.3 1.62 True
    8 1.14 0.73 1.64 False
    9 0.99 0.82 1.18 False
    """
    for name, value in (("false_discovery_rate", false_discovery_rate), ("coverage", coverage)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{name} must lie between 0 and 1; got {value}.")
    found = [_judged(level, coverage) for level in levels]
    p_value = np.concatenate([columns[-1] for columns in found]) if found else np.zeros(0)
    findings, q_value = [], iter(benjamini_hochberg(p_value).tolist())
    for level, columns in zip(levels, found, strict=True):
        for place, multiplier, lower, upper, p in zip(*(column.tolist() for column in columns), strict=True):
            positives, expected = float(level.positives[place]), float(level.expected[place])
            q = next(q_value)
            findings.append(
                SegmentFinding(
                    level.level,
                    place,
                    int(level.key[place]),
                    float(level.rows[place]),
                    positives,
                    expected,
                    expected / positives if positives else None,
                    multiplier,
                    lower,
                    upper,
                    float(level.gain[place]),
                    p,
                    q,
                    q <= false_discovery_rate,
                )
            )
    return sorted(findings, key=lambda one: (one.p_value, -one.lost_log_loss, one.level, one.key))


def _judged(
    level: SegmentCounts, coverage: float
) -> tuple[IntArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Places of segments that can be judged; multiplier, its bounds, and probability by chance."""
    # Imported here: it takes a while, and not everybody who imports this package asks for a report.
    from scipy.special import gammainc, gammaincc, gammaincinv

    place = np.flatnonzero(level.expected > 0.0)
    step = 1.0 / level.dispersion[place]
    count, due = level.positives[place] * step, level.expected[place] * step
    at_least = np.where(count > 0.0, gammainc(np.maximum(count - step + 1.0, 1e-9), due), 1.0)
    p_value = np.minimum(1.0, 2.0 * np.minimum(at_least, gammaincc(count + step, due)))
    shape, rate = count + level.strength, due + level.strength
    lower, upper = (gammaincinv(shape, (1.0 + side * coverage) / 2.0) / rate for side in (-1.0, 1.0))
    return place, shape / rate, lower, upper, p_value
