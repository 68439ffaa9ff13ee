"""Messages that no reader can use, as a careless or broken producer sends them.

They come on top of the real events, so that a reader that refuses them all loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.duration import MINUTE_MS
from pipelines.events import CONVERSION, IMPRESSION, TOPICS, feature_names
from pipelines.simulation_config import SimulationConfig

__all__ = ["MALFORMATIONS", "MalformedMessage", "draw_malformed", "event_objects"]

Event = dict[str, Any]
Times = NDArray[np.int64]


@dataclass(frozen=True)
class MalformedMessage:
    """A message to be sent as it stands.

    Attributes
    ----------
    topic : str
        One of ``pipelines.events.TOPICS``.
    value : str
        Raw text of the message.
    arrival_time : int
        When it is sent, ms since the epoch.
    fault : str
        What is wrong with it, one of ``MALFORMATIONS``.
    """

    topic: str
    value: str
    arrival_time: int
    fault: str


def _without(name: str) -> Callable[[Event], str]:
    return lambda event: json.dumps({key: value for key, value in event.items() if key != name})


def _with(name: str, value: Any) -> Callable[[Event], str]:
    return lambda event: json.dumps(event | {name: value})


def _truncated(event: Event) -> str:
    text = json.dumps(event)
    return text[: len(text) // 2]


def _listed(event: Event) -> str:
    return json.dumps(list(event.values()))


NEGATIVE_DELAY = "negative_delay"
# What is wrong -> the topics that it can happen to, and the text of the message made from a good event.
MALFORMATIONS: dict[str, tuple[tuple[int, ...], Callable[[Event], str]]] = {
    "truncated": ((0, 1, 2), _truncated),
    "empty": ((0, 1, 2), lambda event: ""),
    "not_an_object": ((0, 1, 2), _listed),
    "no_impression_id": ((0, 1, 2), _without("impression_id")),
    "no_event_time": ((0, 1, 2), _without("event_time")),
    "event_time_is_nan": ((0, 1, 2), _with("event_time", float("nan"))),
    "event_time_is_text": ((0, 1, 2), _with("event_time", "yesterday")),
    "no_user_id": ((0,), _without("user_id")),
    "position_is_zero": ((0,), _with("position", 0)),
    "features_are_a_list": ((0,), _with("features", ["price", 3])),
    # draw_malformed has set its event_time before that of the impression.
    NEGATIVE_DELAY: ((1, 2), json.dumps),
    "unknown_operation": ((2,), _with("op", "refund")),
    "value_is_nan": ((2,), _with("value", float("nan"))),
}


def draw_malformed(
    config: SimulationConfig,
    tables: tuple[pa.Table, pa.Table, pa.Table],
    shown_time: tuple[Times, Times, Times],
    rng: np.random.Generator,
) -> tuple[MalformedMessage, ...]:
    """Malformed messages made from some of the events, in order of arrival.

    Each is sent right after the good event that it was made from, under an event id of its own.

    Parameters
    ----------
    config : SimulationConfig
    tables : tuple of pa.Table
        Impressions, clicks and conversions.
    shown_time : tuple of ndarray of int64
        For each table, when the impression of each event was shown, ms.
    rng : numpy.random.Generator
    """
    messages: list[MalformedMessage] = []
    for kind, table in enumerate(tables):
        chosen = np.flatnonzero(rng.random(table.num_rows) < config.faults)
        fitting = [name for name, (kinds, _) in MALFORMATIONS.items() if kind in kinds]
        faults = rng.integers(len(fitting), size=len(chosen))
        good = event_objects(table.take(pa.array(chosen)), kind)
        for event, fault, shown in zip(good, faults, shown_time[kind][chosen], strict=True):
            name = fitting[int(fault)]
            # Accepted all the same, it would make an impression nobody saw, or a label that is wrong.
            for key in ("event_id", "impression_id") if kind == IMPRESSION else ("event_id",):
                event[key] = f"bad-{event[key]}"
            if name == NEGATIVE_DELAY:
                event["event_time"] = int(shown) - MINUTE_MS
            arrival_time = min(event["arrival_time"] + 1, config.end)
            messages.append(MalformedMessage(TOPICS[kind], MALFORMATIONS[name][1](event), arrival_time, name))
    return tuple(sorted(messages, key=lambda message: message.arrival_time))


def event_objects(table: pa.Table, kind: int, rows_at_once: int = 10_000) -> Iterator[Event]:
    """The events of a table as JSON objects: features in an object of their own, nulls left out."""
    features = set(feature_names(table)) if kind == IMPRESSION else set()
    for batch in table.to_batches(max_chunksize=rows_at_once):
        for row in batch.to_pylist():
            event = {name: value for name, value in row.items() if value is not None and name not in features}
            if kind == IMPRESSION:
                event["features"] = {
                    name: row[name] for name in row if name in features and row[name] is not None
                }
            if kind == CONVERSION and event.get("op") == "assert":
                del event["op"]
            yield event
