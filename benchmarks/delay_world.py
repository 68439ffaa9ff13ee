"""A simulated world whose delays depend on campaign and hour in a way that is known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.delay_counts import Path
from pipelines.delay_rows import DelayRows
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.feature_spec import Categorical, FeatureSpec, Hour, Numeric
from pipelines.features import encode
from pipelines.simulation_delays import CONVERSION_DELAY, MEAN_CONVERSION_WEIGHTS

__all__ = ["DelayWorld", "Drawn"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIELDS = ("campaign_id",)
SPEC = FeatureSpec(
    categorical=(
        Categorical(name="campaign_id", buckets=512),
        Categorical(name="device", buckets=8),
        Categorical(name="user_id", buckets=4096),
    ),
    numeric=(Numeric(name="price", low=0, high=100, mean=50, std=29),),
    hour=Hour(),
)


@dataclass(frozen=True)
class Drawn:
    """Outcomes known by the end of a log. ``weights`` (n, components) are the truth of each."""

    rows: DelayRows
    values: list[Path]
    weights: Floats

    def take(self, chosen: NDArray[np.bool_]) -> Drawn:
        values = [self.values[place] for place in np.flatnonzero(chosen).tolist()]
        return Drawn(self.rows.take(chosen), values, self.weights[chosen])


@dataclass(frozen=True)
class DelayWorld:
    """Mixture weights are a campaign's own, tilted by the hour.

    Attributes
    ----------
    weights : ndarray, shape (campaigns, components)
    tilt : float
        Log-odds between noon and midnight.
    window : int
        Attribution window, ms.
    """

    weights: Floats
    tilt: float = 1.5
    window: int = 7 * DAY_MS

    @classmethod
    def draw(cls, campaigns: int, seed: int, tilt: float = 1.5) -> DelayWorld:
        rng = np.random.default_rng(seed)
        return cls(rng.dirichlet(12 * MEAN_CONVERSION_WEIGHTS, campaigns), tilt)

    def mixture(self, campaign: Ints, hour: Ints) -> Floats:
        """True weights of each row, shape (n, components)."""
        late = np.array([-0.5, 0.0, 1.0, 0.5]) * self.tilt
        tilted = self.weights[campaign] * np.exp(-np.cos(2 * np.pi * hour / 24)[:, None] * -late)
        return np.asarray(tilted / tilted.sum(axis=1, keepdims=True))

    def cdf(self, elapsed: npt.ArrayLike, weights: Floats) -> Floats:
        """True F of each row among outcomes within the window, shape (n,)."""
        inside = CONVERSION_DELAY.cdf(self.window, weights)
        return np.minimum(CONVERSION_DELAY.cdf(elapsed, weights) / inside, 1.0)

    def outcomes(self, n: int, log: int, seed: int) -> Drawn:
        """Outcomes of ``n`` windows opened evenly over a log of ``log`` ms, as far as known at its end."""
        rng = np.random.default_rng(seed)
        share = np.arange(1, len(self.weights) + 1) ** -0.8
        campaign = rng.choice(len(self.weights), n, p=share / share.sum())
        opened = np.sort(rng.integers(0, log, n))
        weights = self.mixture(campaign, (opened // HOUR_MS) % 24)
        delay = CONVERSION_DELAY.sample(weights, rng)
        age = log - opened
        seen = (delay <= self.window) & (delay <= age)
        table = pa.table(
            {
                "campaign_id": [f"c{one}" for one in campaign],
                "device": rng.choice(["phone", "desktop", "tablet"], n),
                "user_id": [f"u{one}" for one in rng.integers(0, 2_000, n)],
                "price": rng.uniform(0, 100, n),
                "event_time": opened,
            }
        )
        encoded = encode(table, SPEC, FIELDS)
        rows = DelayRows(
            encoded.buckets[seen],
            encoded.numbers[seen],
            encoded.segment_key[seen],
            opened[seen],
            delay[seen],
            np.minimum(age, self.window)[seen],
        )
        return Drawn(rows, [(f"c{one}",) for one in campaign[seen].tolist()], weights[seen])
