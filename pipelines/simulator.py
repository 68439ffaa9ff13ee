"""A synthetic event log whose click and conversion probabilities, delays and drift are known exactly.

In reading order::

    world ─► traffic ─► truth ─► outcomes ─► delivery ─► tables
    who        who sees    exact     clicks and   network,    the event contract,
    exists     what when   p         conversions  faults      the truth apart

Each stage draws from a random stream of its own, so that a knob of a later stage (such as the fault rate)
leaves the earlier ones as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.events import TOPICS
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_delays import CLICK_DELAY, CLICK_WEIGHTS, CONVERSION_DELAY
from pipelines.simulation_delivery import RETRACT, Delivery, count_orphans, deliver
from pipelines.simulation_malformed import MalformedMessage, draw_malformed
from pipelines.simulation_outcomes import draw_outcomes
from pipelines.simulation_tables import (
    advertiser_id,
    click_table,
    conversion_table,
    impression_table,
    truth_table,
)
from pipelines.simulation_traffic import draw_traffic
from pipelines.simulation_truth import POSITION_PENALTY, Drift, draw_drift, exact_truth
from pipelines.simulation_world import build_world

__all__ = ["Simulation", "SimulationConfig", "simulate"]

_STREAMS = ("world", "traffic", "drift", "clicks", "conversions", "network", "faults", "malformed")


@dataclass(frozen=True)
class Simulation:
    """A simulated log.

    Attributes
    ----------
    config : SimulationConfig
    impressions, clicks, conversions : pa.Table
        Events in order of arrival; each further column of the impressions is a feature.
    truth : pa.Table
        One row an impression, also of those that arrive after the end: exact probabilities, intents,
        outcomes as drawn, delay weights, walks, lifetimes.
    malformed : tuple of MalformedMessage
        Messages that no reader can use, in order of arrival.
    facts : dict
        Truth that is the same for all rows: delay mixtures, position penalty, jump.
    counts : dict
        Messages by topic and by fault.
    """

    config: SimulationConfig
    impressions: pa.Table
    clicks: pa.Table
    conversions: pa.Table
    truth: pa.Table
    malformed: tuple[MalformedMessage, ...]
    facts: dict[str, Any]
    counts: dict[str, int]


def simulate(config: SimulationConfig) -> Simulation:
    """Simulate a log; the same config gives the same log.

    Raises
    ------
    ConfigError
        If a base rate cannot be reached because a window is too short for the delays.

    Examples
    --------
    >>> log = simulate(SimulationConfig(impressions=5_000, days=1, seed=1, faults=0))
    >>> log.impressions.num_rows, log.truth.num_rows
    (5000, 5000)
    >>> round(float(np.mean(log.truth["click_probability"])), 4)
    0.09
    """
    rng = {
        name: np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, number])))
        for number, name in enumerate(_STREAMS)
    }
    world = build_world(config, rng["world"])
    traffic = draw_traffic(config, world, rng["traffic"])
    drift = draw_drift(config, world, traffic, rng["drift"])
    truth = exact_truth(config, world, traffic, drift)
    outcomes = draw_outcomes(config, world, traffic, truth, rng["clicks"], rng["conversions"])
    topics = deliver(config, world, traffic, truth, outcomes, rng["network"], rng["faults"])
    tables = (
        impression_table(config, world, traffic, topics[0]),
        click_table(topics[1]),
        conversion_table(topics[2]),
    )
    shown_time = (
        traffic.event_time[topics[0].row],
        traffic.event_time[topics[1].row],
        traffic.event_time[topics[2].row],
    )
    malformed = draw_malformed(config, tables, shown_time, rng["malformed"])
    return Simulation(
        config=config,
        impressions=tables[0],
        clicks=tables[1],
        conversions=tables[2],
        truth=truth_table(world, traffic, truth, outcomes),
        malformed=malformed,
        facts=_facts(config, drift),
        counts=_counts(topics, len(malformed)),
    )


def _facts(config: SimulationConfig, drift: Drift) -> dict[str, Any]:
    return {
        "position_penalty": POSITION_PENALTY,
        "jump_advertiser_id": advertiser_id(drift.jump_advertiser),
        "jump_time": drift.jump_time,
        "jump_logit": drift.jump,
        "click_delay": CLICK_DELAY.to_mapping() | {"weights": CLICK_WEIGHTS.tolist()},
        "conversion_delay": CONVERSION_DELAY.stretched(config.delay_scale).to_mapping(),
    }


def _counts(topics: tuple[Delivery, Delivery, Delivery], malformed: int) -> dict[str, int]:
    impressions, clicks, conversions = topics
    return {
        **{name: len(topic) for name, topic in zip(TOPICS, topics, strict=True)},
        "late": sum(int(topic.is_late.sum()) for topic in topics),
        "duplicates": sum(int(topic.is_duplicate.sum()) for topic in topics),
        "retractions": int(np.sum((conversions.operation == RETRACT) & ~conversions.is_duplicate)),
        "orphans": count_orphans(impressions, clicks),
        "malformed": malformed,
    }
