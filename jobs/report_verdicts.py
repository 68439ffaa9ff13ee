"""The headline of the report: every check of the run as one line, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jobs.report_run import RunFolder
from monitoring.quality import PairedDifference
from monitoring.verdicts import (
    Verdict,
    accounting_verdict,
    base_rate_verdict,
    consistency_verdict,
    drift_verdict,
    freshness_verdict,
    pcoc_verdict,
    recovery_verdict,
    teacher_verdict,
)

__all__ = ["FRESHNESS_BUDGET_S", "base_rate_alarm", "judged_figures", "run_verdicts", "slowest_stage"]

# Seconds from an event to the served model that has learned it, where the run names no budget of its own.
FRESHNESS_BUDGET_S = 60.0
_TRUE_PCOC_BAND = 0.03
_SURE = 2.0


def run_verdicts(run: RunFolder) -> list[Verdict]:
    """All checks, in the order a reviewer asks; what was not recorded is ``unknown``."""
    verdicts = [verdict for task in run.tasks for verdict in _task_verdicts(run, task)]
    if not run.tasks:
        verdicts.append(Verdict("quality", "unknown", "-", "metrics.json", "the predictions were not judged"))
    return [*verdicts, *_run_wide(run)]


def judged_figures(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of each predictor over the rows that are judged: closed windows, else all."""
    figures: dict[str, dict[str, Any]] = (
        task["by_maturity"]["mature"] if task["judged_on"] == "mature" else task["totals"]
    )
    return figures


def base_rate_alarm(run: RunFolder, task: str) -> str | None:
    """A sentence for the top of the page if a task's student does not beat the running base rate."""
    verdict = _base_rate(run.task(task))
    if verdict.status in ("good", "unknown"):
        return None
    claim = "is not proven to beat" if verdict.status == "watch" else "does not beat"
    why = f"{verdict.why[:1].upper()}{verdict.why[1:]}."
    return f"The {task} model {claim} the running base rate: log loss {verdict.value}. {why}"


def _task_verdicts(run: RunFolder, name: str) -> Iterator[Verdict]:
    task = run.task(name)
    figures = judged_figures(task)
    student, teacher = figures["student"], figures.get("teacher")
    yield _named(name, _base_rate(task))
    yield _named(
        name,
        teacher_verdict(
            student["log_loss"], None if teacher is None else teacher["log_loss"], _paired(task, "teacher")
        ),
    )
    yield _named(name, pcoc_verdict(student))
    calibration = task["calibration"]["student"]
    slope = "-" if calibration["slope"] is None else f"slope {calibration['slope']:.3f}"
    yield Verdict(
        f"{name}: calibration tests",
        calibration["status"],
        slope,
        "no test rejects, or level and slope inside their bands",
        calibration["why"],
    )
    if "regret" in task:
        yield from (_named(name, verdict) for verdict in _truth_verdicts(task["regret"]))


def _named(task: str, verdict: Verdict) -> Verdict:
    return replace(verdict, name=f"{task}: {verdict.name}")


def _paired(task: dict[str, Any], other: str) -> PairedDifference | None:
    found = task["paired"].get(f"student_less_{other}")
    return None if found is None else PairedDifference(**found)


def _base_rate(task: dict[str, Any]) -> Verdict:
    """Beats the running base rate by more than chance."""
    verdict = base_rate_verdict(
        judged_figures(task)["student"]["log_loss"], task["base_rate"]["judged"]["log_loss"]
    )
    difference = _paired(task, "base_rate")
    error = None if difference is None else difference.standard_error
    if verdict.status != "good" or difference is None or difference.mean is None or error is None:
        return verdict
    if abs(difference.mean) > _SURE * error:
        return verdict
    why = f"the gain of {-difference.mean:.2g} is within two standard errors ({error:.2g}): it may be chance"
    return replace(verdict, status="watch", why=why)


def _truth_verdicts(regret: dict[str, Any]) -> Iterator[Verdict]:
    student, teacher = regret["student"], regret.get("teacher")
    name, expected = "regret below the frozen teacher's", "mean KL to the truth below the teacher's"
    if teacher is None or student["regret"] is None:
        yield Verdict(name, "unknown", "-", expected, "no regret of the student or of the teacher")
    else:
        value = f"{student['regret']:.5f} against {teacher['regret']:.5f}"
        if student["regret"] < teacher["regret"]:
            share = student["regret"] / teacher["regret"]
            yield Verdict(name, "good", value, expected, f"{share:.0%} of the teacher's, by the truth file")
        else:
            yield Verdict(
                name, "bad", value, expected, "the teacher is nearer to the truth: serve the teacher"
            )
    level = student["true_pcoc"]
    name, expected = "true PCOC", f"within {_TRUE_PCOC_BAND:.0%} of 1"
    if level is None:
        yield Verdict(name, "unknown", "-", expected, "the truth is 0 for every row")
        return
    inside = abs(level - 1.0) <= _TRUE_PCOC_BAND
    why = "predicted over true probability, free of label noise"
    yield Verdict(name, "good" if inside else "bad", f"{level:.4f}", expected, why)


def _run_wide(run: RunFolder) -> Iterator[Verdict]:
    yield consistency_verdict(run.consistency)
    yield _drift(run)
    _, figures = slowest_stage(run)
    budget = float((run.freshness or {}).get("budget_s", FRESHNESS_BUDGET_S))
    yield freshness_verdict(None if figures is None else figures["p95_s"], budget)
    yield accounting_verdict(None if run.accounting is None else run.accounting["difference"])
    recovery = (run.summary or {}).get("recovery")
    yield recovery_verdict(None if recovery is None else recovery.get("exact"))


def _drift(run: RunFolder) -> Verdict:
    """Drift asks for a look, no more: a model that learns online may have followed it."""
    verdict = drift_verdict(None if run.drift is None else run.drift["features"])
    if verdict.status != "bad":
        return verdict
    return replace(verdict, status="watch", why=f"{verdict.why}; the quality above says whether it harms")


def slowest_stage(run: RunFolder) -> tuple[str, dict[str, Any] | None]:
    """The stage with the longest p95, which is the whole way where that was measured."""
    stages: dict[str, dict[str, Any]] = (run.freshness or {}).get("stages", {})
    measured = {name: figures for name, figures in stages.items() if figures.get("p95_s") is not None}
    if measured:
        name = max(measured, key=lambda stage: float(measured[stage]["p95_s"]))
        return name, measured[name]
    brief = (run.summary or {}).get("freshness_s")
    if brief:
        return "event to served", {"p50_s": brief.get("p50"), "p95_s": brief.get("p95")}
    return "", None
