"""Delays of simulated outcomes: mixtures of shifted log-normals, whose distribution is known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from pipelines.duration import HOUR_MS, MINUTE_MS, SECOND_MS

__all__ = ["CLICK_DELAY", "CLICK_WEIGHTS", "CONVERSION_DELAY", "MEAN_CONVERSION_WEIGHTS", "DelayMixture"]


@dataclass(frozen=True)
class DelayMixture:
    """A mixture of log-normal delays, shifted by a least delay and rounded up to whole ms.

    Component ``k`` is ``offset_ms + ceil(median_ms[k] * exp(sigma[k] * z))`` with ``z`` standard normal.
    Rounding up keeps the distribution exact at whole ms: ``ceil(x) <= n`` is the same as ``x <= n``.

    Attributes
    ----------
    names : tuple of str
        What each component stands for.
    median_ms : tuple of float
        Median of each component before the shift, ms.
    sigma : tuple of float
        Standard deviation of the logarithm of each component.
    offset_ms : int
        Least delay, ms.

    Examples
    --------
    >>> one = DelayMixture(("only",), (60_000.0,), (1.0,), offset_ms=1_000)
    >>> float(one.cdf(61_000, [1.0]))
    0.5
    """

    names: tuple[str, ...]
    median_ms: tuple[float, ...]
    sigma: tuple[float, ...]
    offset_ms: int

    def component_cdf(self, delay_ms: ArrayLike) -> NDArray[np.float64]:
        """P(delay <= delay_ms) of each component, shape ``(..., components)``."""
        whole = np.floor(np.asarray(delay_ms, np.float64))[..., None] - self.offset_ms
        standard = (np.log(np.maximum(whole, 1e-300)) - np.log(self.median_ms)) / self.sigma
        return np.where(whole > 0, ndtr(standard), 0.0)

    def cdf(self, delay_ms: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
        """P(delay <= delay_ms) under mixture weights.

        Parameters
        ----------
        delay_ms : array_like, shape (...)
        weights : array_like, shape (..., components)
            Sum to 1 over the last axis; broadcast against ``delay_ms``.
        """
        return np.asarray(np.sum(self.component_cdf(delay_ms) * np.asarray(weights), axis=-1))

    def sample(self, weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw one delay for each row of ``weights``, shape ``(n, components)``; ms, shape ``(n,)``."""
        n = len(weights)
        edges = np.cumsum(weights, axis=1)[:, :-1]
        component = np.sum(rng.random(n)[:, None] >= edges, axis=1)
        scale = np.asarray(self.median_ms)[component]
        spread = np.asarray(self.sigma)[component]
        delay = self.offset_ms + np.ceil(scale * np.exp(spread * rng.standard_normal(n)))
        return np.asarray(delay, np.int64)

    def stretched(self, factor: float) -> DelayMixture:
        """The same mixture with every median multiplied by ``factor``."""
        return DelayMixture(
            self.names, tuple(factor * median for median in self.median_ms), self.sigma, self.offset_ms
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for ``simulation.toml``."""
        return {
            "components": list(self.names),
            "median_ms": list(self.median_ms),
            "sigma": list(self.sigma),
            "offset_ms": self.offset_ms,
        }


# Most people click at once or not at all; a few come back to an open page. The least delay is longer than
# the longest network delay, so that in a log without faults no click becomes known before its impression.
CLICK_DELAY = DelayMixture(
    names=("at_once", "open_page"),
    median_ms=(12.0 * SECOND_MS, 5.0 * MINUTE_MS),
    sigma=(1.1, 1.0),
    offset_ms=1 * SECOND_MS,
)
CLICK_WEIGHTS = np.array([0.9, 0.1])

# Several modes, because real conversion delays have them and no exponential fits (Criteo: 35 % within
# 15 minutes, 47 % within an hour, 81 % within a week).
CONVERSION_DELAY = DelayMixture(
    names=("minutes", "hours", "next_day", "days"),
    median_ms=(6.0 * MINUTE_MS, 3.5 * HOUR_MS, 21.0 * HOUR_MS, 60.0 * HOUR_MS),
    sigma=(1.0, 0.7, 0.1, 0.6),
    offset_ms=5 * SECOND_MS,
)
# Mean over the advertisers; each has its own weights around them.
MEAN_CONVERSION_WEIGHTS = np.array([0.44, 0.30, 0.20, 0.06])
