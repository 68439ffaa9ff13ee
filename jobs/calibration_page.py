"""The review of a calibration, as one page."""

from __future__ import annotations

import math
from typing import Any

from jobs.calibrate import Calibration
from jobs.calibration_figures import LEVEL, rejected
from jobs.calibration_methods import MethodFigures
from jobs.calibration_paired import DayLevel
from jobs.calibration_plots import STAGE_NAMES, calibration_figures_of
from jobs.calibration_task import STAGES, TaskCalibration
from jobs.progressive_segments import key_text
from jobs.report_blocks import (
    DASH,
    Block,
    Cell,
    Column,
    Facts,
    Section,
    TableBlock,
    Tile,
    count,
    decimal,
    moment,
    percent,
    scientific,
    signed,
    status_cell,
)
from jobs.report_html import Headline, page_html
from pipelines.config import Task

__all__ = ["render"]

_TESTS = {"pcoc_z": "level", "cox_score": "level and slope", "kuiper": "shape", "spiegelhalter_z": "spread"}
_SOURCE = "Figures come from calibration.json and sketches.parquet beside this page."
_WORST = 15
_Z95 = 1.959963984540054


def render(found: Calibration) -> str:
    """The whole page."""
    begin = "what it had learned" if not found.since else moment(found.since)
    return page_html(
        f"Calibration of {found.release.name}",
        f"Rows from {begin} on, labels as of {moment(found.as_of)}",
        _headline(found),
        [_decision(found), *(_task_section(task, one) for task, one in found.tasks.items()), _rows(found)],
        _SOURCE,
    )


def _headline(found: Calibration) -> Headline:
    better = [task for task, one in found.tasks.items() if one.is_better]
    if found.registered is not None:
        status, claim = "good", f"{found.registered} is better calibrated for: {', '.join(better)}."
    elif better:
        status, claim = (
            "watch",
            f"A better calibration was found for {', '.join(better)}; nothing was registered.",
        )
    else:
        status, claim = (
            "unknown",
            f"Nothing was registered: none is shown to be better than that of {found.release.name}.",
        )
    tiles = [
        Tile(
            f"{task.capitalize()} PCOC",
            decimal(one.figures["after"]["pcoc"], 3),
            f"before {decimal(one.figures['before']['pcoc'], 3)}",
        )
        for task, one in found.tasks.items()
    ]
    tiles += [
        Tile(
            f"{task.capitalize()} log loss",
            decimal(one.figures["after"]["log_loss"], 5),
            f"before {decimal(one.figures['before']['log_loss'], 5)}",
        )
        for task, one in found.tasks.items()
    ]
    return Headline(status, claim, (), (), tuple(tiles))


def _decision(found: Calibration) -> Section:
    rule = found.rule
    facts = Facts(
        (
            ("Release", Cell(found.release.name, is_code=True)),
            ("New release", Cell(found.registered or "none", is_code=found.registered is not None)),
            ("Snapshot", Cell(str(found.snapshot), is_code=True)),
            (
                "Labels",
                Cell(
                    "soft, by the delay model, where a window is open"
                    if rule.open_labels
                    else "final: of closed windows only"
                ),
            ),
        ),
        is_one_column=True,
    )
    rows = tuple(
        (
            Cell(task),
            status_cell("good" if one.is_better else "unknown"),
            Cell(one.methods.choice),
            Cell(one.why),
        )
        for task, one in found.tasks.items()
    )
    rows += tuple(
        (Cell(task), status_cell("unknown"), Cell(DASH), Cell(why)) for task, why in found.skipped.items()
    )
    table = TableBlock(
        "By task",
        (Column("Task"), Column("Better"), Column("Method"), Column("Why", is_wide=True)),
        rows,
        is_stacked=True,
    )
    lead = (
        f"Methods are compared by {rule.folds}-fold cross-validation on the earlier rows: the simplest that "
        "keeps every rank and whose log loss is within one standard error of the best is taken. It is "
        f"registered if, on the last {percent(rule.test_share, 0)} of the window, which it has not seen, its "
        "log loss is lower than the release's own by a paired one-sided test at "
        f"{percent(rule.confidence, 0)} confidence, users taken as clusters."
    )
    return Section("decision", "Decision", lead, (facts, table))


def _task_section(task: Task, one: TaskCalibration) -> Section:
    blocks: list[Block] = [
        _stages_table(one),
        _tests_table(one),
        calibration_figures_of(task, one.sketches),
        _methods_table(one),
        _days_table(one.days),
    ]
    if one.segments:
        blocks.append(_segments_table(one))
    lead = (
        f"Judged on {count(round(one.figures['after']['rows']))} rows (weighted) from {moment(one.cut)} on."
    )
    return Section(f"task-{task}", f"{task.capitalize().replace('_', '-')} model", lead, tuple(blocks))


def _stages_table(one: TaskCalibration) -> TableBlock:
    columns = [
        "Log loss",
        "NE",
        "AUC",
        "PCOC",
        "95 % interval",
        "ECE / rate",
        "if perfect",
        "smECE",
        "if perfect",
    ]
    rows = []
    for stage in STAGES:
        found = one.figures[stage]
        values = [
            decimal(found["log_loss"], 5),
            decimal(found["ne"], 4),
            decimal(found["auc"], 4),
            decimal(found["pcoc"], 4),
            _interval(found),
            percent(found["ece_relative"]),
            percent(found["ece_null_relative"]),
            decimal(found["smooth_ece"], 5),
            decimal(found["smooth_ece_null"], 5),
        ]
        strong = stage == "after"
        cells = (Cell(value, strong=strong) for value in values)
        rows.append((Cell(STAGE_NAMES[stage], strong=strong), *cells))
    return TableBlock(
        "Before and after",
        (Column("Probabilities"), *(Column(title, is_number=True) for title in columns)),
        tuple(rows),
        note=(
            "Lower is better: log loss (nats), NE, ECE (20 groups of equal weight, over the base rate) and "
            "smoothed ECE; beside each of these what a perfectly calibrated model shows on the same rows. "
            "PCOC, predicted over observed: 1 is right."
        ),
    )


def _tests_table(one: TaskCalibration) -> TableBlock:
    rows = []
    for stage in STAGES:
        found = one.figures[stage]
        against = rejected(found)
        cells = [
            Cell(scientific(test["p_value"]), tone="bad" if name in against else "good")
            for name, test in found["tests"].items()
        ]
        rows.append((Cell(STAGE_NAMES[stage], strong=stage == "after"), *cells))
    nulls = "; ".join(
        f"{_TESTS[name]}: {test['null']}" for name, test in one.figures["after"]["tests"].items()
    )
    return TableBlock(
        "Tests of calibration, p-values",
        (Column("Probabilities"), *(Column(f"{words} ({name})") for name, words in _TESTS.items())),
        tuple(rows),
        note=(
            f"How likely a calibrated model shows so much; red where a test rejects at {LEVEL:g} for all "
            f"four together. Null distributions: {nulls}. With many rows some test rejects every model: see "
            "also how large the error is."
        ),
    )


def _rejecting(found: dict[str, Any]) -> Cell:
    against = rejected(found)
    text = f"{len(against)} of {len(found['tests'])} reject" if against else "none rejects"
    return Cell(text, tone="bad" if against else "good")


def _interval(found: dict[str, Any]) -> str:
    if found["pcoc_low"] is None:
        return DASH
    return f"{found['pcoc_low']:.3f} to {found['pcoc_high']:.3f}"


def _methods_table(one: TaskCalibration) -> TableBlock:
    best = min((m for m in one.methods.methods if m.is_strict), key=lambda m: m.log_loss)
    rows = tuple(_method_row(method, best, one.methods.choice) for method in one.methods.methods)
    titles = ("Log loss", "Excess × 1000", "Std. error", "PCOC", "AUC", "ECE / rate")
    return TableBlock(
        "Methods, cross-validated on the earlier rows",
        (
            Column("Method"),
            *(Column(title, is_number=True) for title in titles),
            Column("Tests"),
            Column("Ranks"),
        ),
        rows,
        note=(
            "Excess: over the best method that keeps every rank, with the paired standard error of the "
            "difference, in nats × 1000. Methods that lose ranks are shown and never taken."
        ),
    )


def _method_row(method: MethodFigures, best: MethodFigures, choice: str) -> tuple[Cell, ...]:
    strong = method.method == choice
    found = method.figures
    values = [
        decimal(method.log_loss, 6),
        signed(1e3 * (method.log_loss - best.log_loss), 3),
        decimal(1e3 * method.standard_error, 3),
        decimal(found["pcoc"], 4),
        decimal(found["auc"], 4),
        percent(found["ece_relative"]),
    ]
    return (
        Cell(f"{method.method}{' (taken)' if strong else ''}", strong=strong),
        *(Cell(value, strong=strong) for value in values),
        _rejecting(found),
        Cell("kept" if method.is_strict else "lost"),
    )


def _days_table(days: list[DayLevel]) -> TableBlock:
    rows = tuple(
        (
            Cell(moment(day.day)[:10]),
            Cell(count(day.rows)),
            Cell(count(round(day.positives))),
            *(Cell(_ratio(day.expected[stage], day.positives)) for stage in STAGES),
            Cell(percent(_Z95 * math.sqrt(day.square) / day.positives) if day.positives else DASH),
        )
        for day in days
    )
    titles = ("Rows", "Positives", "raw", "before", "after", "± 95 %")
    return TableBlock(
        "PCOC by day",
        (Column("Day"), *(Column(title, is_number=True) for title in titles)),
        rows,
        note=(
            "Predicted over observed positives of windows that opened on a day (UTC): the model's own "
            "logits, the release's calibration, the new one. The noise alone moves it by the last column."
        ),
    )


def _segments_table(one: TaskCalibration) -> TableBlock:
    """The segments that the release's calibration is most certainly wrong about, before and after."""
    after = {(found.level, found.key): found for found in one.segments["after"]}
    rows = []
    for found in one.segments["before"][:_WORST]:
        now = after.get((found.level, found.key))
        rows.append(
            (
                Cell(f"{found.level} {key_text(found.key)}", is_code=True),
                Cell(count(round(found.rows))),
                Cell(count(round(found.positives))),
                Cell(decimal(found.pcoc, 3)),
                Cell(f"{found.lower:.2f} to {found.upper:.2f}"),
                Cell(scientific(found.q_value), tone="bad" if found.is_off else "good"),
                Cell(DASH if now is None else decimal(now.pcoc, 3)),
                Cell(DASH)
                if now is None
                else Cell(scientific(now.q_value), tone="bad" if now.is_off else "good"),
            )
        )
    off = {stage: sum(found.is_off for found in one.segments[stage]) for stage in STAGES}
    titles = (
        "Rows",
        "Positives",
        "PCOC before",
        "true multiplier, 95 %",
        "q before",
        "PCOC after",
        "q after",
    )
    return TableBlock(
        f"Segments ({count(len(one.segments['after']))})",
        (Column("Segment"), *(Column(title, is_number=True) for title in titles)),
        tuple(rows),
        note=(
            f"The {len(rows)} segments with most evidence against the release's calibration. Called off, of "
            f"which 5 % may be so by chance: {off['raw']} uncalibrated, {off['before']} before, "
            f"{off['after']} after. The multiplier is what expected positives would have to be multiplied by."
        ),
    )


def _ratio(expected: float, positives: float) -> str:
    return decimal(expected / positives, 3) if positives else DASH


def _rows(found: Calibration) -> Section:
    titles = {
        "snapshot": "in the snapshot",
        "learned": "may have been learned",
        "before_window": "before the window",
        "after_as_of": "after the as-of time",
        "open": "label may still change",
        "not_recorded": "no prediction recorded",
        "held_out": "held out",
    }
    rows = tuple(
        (Cell(title), *(Cell(count(one.counts[name])) for one in found.rows.values()))
        for name, title in titles.items()
    )
    table = TableBlock("", (Column("Class"), *(Column(task, is_number=True) for task in found.rows)), rows)
    lead = "Every row of the snapshot is in one of these classes; held-out rows are fitted to or judged on."
    return Section("rows", "Rows", lead, (table,))
