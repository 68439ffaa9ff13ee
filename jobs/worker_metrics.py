"""What the worker tells Prometheus, on a port of its own: `docs/operations.md` lists the names.

The worker hands over figures now and then, and a scrape shows the last ones: no scrape ever looks into, or
waits for, a loop that is running.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jobs.freshness_histogram import FreshnessHistogram
from jobs.produced_times import middles
from jobs.progressive import MATURITIES
from jobs.release_manifest import parse_name
from monitoring.stall import LagWatch, StallWatch
from pipelines.config_sections import StreamConfig
from pipelines.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from jobs.worker import Worker

__all__ = ["STAGES", "WorkerMetrics", "parse_address"]

log = logging.getLogger(__name__)

# What an event goes through after it has reached the broker; "served" is told by `ctrstream serve`.
STAGES = ("joined", "learned", "committed", "published")
_UPDATE_EVERY_S = 1.0
_WINDOWS_H = (1, 24)
_WORST_SEGMENTS = 20


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, or of ``PORT`` on the loopback interface.

    Raises
    ------
    ConfigError
        If it is neither.

    Examples
    --------
    >>> parse_address("9100"), parse_address("0.0.0.0:9100"), parse_address("[::1]:9100")
    (('127.0.0.1', 9100), ('0.0.0.0', 9100), ('::1', 9100))
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        raise ConfigError(
            f"expected the address of the metrics as HOST:PORT or PORT. Received: {text!r}.",
            hint="for example --metrics 127.0.0.1:9100",
        )
    return host.strip("[]") or "127.0.0.1", int(port)


class WorkerMetrics(Collector):
    """Collects and, if an address is configured, serves the figures of one worker.

    Parameters
    ----------
    config : StreamConfig
        ``metrics`` is the address; empty: nothing is collected or served.
    clock : callable
        Wall clock, seconds since the epoch.

    Raises
    ------
    SetupError
        If the address cannot be listened on.

    Attributes
    ----------
    port : int or None
        The port that is served, which matters where 0 was asked for.
    """

    def __init__(self, config: StreamConfig, clock: Callable[[], float]) -> None:
        self._clock, self._is_on = clock, bool(config.metrics)
        self._stall = StallWatch(config.stall_after / 1000)
        self._behind = LagWatch(config.lag_alarm, config.stall_after / 1000)
        self._is_stalled = self._is_behind = False
        self._freshness = FreshnessHistogram(STAGES)
        self._families: list[Metric] = []
        self._last_update: float | None = None
        self._last_rows = 0
        self._server: Any = None
        self.port: int | None = None
        if self._is_on:
            self._serve(*parse_address(config.metrics))

    def began(self, produced_at: NDArray[np.int64] | None) -> None:
        """A step is about to be joined and learned; ``produced_at`` is when its rows reached the broker."""
        self._rows_reached("joined", produced_at)

    def learned(self, produced_at: NDArray[np.int64] | None) -> None:
        """A step has been learned."""
        self._rows_reached("learned", produced_at)

    def reached(self, stage: str, produced: Sequence[tuple[int, int]]) -> None:
        """Events are committed or published: the bucket of 100 ms in which each was produced, and count."""
        if not self._is_on or not produced:
            return
        at, count = middles(produced)
        self._freshness.add(stage, self._clock() * 1000 - at, count)

    def update(self, now: float, worker: Worker) -> None:
        """Take new figures if the last ones are older than a second; looks for a stall in any case."""
        since = None if self._last_update is None else now - self._last_update
        if since is not None and since < _UPDATE_EVERY_S:
            return
        rows, lag = sum(worker.loop.read.values()), worker.source.lag()
        is_stalled = self._stall.look(now, position=rows, lag=lag)
        if is_stalled and not self._is_stalled:
            log.error("stalled: the position does not advance rows=%d lag=%d", rows, lag)
        is_behind = self._behind.look(now, lag)
        if is_behind and not self._is_behind:
            log.error("falling behind: the lag is above stream.lag_alarm and does not sink lag=%d", lag)
        self._is_stalled, self._is_behind = is_stalled, is_behind
        if self._is_on:
            speed = (rows - self._last_rows) / since if since else 0.0
            self._families = [*_consumption(lag, speed, is_stalled, is_behind), *_progress(worker)]
            self._families += [*_rows(worker), *_quality(worker), *_segments(worker), *_breaker(worker)]
        self._last_update, self._last_rows = now, rows

    def collect(self) -> Iterator[Metric]:
        """The figures, for a registry."""
        yield from self._families
        yield self._freshness.family()

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def _serve(self, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server = start_http_server(port, host, registry)
        except OSError as error:
            raise SetupError(
                f"cannot serve metrics on {host}:{port}: {error}.", hint="choose another --metrics HOST:PORT"
            ) from error
        self.port = int(self._server[0].server_port)
        log.info("metrics on http://%s:%d/metrics", host, self.port)

    def _rows_reached(self, stage: str, produced_at: NDArray[np.int64] | None) -> None:
        if self._is_on and produced_at is not None:
            waited = self._clock() * 1000 - produced_at.astype(np.float64)
            self._freshness.add(stage, waited, np.ones(len(waited), np.int64))


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ctrstream_{name}", text, value=value)


def _consumption(lag: int, speed: float, is_stalled: bool, is_behind: bool) -> Iterator[Metric]:
    yield _gauge("lag_messages", "Messages that the broker holds and that were not handed out", lag)
    yield _gauge("rows_per_second", "Rows read, over the time since the last figures", speed)
    yield _gauge("stalled", "1 while the position does not advance though there is more to read", is_stalled)
    yield _gauge("lag_alarm", "1 while the lag is above stream.lag_alarm and does not sink", is_behind)


def _progress(worker: Worker) -> Iterator[Metric]:
    loop = worker.loop
    yield _gauge("step", "Steps learned", loop.step_number)
    yield _gauge("committed_step", "Step of the last commit", worker.commits.step)
    yield _gauge("published_step", "Step of the newest release", parse_name(worker.release)[1])
    yield _gauge("event_clock_timestamp_seconds", "Arrival time of the newest row", loop.clock / 1000)
    pause_s = worker.pause_p99_ms() / 1000
    yield _gauge(
        "commit_pause_p99_seconds", "How long learning stops for a commit, of the last 1000", pause_s
    )
    yield _gauge("open_impressions", "Impressions that the joiner holds", len(loop.joiner))
    yield InfoMetricFamily(
        "ctrstream_published_release", "Name of the newest release", value={"release": worker.release}
    )
    offsets = GaugeMetricFamily(
        "ctrstream_next_offset", "Offset of the next message", labels=["topic", "partition"]
    )
    for (topic, partition), place in sorted(worker.cursor.items()):
        offsets.add_metric([topic, str(partition)], place.offset)
    yield offsets


def _rows(worker: Worker) -> Iterator[Metric]:
    read = CounterMetricFamily("ctrstream_rows_read", "Rows read", labels=["kind"])
    for kind, rows in worker.loop.read.items():
        read.add_metric([kind], rows)
    yield read
    accounted = GaugeMetricFamily(
        "ctrstream_rows", "Rows read, by what became of them", labels=["kind", "class"]
    )
    for kind, classes in worker.loop.accounting.value().items():
        for name, rows in classes.items():
            accounted.add_metric([kind, name], rows)
    yield accounted
    lost = GaugeMetricFamily(
        "ctrstream_rows_unaccounted", "Rows read less rows accounted for: 0", labels=["kind"]
    )
    for kind, rows in worker.loop.accounting.check(worker.loop.read).items():
        lost.add_metric([kind], rows)
    yield lost


def _quality(worker: Worker) -> Iterator[Metric]:
    labels = ["task", "predictor", "maturity", "hours"]
    families = {
        "rows": GaugeMetricFamily("ctrstream_quality_rows", "Windows, or rows, judged", labels=labels),
        "ne": GaugeMetricFamily("ctrstream_quality_ne", "Log loss over base-rate entropy", labels=labels),
        "pcoc": GaugeMetricFamily("ctrstream_quality_pcoc", "Predicted over observed", labels=labels),
    }
    for hours, maturity in itertools.product(_WINDOWS_H, MATURITIES):
        for (task, predictor), sums in worker.loop.progressive.trailing(hours, maturity).items():
            figures = sums.value()
            for name, family in families.items():
                value = figures[name]
                if value is not None:
                    family.add_metric([task, predictor, maturity, str(hours)], value)
    yield from families.values()


def _segments(worker: Worker) -> Iterator[Metric]:
    labels = ["task", "field", "key"]
    z = GaugeMetricFamily("ctrstream_segment_z", "Observed less predicted, in standard errors", labels=labels)
    pcoc = GaugeMetricFamily("ctrstream_segment_pcoc", "Predicted over observed", labels=labels)
    rows = GaugeMetricFamily("ctrstream_segment_rows", "Windows that closed", labels=labels)
    for one in worker.loop.segments.worst(_WORST_SEGMENTS):
        for family, value in ((z, one.z), (pcoc, one.pcoc), (rows, one.rows)):
            if value is not None:
                family.add_metric([one.task, one.field, one.key], value)
    yield from (z, pcoc, rows)


def _breaker(worker: Worker) -> Iterator[Metric]:
    breaker = worker.breaker
    yield _gauge("breaker_open", "1 while rows are held and not learned", breaker.mode != "learning")
    yield CounterMetricFamily("ctrstream_breaker_trips", "How often it has opened", value=breaker.trips)
    yield _gauge("hold_rows", "Rows that wait on disk", breaker.held_rows)
    yield _gauge("hold_capacity_rows", "Rows that may wait on disk", breaker.config.hold_rows)
    figures = GaugeMetricFamily(
        "ctrstream_breaker_figure", "What the breaker judges, of the trailing window", labels=["figure"]
    )
    for name, value in breaker.bounds.figures().items():
        if value is not None:
            figures.add_metric([name], value)
    yield figures
