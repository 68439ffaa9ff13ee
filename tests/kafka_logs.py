"""Small event logs for tests that send them to Kafka and read them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from jobs.broker import Broker
from pipelines.config import Config, load_config
from pipelines.event_files import EventFiles
from pipelines.events import EventBlock
from pipelines.kafka_source import KafkaSource

NOW = 1_767_571_200_000
TOPICS = ("impressions", "clicks", "conversions", "dead_letters")


def config_for(broker: Broker, name: str, *overrides: str, partitions: int = 2) -> Config:
    """A configuration with topics of its own on a broker."""
    topics = [f'kafka.topics.{topic}="{name}-{topic}"' for topic in TOPICS]
    address = f'kafka.bootstrap_servers="{broker.bootstrap_servers}"'
    return load_config(None, [address, f"kafka.partitions={partitions}", *topics, *overrides])


def write_log(folder: Path, impressions: int = 400, seed: int = 1) -> EventFiles:
    """A log with ties, redeliveries, rows that break the contract and messages that are no events."""
    rng = np.random.default_rng(seed)
    topics: list[list[dict[str, Any]]] = [[], [], []]
    for number in range(impressions):
        name, shown = f"i{number}", NOW + int(rng.integers(0, 3_000))
        event = {
            "event_id": name,
            "impression_id": name,
            "event_time": shown,
            "arrival_time": shown + int(rng.integers(0, 20)),
            "user_id": f"u{number % 17}",
            "item_id": f"a{number % 5}",
            "position": int(rng.integers(0, 6)),  # 0 breaks the contract
            "features": {"price": float(rng.integers(1, 9)), "tags": ["x", "y"][: int(rng.integers(0, 3))]},
        }
        topics[0].append(event)
        for kind, share in ((1, 0.4), (2, 0.2)):
            if rng.random() < share:
                happened = shown + int(rng.integers(1, 500))
                topics[kind].append(
                    {
                        "event_id": f"{kind}-{number}",
                        "impression_id": name,
                        "event_time": happened,
                        "arrival_time": happened + int(rng.integers(0, 20)),
                    }
                )
    malformed = []
    for kind, events in enumerate(topics):
        events += [events[int(n)] for n in rng.integers(0, len(events), 5)]
        events.sort(key=lambda event: event["arrival_time"])
        lines = [orjson.dumps(event) for event in events]
        lines.insert(len(lines) // 2, b'{"event_id": "bro\xffken"}')
        (folder / f"{TOPICS[kind]}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        malformed += [
            {"topic": TOPICS[kind], "value": value, "arrival_time": NOW + int(rng.integers(0, 3_000))}
            for value in ("", "{", json.dumps(events[0])[:-5], '{"impression_id": "i7", "event_id": 3}')
        ]
    (folder / "malformed.jsonl").write_bytes(b"\n".join(map(orjson.dumps, malformed)))
    return EventFiles(folder)


def read_all(source: KafkaSource, max_rows: int = 8192, timeout_s: float = 20.0) -> list[EventBlock]:
    """Everything that a source reading until the end has."""
    blocks = []
    while not source.exhausted:
        block = source.poll(max_rows, timeout_s)
        if block is not None:
            assert 0 < len(block) <= max_rows
            blocks.append(block)
    return blocks


def story(blocks: Sequence[EventBlock]) -> list[tuple[int, int, str]]:
    """Kind, arrival time and event id (or payload) of each row."""
    rows: list[tuple[int, int, str]] = []
    for block in blocks:
        names = [iter(table.column("event_id").to_pylist()) for table in block.tables]
        names.append(iter([letter.payload for letter in block.dead_letters]))
        for kind, arrival in zip(block.kind.tolist(), block.arrival_time.tolist(), strict=True):
            rows.append((kind, arrival, next(names[kind])))
        assert all(next(left, None) is None for left in names)
    return rows


def tables(blocks: Sequence[EventBlock]) -> list[pa.Table]:
    """The three tables of all blocks."""
    return [table.combine_chunks() for table in EventBlock.concat(list(blocks)).tables]
