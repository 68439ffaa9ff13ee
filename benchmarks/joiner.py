"""How many events a second the joiner joins on one core, and what an open impression costs.

::

    make bench-joiner ARGS='--impressions 1000000'

The input is ready arrays (ids as strings, times, hashes of event ids, encoded features): JSON and feature
encoding are not part of it; finding ids, crediting, labels, timers, rows and the store of features are. 30 %
of the impressions are clicked, 5 % of the clicks convert, some events come late, early or twice. In the same
run: a dict of objects, event by event, which says the same rows (checked), and river's `simulate_qa`, which
only holds a label back for a fixed time. Seconds are those of the processor.

Memory is what Python and numpy have allocated with all impressions open, less their features; the checkpoint
is what `Joiner.state` gives, less their features.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, get_args

import numpy as np

from benchmarks.joiner_peer import DictJoiner
from benchmarks.joiner_traffic import FEATURES, Traffic, make_traffic
from pipelines.config_sections import AttributionConfig, Policy
from pipelines.joiner import Joiner
from pipelines.label_news import ROW_KINDS

__all__ = ["main"]

_FEATURE_BYTES = FEATURES * 4
_RULE = AttributionConfig()
_WITH_VIEWS = AttributionConfig(view_through_window=86_400_000)


def events_per_second(traffic: Traffic, joiner: Joiner, size: int) -> float:
    steps = traffic.steps(size)
    gc.collect()
    began = time.process_time()
    for impressions, clicks, conversions, clock in steps:
        joiner.release(joiner.process(impressions, clicks, conversions, clock))
    return len(traffic) / (time.process_time() - began)


def peer_events_per_second(traffic: Traffic, size: int) -> float:
    steps, peer = traffic.steps(size), DictJoiner(_RULE)
    gc.collect()
    began = time.process_time()
    for step in steps:
        peer.process(*step)
    return len(traffic) / (time.process_time() - began)


def river_events_per_second(traffic: Traffic) -> float:
    """River's holding back of labels: two events a row, no ids, no windows, no corrections."""
    from river.stream import simulate_qa

    rows = min(len(traffic.impressions), 100_000)
    times = traffic.impressions.event_time[:rows].tolist()
    moments = [np.datetime64(moment, "ms").astype("datetime64[us]").item() for moment in times]

    def dataset() -> Iterator[tuple[dict[Hashable, Any], Any]]:
        for moment in moments:
            yield {"moment": moment}, False

    began = time.process_time()
    events = list(simulate_qa(dataset(), "moment", datetime.timedelta(days=1)))
    return len(events) / (time.process_time() - began)


def check_same_rows(traffic: Traffic) -> int:
    """Both joiners say the same rows; returns how many."""
    joiner, peer = Joiner(_RULE, "fnw", traffic_ratio=False), DictJoiner(_RULE)
    ours: Counter[tuple[Any, ...]] = Counter()
    theirs: Counter[tuple[Any, ...]] = Counter()
    number = {name: n for n, name in enumerate(traffic.impressions.impression_id)}
    ids = traffic.impressions.impression_id
    for impressions, clicks, conversions, clock in traffic.steps(2_000):
        names = np.array([number[name] for name in impressions.impression_id], np.int64)
        impressions.features["number"] = names
        joined = joiner.process(impressions, clicks, conversions, clock)
        for task, rows in zip(joiner.tasks, joined.examples, strict=True):
            places = joiner.features["number"][rows.slot].tolist() if len(rows) else []
            columns = (rows.kind, rows.label, rows.event_time, rows.known_at)
            for place, kind, *values in zip(places, *(column.tolist() for column in columns), strict=True):
                ours[(ids[place], task, ROW_KINDS[kind], *values)] += 1
        joiner.release(joined)
        theirs.update(peer.process(impressions, clicks, conversions, clock))
    if ours != theirs:
        first = next(iter((ours - theirs) + (theirs - ours)))
        raise SystemExit(f"the joiners differ, first in {first}")
    return ours.total()


def bytes_per_impression(traffic: Traffic, make: Callable[[], Any], size: int) -> tuple[float, Any]:
    """Bytes allocated for each open impression beyond its features, and the joiner that holds them."""
    steps = traffic.steps(size)
    gc.collect()
    tracemalloc.start()
    joiner = make()
    for step in steps:
        joiner.process(*step)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held, joiner


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joiner", description=__doc__.split("\n")[0])
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--step", type=int, default=4_096)
    given = parser.parse_args()
    print(f"{check_same_rows(make_traffic(20_000, days=10.0)):,} rows said alike by both joiners")
    traffic = make_traffic(given.impressions, days=10.0)
    print(f"{len(traffic):,} events of {given.impressions:,} impressions over 10 days")
    ours = events_per_second(traffic, Joiner(_RULE, "fnw"), given.step)
    print(f"joiner, fnw, steps of {given.step}: {ours:,.0f} events/s on one core")
    small = events_per_second(traffic, Joiner(_RULE, "fnw"), 256)
    print(f"joiner, fnw, steps of 256: {small:,.0f} events/s")
    views = events_per_second(traffic, Joiner(_WITH_VIEWS, "fnw"), given.step)
    print(f"joiner, fnw, with view-through windows: {views:,.0f} events/s")
    for policy in get_args(Policy):
        if policy not in ("fnw", "fnc"):
            found = events_per_second(traffic, Joiner(_RULE, policy), given.step)
            print(f"joiner, {policy}: {found:,.0f} events/s")
    others: dict[str, Callable[[], float]] = {
        "dict of objects": lambda: peer_events_per_second(traffic, given.step),
        "river simulate_qa": lambda: river_events_per_second(traffic),
    }
    for name, run in others.items():
        try:
            theirs = run()
        except ModuleNotFoundError:
            print(f"{name}: not installed (make setup-bench)")
            continue
        print(f"{name}: {theirs:,.0f} events/s, so the joiner does {ours / theirs:.1f} x as many")
    # Ten minutes: no window has closed yet.
    traffic = make_traffic(given.impressions, days=10 / 1440)
    joiner: Joiner
    held, joiner = bytes_per_impression(traffic, lambda: Joiner(_RULE, "fnw"), given.step)
    features = joiner.features["buckets"].nbytes
    print(f"open: {len(joiner):,}; {(held - features) / len(joiner):.0f} bytes each beyond the features")
    arrays, plain = joiner.state()
    state = sum(array.nbytes for name, array in arrays.items() if not name.startswith("feature_"))
    state += len(json.dumps(plain))
    print(f"checkpoint: {state / len(joiner):.0f} bytes each beyond the features")
    few = make_traffic(given.impressions // 5, days=10 / 1440)
    peer: DictJoiner
    held, peer = bytes_per_impression(few, lambda: DictJoiner(_RULE), given.step)
    print(f"dict of objects: {held / len(peer.open) - _FEATURE_BYTES:.0f} bytes each beyond the features")


if __name__ == "__main__":
    main()
