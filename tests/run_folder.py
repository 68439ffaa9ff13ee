"""A run folder as a backtest and a demo leave it: a simulated log, and predictions made of truth and noise.

The predictors are not trained. Each knows the true logit up to noise of a known size, so what the figures
must say follows from how they were made: the student is calibrated, its own logit is not, the teacher is
worse the older it gets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.drift import drift_document
from jobs.evaluation import Evaluation, evaluate
from monitoring.accounting import Accounting
from monitoring.consistency import consistency
from monitoring.freshness import LatencyHistogram
from pipelines.config import Config, dump_config
from pipelines.config_sections import AttributionConfig
from pipelines.duration import HOUR_MS
from pipelines.events import KINDS
from pipelines.hashing import hash_column
from pipelines.outcomes import Tables
from pipelines.simulation_files import write_simulation
from pipelines.simulator import Simulation, SimulationConfig, simulate

Floats = NDArray[np.float64]

# Standard deviation of what a predictor does not know, in logits.
STUDENT_NOISE, TEACHER_NOISE = 0.35, 0.6
RAW_SHIFT, RAW_SLOPE = 0.5, 1.3


@dataclass(frozen=True)
class SimulatedRun:
    """A simulated log and predictions for what follows its first quarter."""

    simulation: Simulation
    tables: Tables
    attribution: AttributionConfig
    warm_up_until: int
    predictions: pa.Table

    def evaluate(self, **options: Any) -> Evaluation:
        return evaluate(
            self.predictions,
            self.tables,
            self.attribution,
            truth=self.simulation.truth,
            warm_up_until=self.warm_up_until,
            **options,
        )


def simulated_run(impressions: int = 40_000, days: float = 4.0, seed: int = 11) -> SimulatedRun:
    """Simulate a log and predict it."""
    simulation = simulate(SimulationConfig(impressions=impressions, days=days, seed=seed))
    config = simulation.config
    arrived = np.asarray(simulation.impressions["arrival_time"].to_numpy())
    warm_up_until = int(arrived[len(arrived) // 4])
    parts = [predictions_of(simulation, task, warm_up_until) for task in ("click", "conversion")]
    return SimulatedRun(
        simulation,
        (simulation.impressions, simulation.clicks, simulation.conversions),
        AttributionConfig(click_window=config.click_window, attribution_window=config.attribution_window),
        warm_up_until,
        pa.concat_tables(parts),
    )


def predictions_of(simulation: Simulation, task: str, after: int) -> pa.Table:
    """Predictions of one task for the impressions that arrive from ``after`` on, as a backtest does."""
    rng = np.random.default_rng([17, len(task)])
    shown = simulation.impressions.filter(
        pa.compute.greater_equal(simulation.impressions["arrival_time"], after)
    )
    number = dict(zip(simulation.truth["impression_id"].to_pylist(), range(10**9), strict=False))
    row = np.array([number[name] for name in shown["impression_id"].to_pylist()])
    truth = np.asarray(simulation.truth[f"{task}_probability"].to_numpy())[row]
    logit = np.log(truth) - np.log1p(-truth)
    event_time = np.asarray(shown["event_time"].to_numpy())
    age = (event_time - after) / max(1, int(event_time.max()) - after)
    student = levelled(shrunk(logit, STUDENT_NOISE, rng), truth)
    teacher = levelled(shrunk(logit, TEACHER_NOISE, rng), truth)
    n = len(row)
    return pa.table(
        {
            "impression_id": shown["impression_id"],
            "task": pa.array([task] * n).dictionary_encode(),
            "predicted_at": event_time,
            "logit": RAW_SHIFT + RAW_SLOPE * student,
            "probability": sigmoid(student),
            "release": pa.array([f"student-0001-{hour:010d}" for hour in (event_time // HOUR_MS).tolist()]),
            "arrived_at": shown["arrival_time"],
            "user_key": hash_column(shown["user_id"]).view(np.int64),
            "teacher_probability": sigmoid(teacher - 0.3 * age),
            "stale_probability": sigmoid(student - 0.5 * age),
        }
    )


def shrunk(logit: Floats, noise: float, rng: np.random.Generator) -> Floats:
    """The mean of a normal logit, as known from one noisy look at it."""
    spread = float(logit.var())
    keep = spread / (spread + noise**2)
    return float(logit.mean()) * (1 - keep) + keep * (logit + noise * rng.normal(size=len(logit)))


def levelled(logit: Floats, truth: Floats) -> Floats:
    """Logits moved together so that their probabilities sum to those of the truth (Newton's method)."""
    shift = 0.0
    for _ in range(20):
        probability = sigmoid(logit + shift)
        shift += float((truth - probability).sum() / (probability * (1 - probability)).sum())
    return logit + shift


def sigmoid(logit: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-logit))


def write_run(run: SimulatedRun, folder: Path) -> Path:
    """Write the log to ``folder/events`` and everything that a demo leaves to ``folder/run``."""
    write_simulation(run.simulation, folder / "events")
    out = folder / "run"
    out.mkdir()
    pq.write_table(run.predictions, out / "predictions.parquet")
    evaluation = run.evaluate()
    evaluation.write(out)
    config = Config(attribution=run.attribution)
    (out / "config.toml").write_text(dump_config(config), encoding="utf-8")
    dump(out / "accounting.json", accounting(run))
    dump(out / "consistency.json", rescored(run))
    dump(out / "freshness.json", latencies())
    day = 24 * HOUR_MS
    start = run.simulation.config.start
    dump(
        out / "drift.json",
        drift_document(
            run.tables,
            None,
            reference=(start, start + day),
            current=(start + 2 * day, start + 3 * day),
            attribution=run.attribution,
        ),
    )
    digest = "4f1c6d0b9a77e2d35c08e1f4a6b2937d5e8c1a0f3b6d9274e5f80c1d2a3b4c5d"
    dump(
        out / "summary.json",
        {
            "events": "events",
            "stages": {"simulate": 3.1, "samples": 21.4, "teacher": 9.8, "stream": 41.7, "serve": 6.0},
            "recovery": {"exact": True, "digest": digest, "reference_digest": digest},
            "links": {"MLflow": "http://127.0.0.1:5000/#/experiments/1"},
        },
    )
    return out


def dump(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def accounting(run: SimulatedRun) -> dict[str, Any]:
    """Every input row in one class, as a worker would count it."""
    counted, read = Accounting(), {}
    for kind, table in zip(KINDS, run.tables, strict=True):
        early = int((np.asarray(table["arrival_time"].to_numpy()) < run.warm_up_until).sum())
        distinct = len(table["event_id"].combine_chunks().unique())
        counted.add(kind, "warm_up", early)
        counted.add(kind, "duplicate", table.num_rows - distinct)
        counted.add(kind, "trained", distinct - early)
        read[kind] = table.num_rows
    malformed = len(run.simulation.malformed)
    counted.add("impression", "dead_lettered", malformed)
    read["impression"] += malformed
    return {
        "read": read,
        "classes": counted.value(),
        "by_class": counted.by_class(),
        "difference": counted.check(read),
    }


def rescored(run: SimulatedRun) -> dict[str, Any]:
    """What `jobs.consistency` finds of logits that differ by rounding."""
    logit = np.asarray(run.predictions["logit"].to_numpy())[:2000]
    found = consistency(logit, logit + np.random.default_rng(1).normal(0, 2e-7, len(logit)))
    found["max_abs_delta_logit"] = found.pop("max_abs_delta")
    found["p99_abs_delta_logit"] = found.pop("p99_abs_delta")
    return {**found, "max_abs_delta_probability": 4.1e-8}


def latencies() -> dict[str, Any]:
    """Seconds by stage, as the worker measures them."""
    rng, found = np.random.default_rng(2), {}
    for stage, typical in (
        ("event to learned", 0.8),
        ("learned to published", 1.4),
        ("event to served", 2.6),
    ):
        histogram = LatencyHistogram()
        histogram.update(typical * rng.lognormal(0, 0.5, 5_000))
        found[stage] = histogram.value()
    return {"stages": found, "budget_s": 10.0}
