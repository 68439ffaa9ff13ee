"""Tables that ``samples check`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.check_delays import DELAY_STEPS, Arrivals, event_shares
from pipelines.check_findings import Finding, figure_text

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.samples_check import CheckReport

__all__ = ["check_tables"]

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "told": "dim"}
_AREAS = ("files", "sums", "rows", "features", "overlap", "events", "partitions", "lake")
_CLASSES = (
    "credited",
    "superseded",
    "view_through",
    "retraction",
    "late",
    "out_of_window",
    "negative_delay",
    "unclicked",
    "orphan",
    "before_window",
)


def check_tables(report: CheckReport) -> Iterator[Table]:
    """Figures, limits and verdicts; how late outcomes arrive; what became of them.

    Of figures of one kind that are all within their limit the one nearest to it is shown.
    """
    from rich.table import Table

    table = Table(title="checks", title_justify="left")
    for name in ("", "check"):
        table.add_column(name, no_wrap=True)
    table.add_column("of", min_width=18)
    for name in ("figure", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for area in _AREAS:
        shown = list(_shown([finding for finding in report.findings if finding.area == area]))
        for place, (finding, check, subject) in enumerate(shown):
            style = _STYLES[finding.verdict]
            table.add_row(
                area if place == 0 else "",
                check,
                subject,
                figure_text(finding.figure, finding.unit),
                figure_text(finding.limit, finding.unit) if finding.limit is not None else "",
                f"[{style}]{'–' if finding.verdict == 'told' else finding.verdict}[/]",
                end_section=place == len(shown) - 1,
            )
    yield table
    if report.arrivals:
        yield _arrival_table(report.arrivals)
    shares = event_shares(report.manifest.events)
    if shares:
        yield _class_table(shares)
    unmeasured = [own for own in report.findings if own.verdict == "told" and own.figure is None]
    notes = _note_table([*report.failed, *report.warnings, *unmeasured])
    if notes is not None:
        yield notes


def _shown(findings: list[Finding]) -> Iterator[tuple[Finding, str, str]]:
    """Findings to print, with their check and subject in words."""
    checks: dict[str, list[Finding]] = {}
    for finding in findings:
        # The rules of rows are many, and mostly kept: those are told in one line.
        is_kept = finding.area == "rows" and finding.verdict == "ok"
        checks.setdefault("rules that rows keep" if is_kept else finding.check, []).append(finding)
    for check, own in checks.items():
        for finding in own:
            if finding.verdict in ("failed", "warning"):
                yield finding, check, finding.subject
        for verdict in ("ok", "told"):
            calm = [finding for finding in own if finding.verdict == verdict]
            if calm:
                yield _together(calm, check)


def _together(calm: list[Finding], check: str) -> tuple[Finding, str, str]:
    """The nearest to its limit of several findings that are within theirs."""
    if calm[0].area == "rows":
        return calm[0], f"{len({finding.check for finding in calm})} {check}", "all tasks"
    most = max(calm, key=_nearness)
    if calm[0].area != "features":
        return most, check, ", ".join(dict.fromkeys(finding.subject for finding in calm))
    if most.verdict == "told":
        tasks = dict.fromkeys(finding.subject.split(" ")[0] for finding in calm)
        return most, check, f"{', '.join(tasks)} ({len(calm)} column{'s' if len(calm) > 1 else ''})"
    return most, check, most.subject if len(calm) == 1 else f"{most.subject}, most of {len(calm)}"


def _nearness(finding: Finding) -> float:
    figure = finding.figure or 0.0
    return -figure if finding.is_least else figure


def _arrival_table(arrivals: list[Arrivals]) -> Table:
    from rich.table import Table

    table = Table(title="arrived so long after what it belongs to, %", title_justify="left")
    table.add_column("")
    table.add_column("outcomes", justify="right")
    for step in DELAY_STEPS:
        table.add_column(step, justify="right", no_wrap=True)
    for row in arrivals:
        cells = ["–" if share is None else f"{100 * share:.1f}" for share in row.shares]
        table.add_row(row.of, f"{row.count:,}", *cells)
    return table


def _class_table(shares: dict[str, dict[str, float]]) -> Table:
    from rich.table import Table

    table = Table(title="what became of distinct events, %", title_justify="left")
    table.add_column("")
    for kind in shares:
        table.add_column(f"{kind}s", justify="right")
    for name in _CLASSES:
        cells = [own.get(name) for own in shares.values()]
        if any(cells):
            words = ["–" if share is None else f"{100 * share:.2f}" for share in cells]
            table.add_row(name.replace("_", " "), *words)
    return table


def _note_table(findings: list[Finding]) -> Table | None:
    from rich.table import Table

    noted = [finding for finding in findings if finding.note]
    if not noted:
        return None
    table = Table(title="in detail", title_justify="left", show_header=False)
    for is_wide in (False, False, True):
        table.add_column(no_wrap=not is_wide)
    lines = {
        (finding.verdict, finding.subject.split(" ")[0], finding.check, finding.note): finding
        for finding in reversed(noted)
    }
    for finding in reversed(lines.values()):
        style = _STYLES[finding.verdict]
        is_told = finding.verdict == "told"
        subject = finding.subject.split(" ")[0] if is_told else finding.subject
        word = "not measured" if is_told else finding.verdict
        table.add_row(f"[{style}]{word}[/]", subject, f"{finding.check}: {finding.note}")
    return table
