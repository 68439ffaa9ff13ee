"""Freshness as Prometheus wants it: cumulative counts below fixed edges."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import HistogramMetricFamily

__all__ = ["FreshnessHistogram"]

_EDGES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
_EDGES_MS = np.array(_EDGES_S) * 1000.0


class FreshnessHistogram:
    """From an event reaching the broker to a stage that it has come to, by stage; any thread may add.

    Parameters
    ----------
    stages : sequence of str

    Examples
    --------
    >>> histogram = FreshnessHistogram(["learned"])
    >>> histogram.add("learned", np.array([40.0, 700.0]), np.array([1, 2]))
    >>> histogram.family().samples[-1].value  # sum, seconds
    1.44
    """

    def __init__(self, stages: Sequence[str]) -> None:
        self._counts = {stage: np.zeros(len(_EDGES_S) + 1, np.int64) for stage in stages}
        self._sum_s = dict.fromkeys(stages, 0.0)
        self._lock = threading.Lock()

    def add(self, stage: str, latency_ms: NDArray[np.float64], count: NDArray[np.int64]) -> None:
        """Add ``count`` events of each latency."""
        places = np.searchsorted(_EDGES_MS, latency_ms, side="left")
        with self._lock:
            np.add.at(self._counts[stage], places, count)
            self._sum_s[stage] += float((latency_ms * count).sum()) / 1000.0

    def family(self) -> HistogramMetricFamily:
        """All stages, for a registry."""
        family = HistogramMetricFamily(
            "ctrstream_freshness_seconds", "From an event reaching the broker to a stage", labels=["stage"]
        )
        edges = [*map(str, _EDGES_S), "+Inf"]
        with self._lock:
            for stage, counts in self._counts.items():
                below = map(float, np.cumsum(counts).tolist())
                family.add_metric([stage], list(zip(edges, below, strict=True)), self._sum_s[stage])
        return family
