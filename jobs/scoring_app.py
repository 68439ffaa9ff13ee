"""The scoring endpoint: an ASGI application over one folder of releases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from jobs.release_watch import ReleaseWatch, wall_clock_ms
from jobs.served_freshness import ServedFreshness
from jobs.served_log import ServedLog
from pipelines.errors import DataError

__all__ = ["MAX_BODY_BYTES", "MAX_IMPRESSIONS", "ScoreRequest", "create_app"]

log = logging.getLogger(__name__)

# Scoring runs on the event loop: this many impressions keep it busy for some 20 ms.
MAX_IMPRESSIONS = 1000
MAX_BODY_BYTES = 4 << 20
_LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)

_FEATURE_EXPECTED = "expected a string, a finite number, true or false, a list of strings, or null"

_Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
_Feature = StrictStr | StrictBool | StrictInt | _Number | list[StrictStr | None] | None


class Impression(BaseModel):
    """One impression to score: the event contract's fields that are known when it is scored."""

    model_config = ConfigDict(extra="forbid")

    impression_id: str
    user_id: str
    item_id: str
    event_time: int = Field(ge=0, description="ms since the epoch, UTC")
    position: int | None = Field(default=None, ge=1)
    features: dict[str, _Feature] = Field(default_factory=dict)


class ScoreRequest(BaseModel):
    """Body of ``POST /score``."""

    model_config = ConfigDict(extra="forbid")

    impressions: list[Impression] = Field(min_length=1, max_length=MAX_IMPRESSIONS)


@dataclass
class ServingMetrics:
    """What ``GET /metrics`` tells Prometheus, in a registry of its own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        registry = self.registry
        self.requests = Counter(
            "ctrstream_requests", "POST /score by status code", ["code"], registry=registry
        )
        self.impressions = Counter("ctrstream_impressions", "Impressions scored", registry=registry)
        self.latency = Histogram(
            "ctrstream_score_seconds", "POST /score", buckets=_LATENCY_BUCKETS_S, registry=registry
        )
        self.release = Gauge(
            "ctrstream_release_info", "1 for the release in service", ["release"], registry=registry
        )
        self.step = Gauge("ctrstream_release_step", "Step of the release in service", registry=registry)
        self.learned_until = Gauge(
            "ctrstream_release_last_event_timestamp_seconds", "Newest event learned", registry=registry
        )
        self.refusals = Gauge("ctrstream_reload_refusals", "Releases refused so far", registry=registry)
        self.lost = Gauge("ctrstream_served_log_lost_lines", "Log lines not written", registry=registry)

    def page(self, watch: ReleaseWatch, served: ServedLog | None) -> bytes:
        """The metrics as text."""
        manifest = watch.current.release.manifest
        self.release.clear()
        self.release.labels(manifest.name).set(1)
        self.step.set(manifest.step)
        self.learned_until.set(manifest.last_event_time / 1000.0)
        self.refusals.set(watch.refusals)
        self.lost.set(0 if served is None else served.lost)
        return generate_latest(self.registry)


class ScoringEndpoint:
    """The handlers, over one watched folder of releases and one log."""

    def __init__(
        self, watch: ReleaseWatch, served: ServedLog | None, reload_every: int, clock: Callable[[], int]
    ) -> None:
        self.watch = watch
        self.served = served
        self.metrics = ServingMetrics()
        self.freshness = ServedFreshness(watch.root)
        self.freshness.loaded(watch.current)
        self.metrics.registry.register(self.freshness)
        self._reload_every_s = reload_every / 1000.0
        self._clock = clock

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Follow CURRENT while the application runs; write out the log when it ends."""
        following = asyncio.create_task(self._follow())
        yield
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        if self.served is not None:
            self.served.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._reload_every_s)
            try:
                if await asyncio.to_thread(self.watch.poll):
                    await asyncio.to_thread(self.freshness.loaded, self.watch.current)
            except Exception:
                # Of code that a release brings in: it must not end the loop, and the log has the traceback.
                log.exception("looking for a new release failed; still serving the old one")

    async def score(self, request: Request) -> Response:
        """Logit and probability of each task for each impression."""
        started = time.perf_counter()
        try:
            status, answer = 200, self._answer(await _read(request))
        except _Refusal as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
        self.metrics.requests.labels(str(status)).inc()
        self.metrics.latency.observe(time.perf_counter() - started)
        return _json(answer, status)

    async def healthz(self) -> Response:
        """What is served, since when, and why it is not newer."""
        loaded, problem = self.watch.current, self.watch.problem
        return _json(
            {
                "status": "ok" if problem is None else "held back",
                "release": loaded.release.name,
                "digest": loaded.release.digest(),
                "loaded_at": loaded.loaded_at,
                "age_s": (self._clock() - loaded.loaded_at) / 1000.0,
                "problem": problem,
                "log_lines_lost": 0 if self.served is None else self.served.lost,
            }
        )

    async def release(self) -> Response:
        """Manifest of the release in service."""
        return _json(self.watch.current.release.manifest.model_dump(mode="json"))

    async def metrics_page(self) -> Response:
        """Figures for Prometheus."""
        return Response(self.metrics.page(self.watch, self.served), media_type=CONTENT_TYPE_LATEST)

    def _answer(self, body: bytes) -> dict[str, Any]:
        try:
            request = ScoreRequest.model_validate_json(body)
        except ValidationError as error:
            raise _Refusal(422, _explain(error)) from error
        rows = [impression.model_dump() for impression in request.impressions]
        release = self.watch.current.release  # once: all of a request is answered by one release
        try:
            encoded = release.encode(rows)
        except DataError as error:
            raise _Refusal(422, str(error)) from error
        scored = release.score(encoded)
        request_id = uuid.uuid4().hex
        if self.served is not None:
            self.served.append(request_id, release, self._clock(), rows, encoded, scored)
        self.metrics.impressions.inc(len(rows))
        impressions = [
            {"impression_id": row["impression_id"], "release": release.name, "tasks": {}} for row in rows
        ]
        for task, values in scored.items():
            pairs = zip(values.logit.tolist(), values.probability.tolist(), strict=True)
            for impression, (logit, probability) in zip(impressions, pairs, strict=True):
                impression["tasks"][task] = {"logit": logit, "probability": probability}
        return {"request_id": request_id, "release": release.name, "impressions": impressions}


def create_app(
    watch: ReleaseWatch,
    served: ServedLog | None,
    reload_every: int,
    clock: Callable[[], int] = wall_clock_ms,
) -> FastAPI:
    """The application.

    Parameters
    ----------
    watch : ReleaseWatch
    served : ServedLog, optional
        Closed when the application ends.
    reload_every : int
        How often CURRENT is looked at, ms.
    clock : callable
        Wall clock, ms.
    """
    endpoint = ScoringEndpoint(watch, served, reload_every, clock)
    app = FastAPI(title="ctrstream", lifespan=endpoint.lifespan)
    body = {"required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}
    app.add_api_route("/score", endpoint.score, methods=["POST"], openapi_extra={"requestBody": body})
    app.add_api_route("/healthz", endpoint.healthz)
    app.add_api_route("/release", endpoint.release)
    app.add_api_route("/metrics", endpoint.metrics_page)
    return app


class _Refusal(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def _read(request: Request) -> bytes:
    """The body, of bounded size."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _Refusal(
                413,
                f"expected a body of at most {MAX_BODY_BYTES} bytes. Received more: send fewer impressions.",
            )
        parts.append(part)
    return b"".join(parts)


def _explain(error: ValidationError) -> str:
    """What was expected and what was received, at the first place that is wrong."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if "features" in path[:-1]:
        place, expected = ".".join(path[:4]), _FEATURE_EXPECTED
    elif first["type"] == "extra_forbidden":
        known = Impression if path[0] == "impressions" else ScoreRequest
        place, expected = ".".join(path), f"no such field; expected {', '.join(known.model_fields)}"
    else:
        place, expected = ".".join(path) or "body", first["msg"]
    return f"{place}: {expected}. Received: {first.get('input')!r:.200}."


def _json(document: Mapping[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
