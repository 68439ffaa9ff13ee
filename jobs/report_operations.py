"""The report's sections on what is around the model: drift, consistency, freshness, rows, recovery, time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.report_blocks import (
    DASH,
    Block,
    Cell,
    Column,
    Facts,
    Missing,
    Section,
    TableBlock,
    count,
    decimal,
    moment,
    percent,
    scientific,
    seconds,
    status_cell,
)
from jobs.report_run import RunFolder
from jobs.report_verdicts import FRESHNESS_BUDGET_S, slowest_stage
from monitoring.accounting import CLASSES
from pipelines.events import KINDS

__all__ = [
    "accounting_section",
    "consistency_section",
    "drift_section",
    "freshness_section",
    "recovery_section",
    "timing_section",
]

# What drifted comes first; whoever wants the rest unfolds it.
_DRIFT_ROWS = 12
_CLASS_WORDS = {
    "trained": "learned from",
    "late": "behind the watermark: counted and kept, not learned",
    "duplicate": "a redelivery of an event already read",
    "superseded": "replaced by a later version of the same label",
    "dead_lettered": "malformed or impossible: kept with its reason",
    "expired": "its window closed without anything to learn from it",
    "pending": "waiting in the joiner",
    "warm_up": "learned offline, before the online start",
}


def drift_section(run: RunFolder) -> Section:
    """Features, labels and predictions of two windows."""
    title, anchor = "Drift", "drift"
    if run.drift is None:
        return Section(anchor, title, blocks=(Missing("Drift", "`ctrstream drift` writes drift.json"),))
    spans = [" to ".join(moment(time) for time in run.drift[side]) for side in ("reference", "current")]
    parts = (
        ("Features", run.drift["features"]),
        ("Labels", run.drift.get("labels", [])),
        ("Predictions", run.drift.get("predictions", [])),
    )
    blocks = tuple(
        _drift_table(name, rows, is_first=number == 0) for number, (name, rows) in enumerate(parts) if rows
    )
    return Section(anchor, title, lead=f"Reference: {spans[0]}. Current: {spans[1]}.", blocks=blocks)


def _drift_table(title: str, found: Sequence[dict[str, Any]], *, is_first: bool) -> TableBlock:
    rows = tuple(
        (
            Cell(row["feature"], is_code=True, detail=row["kind"]),
            status_cell(row["verdict"]),
            Cell(decimal(row["psi_excess"], 3)),
            Cell(decimal(row["ks"], 3)),
            Cell(decimal(row["w1_scaled"], 3)),
            Cell(_change(row["null_rate_reference"], row["null_rate_current"])),
            Cell(percent(row["new_mass"])),
            Cell(percent(row["oov_rate"])),
            Cell(row["why"]),
        )
        for row in found
    )
    numbers = ("PSI", "KS", "W1", "Null", "New", "Unseen")
    fold = _DRIFT_ROWS if len(rows) > _DRIFT_ROWS else None
    return TableBlock(
        title=title,
        columns=(
            Column("Name", is_tight=True),
            Column("Verdict"),
            *(Column(number, is_number=True) for number in numbers),
            Column("Why", is_wide=True),
        ),
        rows=rows,
        note=""
        if not is_first
        else (
            "All are 0 without drift. PSI: less what sampling alone would show. KS: the largest gap between "
            "the distribution functions. W1: the distance moved over the middle 90 % of the reference. Null: "
            "share without a value. New: share of values that the reference lacked; unseen: that no earlier "
            "row had. A verdict needs more than chance (false discovery rate 1 %) and an effect above its "
            "floor."
        ),
        fold_from=fold,
        fold_title="" if fold is None else f"{len(rows) - fold} more",
    )


def _change(before: float | None, now: float | None) -> str:
    if before is None or now is None:
        return DASH
    first, last = f"{100 * before:.1f}", f"{100 * now:.1f}"
    return f"{last} %" if first == last else f"{first} → {last} %"


def consistency_section(run: RunFolder) -> Section:
    """What was served against the same rows rescored offline."""
    title, anchor = "Offline / online consistency", "consistency"
    found = run.consistency
    if found is None:
        remedy = (
            "`ctrstream consistency` rescores what `ctrstream serve` has logged and writes consistency.json"
        )
        return Section(anchor, title, blocks=(Missing("Consistency", remedy),))
    facts = (
        ("Verdict", status_cell(found["status"])),
        ("Rows compared", Cell(count(found["rows"]))),
        ("Over the gate, 1e-4", Cell(count(found["rows_over_gate"]))),
        ("Largest |Δlogit|", Cell(scientific(found.get("max_abs_delta_logit")))),
        ("p99 of |Δlogit|", Cell(scientific(found.get("p99_abs_delta_logit")))),
        ("Above rounding, 1e-5", Cell(percent(found.get("share_over_noise"), 2))),
        ("Largest |Δprobability|", Cell(scientific(found.get("max_abs_delta_probability")))),
        ("Rank correlation", Cell(decimal(found.get("spearman"), 6))),
        ("First differing feature", Cell(found.get("first_differing_feature") or "none")),
    )
    return Section(
        anchor, title, lead=f"{found['why'][:1].upper()}{found['why'][1:]}.", blocks=(Facts(facts),)
    )


def freshness_section(run: RunFolder) -> Section:
    """How long until an event is learned and served."""
    title, anchor = "Freshness", "freshness"
    slowest, figures = slowest_stage(run)
    if figures is None:
        remedy = "`ctrstream stream` measures it against a broker; a backtest has no clock of its own"
        return Section(anchor, title, blocks=(Missing("Freshness", remedy),))
    stages = (run.freshness or {}).get("stages") or {slowest: figures}
    rows = tuple(
        (
            Cell(name, strong=name == slowest),
            Cell(count(one.get("rows"))),
            *(Cell(seconds(one.get(key))) for key in ("p50_s", "p95_s", "p99_s", "max_s")),
        )
        for name, one in stages.items()
    )
    numbers = ("Events", "p50", "p95", "p99", "Longest")
    budget = float((run.freshness or {}).get("budget_s", FRESHNESS_BUDGET_S))
    table = TableBlock(
        title="",
        columns=(Column("Stage"), *(Column(number, is_number=True) for number in numbers)),
        rows=rows,
        note=(
            "Wall-clock time, shorter is better; quantiles are right to 1 %. The verdict asks for a p95 of "
            f"the slowest stage up to {seconds(budget)}."
        ),
    )
    return Section(anchor, title, blocks=(table,))


def accounting_section(run: RunFolder) -> Section:
    """What became of every input row."""
    title, anchor = "Row accounting", "accounting"
    found = run.accounting
    if found is None:
        remedy = "`ctrstream backtest` and `ctrstream stream` write accounting.json"
        return Section(anchor, title, blocks=(Missing("Row accounting", remedy),))
    classes, read = found["classes"], found["read"]
    rows = []
    for name in CLASSES:
        values = [classes[kind].get(name, 0) for kind in KINDS]
        total = sum(values)
        rows.append(
            (
                Cell(name.replace("_", " ")),
                *(Cell(count(value)) for value in values),
                Cell(count(total)),
                Cell(_CLASS_WORDS[name]),
            )
        )
    rows.append(_sum_row("accounted for", [sum(classes[kind].values()) for kind in KINDS]))
    rows.append(_sum_row("read", [int(read.get(kind, 0)) for kind in KINDS]))
    lost = sum(abs(int(rows_lost)) for rows_lost in found["difference"].values())
    total = sum(int(read.get(kind, 0)) for kind in KINDS)
    lead = (
        f"{count(total)} rows in, {count(total)} rows accounted for."
        if not lost
        else f"{count(total)} rows in, but {count(lost)} of them are lost or counted twice."
    )
    table = TableBlock(
        title="",
        columns=(
            Column("Class"),
            *(Column(f"{kind.capitalize()}s", is_number=True) for kind in KINDS),
            Column("All", is_number=True),
            Column("The row was", is_wide=True),
        ),
        rows=tuple(rows),
        note="Every row read is in exactly one class, so the classes add up to what was read.",
    )
    return Section(anchor, title, lead=lead, blocks=(table,))


def _sum_row(name: str, values: Sequence[int]) -> tuple[Cell, ...]:
    cells = [Cell(count(value), strong=True) for value in (*values, sum(values))]
    return (Cell(name, strong=True), *cells, Cell(""))


def recovery_section(run: RunFolder) -> Section:
    """Whether a killed worker ended in the state of one that was not."""
    title, anchor = "Recovery", "recovery"
    found = (run.summary or {}).get("recovery")
    if not found:
        remedy = "`ctrstream demo` kills the worker in mid-stream and compares the two states"
        return Section(anchor, title, blocks=(Missing("Recovery", remedy),))
    exact = found.get("exact")
    verdict = "unknown" if exact is None else "good" if exact else "bad"
    digests = [(name, value) for name, value in found.items() if name != "exact" and value is not None]
    facts = [("Verdict", status_cell(verdict))]
    facts += [
        (name.replace("_", " ").capitalize(), Cell(str(value), is_code=len(str(value)) > 20))
        for name, value in digests
    ]
    lead = {
        "good": "A killed and resumed worker ended in the state of one that was not killed, bit by bit.",
        "bad": "A killed and resumed worker ended in another state: rows were lost or learned twice.",
        "unknown": "No crash was tried.",
    }[verdict]
    return Section(anchor, title, lead=lead, blocks=(Facts(tuple(facts), is_one_column=True),))


def timing_section(run: RunFolder) -> Section:
    """Seconds of each stage, and links to what the run has left."""
    title, anchor = "Stages and links", "stages"
    summary = run.summary or {}
    stages: dict[str, float] = {name: float(took) for name, took in (summary.get("stages") or {}).items()}
    blocks: list[Block] = []
    if stages:
        total, longest = max(sum(stages.values()), 1e-9), max(max(stages.values()), 1e-9)
        rows = [
            (
                Cell(name.replace("_", " ")),
                Cell(seconds(took)),
                Cell(percent(took / total, 0)),
                Cell("", bar=took / longest),
            )
            for name, took in stages.items()
        ]
        rows.append((Cell("all", strong=True), Cell(seconds(total), strong=True), Cell(""), Cell("")))
        columns = (
            Column("Stage"),
            Column("Wall-clock time", is_number=True),
            Column("Share", is_number=True),
            Column("", is_wide=True),
        )
        blocks.append(TableBlock("", columns, tuple(rows)))
    else:
        blocks.append(Missing("Stage timings", "`ctrstream demo` and `ctrstream backtest` record them"))
    links = summary.get("links") or {}
    if links:
        blocks.append(Facts(tuple((name, Cell(str(to), link=_safe(str(to)))) for name, to in links.items())))
    return Section(anchor, title, blocks=tuple(blocks))


def _safe(address: str) -> str:
    """Only addresses that a browser fetches, never runs: anything else is shown as text."""
    return address if address.startswith(("http://", "https://")) else ""
