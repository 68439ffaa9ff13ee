"""What the worker tells MLflow: one long-lived run, in event time, through the outbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.online import OnlineLoop
from jobs.progressive import Maturity, ProgressiveQuality
from jobs.publish_decision import Decision
from jobs.release_manifest import parse_name
from jobs.tracking_outbox import TrackingOutbox
from pipelines.config import Config
from pipelines.duration import HOUR_MS

__all__ = ["WorkerTracking"]

_PREFIXES: dict[Maturity, str] = {"mature": "quality", "provisional": "quality/provisional"}
_FIGURES = ("rows", "positives", "log_loss", "ne", "pcoc")
_GATE_FIGURES = ("rows", "log_loss", "second_log_loss", "worse_z", "pcoc", "level_z")
Metric = tuple[str, float, int, int]
# A worker that was fenced lets go of the outbox after its next commit and half a minute for MLflow.
_PATIENCE_S = 60.0


class WorkerTracking:
    """Logs progressive quality by hour, accounting, lag and releases; never waits for MLflow.

    A step of a chart is an hour since the epoch and its timestamp event time, so what a restarted worker logs
    again falls on the same points. Without ``tracking.uri`` nothing is logged.

    Parameters
    ----------
    config : Config
    state : Path
        The worker's folder; the outbox lives in it.
    """

    def __init__(self, config: Config, state: Path) -> None:
        tracking = config.tracking
        self._outbox = TrackingOutbox(
            state / "outbox",
            tracking.uri,
            tracking.experiment,
            tracking.registered_model,
            patience_s=_PATIENCE_S,
        )
        self._run = self._outbox.run(
            f"online worker {state.resolve().parent.name}/{state.name}",
            {"job": "stream"},
            key=f"worker/{state.name}",
        )
        self._run.log_params(config.model_dump(mode="json"))
        self._logged_rows: dict[tuple[str, str, int, str], int] = {}

    def committed(self, loop: OnlineLoop, figures: dict[str, float]) -> None:
        """Log what has changed since the last commit; ``figures`` are the worker's own, such as lag."""
        hour = loop.clock // HOUR_MS
        metrics: list[Metric] = [(f"lag/{name}", value, hour, loop.clock) for name, value in figures.items()]
        for name, rows in loop.accounting.by_class().items():
            metrics.append((f"rows/{name}", float(rows), hour, loop.clock))
        for maturity, prefix in _PREFIXES.items():
            metrics += self._quality(loop.progressive, maturity, prefix)
        self._run.log_metrics(metrics)

    def _quality(self, progressive: ProgressiveQuality, maturity: Maturity, prefix: str) -> list[Metric]:
        metrics: list[Metric] = []
        for task, start, predictor, found in progressive.hours(maturity):
            key = (maturity, task, start, predictor)
            if self._logged_rows.get(key) == found["rows"]:
                continue
            self._logged_rows[key] = found["rows"]
            metrics += [
                (f"{prefix}/{task}/{predictor}/{name}", float(found[name]), start // HOUR_MS, start)
                for name in _FIGURES
                if found[name] is not None
            ]
        return metrics

    def decided(self, decision: Decision, releases: Path) -> None:
        """Log a decision of the gate, step by step of the loop, and move the aliases that it moves."""
        step = parse_name(decision.candidate)[1]
        is_published = float(decision.verdict == "published")
        metrics: list[Metric] = [("gate/published", is_published, step, decision.clock)]
        for task, figures in decision.figures.items():
            metrics += [
                (f"gate/{task}/{name}", float(figures[name]), step, decision.clock)
                for name in _GATE_FIGURES
                if figures[name] is not None
            ]
        for task, factor in decision.growth.items():
            metrics.append((f"gate/{task}/weight_growth", factor, step, decision.clock))
        self._run.log_metrics(metrics)
        if decision.reasons:
            self.note(**{"gate.refused": f"{decision.candidate}: {'; '.join(decision.reasons)}"})
        if decision.begins_trial:
            self._run.register(releases / decision.candidate, ["champion", "challenger"])
        if decision.proven is not None:
            self._run.register(releases / decision.proven, ["last_good"])
        if decision.returned_to is not None:
            self._run.register(releases / decision.returned_to, ["champion"])

    def published(self, release: Path) -> None:
        """Register a release as champion."""
        self._run.register(release, ["champion"])

    def note(self, **tags: Any) -> None:
        """Tag the run."""
        self._run.set_tags({name: str(value) for name, value in tags.items()})

    def close(self) -> None:
        """Wait, for a while, until MLflow has everything; what it has not stays in the outbox."""
        self._outbox.close()
