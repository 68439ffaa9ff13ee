"""Traffic of the simulated log: who is shown what, when, where, at which position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_world import DEVICES, PLACEMENTS, World

__all__ = ["Traffic", "draw_traffic", "hour_of_day", "weekday"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Share of the nth position falls with n: P(position <= j) = (j / positions) ** (1 / 1.6).
_POSITION_EXPONENT = 1.6
_PLACEMENT_SHARES = (0.45, 0.25, 0.20, 0.10)


@dataclass(frozen=True)
class Traffic:
    """Impressions; every array has one entry an impression, in order of ``event_time``.

    ``user``, ``item``, ``device`` and ``placement`` are row numbers into the world; ``position`` counts
    from 1; ``item_age_hours`` and ``user_affinity`` (NaN where null) are as logged.
    """

    event_time: Ints
    user: Ints
    item: Ints
    position: Ints
    device: Ints
    placement: Ints
    item_age_hours: Floats
    user_affinity: Floats

    def __len__(self) -> int:
        return len(self.event_time)


def draw_traffic(config: SimulationConfig, world: World, rng: np.random.Generator) -> Traffic:
    """Draw all impressions of the log."""
    n = config.impressions
    event_time = _draw_times(config, rng)
    item = _draw_shown_items(config, world, event_time, rng)
    user = _weighted_choice(world.users.activity, n, rng)
    device = np.where(
        rng.random(n) < 0.85, world.users.device[user], rng.integers(len(DEVICES), size=n)
    ).astype(np.int64)
    age = (event_time - world.items.birth[item]) / HOUR_MS
    return Traffic(
        event_time=event_time,
        user=user,
        item=item,
        position=_draw_positions(config, world.items.click_quality[item], rng),
        device=device,
        placement=rng.choice(len(PLACEMENTS), size=n, p=_PLACEMENT_SHARES),
        # The truth is a function of what is logged, so that rounding comes first.
        item_age_hours=np.round(age, 3),
        user_affinity=_draw_affinity(world, user, item, rng),
    )


def hour_of_day(event_time: Ints) -> Ints:
    """Hour of the day, 0 to 23, UTC."""
    return np.asarray(event_time // HOUR_MS % 24)


def weekday(event_time: Ints) -> Ints:
    """Day of the week, Monday is 0, UTC."""
    # 1970-01-01 was a Thursday.
    return np.asarray((event_time // DAY_MS + 3) % 7)


def _draw_times(config: SimulationConfig, rng: np.random.Generator) -> Ints:
    """Sorted event times from a daily cycle (busy evenings, quiet nights) and livelier weekends."""
    steps = max(2, min(config.duration // MINUTE_MS, 600_000))
    edges = config.start + np.linspace(0, config.duration, steps + 1)
    middle = ((edges[1:] + edges[:-1]) / 2).astype(np.int64)
    phase = 2 * np.pi * ((middle % DAY_MS) / DAY_MS - 20 / 24)
    intensity = (1 + 0.6 * np.cos(phase)) * np.where(weekday(middle) >= 5, 1.15, 1.0)
    cumulative = np.concatenate([[0.0], np.cumsum(intensity)])
    drawn = np.interp(np.sort(rng.random(config.impressions)) * cumulative[-1], cumulative, edges)
    return np.asarray(np.minimum(drawn, config.end - 1), np.int64)


def _draw_shown_items(
    config: SimulationConfig, world: World, event_time: Ints, rng: np.random.Generator
) -> Ints:
    """An item for each impression, by popularity, among those that run throughout its time slot."""
    slots = int(np.clip(round(config.days * 96), 96, 1000))
    edges = (config.start + np.linspace(0, config.duration, slots + 1)).astype(np.int64)
    edges[-1] = config.end
    first = np.searchsorted(event_time, edges)
    uniform = rng.random(len(event_time))
    death = world.campaigns.death[world.items.campaign]
    shown = np.empty(len(event_time), np.int64)
    for slot in range(slots):
        rows = slice(first[slot], first[slot + 1])
        running = (world.items.birth <= edges[slot]) & (death >= edges[slot + 1])
        cumulative = np.cumsum(np.where(running, world.items.popularity, 0.0))
        shown[rows] = np.searchsorted(cumulative, uniform[rows] * cumulative[-1], side="right")
    return shown


def _weighted_choice(weights: Floats, n: int, rng: np.random.Generator) -> Ints:
    cumulative = np.cumsum(weights)
    return np.asarray(np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right"), np.int64)


def _draw_positions(config: SimulationConfig, quality: Floats, rng: np.random.Generator) -> Ints:
    """Positions as an older ranker gave them: better items stand higher, so position is confounded."""
    rank = 0.6 * quality / 0.4 + 0.8 * rng.standard_normal(len(quality))
    share = (1 - ndtr(rank)) ** _POSITION_EXPONENT
    return np.asarray(np.clip(np.ceil(share * config.positions), 1, config.positions), np.int64)


def _draw_affinity(world: World, user: Ints, item: Ints, rng: np.random.Generator) -> Floats:
    """A noisy upstream score of the user for the item's category; unknown for many who come rarely."""
    category = world.campaigns.category[world.items.campaign[item]]
    dot = np.einsum("nk,nk->n", world.users.latent[user], world.category_latent[category])
    score = np.tanh(dot / 4) + 0.3 * rng.standard_normal(len(user))
    is_rare = world.users.activity[user] < 1.5
    is_null = rng.random(len(user)) < np.where(is_rare, 0.25, 0.05)
    return np.where(is_null, np.nan, np.round(score, 4))
