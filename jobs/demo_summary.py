"""The end of the demo: judge, account, report, and say it in one table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.backtest_report import read_truth
from jobs.checkpoint import Checkpoint, CheckpointStore
from jobs.drift import drift_document
from jobs.evaluation import Evaluation, evaluate
from jobs.predictions import PredictionLog
from jobs.quality_lines import quality_tables
from monitoring.accounting import Accounting
from pipelines.errors import StaleStateError

if TYPE_CHECKING:
    from jobs.demo_live import LiveResult
    from jobs.demo_recovery import Recovery
    from jobs.mlflow_server import TrackingServer
    from jobs.stage_log import StageLog
    from pipelines.config import Config
    from pipelines.event_files import EventFiles

__all__ = ["Judging", "print_summary", "review"]

_CONSISTENCY = ("rows", "max_abs_delta_logit", "p99_abs_delta_logit")
_PREDICTORS = ("student", "student_uncalibrated", "teacher", "stale")


@dataclass(frozen=True)
class Judging:
    """What is judged: a run folder, its log, when online learning began (ms), and tasks without a model."""

    out: Path
    config: Config
    files: EventFiles
    begins_at: int
    skipped: dict[str, str]


def review(
    judging: Judging,
    recovery: Recovery,
    live: LiveResult,
    tracking: TrackingServer,
    stages: StageLog,
) -> tuple[dict[str, Any], Evaluation]:
    """Write every document of the run folder and the report; returns summary and judged predictions."""
    from jobs.report import write_report

    out, files = judging.out, judging.files
    checkpoint = CheckpointStore(out / "worker").load()
    if checkpoint is None:
        raise StaleStateError(f"the worker has committed nothing in {out / 'worker'}.")
    evaluation = _judged(judging, checkpoint)
    accounting = _accounting(checkpoint.plain, files.rows)
    summary = {
        "stages": dict(stages.seconds),
        "rows": {"read": accounting["total_read"], "in_log": files.rows, **accounting["by_class"]},
        "recovery": _recovery(recovery),
        "quality": _quality(evaluation),
        "freshness_s": _freshness(live.freshness),
        "consistency": {name: live.consistency[name] for name in _CONSISTENCY},
        "links": {
            "report": str(out / "report.html"),
            "mlflow": tracking.uri,
            "mlflow again": f"ctrstream tracking up --data {tracking.folder}",
        },
    }
    for name, document in (
        ("drift", _drift(out, judging.config, files, judging.begins_at)),
        ("accounting", accounting),
        ("freshness", live.freshness),
        ("consistency", live.consistency),
        ("summary", summary),
    ):
        (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write_report(out)
    summary["links"]["review run"] = _track(out, judging.config, evaluation, summary)
    return summary, evaluation


def _judged(judging: Judging, checkpoint: Checkpoint) -> Evaluation:
    """What the worker has committed as ``predictions.parquet``, judged by the log."""
    import pyarrow.parquet as pq

    out, files = judging.out, judging.files
    predictions = PredictionLog(out / "worker" / "predictions").read(checkpoint.manifest["outputs"])
    pq.write_table(predictions, out / "predictions.parquet", compression="zstd")
    evaluation = evaluate(
        predictions,
        files.tables,
        judging.config.attribution,
        truth=read_truth(files.folder),
        warm_up_until=judging.begins_at,
        skipped=judging.skipped,
    )
    evaluation.write(out)
    return evaluation


def _drift(out: Path, config: Config, files: EventFiles, begins_at: int) -> dict[str, Any]:
    """The later half of the online part against the warm-up."""
    from pipelines.feature_spec import FeatureSpec

    times = files.impressions.column("event_time").to_numpy()
    first, last = int(times.min()), int(times.max())
    return drift_document(
        files.tables,
        FeatureSpec.read(out / "feature_spec.toml"),
        reference=(first, begins_at),
        current=(last - (last - begins_at) // 2, last + 1),
        attribution=config.attribution,
    )


def _recovery(recovery: Recovery) -> dict[str, Any]:
    return {
        "exact": recovery.exact,
        "digest": recovery.digest,
        "reference_digest": recovery.reference_digest,
        "killed_at_step": recovery.killed_at_step,
        "steps": recovery.steps,
    }


def _accounting(plain: dict[str, Any], in_log: int) -> dict[str, Any]:
    accounting = Accounting.from_state(plain["accounting"])
    return {
        "read": plain["read"],
        "total_read": sum(plain["read"].values()),
        "in_log": in_log,
        "classes": accounting.value(),
        "by_class": accounting.by_class(),
        "difference": accounting.check(plain["read"]),
    }


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task in evaluation.tasks:
        figures = evaluation.metrics[task]
        judged = figures["by_maturity"][figures["judged_on"]]
        own = {name: dict(judged[name]) for name in _PREDICTORS if name in judged}
        regret = figures.get("regret")
        if regret:
            for name, values in own.items():
                values["regret"] = regret[name]["regret"]
                values["true_pcoc"] = regret[name]["true_pcoc"]
            own["truth"] = regret["oracle"]
        found[task] = {"judged_on": figures["judged_on"], "base_rate": figures["base_rate"]["judged"], **own}
    return found


def _freshness(freshness: dict[str, Any]) -> dict[str, Any]:
    served = freshness["stages"]["event to served"]
    return {"p50": served["p50_s"], "p95": served["p95_s"], "rows": served["rows"]}


def _track(out: Path, config: Config, evaluation: Evaluation, summary: dict[str, Any]) -> str:
    """One MLflow run that holds the review: figures, verdicts and the report."""
    from jobs.report_tracking import log_review
    from jobs.tracking import Tracking

    tracking = Tracking(config.tracking.uri, config.tracking.experiment, config.tracking.registered_model)
    return log_review(tracking, out, evaluation, summary)


def print_summary(summary: dict[str, Any], evaluation: Evaluation) -> None:
    """The closing table on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    for table in quality_tables(evaluation):
        console.print(table)
    facts = Table(show_header=False, title="this run", title_justify="left")
    rows, recovery = summary["rows"], summary["recovery"]
    classes = ", ".join(f"{n:,} {name}" for name, n in rows.items() if name not in ("read", "in_log") and n)
    accounted = sum(n for name, n in rows.items() if name not in ("read", "in_log"))
    sign = "=" if rows["in_log"] == rows["read"] == accounted else "≠"
    facts.add_row("rows", f"{rows['in_log']:,} in {sign} {accounted:,} accounted for: {classes}")
    facts.add_row(
        "recovery",
        f"{'exact' if recovery['exact'] else 'NOT EXACT'}: killed after step {recovery['killed_at_step']} "
        f"of {recovery['steps']}, digest {recovery['digest'][:16]}, "
        f"without a crash {recovery['reference_digest'][:16]}",
    )
    fresh = summary["freshness_s"]
    if fresh["p50"] is not None:
        facts.add_row("freshness", f"event to served p50 {fresh['p50']:.2f} s, p95 {fresh['p95']:.2f} s")
    same = summary["consistency"]
    facts.add_row(
        "consistency",
        f"{same['rows']:,} served rows rescored, max |Δlogit| {same['max_abs_delta_logit']:.1e}",
    )
    facts.add_row("time", f"{sum(summary['stages'].values()):.0f} s in all")
    for name, link in summary["links"].items():
        facts.add_row(name, link)
    console.print(facts)
