"""The stages of the demo, in order. Every part is the real one, run as a user would run it."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.demo_live import run_live
from jobs.demo_recovery import run_recovery
from jobs.stage_log import StageLog
from pipelines.config import Config, dump_config
from pipelines.config_sections import AttributionConfig, KafkaConfig, TrackingConfig
from pipelines.duration import HOUR_MS

if TYPE_CHECKING:
    from jobs.evaluation import Evaluation
    from pipelines.event_files import EventFiles

__all__ = ["DemoPlan", "run_demo"]

# Share of the log that trains the first models. Fewer than half: the online part is what is shown.
_SIMULATED_WARM_UP = "40%"


@dataclass(frozen=True)
class DemoPlan:
    """What to run: see ``ctrstream demo --help``."""

    out: Path
    events: Path | None
    impressions: int
    seed: int
    live_seconds: int
    live_rate: int
    keep: bool


@dataclass(frozen=True)
class _Split:
    """Input rows: ``[0, backlog)`` are produced at once, ``[backlog, end)`` live; times in ms."""

    begins_at: int
    first_time: int
    backlog: int
    end: int


def run_demo(plan: DemoPlan, config: Config) -> tuple[dict[str, Any], Evaluation]:
    """Run all stages; returns the summary and the judged predictions."""
    from jobs.broker import Broker
    from jobs.demo_summary import Judging, review
    from jobs.mlflow_server import TrackingServer
    from pipelines.event_files import EventFiles

    stages = StageLog()
    with ExitStack() as running:
        with stages("start Kafka and MLflow"):
            tracking = TrackingServer(plan.out / "mlflow").start(wait=False)
            running.callback(tracking.stop)
            broker = Broker(plan.out / "kafka").start()
            running.callback(broker.stop)
        events = plan.events
        if events is None:
            with stages("simulate"):
                events, config = _simulate(plan, config)
        config = _local(config, broker.bootstrap_servers, tracking.uri)
        files = EventFiles(events)
        (plan.out / "config.toml").write_text(dump_config(config), encoding="utf-8")
        split = _split(files, config, plan)
        with stages("produce events to Kafka"):
            _produce(files, config, 0, split.backlog)
        with stages("ingest into the lake (Spark)") as say:
            snapshot = _samples(plan.out, config, split, stages, say)
        with stages("train teacher and first student"):
            tracking.wait_ready()
            skipped = _train(plan.out, snapshot, config)
        with stages("learn online; kill the worker once, recover"):
            recovery = run_recovery(plan.out, split.backlog)
        with stages("serve while learning live"):
            live = run_live(plan.out, config, files, split.backlog, split.end, plan.live_rate)
        with stages("judge and report"):
            judging = Judging(plan.out, config, files, split.begins_at, skipped)
            summary, evaluation = review(judging, recovery, live, tracking, stages)
        summary["stages"] = stages.seconds
        if plan.keep:
            _keep(summary)
    return summary, evaluation


def _simulate(plan: DemoPlan, config: Config) -> tuple[Path, Config]:
    from pipelines.simulation_config import SimulationConfig
    from pipelines.simulation_files import write_simulation
    from pipelines.simulator import simulate

    simulation = simulate(SimulationConfig(impressions=plan.impressions, seed=plan.seed))
    folder = plan.out / "events"
    folder.mkdir()
    write_simulation(simulation, folder)
    # The simulated business credits conversions for this long; a real log brings its own rule by --config.
    attribution = AttributionConfig(
        **{
            **config.attribution.model_dump(),
            "click_window": simulation.config.click_window,
            "attribution_window": simulation.config.attribution_window,
        }
    )
    backtest = config.backtest.model_copy(update={"warmup": _SIMULATED_WARM_UP})
    return folder, config.model_copy(update={"attribution": attribution, "backtest": backtest})


def _local(config: Config, bootstrap_servers: str, tracking_uri: str) -> Config:
    kafka = KafkaConfig(**{**config.kafka.model_dump(), "bootstrap_servers": bootstrap_servers})
    tracking = TrackingConfig(**{**config.tracking.model_dump(), "uri": tracking_uri})
    return config.model_copy(update={"kafka": kafka, "tracking": tracking})


def _split(files: EventFiles, config: Config, plan: DemoPlan) -> _Split:
    from jobs.backtest import warm_up_end

    begins_at, warm = warm_up_end(files, config.backtest.warmup)
    live = min(plan.live_rate * plan.live_seconds, (files.rows - warm) // 2)
    first = int(files.impressions.column("event_time").to_numpy().min())
    return _Split(begins_at, first, files.rows - live, files.rows)


def _produce(files: EventFiles, config: Config, start: int, stop: int) -> None:
    from jobs.produce import produce

    produce(files, config, start=start, stop=stop)


def _samples(out: Path, config: Config, split: _Split, stages: StageLog, say: Any) -> Path:
    from jobs.jars import resolve
    from jobs.samples_build import build
    from jobs.samples_ingest import ingest
    from pipelines.spark_session import spark_session, stop_spark

    jars = sorted(resolve("spark-kafka").glob("*.jar"))
    spark = spark_session("ctrstream-demo", jars=jars)
    try:
        report = ingest(spark, out / "lake", config)
        say(f"{sum(report.rows.values()):,} rows, {report.dead_letters} dead letters")
        stages.next("build samples (Spark)")
        # Labels as known just before online learning begins.
        window = math.ceil((split.begins_at - split.first_time) / HOUR_MS) * HOUR_MS
        return Path(build(spark, out / "lake", out / "snapshots", split.begins_at - 1, window, config))
    finally:
        stop_spark(spark)


def _train(out: Path, snapshot: Path, config: Config) -> dict[str, str]:
    """Train; returns the tasks that could not be trained, with the reason."""
    from jobs.train import train

    first, skipped = train(snapshot, out / "releases", config)
    shutil.copytree(out / "releases", out / "reference" / "releases")
    shutil.copy(first.student.path / "feature_spec.toml", out / "feature_spec.toml")
    # From here on the label policies are settled.
    (out / "config.toml").write_text(dump_config(first.settle(config)), encoding="utf-8")
    return skipped


def _keep(summary: dict[str, Any]) -> None:
    import signal

    import click

    click.echo(json.dumps(summary["links"], indent=1))
    click.echo("Kafka and MLflow are running. Ctrl-C ends them.", err=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        click.echo("stopping", err=True)
