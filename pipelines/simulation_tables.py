"""Tables of the simulated log in the event contract, and the truth table beside them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.events import CLICK, CONVERSION, IMPRESSION, OPERATIONS
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_delays import CONVERSION_DELAY
from pipelines.simulation_delivery import RETRACT, Delivery
from pipelines.simulation_outcomes import Outcomes
from pipelines.simulation_traffic import Traffic, weekday
from pipelines.simulation_truth import Truth
from pipelines.simulation_world import (
    AGE_GROUPS,
    CATEGORIES,
    DEVICES,
    PLACEMENTS,
    REGIONS,
    SEGMENTS,
    TAGS,
    Items,
    World,
)

__all__ = [
    "advertiser_id",
    "click_table",
    "conversion_table",
    "impression_table",
    "truth_table",
]

Ints = NDArray[np.int64]

_EVENT_PREFIX = {IMPRESSION: "imp-", CLICK: "clk-", CONVERSION: "cnv-"}
_RETRACT_PREFIX = "rtr-"
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
# Odd, so that multiplication modulo 2**64 never gives the same number twice.
_SCATTER = np.uint64(0x9E3779B97F4A7C15)


def impression_table(
    config: SimulationConfig, world: World, traffic: Traffic, delivery: Delivery
) -> pa.Table:
    """Impressions in order of arrival: the contract's columns, then one column a feature."""
    row = delivery.row
    user, item = traffic.user[row], traffic.item[row]
    campaign = world.items.campaign[item]
    users = world.users
    numbers = row.astype(np.uint64) + np.uint64(config.seed % 2**32)
    ids = _ids(IMPRESSION, row)
    return pa.table(
        {
            "event_id": ids,
            "impression_id": ids,
            "event_time": delivery.event_time,
            "arrival_time": delivery.arrival_time,
            "user_id": _numbered("user_", user),
            "item_id": _numbered("item_", item),
            "position": pa.array(traffic.position[row], pa.int32()),
            "request_id": _joined("req-", pc.cast(pa.array(numbers * _SCATTER), pa.string())),
            "campaign_id": _numbered("campaign_", campaign),
            "advertiser_id": _numbered("advertiser_", world.campaigns.advertiser[campaign]),
            "category": _named(CATEGORIES, world.campaigns.category[campaign]),
            "tags": _item_tags(world.items).take(pa.array(item)),
            "price": world.items.price[item],
            "item_age_hours": traffic.item_age_hours[row],
            "user_segment": _named(SEGMENTS, users.segment[user]),
            "user_age_group": _named(AGE_GROUPS, users.age_group[user]),
            "user_region": _named(REGIONS, users.region[user]),
            "user_affinity": pa.array(traffic.user_affinity[row], from_pandas=True),
            "device": _named(DEVICES, traffic.device[row]),
            "placement": _named(PLACEMENTS, traffic.placement[row]),
            "weekday": _named(_WEEKDAYS, weekday(delivery.event_time)),
        }
    )


def click_table(delivery: Delivery) -> pa.Table:
    """Clicks in order of arrival."""
    return pa.table(
        {
            "event_id": _ids(CLICK, delivery.row),
            "impression_id": _ids(IMPRESSION, delivery.row),
            "event_time": delivery.event_time,
            "arrival_time": delivery.arrival_time,
        }
    )


def conversion_table(delivery: Delivery) -> pa.Table:
    """Conversions and retractions in order of arrival; a retraction has no value."""
    number = pc.cast(pa.array(delivery.row), pa.string())
    is_retract = pa.array(delivery.operation == RETRACT)
    prefix = pc.if_else(is_retract, _RETRACT_PREFIX, _EVENT_PREFIX[CONVERSION])
    return pa.table(
        {
            "event_id": pc.binary_join_element_wise(prefix, number, ""),
            "impression_id": _ids(IMPRESSION, delivery.row),
            "event_time": delivery.event_time,
            "arrival_time": delivery.arrival_time,
            "value": pa.array(delivery.value, from_pandas=True),
            "op": _named(OPERATIONS, delivery.operation.astype(np.int64)),
        }
    )


def truth_table(world: World, traffic: Traffic, truth: Truth, outcomes: Outcomes) -> pa.Table:
    """The truth of every impression, also of those that arrive after the end of the log.

    Columns: the exact probabilities, the intents (the same without a window), the outcomes as drawn (null:
    never), the weights of the conversion delay, the state of the walks and the lifetimes, times in ms.
    """
    campaign = world.items.campaign[traffic.item]
    rows = np.arange(len(traffic))
    columns = {
        "impression_id": _ids(IMPRESSION, rows),
        "event_time": traffic.event_time,
        "click_probability": truth.click_probability,
        "conversion_probability": truth.conversion_probability,
        "click_intent": truth.click_intent,
        "conversion_intent": truth.conversion_intent,
        "click_time": _scattered(len(rows), outcomes.click_row, outcomes.click_time),
        "conversion_time": _scattered(len(rows), outcomes.conversion_row, outcomes.conversion_time),
        "item_drift": truth.item_drift,
        "campaign_drift": truth.campaign_drift,
        "item_birth_time": world.items.birth[traffic.item],
        "campaign_birth_time": world.campaigns.birth[campaign],
        "campaign_death_time": world.campaigns.death[campaign],
    }
    for number, name in enumerate(CONVERSION_DELAY.names):
        columns[f"delay_weight_{name}"] = np.ascontiguousarray(truth.delay_weights[:, number])
    return pa.table(columns)


def advertiser_id(number: int) -> str:
    """Id under which an advertiser is logged."""
    return f"advertiser_{number}"


def _ids(kind: int, row: Ints) -> pa.Array:
    return _numbered(_EVENT_PREFIX[kind], row)


def _numbered(prefix: str, number: Ints) -> pa.Array:
    return _joined(prefix, pc.cast(pa.array(number), pa.string()))


def _joined(prefix: str, text: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pa.scalar(prefix), text, "")


def _named(names: tuple[str, ...], number: Ints) -> pa.Array:
    return pa.array(names).take(pa.array(number))


def _item_tags(items: Items) -> pa.Array:
    return pa.array([[TAGS[tag] for tag in tags if tag >= 0] for tags in items.tags], pa.list_(pa.string()))


def _scattered(n: int, row: Ints, time: Ints) -> pa.Array:
    """``time`` at ``row``, null elsewhere."""
    values, is_null = np.zeros(n, np.int64), np.ones(n, np.bool_)
    values[row], is_null[row] = time, False
    return pa.array(values, mask=is_null)
