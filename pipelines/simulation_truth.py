"""The truth of the simulated log: exact probabilities of click and conversion for each impression.

Conventions: ``*_logit`` is the log-odds of the intent; an intent becomes an outcome within its window
with the probability that the delay allows::

    click_probability      = sigmoid(click_logit)      * P(delay <= click window)
    conversion_probability = sigmoid(conversion_logit) * P(delay <= attribution window | advertiser)

Both logits are functions of logged features, ids and time only: no noise of a single impression enters,
so that a perfect model could reach them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from pipelines.errors import ConfigError
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_delays import CLICK_DELAY, CLICK_WEIGHTS, CONVERSION_DELAY
from pipelines.simulation_traffic import Traffic, hour_of_day, weekday
from pipelines.simulation_world import World

__all__ = ["POSITION_PENALTY", "Drift", "Truth", "draw_drift", "exact_truth"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Log-odds lost per natural logarithm of the position: position 8 has -1.25.
POSITION_PENALTY = 0.6
# Walks move in this many steps over the log.
_WALK_STEPS = 96
# Of drift = 1: standard deviation of a walk at the end of the log, size of the jump, slope of the trends.
_ITEM_WALK = 0.4
_CAMPAIGN_WALK = 0.25
_JUMP = -1.2
_JUMP_AT = 0.6
_CLICK_TREND = -0.3
_CONVERSION_TREND = 0.25


@dataclass(frozen=True)
class Drift:
    """How the world changes while the log runs.

    Attributes
    ----------
    item_walk : ndarray, shape (items, steps)
        Random walk of each item's click log-odds.
    campaign_walk : ndarray, shape (campaigns, steps)
        Random walk of each campaign's conversion log-odds.
    jump_advertiser : int
        Row number of the advertiser whose conversion rate jumps.
    jump_time : int
        When it jumps, ms since the epoch.
    jump : float
        By how much, log-odds.
    """

    item_walk: Floats
    campaign_walk: Floats
    jump_advertiser: int
    jump_time: int
    jump: float


@dataclass(frozen=True)
class Truth:
    """Exact probabilities; every array has one entry an impression.

    Attributes
    ----------
    click_intent, conversion_intent : ndarray
        P(click ever | impression), P(conversion ever | click).
    click_probability, conversion_probability : ndarray
        The same within the click window and the attribution window.
    delay_weights : ndarray, shape (n, components)
        Mixture weights of the conversion delay.
    item_drift, campaign_drift : ndarray
        State of the item's and the campaign's walk, log-odds.
    """

    click_intent: Floats
    conversion_intent: Floats
    click_probability: Floats
    conversion_probability: Floats
    delay_weights: Floats
    item_drift: Floats
    campaign_drift: Floats


def draw_drift(config: SimulationConfig, world: World, traffic: Traffic, rng: np.random.Generator) -> Drift:
    """Draw the walks, and choose the advertiser that jumps: the one with most traffic on both sides."""
    jump_time = config.start + round(_JUMP_AT * config.duration)
    advertiser = world.campaigns.advertiser[world.items.campaign[traffic.item]]
    is_before = traffic.event_time < jump_time
    before = np.bincount(advertiser[is_before], minlength=config.advertisers)
    after = np.bincount(advertiser[~is_before], minlength=config.advertisers)
    step = config.drift / np.sqrt(_WALK_STEPS)
    return Drift(
        item_walk=_ITEM_WALK * step * _walk(config.item_count, rng),
        campaign_walk=_CAMPAIGN_WALK * step * _walk(config.campaigns, rng),
        jump_advertiser=int(np.argmax(np.minimum(before, after))),
        jump_time=jump_time,
        jump=_JUMP * config.drift,
    )


def exact_truth(config: SimulationConfig, world: World, traffic: Traffic, drift: Drift) -> Truth:
    """Exact probabilities of every impression.

    Raises
    ------
    ConfigError
        If a base rate cannot be reached because the window is too short for the delays.
    """
    share = (traffic.event_time - config.start) / config.duration
    step = np.minimum((share * _WALK_STEPS).astype(np.int64), _WALK_STEPS - 1)
    campaign = world.items.campaign[traffic.item]
    item_drift = drift.item_walk[traffic.item, step]
    campaign_drift = drift.campaign_walk[campaign, step]
    click_logit = _click_logit(world, traffic) + item_drift + config.drift * _CLICK_TREND * share
    conversion_logit = (
        _conversion_logit(world, traffic) + campaign_drift + config.drift * _CONVERSION_TREND * share
    )
    advertiser = world.campaigns.advertiser[campaign]
    has_jumped = (advertiser == drift.jump_advertiser) & (traffic.event_time >= drift.jump_time)
    conversion_logit += np.where(has_jumped, drift.jump, 0.0)

    in_click_window = np.broadcast_to(CLICK_DELAY.cdf(config.click_window, CLICK_WEIGHTS), share.shape)
    click_logit += _intercept("base_click_rate", config.base_click_rate, click_logit, in_click_window)
    click_intent = expit(click_logit)
    click_probability = click_intent * in_click_window

    delay = CONVERSION_DELAY.stretched(config.delay_scale)
    weights = world.advertisers.delay_weights
    in_window = delay.cdf(config.attribution_window, weights)[advertiser]
    conversion_logit += _intercept(
        "base_conversion_rate", config.base_conversion_rate, conversion_logit, in_window, click_probability
    )
    conversion_intent = expit(conversion_logit)
    return Truth(
        click_intent=click_intent,
        conversion_intent=conversion_intent,
        click_probability=click_probability,
        conversion_probability=conversion_intent * in_window,
        delay_weights=weights[advertiser],
        item_drift=item_drift,
        campaign_drift=campaign_drift,
    )


def _click_logit(world: World, traffic: Traffic) -> Floats:
    users, items, context = world.users, world.items, world.context
    user, item = traffic.user, traffic.item
    # A missing tag is number -1, the appended zero.
    item_tags = np.append(context.tag, 0.0)[items.tags].sum(axis=1)
    category = world.campaigns.category[items.campaign]
    per_item = items.click_quality + item_tags + context.category[category] - 0.1 * _price(items.price) ** 2
    hour = hour_of_day(traffic.event_time)
    return np.asarray(
        per_item[item]
        + users.click_bias[user]
        + 0.24 * np.einsum("nk,nk->n", users.latent[user, :6], items.latent[item, :6])
        - POSITION_PENALTY * np.log(traffic.position)
        + context.device_placement[traffic.device, traffic.placement]
        + 0.25 * np.cos(2 * np.pi * (hour - 21) / 24)
        + np.where(weekday(traffic.event_time) >= 5, 0.1, 0.0)
        # Novelty wears off within a day.
        + 0.35 * np.exp(-traffic.item_age_hours / 24)
    )


def _conversion_logit(world: World, traffic: Traffic) -> Floats:
    users, items = world.users, world.items
    user, item = traffic.user, traffic.item
    campaign = items.campaign
    advertiser = world.campaigns.advertiser[campaign]
    per_item = (
        items.conversion_quality
        + world.campaigns.conversion_bias[campaign]
        + world.advertisers.conversion_bias[advertiser]
        - 0.45 * _price(items.price)
    )
    hour = hour_of_day(traffic.event_time)
    return np.asarray(
        per_item[item]
        + users.conversion_bias[user]
        # Four of the eight latent dimensions, two of them shared with the clicks.
        + 0.12 * np.einsum("nk,nk->n", users.latent[user, 4:], items.latent[item, 4:])
        + world.context.device_conversion[traffic.device]
        + 0.15 * np.cos(2 * np.pi * (hour - 12) / 24)
    )


def _price(price: Floats) -> Floats:
    """Standardised logarithm of the price."""
    return np.asarray((np.log(price) - np.log(30.0)) / 0.8)


def _walk(count: int, rng: np.random.Generator) -> Floats:
    steps = rng.standard_normal((count, _WALK_STEPS))
    steps[:, 0] = 0.0
    return np.cumsum(steps, axis=1)


def _intercept(
    name: str, target: float, logit: Floats, ceiling: Floats, weight: Floats | None = None
) -> float:
    """The shift for which the weighted mean of ``ceiling * sigmoid(logit + shift)`` is ``target``."""
    # The shift is part of the definition of the world, not an estimate: a part of a long log will do.
    stride = max(1, len(logit) // 50_000)
    logit, ceiling = logit[::stride], ceiling[::stride]
    weight = np.ones(len(logit)) if weight is None else weight[::stride]
    reachable = float(np.average(ceiling, weights=weight))
    if target >= 0.98 * reachable:
        raise ConfigError(
            f"{name} must be less than the share of outcomes whose delay fits into the window, "
            f"{reachable:.3g}. Received: {target}.",
            hint="lengthen the window, or lower delay_scale",
        )

    def excess(shift: float) -> float:
        return float(np.average(ceiling * expit(logit + shift), weights=weight)) - target

    return _bisect(excess, -40.0, 40.0)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Root of an increasing function."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
