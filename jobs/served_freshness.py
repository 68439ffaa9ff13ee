"""When the events that a release has learned come into service, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from jobs.freshness_histogram import FreshnessHistogram
from jobs.produced_times import middles
from jobs.release import list_releases
from jobs.release_manifest import Manifest, parse_name
from jobs.release_watch import Loaded
from pipelines.errors import CtrstreamError

__all__ = ["ServedFreshness"]


class ServedFreshness(Collector):
    """The last stage of freshness: from an event reaching the broker to a release that learned it in service.

    An event is served once, when the first release that has learned it, or a later one, is loaded. What the
    release has learned that the server began with is not counted: it may have been served before.

    Parameters
    ----------
    root : Path
        Folder of releases.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._histogram = FreshnessHistogram(["served"])
        self._served: tuple[int, int] | None = None

    def loaded(self, found: Loaded) -> None:
        """A release has come into service; going back to an older one serves nothing new."""
        newest = parse_name(found.release.name)[:2]
        if self._served is None or newest <= self._served:
            self._served = self._served or newest
            return
        before, self._served = self._served, newest
        for name in list_releases(self._root):
            if before < parse_name(name)[:2] <= newest:
                self._add(name, found.loaded_at)

    def collect(self) -> Iterator[Metric]:
        """The figures, for a registry."""
        yield self._histogram.family()

    def _add(self, name: str, loaded_at: int) -> None:
        try:
            produced = Manifest.read(self._root / name).extra.get("produced_at")
        except (CtrstreamError, OSError):  # the worker has removed it meanwhile: too old to be kept
            return
        if produced is None or not produced["counts"]:
            return
        at, count = middles(produced["counts"], produced["resolution_ms"])
        self._histogram.add("served", loaded_at - at, count)
