"""The review in MLflow: one run with figures, verdicts and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.evaluation import Evaluation
from jobs.report_run import RunFolder
from jobs.report_verdicts import run_verdicts
from jobs.tracking import Metric, Tracking
from monitoring.verdicts import Verdict
from pipelines.duration import HOUR_MS

__all__ = ["log_review", "verdict_note"]

# What needs a look comes first: the run page shows a few rows and hides the rest behind a link.
_ORDER = ("bad", "watch", "unknown", "good")
_FIGURES = ("log_loss", "ne", "auc", "gauc", "pcoc")
_DOCUMENTS = (
    "metrics.json",
    "summary.json",
    "accounting.json",
    "consistency.json",
    "drift.json",
    "freshness.json",
)


def log_review(tracking: Tracking, out: Path, evaluation: Evaluation, summary: dict[str, Any]) -> str:
    """Log a run folder; returns the address of the run's page."""
    digest = summary["recovery"]["digest"]
    run = tracking.run(f"review {digest[:8]}", {"job": "demo"}, key=f"review/{digest}")
    metrics: list[Metric] = []
    for task in evaluation.tasks:
        figures = evaluation.metrics[task]
        for predictor, own in figures["by_maturity"][figures["judged_on"]].items():
            metrics += _named(f"quality/{task}/{predictor}", own, 0, evaluation.metrics["as_of"])
        for start, predictors in figures["by_hour"].items():
            for predictor, own in predictors.items():
                metrics += _named(f"hourly/{task}/{predictor}", own, int(start) // HOUR_MS, int(start))
    run.log_metrics(metrics)
    run.note(verdict_note(run_verdicts(RunFolder.read(out))))
    run.log_artifact(out / "report.html")
    for name in _DOCUMENTS:
        if (out / name).exists():
            run.log_artifact(out / name, "documents")
    run.finish()
    return tracking.run_url(run.run_id)


def verdict_note(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as Markdown, in one line and as a table.

    Examples
    --------
    >>> print(verdict_note([Verdict("PCOC", "good", "1.01", "0.95 to 1.05", "")]))
    **1 good**
    <BLANKLINE>
    | check | verdict | found | expected |
    |---|---|---|---|
    | PCOC | good | 1.01 | 0.95 to 1.05 |
    """
    counts = [(status, sum(one.status == status for one in verdicts)) for status in _ORDER]
    lines = [f"**{', '.join(f'{count} {status}' for status, count in counts if count)}**", ""]
    lines += ["| check | verdict | found | expected |", "|---|---|---|---|"]
    for one in sorted(verdicts, key=lambda one: _ORDER.index(one.status)):
        status = one.status if one.status == "good" else f"**{one.status}**"
        lines.append(f"| {one.name} | {status} | {one.value or '–'} | {one.expected} |")
    return "\n".join(lines)


def _named(prefix: str, figures: dict[str, Any], step: int, time: int) -> list[Metric]:
    return [
        (f"{prefix}/{name}", float(figures[name]), step, time)
        for name in _FIGURES
        if figures.get(name) is not None
    ]
