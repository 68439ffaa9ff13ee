"""How late outcomes arrive: the share that is there some time after what they belong to."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.check_events import coverage
from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.duration import parse_duration
from pipelines.snapshot import DELAYS_NAME
from pipelines.snapshot_manifest import SnapshotManifest
from pipelines.storage import open_folder

__all__ = ["DELAY_STEPS", "Arrivals", "credited_arrivals", "event_shares"]

# As people read them; arrival less opening.
DELAY_STEPS = ("1s", "10s", "1m", "10m", "1h", "6h", "1d", "3d", "7d", "14d", "30d")


@dataclass(frozen=True)
class Arrivals:
    """Outcomes of one kind by delay.

    Attributes
    ----------
    of : str
        What was counted.
    count : int
        How many.
    shares : tuple of float or None
        Share that had arrived by each of `DELAY_STEPS` after what it belongs to opened; None beyond the label
        window.
    """

    of: str
    count: int
    shares: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"steps": list(DELAY_STEPS)}


def credited_arrivals(location: str | Path, manifest: SnapshotManifest) -> list[Arrivals]:
    """Delays of the outcomes behind positives: those seen, and all that will come by the delay curve.

    Of the youngest windows only the short delays have been seen yet. The curve corrects that
    (`pipelines.delay.DelayCurve`).

    Raises
    ------
    FileNotFoundError
        If the snapshot has no delays.
    """
    table = pq.read_table(io.BytesIO(open_folder(location).read(DELAYS_NAME)))
    rule = AttributionConfig.model_validate(manifest.config["attribution"])
    found = []
    for task in manifest.tasks:
        grid = DelayGrid(rule.width(task) + rule.allowed_lateness)
        own = table.filter(pa.array([name == task for name in table.column("task").to_pylist()], pa.bool_()))
        found += _of_task(own, task, grid)
    return found


def _of_task(own: pa.Table, task: Task, grid: DelayGrid) -> list[Arrivals]:
    edges = grid.edges()
    delay, follow_up = (own.column(name).to_numpy() for name in ("delay_bin", "follow_up_bin"))
    count = np.asarray(own.column("count").to_numpy(), np.float64)
    total = int(count.sum())
    steps = np.array([parse_duration(step) for step in DELAY_STEPS], np.float64)
    by_bin = np.cumsum(np.bincount(delay, count, grid.bins)) / max(total, 1)
    seen = np.interp(steps, edges, by_bin)
    curve = DelayCurve.fit(edges[delay], edges[follow_up], count).cdf(steps)
    outcome = {"click": "clicks", "conversion": "conversions", "view_through": "view-through conversions"}
    name = outcome[task]
    if not total:
        return [Arrivals(f"{name} credited", 0, (None,) * len(steps))]
    inside = [step <= grid.horizon for step in steps]
    rows = ((f"{name} credited so far", seen), (f"{name} credited in the end", curve))
    return [
        Arrivals(
            of,
            total,
            tuple(float(share) if fits else None for share, fits in zip(shares, inside, strict=True)),
        )
        for of, shares in rows
    ]


def event_shares(events: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """Of distinct clicks, and of conversions, the share in each class, and ``coverage``."""
    found = {}
    for kind, classes in events.items():
        distinct = classes.get("read", 0) - classes.get("duplicate", 0)
        if "orphan" not in classes or not distinct:
            continue
        own = {name: count / distinct for name, count in classes.items() if name not in ("read", "duplicate")}
        share = coverage(classes)
        found[kind] = own if share is None else own | {"coverage": share}
    return found
