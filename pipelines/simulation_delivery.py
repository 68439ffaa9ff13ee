"""Delivery of simulated events: network delays, faults, and the hard end of the log.

Every fault leaves the exact probabilities true: once all events are known, the labels are those that the
world drew. So a retraction takes back a conversion that was asserted by mistake, on a click that never
converts, and malformed messages come on top of the real ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipelines.duration import HOUR_MS, MINUTE_MS, SECOND_MS
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_delays import CONVERSION_DELAY
from pipelines.simulation_outcomes import Outcomes, draw_values
from pipelines.simulation_traffic import Traffic
from pipelines.simulation_truth import Truth
from pipelines.simulation_world import World

__all__ = ["ASSERT", "RETRACT", "Delivery", "count_orphans", "deliver"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Codes are row numbers into pipelines.events.OPERATIONS.
ASSERT, RETRACT = 0, 1

# 20 ms to 920 ms: less than the least click delay, so that only a fault makes an orphan.
_LEAST_NETWORK_MS, _MEAN_NETWORK_MS, _MOST_NETWORK_MS = 20, 150.0, 900.0


@dataclass(frozen=True)
class Delivery:
    """The messages of one topic; every array has one entry a message.

    Attributes
    ----------
    row : ndarray of int64
        Row number of the impression.
    event_time, arrival_time : ndarray of int64
        When it happened and when it became known, ms.
    operation : ndarray of int8
        ASSERT or RETRACT.
    value : ndarray of float64
        Worth of a conversion, NaN for anything else.
    is_late, is_duplicate : ndarray of bool
        Which fault was laid upon the message.
    """

    row: Ints
    event_time: Ints
    arrival_time: Ints
    operation: NDArray[np.int8]
    value: Floats
    is_late: NDArray[np.bool_]
    is_duplicate: NDArray[np.bool_]

    @classmethod
    def of(cls, row: Ints, event_time: Ints, operation: int = ASSERT, value: Floats | None = None) -> Self:
        """Messages that become known at the moment they happen."""
        n = len(row)
        return cls(
            row=row,
            event_time=event_time,
            arrival_time=event_time,
            operation=np.full(n, operation, np.int8),
            value=np.full(n, np.nan) if value is None else value,
            is_late=np.zeros(n, np.bool_),
            is_duplicate=np.zeros(n, np.bool_),
        )

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Self:
        """The messages at an index or under a mask."""
        return type(self)(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def followed_by(self, *others: Self) -> Self:
        """These messages, then the others'."""
        parts = (self, *others)
        return type(self)(
            *(
                np.concatenate([getattr(part, field.name) for part in parts])
                for field in dataclasses.fields(self)
            )
        )


def deliver(
    config: SimulationConfig,
    world: World,
    traffic: Traffic,
    truth: Truth,
    outcomes: Outcomes,
    network_rng: np.random.Generator,
    fault_rng: np.random.Generator,
) -> tuple[Delivery, Delivery, Delivery]:
    """What each topic receives, in order of arrival, until the end of the log.

    1. Conversions asserted by mistake, and their retractions, join the conversions.
    2. Every message takes its network delay.
    3. Some are late by minutes or hours.
    4. Some impressions arrive only after their click: the click is an orphan until then.
    5. Some messages are delivered twice.
    6. What would become known after the end of the log is cut off.
    """
    impressions = Delivery.of(np.arange(len(traffic)), traffic.event_time)
    clicks = Delivery.of(outcomes.click_row, outcomes.click_time)
    conversions = Delivery.of(outcomes.conversion_row, outcomes.conversion_time, ASSERT, outcomes.value)
    conversions = _with_retractions(config, world, traffic, truth, outcomes, conversions, fault_rng)
    topics = [_over_network(topic, network_rng) for topic in (impressions, clicks, conversions)]
    topics = [_with_late(topic, config.faults, fault_rng) for topic in topics]
    topics[0] = _with_orphans(topics[0], topics[1], config.faults, fault_rng)
    topics = [_with_duplicates(topic, config.faults, fault_rng) for topic in topics]
    impressions, clicks, conversions = (_until(config.end, topic) for topic in topics)
    return impressions, clicks, conversions


def count_orphans(impressions: Delivery, clicks: Delivery) -> int:
    """How many clicks first arrive before their impression, or without it."""
    never = np.iinfo(np.int64).max
    shown = np.full(1 + max(_largest(impressions.row), _largest(clicks.row)), never, np.int64)
    np.minimum.at(shown, impressions.row, impressions.arrival_time)
    first = ~clicks.is_duplicate
    return int(np.sum(clicks.arrival_time[first] < shown[clicks.row[first]]))


def _largest(row: Ints) -> int:
    return int(row.max(initial=-1))


def _with_retractions(
    config: SimulationConfig,
    world: World,
    traffic: Traffic,
    truth: Truth,
    outcomes: Outcomes,
    conversions: Delivery,
    rng: np.random.Generator,
) -> Delivery:
    candidates = np.flatnonzero(~np.isin(outcomes.click_row, outcomes.conversion_row))
    count = min(int(rng.binomial(len(conversions), config.faults)), len(candidates))
    chosen = np.sort(rng.choice(candidates, size=count, replace=False))
    row = outcomes.click_row[chosen]
    delay = CONVERSION_DELAY.stretched(config.delay_scale).sample(truth.delay_weights[row], rng)
    asserted = outcomes.click_time[chosen] + delay
    regret = config.delay_scale * HOUR_MS * np.exp(rng.standard_normal(count))
    retracted = asserted + MINUTE_MS + regret.astype(np.int64)
    return conversions.followed_by(
        Delivery.of(row, asserted, ASSERT, draw_values(world, traffic, row, rng)),
        Delivery.of(row, retracted, RETRACT),
    )


def _over_network(topic: Delivery, rng: np.random.Generator) -> Delivery:
    delay = np.minimum(rng.exponential(_MEAN_NETWORK_MS, len(topic)), _MOST_NETWORK_MS)
    arrival_time = topic.event_time + _LEAST_NETWORK_MS + delay.astype(np.int64)
    return dataclasses.replace(topic, arrival_time=arrival_time)


def _with_late(topic: Delivery, rate: float, rng: np.random.Generator) -> Delivery:
    is_late = rng.random(len(topic)) < rate
    behind = np.clip(20 * MINUTE_MS * np.exp(1.2 * rng.standard_normal(len(topic))), MINUTE_MS, 12 * HOUR_MS)
    arrival_time = topic.arrival_time + np.where(is_late, behind.astype(np.int64), 0)
    return dataclasses.replace(topic, arrival_time=arrival_time, is_late=is_late)


def _with_orphans(impressions: Delivery, clicks: Delivery, rate: float, rng: np.random.Generator) -> Delivery:
    chosen = rng.random(len(clicks)) < rate
    behind = rng.integers(SECOND_MS, 10 * MINUTE_MS, size=len(clicks))
    arrival_time = impressions.arrival_time.copy()
    # Impressions are still in order of their row number, one message each.
    row = clicks.row[chosen]
    arrival_time[row] = np.maximum(arrival_time[row], (clicks.arrival_time + behind)[chosen])
    return dataclasses.replace(impressions, arrival_time=arrival_time)


def _with_duplicates(topic: Delivery, rate: float, rng: np.random.Generator) -> Delivery:
    again = topic.take(rng.random(len(topic)) < rate)
    # Seconds for a retried send, hours for a producer that starts over.
    behind = SECOND_MS + (2 * MINUTE_MS * np.exp(1.5 * rng.standard_normal(len(again)))).astype(np.int64)
    return topic.followed_by(
        dataclasses.replace(
            again,
            arrival_time=again.arrival_time + behind,
            is_late=np.zeros(len(again), np.bool_),
            is_duplicate=np.ones(len(again), np.bool_),
        )
    )


def _until(end: int, topic: Delivery) -> Delivery:
    known = topic.take(topic.arrival_time <= end)
    return known.take(np.argsort(known.arrival_time, kind="stable"))
