"""The report's tables of quality: level, ranking, calibration, maturity, comparisons, by task."""

from __future__ import annotations

from typing import Any

from jobs.report_blocks import (
    DASH,
    Block,
    Cell,
    Column,
    Missing,
    Section,
    TableBlock,
    count,
    decimal,
    percent,
    signed,
    status_cell,
)
from jobs.report_plots import task_figures
from jobs.report_run import RunFolder
from jobs.report_verdicts import base_rate_alarm, judged_figures
from monitoring.quality import pcoc_interval

__all__ = ["PREDICTOR_NAMES", "task_section"]

# In the order of the tables.
PREDICTOR_NAMES = {
    "student": "student, calibrated",
    "student_uncalibrated": "student, before calibration",
    "stale": "first student, frozen",
    "teacher": "teacher, frozen",
    "base_rate": "running base rate",
    "oracle": "truth",
}
_QUESTIONS = {
    "click": "P(click | impression)",
    "conversion": "P(conversion | click)",
    "view_through": "P(conversion without a click | impression)",
}

QUALITY_NOTE = (
    "Lower is better: log loss (nats), NE (log loss over the entropy of the rate of these rows; 1 is a model "
    "that knows only the rate). Higher is better: AUC, GAUC (mean over users); 0.5 ranks nothing. PCOC, "
    "predicted over observed: 1 is right, above 1 over-predicts."
)
TRUTH_NOTE = (
    " Regret, mean KL divergence from the truth in nats × 1000: 0 is best. True PCOC, predicted over true "
    "probability: free of label noise."
)


def task_section(run: RunFolder, task: str) -> Section:
    """Everything about one task."""
    found = run.task(task)
    reliability = (run.reliability or {}).get(task)
    blocks: list[Block] = [_quality_table(found)]
    student = judged_figures(found)["student"]
    if 0 < student["positives"] < student["rows"]:
        blocks.append(task_figures(task, found, reliability))
    else:
        blocks.append(
            Missing("Plots", "All labels are alike, so there is no rate to compare with", "not shown")
        )
    if reliability is None:
        blocks.append(Missing("The reliability diagram", "`ctrstream evaluate` writes reliability.json"))
    blocks += [_calibration_table(found, reliability), _paired_table(found), _maturity_table(found)]
    alarm = base_rate_alarm(run, task)
    return Section(
        anchor=f"task-{task}",
        title=f"{task.capitalize().replace('_', '-')} model: {_QUESTIONS[task]}",
        short=f"{task.capitalize().replace('_', '-')} model",
        lead=_lead(found),
        blocks=tuple(blocks),
        alarms=() if alarm is None else (alarm,),
    )


def _lead(found: dict[str, Any]) -> str:
    rows = found["rows"]
    judged = judged_figures(found)["student"]
    text = f"{count(judged['rows'])} rows with {count(judged['positives'])} positives are judged"
    if found["judged_on"] == "mature":
        open_rows = rows["judged"] - judged["rows"]
        text += f": those whose window has closed. {count(open_rows)} more may still change their label."
    else:
        text += " by provisional labels: no window has closed yet, so positives are still missing."
    left_out = {
        "repeated": "repeated deliveries",
        "not_clicked": "impressions without a credited click",
        "not_in_log": "impressions that are not in the log or came too late",
    }
    parts = [f"{count(rows[name])} {words}" for name, words in left_out.items() if rows[name]]
    if parts:
        text += f" Of {count(rows['recorded'])} recorded predictions, {', '.join(parts)} are left out."
    return text


def _quality_table(found: dict[str, Any]) -> TableBlock:
    regret = found.get("regret")
    figures: dict[str, dict[str, Any]] = {**judged_figures(found), "base_rate": found["base_rate"]["judged"]}
    if regret is not None:
        figures["oracle"] = regret["oracle"]
    titles = ["Log loss", "NE", "AUC", "GAUC", "PCOC", "95 % interval"]
    titles += ["Regret ×1000", "True PCOC"] if regret is not None else []
    rows = []
    for name, words in PREDICTOR_NAMES.items():
        if name not in figures:
            continue
        one = figures[name]
        is_student = name == "student"
        values = [
            decimal(one["log_loss"], 5),
            decimal(one["ne"], 4),
            decimal(one.get("auc"), 4),
            decimal(one.get("gauc"), 4),
            decimal(one["pcoc"], 4),
            _interval(one),
        ]
        if regret is not None:
            known = regret.get(name, {})
            exact = {"regret": 0.0, "true_pcoc": 1.0} if name == "oracle" else known
            thousandths = exact.get("regret")
            values.append(decimal(None if thousandths is None else 1000 * thousandths, 3))
            values.append(decimal(exact.get("true_pcoc"), 4))
        rows.append((Cell(words, strong=is_student), *(Cell(value, strong=is_student) for value in values)))
    return TableBlock(
        title="Quality",
        columns=(Column("Predictor"), *(Column(title, is_number=True) for title in titles)),
        rows=tuple(rows),
        note=QUALITY_NOTE + (TRUTH_NOTE if regret is not None else "") + _base_rate_note(found),
    )


def _base_rate_note(found: dict[str, Any]) -> str:
    rules = {
        "closed_windows": "counting windows that had closed",
        "known_labels": "counting every window from its opening, negative until its outcome was known",
    }
    return f" Running base rate: the rate known before each row, {rules[found['base_rate']['rule']]}."


def _interval(figures: dict[str, Any]) -> str:
    ends = pcoc_interval(figures["pcoc"], figures["positives"], figures["rows"])
    return DASH if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _calibration_table(found: dict[str, Any], reliability: dict[str, Any] | None) -> TableBlock:
    rows = []
    for name, verdict in _in_order(found["calibration"]):
        tests = {test["name"]: test for test in verdict["tests"]}
        error = ((reliability or {}).get(name) or {}).get("error") or {}
        rows.append(
            (
                Cell(PREDICTOR_NAMES[name], strong=name == "student"),
                status_cell(verdict["status"]),
                *(_test_cell(tests[test]) for test in ("pcoc_z", "cox_score", "kuiper", "spiegelhalter_z")),
                Cell(decimal(verdict["intercept"], 3)),
                Cell(decimal(verdict["slope"], 3)),
                Cell(percent(error.get("relative"))),
                Cell(percent(error.get("null_relative"))),
            )
        )
    numbers = ("Level z", "Cox χ²", "Kuiper", "Spread z", "Intercept", "Slope", "ECE / rate", "by chance")
    return TableBlock(
        title="Calibration tests",
        columns=(
            Column("Predictor"),
            Column("Verdict"),
            *(Column(title, is_number=True) for title in numbers),
        ),
        rows=tuple(rows),
        note=(
            "Each statistic with the chance (p) that a calibrated model shows one as large: below 1 % after "
            "correction it rejects, and the verdict is bad only if PCOC leaves 0.95 to 1.05 or the slope 0.9 "
            "to 1.1 as well. Intercept 0 and slope 1 are right in logit P = a + b · logit p; a slope below 1 "
            "is over-confident. ECE is relative to the rate; by chance is what a perfect model would show."
        ),
    )


def _test_cell(test: dict[str, Any]) -> Cell:
    p_value = test["p_value"]
    if test["statistic"] is None or p_value is None:
        return Cell(DASH)
    chance = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return Cell(decimal(test["statistic"], 2), detail=chance)


def _paired_table(found: dict[str, Any]) -> TableBlock:
    rows = []
    for name, words in PREDICTOR_NAMES.items():
        pair = found["paired"].get(f"student_less_{name}")
        if pair is None or pair["mean"] is None:
            continue
        error = pair["standard_error"]
        steps = None if not error else pair["mean"] / error
        rows.append(
            (
                Cell(f"less {words}"),
                Cell(signed(pair["mean"])),
                Cell(decimal(error, 5)),
                Cell(signed(steps, 1)),
                Cell(_reading(pair["mean"], steps)),
            )
        )
    return TableBlock(
        title="Student against the others, on the same rows",
        columns=(
            Column("Student"),
            Column("Δ log loss", is_number=True),
            Column("Standard error", is_number=True),
            Column("in errors", is_number=True),
            Column("Reads"),
        ),
        rows=tuple(rows),
        note=(
            "Mean difference of log loss in nats: below 0 the student is better. Within two standard errors "
            "it may be chance; rows of one user are taken as independent."
        ),
    )


def _reading(mean: float, steps: float | None) -> str:
    if steps is None or abs(steps) <= 2.0:
        return "no difference beyond chance"
    return "the student is better" if mean < 0 else "the student is worse"


def _maturity_table(found: dict[str, Any]) -> TableBlock:
    rows: list[tuple[Cell, ...]] = []
    for maturity, words in (("mature", "Window closed"), ("provisional", "Window still open")):
        by_predictor = _in_order(found["by_maturity"][maturity])
        support = by_predictor[0][1]
        if support["rows"] == 0:
            continue
        rows.append(
            (Cell(f"{words}: {count(support['rows'])} rows, {count(support['positives'])} positives"),)
        )
        rows += [
            (
                Cell(PREDICTOR_NAMES[name], strong=name == "student"),
                *(Cell(decimal(figures[key], 5 if key == "log_loss" else 4)) for key in _MATURITY_KEYS),
            )
            for name, figures in by_predictor
        ]
    numbers = ("Log loss", "NE", "AUC", "GAUC", "PCOC")
    return TableBlock(
        title="By maturity of the label",
        columns=(Column("Predictor"), *(Column(title, is_number=True) for title in numbers)),
        rows=tuple(rows),
        note=(
            "While a window is open, a negative may still turn: there PCOC is above 1 even for a perfect "
            "model, and no verdict looks at it."
        ),
    )


_MATURITY_KEYS = ("log_loss", "ne", "auc", "gauc", "pcoc")


def _in_order(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, found[name]) for name in PREDICTOR_NAMES if name in found]
