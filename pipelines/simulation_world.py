"""The simulated world: users, advertisers, campaigns and items, with the latent truth behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_delays import MEAN_CONVERSION_WEIGHTS

__all__ = [
    "AGE_GROUPS",
    "CATEGORIES",
    "DEVICES",
    "LATENT_DIM",
    "PLACEMENTS",
    "REGIONS",
    "SEGMENTS",
    "TAGS",
    "Advertisers",
    "Campaigns",
    "Context",
    "Items",
    "Users",
    "World",
    "build_world",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CATEGORIES = (
    "apparel", "appliances", "banking", "beauty", "books", "cars", "education", "electronics",
    "fitness", "food", "furniture", "games", "garden", "health", "hotels", "insurance",
    "jewellery", "music", "pets", "shoes", "software", "sports", "toys", "travel",
)  # fmt: skip
DEVICES = ("desktop", "phone", "tablet")
PLACEMENTS = ("feed", "search", "sidebar", "story")
AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
REGIONS = ("central", "east", "north", "north_east", "south", "south_west", "west", "overseas")
SEGMENTS = tuple(f"segment_{number:02d}" for number in range(12))
TAGS = tuple(f"tag_{number:02d}" for number in range(60))

LATENT_DIM = 8
_TAGS_PER_CATEGORY = 8
_MOST_TAGS = 4


@dataclass(frozen=True)
class Users:
    """Users; every array has one entry a user. Biases are log-odds."""

    activity: Floats
    segment: Ints
    age_group: Ints
    region: Ints
    device: Ints
    latent: Floats
    click_bias: Floats
    conversion_bias: Floats


@dataclass(frozen=True)
class Advertisers:
    """Advertisers. ``delay_weights`` has shape ``(advertisers, components)``; biases are log-odds."""

    conversion_bias: Floats
    delay_weights: Floats


@dataclass(frozen=True)
class Campaigns:
    """Campaigns run from ``birth`` to ``death``, ms since the epoch; biases are log-odds."""

    advertiser: Ints
    category: Ints
    birth: Ints
    death: Ints
    conversion_bias: Floats


@dataclass(frozen=True)
class Items:
    """Items run from ``birth`` to the death of their campaign.

    ``click_quality`` and ``conversion_quality`` are log-odds at the start of the log; ``tags`` holds
    tag numbers, -1 where an item has fewer, shape ``(items, 4)``.
    """

    campaign: Ints
    birth: Ints
    popularity: Floats
    price: Floats
    tags: Ints
    latent: Floats
    click_quality: Floats
    conversion_quality: Floats


@dataclass(frozen=True)
class Context:
    """Effects of the context, log-odds.

    Shapes: ``(devices, placements)``, ``(devices,)``, ``(tags,)`` and ``(categories,)``.
    """

    device_placement: Floats
    device_conversion: Floats
    tag: Floats
    category: Floats


@dataclass(frozen=True)
class World:
    """Everything that stays the same while the log runs."""

    users: Users
    advertisers: Advertisers
    campaigns: Campaigns
    items: Items
    context: Context
    category_latent: Floats


def build_world(config: SimulationConfig, rng: np.random.Generator) -> World:
    """Draw a world."""
    category_latent = rng.standard_normal((len(CATEGORIES), LATENT_DIM))
    campaigns = _draw_campaigns(config, rng)
    return World(
        users=_draw_users(config.user_count, rng),
        advertisers=_draw_advertisers(config.advertisers, rng),
        campaigns=campaigns,
        items=_draw_items(config, campaigns, category_latent, rng),
        context=Context(
            device_placement=0.2 * rng.standard_normal((len(DEVICES), len(PLACEMENTS))),
            device_conversion=np.array([0.25, -0.15, 0.0]),
            tag=0.2 * rng.standard_normal(len(TAGS)),
            category=0.3 * rng.standard_normal(len(CATEGORIES)),
        ),
        category_latent=category_latent,
    )


def _draw_users(count: int, rng: np.random.Generator) -> Users:
    segment = rng.integers(len(SEGMENTS), size=count)
    age_group = rng.integers(len(AGE_GROUPS), size=count)
    region = rng.choice(len(REGIONS), size=count, p=_falling_shares(len(REGIONS), 0.7))
    centroid = rng.standard_normal((len(SEGMENTS), LATENT_DIM))
    return Users(
        # Pareto: a few users see a large part of the traffic; capped, so that none sees most of it.
        activity=np.minimum(1 + rng.pareto(1.3, count), 200.0),
        segment=segment,
        age_group=age_group,
        region=region,
        device=rng.choice(len(DEVICES), size=count, p=[0.33, 0.57, 0.10]),
        # Mostly the segment's taste, so that segment x category can be learnt from few rows.
        latent=0.9 * centroid[segment] + 0.45 * rng.standard_normal((count, LATENT_DIM)),
        click_bias=_user_bias(age_group, region, rng),
        conversion_bias=_user_bias(age_group, region, rng),
    )


def _user_bias(age_group: Ints, region: Ints, rng: np.random.Generator) -> Floats:
    """Log-odds of each user: partly the attributes', partly the user's own."""
    by_age = 0.2 * rng.standard_normal(len(AGE_GROUPS))
    by_region = 0.1 * rng.standard_normal(len(REGIONS))
    return np.asarray(by_age[age_group] + by_region[region] + 0.2 * rng.standard_normal(len(age_group)))


def _draw_advertisers(count: int, rng: np.random.Generator) -> Advertisers:
    return Advertisers(
        conversion_bias=0.45 * rng.standard_normal(count),
        delay_weights=rng.dirichlet(12 * MEAN_CONVERSION_WEIGHTS, size=count),
    )


def _draw_campaigns(config: SimulationConfig, rng: np.random.Generator) -> Campaigns:
    count = config.campaigns
    every = np.arange(config.advertisers)
    drawn = rng.choice(
        config.advertisers, size=count - len(every), p=_falling_shares(config.advertisers, 0.8)
    )
    # Times are in units of the log's length: a log of any length sees campaigns come and go.
    is_old = rng.random(count) < 0.5
    birth = np.where(is_old, -rng.random(count), rng.random(count))
    lifetime = 0.1 + rng.gamma(2.0, 0.45, count)
    # An old campaign that ended before the log is one that nobody sees: let it live on into the log.
    death = np.where(birth + lifetime > 0, birth + lifetime, lifetime)
    # A tenth always runs, so that there is something to show at any moment.
    always = np.arange(count) < max(1, count // 10)
    birth = np.where(always, -rng.random(count) - 0.1, birth)
    death = np.where(always, 2.0, death)
    return Campaigns(
        advertiser=np.concatenate([every, drawn]),
        category=rng.integers(len(CATEGORIES), size=count),
        birth=_as_time(config, birth),
        death=_as_time(config, death),
        conversion_bias=0.25 * rng.standard_normal(count),
    )


def _draw_items(
    config: SimulationConfig, campaigns: Campaigns, category_latent: Floats, rng: np.random.Generator
) -> Items:
    count = config.item_count
    every = np.arange(config.campaigns)
    campaign = np.concatenate([every, rng.integers(config.campaigns, size=count - len(every))])
    category = campaigns.category[campaign]
    lifetime = campaigns.death[campaign] - campaigns.birth[campaign]
    # Half of the items start with their campaign, the others join while it runs.
    joins = np.where((np.arange(count) < len(every)) | (rng.random(count) < 0.5), 0.0, rng.random(count))
    return Items(
        campaign=campaign,
        birth=campaigns.birth[campaign] + (0.6 * joins * lifetime).astype(np.int64),
        popularity=1 + np.minimum(rng.pareto(1.5, count), 30.0),
        price=np.maximum(np.round(np.exp(np.log(30.0) + 0.8 * rng.standard_normal(count)), 2), 0.5),
        tags=_draw_tags(category, rng),
        latent=0.85 * category_latent[category] + 0.5 * rng.standard_normal((count, LATENT_DIM)),
        click_quality=0.4 * rng.standard_normal(count),
        conversion_quality=0.15 * rng.standard_normal(count),
    )


def _draw_tags(category: Ints, rng: np.random.Generator) -> Ints:
    """Up to four different tags an item, from its category's own pool, -1 where there are fewer."""
    pools = np.stack([rng.permutation(len(TAGS))[:_TAGS_PER_CATEGORY] for _ in CATEGORIES])
    order = np.argsort(rng.random((len(category), _TAGS_PER_CATEGORY)), axis=1)[:, :_MOST_TAGS]
    tags = np.take_along_axis(pools[category], order, axis=1)
    kept = rng.choice(_MOST_TAGS + 1, size=len(category), p=[0.05, 0.2, 0.3, 0.25, 0.2])
    return np.where(np.arange(_MOST_TAGS) < kept[:, None], tags, -1)


def _falling_shares(count: int, exponent: float) -> Floats:
    """Zipf-like shares that sum to 1."""
    shares = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(shares / shares.sum())


def _as_time(config: SimulationConfig, relative: Floats) -> Ints:
    return config.start + np.round(relative * config.duration).astype(np.int64)
