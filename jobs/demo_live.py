"""The demo's live part: events arrive at a steady rate, are learned, published and served."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.consistency import check_consistency
from jobs.demo_recovery import start_worker
from jobs.freshness import freshness_report
from jobs.serve import ServeProcess
from pipelines.errors import CtrstreamError

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.event_files import EventFiles

__all__ = ["LiveResult", "run_live"]

_REQUEST_ROWS = 16
_REQUEST_EVERY_S = 0.05
_START_TIMEOUT_S = 120.0
_CATCH_UP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class LiveResult:
    """What the live part has shown: the documents of ``freshness.json`` and ``consistency.json``."""

    freshness: dict[str, Any]
    consistency: dict[str, Any]
    scored: int


def run_live(out: Path, config: Config, files: EventFiles, start: int, stop: int, rate: int) -> LiveResult:
    """Produce rows ``[start, stop)`` at ``rate`` events/s to a running worker, scoring all the while."""
    from jobs.produce import produce

    with ServeProcess(out / "serve", out / "releases").start() as server:
        worker = start_worker(out, out / "releases", out / "worker", until_end=False)
        try:
            _wait_for_worker(out / "worker", worker.pid)
            began = time.time()
            producer = threading.Thread(
                target=produce, args=(files, config), kwargs={"start": start, "stop": stop, "rate": rate}
            )
            producer.start()
            scored = _score_while(producer, server.url, files, start, stop)
            _wait_until_learned(out / "worker", config)
            worker.send_signal(signal.SIGTERM)
            worker.communicate(timeout=_CATCH_UP_TIMEOUT_S)
        finally:
            if worker.poll() is None:
                worker.kill()
        if worker.returncode != 0:
            raise CtrstreamError(
                f"the live worker failed with exit code {worker.returncode}.", hint=f"see {out}/worker.log"
            )
        time.sleep(2 * config.serve.reload_every / 1000)
    freshness = freshness_report(out / "releases", server.loaded, since_ms=round(began * 1000))
    return LiveResult(freshness, check_consistency(server.served, out / "releases"), scored)


def _wait_for_worker(state: Path, pid: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        path = state / "running.json"
        if path.exists() and json.loads(path.read_text())["pid"] == pid:
            return
        time.sleep(0.05)
    raise CtrstreamError("the live worker did not start in time.", hint=f"see {state.parent}/worker.log")


def _wait_until_learned(state: Path, config: Config) -> None:
    """Wait until the worker's last commit covers everything that the topics hold."""
    from jobs.checkpoint import CheckpointStore
    from pipelines.kafka_client import make_consumer
    from pipelines.kafka_source import Cursor

    store, deadline = CheckpointStore(state), time.monotonic() + _CATCH_UP_TIMEOUT_S
    consumer = make_consumer(config.kafka)
    try:
        while time.monotonic() < deadline:
            manifest = store.folder / (store.head() or "") / "MANIFEST.json"
            cursor = (
                Cursor.from_state(json.loads(manifest.read_text())["cursor"]) if manifest.exists() else {}
            )
            if all(
                place.offset >= end - 1
                for (topic, partition), place in cursor.items()
                for end in [_end(consumer, topic, partition)]
            ):
                return
            time.sleep(0.3)
    finally:
        consumer.close()
    raise CtrstreamError("the live worker did not catch up in time.", hint=f"see {state.parent}/worker.log")


def _end(consumer: Any, topic: str, partition: int) -> int:
    from kafka import TopicPartition

    own = TopicPartition(topic, partition)
    return int(consumer.end_offsets([own])[own])


def _score_while(producer: threading.Thread, url: str, files: EventFiles, start: int, stop: int) -> int:
    """Ask for scores, as an ad server would, until everything has been produced; returns how many."""
    import httpx

    scored = 0
    requests = _requests(files, start, stop)
    with httpx.Client(timeout=10) as client:
        while producer.is_alive():
            batch = next(requests)
            client.post(f"{url}/score", json={"impressions": batch}).raise_for_status()
            scored += len(batch)
            time.sleep(_REQUEST_EVERY_S)
    producer.join()
    return scored


def _requests(files: EventFiles, start: int, stop: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of the impressions of the live part, over and over, as JSON."""
    from pipelines.codec import encode_json
    from pipelines.events import IMPRESSION

    while True:
        for block in files.blocks(start, stop, 4096):
            impressions = block.tables[IMPRESSION]
            for first in range(0, impressions.num_rows, _REQUEST_ROWS):
                part = impressions.slice(first, _REQUEST_ROWS)
                rows = [json.loads(text) for text in encode_json(IMPRESSION, part)]
                yield [{name: row[name] for name in _WANTED if name in row} for row in rows]


_WANTED = ("impression_id", "user_id", "item_id", "position", "event_time", "features")
