"""The report as one page: its sections in order, put into the template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.report_blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Missing,
    Section,
    TableBlock,
    Tile,
    count,
    decimal,
    moment,
    seconds,
    status_cell,
)
from jobs.report_html import Headline, page_html
from jobs.report_operations import (
    accounting_section,
    consistency_section,
    drift_section,
    freshness_section,
    recovery_section,
    timing_section,
)
from jobs.report_quality import task_section
from jobs.report_run import RunFolder
from jobs.report_verdicts import judged_figures, run_verdicts, slowest_stage
from monitoring.verdicts import Verdict, overall_status
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS, parse_duration

__all__ = ["Headline", "render", "sections"]

_DIGEST_DIGITS = 16
# Label policies whose first row waits for the observation window.
_OBSERVING = ("vanilla", "esdfm", "defer", "defuse", "bidefuse")


def render(run: RunFolder) -> str:
    """The whole page: one HTML document that loads nothing from anywhere."""
    verdicts = run_verdicts(run)
    parts = sections(run, verdicts)
    return page_html(_title(run), _subtitle(run), _headline(run, verdicts, parts), parts)


def sections(run: RunFolder, verdicts: Sequence[Verdict]) -> list[Section]:
    """All sections in the order in which a reviewer asks."""
    return [
        _verdict_section(verdicts),
        _run_section(run),
        *(task_section(run, task) for task in run.tasks),
        *_unjudged(run),
        drift_section(run),
        consistency_section(run),
        freshness_section(run),
        accounting_section(run),
        recovery_section(run),
        timing_section(run),
    ]


def _title(run: RunFolder) -> str:
    name = (run.summary or {}).get("events")
    return f"Review of {Path(name).name}" if name else f"Review of {run.path.resolve().name}"


def _subtitle(run: RunFolder) -> str:
    if run.metrics is None:
        return "The predictions of this run were not judged."
    log, until = run.metrics["log"], run.metrics.get("warm_up_until")
    begin = moment(log["first"] if until is None else until)
    return f"Predictions from {begin} to {moment(log['last'])}, judged as of {moment(run.metrics['as_of'])}"


def _headline(run: RunFolder, verdicts: Sequence[Verdict], parts: Sequence[Section]) -> Headline:
    status = overall_status(verdicts)
    found = {name: [one for one in verdicts if one.status == name] for name in _ORDER}
    worst = ", ".join(one.name for one in found[status])
    claims = {
        "good": "All checks pass: what is served can be believed.",
        "watch": f"No check fails. To watch: {worst}.",
        "bad": f"Do not rely on this run as it stands. Failed checks: {worst}.",
        "unknown": f"No check fails, but not all were made. Unknown: {worst}.",
    }
    return Headline(
        status=status,
        claim=claims[status],
        counts=tuple((name, len(found[name])) for name in _ORDER if found[name]),
        alarms=tuple(alarm for part in parts for alarm in part.alarms),
        tiles=tuple(_tiles(run)),
    )


def _tiles(run: RunFolder) -> Iterator[Tile]:
    """The figures that a reader asks for first."""
    for task in run.tasks:
        figures = judged_figures(run.task(task))
        student, teacher = figures["student"], figures.get("teacher")
        against = "" if teacher is None else f"teacher {decimal(teacher['ne'], 3)}"
        yield Tile(f"{task.capitalize()} NE", decimal(student["ne"], 3), against)
        raw = decimal(figures["student_uncalibrated"]["pcoc"], 3)
        yield Tile(f"{task.capitalize()} PCOC", decimal(student["pcoc"], 3), f"before calibration {raw}")
    _, fresh = slowest_stage(run)
    if fresh is not None:
        yield Tile("Freshness, p95", seconds(fresh["p95_s"]), f"p50 {seconds(fresh['p50_s'])}")
    if run.accounting is not None:
        lost = sum(abs(int(rows)) for rows in run.accounting["difference"].values())
        yield Tile(
            "Rows accounted for",
            count(sum(int(rows) for rows in run.accounting["read"].values()) - lost),
            "all that were read" if not lost else f"{count(lost)} are not",
        )


_ORDER = ("bad", "watch", "unknown", "good")


def _verdict_section(verdicts: Sequence[Verdict]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    group = ""
    for one in verdicts:
        task, colon, check = one.name.partition(": ")
        heading = f"{task.capitalize()} model" if colon else "The run as a whole"
        if heading != group:
            rows.append((Cell(heading),))
            group = heading
        name = check if colon else one.name
        rows.append(
            (
                Cell(name[:1].upper() + name[1:]),
                status_cell(one.status),
                Cell(one.value),
                Cell(one.expected),
                Cell(one.why.replace("`", "")),
            )
        )
    table = TableBlock(
        title="",
        columns=(
            Column("Check", is_tight=True),
            Column("Verdict"),
            Column("Found", is_tight=True),
            Column("Expected"),
            Column("Why", is_wide=True),
        ),
        rows=tuple(rows),
        note=(
            "Good: as expected. Watch: outside, but it may be chance or needs a look. Bad: outside beyond "
            "chance. Unknown: not recorded, or too few rows to tell; it is never taken for good."
        ),
        is_stacked=True,
    )
    return Section("verdicts", "Verdicts", blocks=(table,))


def _run_section(run: RunFolder) -> Section:
    facts: list[tuple[str, Cell]] = [("Run folder", Cell(run.path.resolve().name, is_code=True))]
    blocks: list[Block] = []
    if run.metrics is not None:
        facts += _metrics_facts(run.metrics)
    else:
        blocks.append(Missing("Quality of the predictions", "`ctrstream evaluate` writes metrics.json"))
    if run.config is not None:
        facts += _config_facts(run.config)
    else:
        blocks.append(Missing("The configuration", "`ctrstream backtest` writes config.toml"))
    for name, digest in (("Config digest", run.config_digest), ("Feature spec digest", run.spec_digest)):
        if digest is not None:
            facts.append((name, Cell(f"sha256 {digest[:_DIGEST_DIGITS]}", is_code=True)))
    if run.releases:
        facts.append(("Releases", Cell(f"{count(len(run.releases))}, the last is {run.releases[-1]}")))
    return Section("run", "What was run", blocks=(Facts(tuple(facts)), *blocks))


def _metrics_facts(metrics: dict[str, Any]) -> list[tuple[str, Cell]]:
    log = metrics["log"]
    events = ", ".join(f"{count(log[topic])} {topic}" for topic in ("impressions", "clicks", "conversions"))
    facts = [
        ("Events", Cell(events)),
        ("Shown from", Cell(f"{moment(log['first'])} to {moment(log['last'])}")),
        ("Learns online from", Cell(moment(metrics.get("warm_up_until")))),
        ("Labels as of", Cell(moment(metrics["as_of"]))),
    ]
    windows = metrics["attribution"]
    facts.append(
        (
            "Windows",
            Cell(
                f"click {windows['click_window']} after the impression, conversion "
                f"{windows['attribution_window']} after the click, "
                f"{windows['allowed_lateness']} for late events"
            ),
        )
    )
    return facts


def _config_facts(config: dict[str, Any]) -> list[tuple[str, Cell]]:
    def section(name: str) -> dict[str, Any]:
        found: dict[str, Any] = config.get(name, {})
        return found

    student, calibration = section("student"), section("calibration")
    frozen = student.get("frozen") or ["nothing"]
    online = "updated online" if calibration.get("online") else "not updated online"
    return [
        ("Warm-up", Cell(f"{section('backtest').get('warmup')} of the log trains the first models")),
        ("Label policy", Cell(_label_policy(section("labels"), section("attribution")))),
        ("Teacher", Cell(str(section("teacher").get("model")))),
        ("Student", Cell(f"{student.get('model')}, {' and '.join(frozen)} frozen online")),
        ("Calibration", Cell(f"{calibration.get('method')}, {online}")),
    ]


def _label_policy(labels: dict[str, Any], attribution: dict[str, Any]) -> str:
    """The policy of each task, and how long its first row waits where it does."""
    common = labels.get("policy")
    own = {task: labels.get(task, {}) for task in labels.get("tasks", ("click", "conversion"))}
    if not any("policy" in one for one in own.values()):
        return str(common)
    parts = []
    for task, one in own.items():
        policy = one.get("policy", common)
        window = one.get("observation_window", attribution.get("observation_window"))
        waits = policy in _OBSERVING and window is not None
        parts.append(f"{task} {policy}" + (f", first row after {_duration(window)}" if waits else ""))
    settled = " (settled from the delays)" if common == "auto" else ""
    return "; ".join(parts) + settled


def _duration(text: str) -> str:
    """A duration of the config in units a reader need not convert: ``1213m`` is ``20h 13m``."""
    left, parts = parse_duration(text), []
    for unit, width in (("d", DAY_MS), ("h", HOUR_MS), ("m", MINUTE_MS)):
        if left >= width:
            parts.append(f"{left // width}{unit}")
            left %= width
    if left or not parts:
        parts.append(f"{left / 1000:g}s")
    return " ".join(parts)


def _unjudged(run: RunFolder) -> list[Section]:
    """A section for each task that has no figures, so that it is not overlooked."""
    if run.metrics is None:
        remedy = "`ctrstream evaluate` judges predictions.parquet by the log"
        return [Section("quality", "Quality", blocks=(Missing("Quality", remedy),))]
    return [
        Section(
            f"task-{task}",
            f"{task.capitalize()} model",
            blocks=(
                Missing(f"{task.capitalize()} model", f"{reason[:1].upper()}{reason[1:]}", "not judged"),
            ),
        )
        for task, reason in run.metrics["skipped"].items()
    ]
