"""Outcomes of the simulated log: which impressions are clicked, which clicks convert, and when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_delays import CLICK_DELAY, CLICK_WEIGHTS, CONVERSION_DELAY
from pipelines.simulation_traffic import Traffic
from pipelines.simulation_truth import Truth
from pipelines.simulation_world import World

__all__ = ["Outcomes", "draw_outcomes", "draw_values"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Outcomes:
    """All outcomes, also those after their window or after the end of the log.

    Attributes
    ----------
    click_row, conversion_row : ndarray of int64, shape (clicks,), (conversions,)
        Row number of the impression, increasing; the conversions are among the clicks.
    click_time, conversion_time : ndarray of int64
        Event times, ms.
    value : ndarray of float64, shape (conversions,)
        Worth of the conversion: price times quantity.
    """

    click_row: Ints
    click_time: Ints
    conversion_row: Ints
    conversion_time: Ints
    value: Floats


def draw_outcomes(
    config: SimulationConfig,
    world: World,
    traffic: Traffic,
    truth: Truth,
    click_rng: np.random.Generator,
    conversion_rng: np.random.Generator,
) -> Outcomes:
    """Draw every click and conversion from the exact probabilities."""
    click_row = np.flatnonzero(click_rng.random(len(traffic)) < truth.click_intent)
    weights = np.broadcast_to(CLICK_WEIGHTS, (len(click_row), len(CLICK_WEIGHTS)))
    click_time = traffic.event_time[click_row] + CLICK_DELAY.sample(weights, click_rng)

    converts = conversion_rng.random(len(click_row)) < truth.conversion_intent[click_row]
    conversion_row = click_row[converts]
    delay = CONVERSION_DELAY.stretched(config.delay_scale)
    conversion_time = click_time[converts] + delay.sample(truth.delay_weights[conversion_row], conversion_rng)
    return Outcomes(
        click_row=click_row,
        click_time=click_time,
        conversion_row=conversion_row,
        conversion_time=conversion_time,
        value=draw_values(world, traffic, conversion_row, conversion_rng),
    )


def draw_values(world: World, traffic: Traffic, row: Ints, rng: np.random.Generator) -> Floats:
    """Worth of a conversion on each impression of ``row``."""
    quantity = 1 + rng.poisson(0.3, len(row))
    return np.asarray(np.round(world.items.price[traffic.item[row]] * quantity, 2))
