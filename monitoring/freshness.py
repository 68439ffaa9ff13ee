"""Freshness: how long it takes from an event until the model that is served has learned it.

A histogram of latencies with log-spaced bins, as in DDSketch [1]_: merging is addition and exact, in any
order, and every quantile is right to one percent.

References
----------
.. [1] Masson, Rim and Lee 2019, DDSketch: a fast and fully-mergeable quantile sketch with relative-error
guarantees.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError

__all__ = ["RELATIVE_ERROR", "LatencyHistogram"]

# Of any quantile above a millisecond. A bin reaches from gamma^(k-1) to gamma^k milliseconds; its value 2
# gamma^k / (gamma + 1) is within this share of everything in it.
RELATIVE_ERROR = 0.01
_GAMMA = (1.0 + RELATIVE_ERROR) / (1.0 - RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)
_ZERO_BIN = 0  # up to 1 ms, including clocks that run backwards


@dataclass
class LatencyHistogram:
    """Counts of latencies in bins one percent wide either way.

    Attributes
    ----------
    counts : Counter
        Bin -> events. Bin 0 holds up to 1 ms, bin k holds (γ^(k-1), γ^k] ms.
    negative : int
        Latencies below 0, which are counted in bin 0 as well: two clocks disagree.
    total_ms : int
        Sum of the latencies, each rounded to a millisecond: an integer, so that merging stays exact.
    longest_ms : int

    Examples
    --------
    >>> histogram = LatencyHistogram()
    >>> histogram.update([0.5, 1.0, 2.0, 60.0])
    >>> round(histogram.quantile(0.5), 2), histogram.value()["rows"]
    (1.0, 4)
    """

    counts: Counter[int] = field(default_factory=Counter)
    negative: int = 0
    total_ms: int = 0
    longest_ms: int = 0

    def update(self, latency_seconds: npt.ArrayLike, count: npt.ArrayLike = 1) -> None:
        """Add latencies in seconds, a number or ``(n,)``, each seen ``count`` times (integers >= 0, alike).

        Raises
        ------
        DataError
            If a latency is NaN or infinite, or a count is not an integer >= 0.
        """
        seconds, times = np.broadcast_arrays(
            np.atleast_1d(np.asarray(latency_seconds, dtype=np.float64)), np.asarray(count)
        )
        if seconds.size == 0:
            return
        if not np.isfinite(seconds).all():
            raise DataError("expected finite latencies in seconds, received NaN or an infinite one.")
        if times.dtype.kind not in "iu" or (times < 0).any():
            raise DataError(f"expected counts as integers >= 0, received {count!r}.")
        ms = seconds * 1000.0
        bins = np.where(ms <= 1.0, _ZERO_BIN, np.ceil(np.log(np.maximum(ms, 1.0)) / _LOG_GAMMA)).astype(
            np.int64
        )
        places, inverse = np.unique(bins, return_inverse=True)
        added = np.zeros(places.shape[0], dtype=np.int64)
        np.add.at(added, inverse, times)
        self.counts.update({k: n for k, n in zip(places.tolist(), added.tolist(), strict=True) if n})
        self.negative += int(times[seconds < 0].sum())
        rounded = np.rint(ms).astype(np.int64)
        self.total_ms += int((rounded * times).sum())
        self.longest_ms = max(self.longest_ms, int(rounded[times > 0].max(initial=0)))

    def merge(self, other: LatencyHistogram) -> LatencyHistogram:
        """Return the histogram of both sets of events; neither input changes."""
        counts = Counter(self.counts)
        counts.update(other.counts)
        return LatencyHistogram(
            counts,
            self.negative + other.negative,
            self.total_ms + other.total_ms,
            max(self.longest_ms, other.longest_ms),
        )

    @property
    def rows(self) -> int:
        """Events counted."""
        return sum(self.counts.values())

    def quantile(self, share: float) -> float | None:
        """Seconds within which ``share`` of the events were learned, right to 1 %, or to 1 ms; None if empty.

        The smallest latency that at least ``share`` of the events do not exceed: numpy's ``inverted_cdf``.
        """
        if not 0.0 <= share <= 1.0:
            raise DataError(f"expected a share in [0, 1], received {share}.")
        rows = self.rows
        if rows == 0:
            return None
        needed = max(1, math.ceil(share * rows))
        seen = 0
        for place in sorted(self.counts):
            seen += self.counts[place]
            if seen >= needed:
                break
        if place == _ZERO_BIN:
            return 0.0005
        return 2.0 * _GAMMA**place / (_GAMMA + 1.0) / 1000.0

    def value(self) -> dict[str, float | int | None]:
        """``rows, negative, p50_s, p95_s, p99_s, mean_s, max_s`` and ``relative_error`` of the quantiles."""
        rows = self.rows
        return {
            "rows": rows,
            "negative": self.negative,
            "p50_s": self.quantile(0.5),
            "p95_s": self.quantile(0.95),
            "p99_s": self.quantile(0.99),
            "mean_s": self.total_ms / rows / 1000.0 if rows else None,
            "max_s": self.longest_ms / 1000.0 if rows else None,
            "relative_error": RELATIVE_ERROR,
        }

    def state(self) -> dict[str, Any]:
        """JSON state; only the bins that hold events."""
        places = sorted(self.counts)
        return {
            "relative_error": RELATIVE_ERROR,
            "bins": places,
            "counts": [self.counts[place] for place in places],
            "negative": self.negative,
            "total_ms": self.total_ms,
            "longest_ms": self.longest_ms,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LatencyHistogram:
        """Inverse of `state`, exact; DataError if it was written with other bins."""
        if state["relative_error"] != RELATIVE_ERROR:
            raise DataError(f"expected latency bins of {RELATIVE_ERROR}, received {state['relative_error']}.")
        counts = Counter(dict(zip(state["bins"], state["counts"], strict=True)))
        return cls(counts, state["negative"], state["total_ms"], state["longest_ms"])
