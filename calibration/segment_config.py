"""Which segments are corrected, and how fast they are learned and forgotten."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibration.segment_levels import segment_columns, segment_levels
from pipelines.errors import ConfigError

__all__ = ["SegmentConfig"]


@dataclass(frozen=True, slots=True)
class SegmentConfig:
    """Which segments, and how fast they are learned and forgotten.

    Attributes
    ----------
    names : tuple of str
        The levels, coarse ones first: ``all``, a column, or columns joined by ``*``
        (:mod:`calibration.segment_levels`). They act in this order.
    half_life : float, effective rows
        After so much Σ weight (over all segments) a row counts half.
    minimum_support : float, effective rows
        A segment with less is not corrected. Shrinkage takes care of small ones: one that has been forgotten
        needs no more than this.
    maximum_segments : int
        Per level; beyond it the least supported are dropped.
    prior_strength : float, expected positives
        ``a`` until the first :meth:`SegmentCorrection.refit`.

    Raises
    ------
    ConfigError
        A value outside its range.
    """

    names: tuple[str, ...]
    half_life: float = 2_000_000.0
    minimum_support: float = 1.0
    maximum_segments: int = 8192
    prior_strength: float = 50.0

    def __post_init__(self) -> None:
        segment_levels(self.names)
        for name in ("half_life", "prior_strength"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ConfigError(f"segments: {name} must be finite and above 0; got {getattr(self, name)}.")
        if not (math.isfinite(self.minimum_support) and self.minimum_support >= 0.0):
            raise ConfigError(f"segments: minimum_support must be >= 0; got {self.minimum_support}.")
        if self.maximum_segments < 8:
            raise ConfigError(f"segments: maximum_segments must be at least 8; got {self.maximum_segments}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """What the columns of the keys must be."""
        return segment_columns(self.names)
