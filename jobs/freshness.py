"""Freshness: from an event reaching the broker to a release that learned it being published and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.release import list_releases
from jobs.release_manifest import Manifest
from monitoring.freshness import LatencyHistogram

__all__ = ["BUDGET_S", "freshness_report"]

# What a worker that publishes every 2 s is meant to reach at the 95th percentile.
BUDGET_S = 5.0


def freshness_report(releases: Path, loaded: Path, *, since_ms: int = 0) -> dict[str, Any]:
    """Content of ``freshness.json``.

    An event is served from the moment when the first release that has learned it, or a later one, was
    loaded by the server.

    Parameters
    ----------
    releases : Path
        Releases that the worker wrote; each says when its new events reached the broker.
    loaded : Path
        ``loaded.jsonl`` of ``ctrstream serve``.
    since_ms : int
        Only events that reached the broker from then on (wall clock, ms).
    """
    published, served = LatencyHistogram(), LatencyHistogram()
    loads = _loads(loaded)
    for name in list_releases(releases):
        manifest = Manifest.read(releases / name)
        produced = manifest.extra.get("produced_at")
        if produced is None:
            continue
        order = (manifest.epoch, manifest.step)
        served_at = min((at for known, at in loads if known >= order), default=None)
        # A bucket holds events from its start to its end: its middle is what they waited from.
        middle = produced["resolution_ms"] / 2
        for bucket, count in produced["counts"]:
            at = bucket * produced["resolution_ms"] + middle
            if at < since_ms:
                continue
            published.update([(manifest.extra["published_at"] - at) / 1000], [count])
            if served_at is not None:
                served.update([(served_at - at) / 1000], [count])
    return {
        "stages": {"event to published": published.value(), "event to served": served.value()},
        "budget_s": BUDGET_S,
    }


def _loads(path: Path) -> list[tuple[tuple[int, int], int]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        _, epoch, step = entry["release"].rsplit("-", 2)
        found.append(((int(epoch), int(step)), int(entry["loaded_at_ms"])))
    return found
