"""Whether the stream can still be learned from: bounds on what a trailing window of event time looks like.

A joiner that is stale, a topic that is silent or a feature that is no longer filled makes labels and rows
that are wrong but well formed. A model that learns them forgets what it knew. So the figures of the last
``window`` are looked at before each step is learned, that step included.

================== ===================================================================================
figure             over the rows that arrived in the window
================== ===================================================================================
click_rate         clicks over impressions
click_rate_change  clicks over those that the rate of the baseline would have given (each plus one)
click_coverage     share of the clicks whose impression the joiner knows
conversion_coverage  the same of the conversions
null_rate          share of the impressions without a value, of the feature where it is greatest
null_rise          how far that share has risen above its share in the baseline, where it rose most
rows_per_second    rows of all kinds over the seconds of the window
================== ===================================================================================

The baseline is what came before the window: a row a day older counts half, so that a stream may change as
slowly as it likes. Until it spans six windows nothing is compared with it.

Time is that at which rows arrived, as they tell it themselves: no wall clock is read, so the same log trips
at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config_sections import BreakerConfig
from pipelines.duration import DAY_MS

__all__ = ["FIGURES", "ArrivedRows", "Breaker", "Trip"]

FIGURES = (
    "click_rate",
    "click_rate_change",
    "click_coverage",
    "conversion_coverage",
    "null_rate",
    "null_rise",
    "rows_per_second",
)
# A window moves on by a tenth of its width.
_PARTS = 10
# A baseline of less may be all night, or the first hour of a log whose clicks are still to come.
_BASELINE_WINDOWS = 6
_HALF_LIFE_MS = DAY_MS
_COUNTS = ("impressions", "clicks", "conversions", "known_clicks", "known_conversions")
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class ArrivedRows:
    """The rows of one step, as far as the breaker looks at them.

    Attributes
    ----------
    impressions, clicks, conversions : ndarray of int64
        When each arrived, ms.
    known_clicks, known_conversions : ndarray of bool
        Whether the joiner knows the impression of each.
    nulls : dict of str to ndarray of bool
        By feature, which impressions have no value; features without a null may be left out.
    """

    impressions: Ints
    clicks: Ints
    conversions: Ints
    known_clicks: Flags
    known_conversions: Flags
    nulls: Mapping[str, Flags] = field(default_factory=dict)


@dataclass(frozen=True)
class Trip:
    """Why the breaker has opened: what was out of bounds when the clock stood at ``clock`` (ms)."""

    clock: int
    reasons: tuple[str, ...]
    figures: dict[str, float | None]


@dataclass
class _Sums:
    """Counts of a part of the window; of the baseline, weighted by age."""

    impressions: float = 0
    clicks: float = 0
    conversions: float = 0
    known_clicks: float = 0
    known_conversions: float = 0
    nulls: dict[str, float] = field(default_factory=dict)

    def add(self, other: _Sums) -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, rows in other.nulls.items():
            self.nulls[name] = self.nulls.get(name, 0) + rows

    def fade(self, share: float) -> None:
        """Keep this share of all counts."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) * share)
        self.nulls = {name: rows * share for name, rows in self.nulls.items()}

    def null_share(self, name: str) -> float:
        return self.nulls.get(name, 0) / self.impressions


class Breaker:
    """Figures of a trailing window, and the bounds that they must keep.

    Parameters
    ----------
    config : BreakerConfig

    Examples
    --------
    Nobody clicks any more:

    >>> config = BreakerConfig(enabled=True, window=10_000, min_impressions=100, click_rate=(0.01, 0.5))
    >>> breaker = Breaker(config)
    >>> none = np.zeros(0, np.int64)
    >>> rows = ArrivedRows(np.arange(200), none, none, none > 0, none > 0)
    >>> breaker.observe(rows, clock=199).reasons
    ('click_rate is 0, below 0.01',)
    """

    def __init__(self, config: BreakerConfig) -> None:
        self.config = config
        self._width = max(config.window // _PARTS, 1)
        self.restart()

    def restart(self, *, keep_baseline: bool = False) -> None:
        """Forget the rows of the window, and by default those before it: they count from the next ones on."""
        self._parts: dict[int, _Sums] = {}
        self._since = -1
        if not keep_baseline:
            self._baseline = _Sums()
            self._newest = -1  # part of the baseline
            self._begun = -1  # when it began
            self._clock = -1

    def observe(self, rows: ArrivedRows, clock: int) -> Trip | None:
        """Add the rows of a step; ``clock`` is when its last row arrived, ms. A Trip if a bound is broken."""
        if clock < 0:
            return None  # dead letters only
        for part, sums in self._by_part(rows).items():
            self._parts.setdefault(part, _Sums()).add(sums)
        self._clock = max(self._clock, clock)
        self._since = clock if self._since < 0 else self._since
        self._begun = clock if self._begun < 0 else self._begun
        oldest = self._clock // self._width - _PARTS + 1
        for part in sorted(part for part in self._parts if part < oldest):
            self._retire(part)
        figures = self.figures()
        reasons = tuple(self._broken(figures))
        return Trip(self._clock, reasons, figures) if reasons else None

    def figures(self) -> dict[str, float | None]:
        """The figures of the window as it is; None where it holds too few rows to tell."""
        total, config = _Sums(), self.config
        for part in sorted(self._parts):
            total.add(self._parts[part])
        told: dict[str, float | None] = dict.fromkeys(FIGURES)
        if total.impressions >= config.min_impressions:
            told["click_rate"] = total.clicks / total.impressions
            told["null_rate"] = max(map(total.null_share, total.nulls), default=0.0)
            told |= self._changes(total)
        if total.clicks >= config.min_outcomes:
            told["click_coverage"] = total.known_clicks / total.clicks
        if total.conversions >= config.min_outcomes:
            told["conversion_coverage"] = total.known_conversions / total.conversions
        if self._clock - self._since >= config.window:
            begin = (self._clock // self._width - _PARTS + 1) * self._width
            seconds = (self._clock - begin + 1) / 1000
            told["rows_per_second"] = (total.impressions + total.clicks + total.conversions) / seconds
        return told

    def state(self) -> dict[str, Any]:
        """JSON state; `load_state` goes on identically."""
        return {
            "width": self._width,
            "clock": self._clock,
            "since": self._since,
            "begun": self._begun,
            "newest": self._newest,
            "baseline": _plain(self._baseline),
            "parts": [[part, _plain(self._parts[part])] for part in sorted(self._parts)],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`; one of a window of another width is of no use, and forgotten."""
        if state["width"] != self._width:
            self.restart()
            return
        self._clock, self._since, self._begun = state["clock"], state["since"], state["begun"]
        self._baseline, self._newest = _sums(state["baseline"]), state["newest"]
        self._parts = {part: _sums(values) for part, values in state["parts"]}

    def _retire(self, part: int) -> None:
        """Move a part from the window to the baseline."""
        # A row that is late for the window is late for the baseline, too: it counts as the newest there.
        passed = max(part - self._newest, 0) * self._width if self._newest >= 0 else 0
        self._baseline.fade(0.5 ** (passed / _HALF_LIFE_MS))
        self._baseline.add(self._parts.pop(part))
        self._newest = max(self._newest, part)

    def _changes(self, total: _Sums) -> dict[str, float | None]:
        """Figures that compare the window with the baseline; none where either holds too few rows."""
        config, baseline = self.config, self._baseline
        is_short = self._clock - self._begun < (_BASELINE_WINDOWS + 1) * config.window
        if is_short or baseline.impressions < config.min_impressions:
            return {}
        rises = [total.null_share(name) - baseline.null_share(name) for name in total.nulls]
        found: dict[str, float | None] = {"null_rise": max([*rises, 0.0])}
        expected = baseline.clicks / baseline.impressions * total.impressions
        if max(expected, total.clicks) >= config.min_outcomes:
            found["click_rate_change"] = (total.clicks + 1) / (expected + 1)
        return found

    def _by_part(self, rows: ArrivedRows) -> dict[int, _Sums]:
        found: dict[int, _Sums] = {}
        columns = {
            "impressions": rows.impressions,
            "clicks": rows.clicks,
            "conversions": rows.conversions,
            "known_clicks": rows.clicks[rows.known_clicks],
            "known_conversions": rows.conversions[rows.known_conversions],
        }
        for name, arrived in columns.items():
            for part, count in _counted(arrived // self._width):
                setattr(found.setdefault(part, _Sums()), name, count)
        for name, is_null in rows.nulls.items():
            for part, count in _counted(rows.impressions[is_null] // self._width):
                found[part].nulls[name] = count
        return found

    def _broken(self, figures: Mapping[str, float | None]) -> list[str]:
        config = self.config
        bounds: dict[str, tuple[float, float]] = {
            "click_rate": config.click_rate,
            "click_rate_change": config.click_rate_change,
            "click_coverage": (config.click_coverage, 1.0),
            "conversion_coverage": (config.conversion_coverage, 1.0),
            "null_rate": (0.0, config.null_rate),
            "null_rise": (0.0, config.null_rise),
            "rows_per_second": config.rows_per_second,
        }
        broken = []
        for name, (low, high) in bounds.items():
            value = figures[name]
            if value is not None and value < low:
                broken.append(f"{name} is {value:.4g}, below {low:.4g}")
            elif value is not None and value > high:
                broken.append(f"{name} is {value:.4g}, above {high:.4g}")
        return broken


def _counted(parts: Ints) -> list[tuple[int, int]]:
    found, counts = np.unique(parts, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def _plain(sums: _Sums) -> dict[str, Any]:
    return {name: dict(value) if name == "nulls" else value for name, value in vars(sums).items() if value}


def _sums(values: Mapping[str, Any]) -> _Sums:
    return _Sums(**{**values, "nulls": dict(values.get("nulls", {}))})
