"""The quality table that commands print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.evaluation import Evaluation

__all__ = ["quality_tables"]

_NAMES = {
    "student": "student (online), calibrated",
    "student_uncalibrated": "student (online), uncalibrated",
    "teacher": "teacher (frozen), calibrated",
    "stale": "first student (frozen), calibrated",
}


def quality_tables(evaluation: Evaluation) -> Iterator[Table]:
    """One table for each task: what was predicted on arrival against what came of it."""
    from rich.table import Table

    for task in evaluation.tasks:
        figures = evaluation.metrics[task]
        judged_on = figures["judged_on"]
        judged = figures["by_maturity"][judged_on]
        support = (
            f"{judged['student']['rows']:,} {judged_on} rows, {judged['student']['positives']:,} positives"
        )
        table = Table(title=f"{task}: {support}", title_justify="left")
        table.add_column("predictor")
        for name in ("log loss", "NE", "AUC", "GAUC", "PCOC", "regret"):
            table.add_column(name, justify="right")
        regret = figures.get("regret") or {}
        for name, label in _NAMES.items():
            if name in judged:
                table.add_row(label, *_cells(judged[name]), _number(_regret(regret.get(name))))
        base = figures["base_rate"]["judged"]
        table.add_row(
            "running base rate",
            *(_number(base.get(name)) for name in ("log_loss", "ne", "auc", "gauc", "pcoc")),
            _number(_regret(regret.get("base_rate"))),
        )
        if "oracle" in regret:
            table.add_row("truth", *_cells(regret["oracle"]), _number(0.0))
        yield table
    for task, reason in evaluation.metrics["skipped"].items():
        yield _skipped(task, reason)


def _skipped(task: str, reason: str) -> Table:
    from rich.table import Table

    table = Table(title=f"{task}: skipped", title_justify="left")
    table.add_column("reason")
    table.add_row(reason)
    return table


def _cells(figures: dict[str, Any]) -> list[str]:
    return [_number(figures[name]) for name in ("log_loss", "ne", "auc", "gauc", "pcoc")]


def _regret(truth: Any) -> float | None:
    return truth.get("regret") if isinstance(truth, dict) else truth


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}" if abs(value) < 10 else f"{value:,.1f}"
