"""The verdict table: can what is being served still be believed, one line a question.

Every function takes figures that may be None and answers ``unknown`` then: a figure that is missing is never
taken for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from monitoring.quality import PairedDifference, pcoc_interval

__all__ = [
    "Status",
    "Verdict",
    "accounting_verdict",
    "base_rate_verdict",
    "consistency_verdict",
    "drift_verdict",
    "freshness_verdict",
    "overall_status",
    "pcoc_verdict",
    "recovery_verdict",
    "teacher_verdict",
    "verdict_table",
]

Status: TypeAlias = Literal["good", "watch", "bad", "unknown"]

_PCOC_BAND = (0.95, 1.05)
# Beyond two standard errors a difference is taken for real.
_SURE = 2.0


@dataclass(frozen=True)
class Verdict:
    """One line: what was asked, what came out, what was expected, and why it matters."""

    name: str
    status: Status
    value: str
    expected: str
    why: str


def _shown(value: float, digits: int = 5) -> str:
    return f"{value:.{digits}g}"


def base_rate_verdict(log_loss: float | None, base_rate_log_loss: float | None) -> Verdict:
    """Does the model beat the running base rate, both as progressive log loss over the same rows?

    Examples
    --------
    >>> base_rate_verdict(0.21, 0.20).why
    'the model is worse than guessing the click rate so far: it must not be served'
    """
    name, expected = "beats the running base rate", "log loss below that of the running base rate"
    if log_loss is None or base_rate_log_loss is None:
        return Verdict(name, "unknown", "-", expected, "no log loss of the model or of the base rate")
    value = f"{_shown(log_loss)} against {_shown(base_rate_log_loss)}"
    if log_loss < base_rate_log_loss:
        gain = 1.0 - log_loss / base_rate_log_loss
        return Verdict(name, "good", value, expected, f"log loss is {gain:.1%} below the base rate's")
    if log_loss == base_rate_log_loss:
        why = "the model knows no more than the click rate so far: it adds nothing"
    else:
        why = "the model is worse than guessing the click rate so far: it must not be served"
    return Verdict(name, "bad", value, expected, why)


def teacher_verdict(
    student: float | None, teacher: float | None, difference: PairedDifference | None = None
) -> Verdict:
    """Does the online student beat the frozen teacher in log loss over the same rows?

    Parameters
    ----------
    student, teacher : log loss in nats, or None
    difference : student less teacher (`monitoring.quality.paired_log_loss`), optional
        With it, a difference within two standard errors is ``watch``; without it, any difference counts.
    """
    name, expected = "online beats the frozen teacher", "log loss of the student below the teacher's"
    if student is None or teacher is None:
        return Verdict(name, "unknown", "-", expected, "no log loss of the student or of the teacher")
    value = f"{_shown(student)} against {_shown(teacher)}"
    error = None if difference is None else difference.standard_error
    if error is not None and abs(student - teacher) <= _SURE * error:
        why = f"the difference {student - teacher:+.2g} is within two standard errors ({error:.2g})"
        return Verdict(name, "watch", value, expected, why)
    if student < teacher:
        why = f"learning online takes {1.0 - student / teacher:.2%} off the teacher's log loss"
        return Verdict(name, "good", value, expected, why)
    if student == teacher:
        return Verdict(name, "watch", value, expected, "learning online changes nothing")
    why = "learning online makes the model worse than the frozen teacher: serve the teacher"
    return Verdict(name, "bad", value, expected, why)


def pcoc_verdict(figures: Mapping[str, Any] | None, name: str = "PCOC") -> Verdict:
    """Is the level right: PCOC in 0.95-1.05, judged with its interval?

    ``bad`` only if the whole 95 % interval is outside the band; ``watch`` if PCOC is outside but its
    interval is not; ``unknown`` if PCOC is inside but the interval is wider than ±20 %, when almost anything
    would be.

    Parameters
    ----------
    figures : dict with ``pcoc, positives, rows``, as `monitoring.quality.quality` gives
    """
    expected = f"{_PCOC_BAND[0]:g} to {_PCOC_BAND[1]:g}"
    pcoc = None if figures is None else figures.get("pcoc")
    if figures is None or pcoc is None:
        return Verdict(name, "unknown", "-", expected, "no positives to judge the level by")
    interval = pcoc_interval(pcoc, figures["positives"], figures["rows"])
    low, high = (pcoc, pcoc) if interval is None else interval
    value = f"{pcoc:.4f} ({low:.4f} to {high:.4f})"
    support = f"{figures['positives']} positives"
    if _PCOC_BAND[0] <= pcoc <= _PCOC_BAND[1]:
        if math.log(high / low) > 2.0 * math.log(1.2):
            return Verdict(name, "unknown", value, expected, f"{support} are too few to judge the level by")
        return Verdict(name, "good", value, expected, f"the level is right, by {support}")
    direction = "over" if pcoc > 1 else "under"
    if high < _PCOC_BAND[0] or low > _PCOC_BAND[1]:
        return Verdict(name, "bad", value, expected, f"the model {direction}-predicts by {abs(pcoc - 1):.1%}")
    return Verdict(name, "watch", value, expected, f"it may {direction}-predict, but {support} leave it open")


def consistency_verdict(outcome: Mapping[str, Any] | None) -> Verdict:
    """Do offline and online agree? Takes what `monitoring.consistency.consistency` gives."""
    name, expected = "offline / online consistency", "0 rows with |Δlogit| above 1e-4"
    if outcome is None:
        return Verdict(name, "unknown", "-", expected, "no rows were scored twice")
    status: Status = outcome["status"]
    return Verdict(
        name, status, f"{outcome['rows_over_gate']} of {outcome['rows']} rows", expected, outcome["why"]
    )


def drift_verdict(rows: Sequence[Mapping[str, Any]] | None) -> Verdict:
    """Has a feature drifted? Takes the rows of `monitoring.drift.drift_table`, worst first."""
    name, expected = "feature drift", "no feature drifted"
    if not rows:
        return Verdict(name, "unknown", "-", expected, "no features were compared")
    drifted = [row["feature"] for row in rows if row["verdict"] == "drifted"]
    watched = [row["feature"] for row in rows if row["verdict"] == "watch"]
    value = f"{len(drifted)} drifted, {len(watched)} to watch, of {len(rows)}"
    if not drifted and not watched:
        return Verdict(name, "good", value, expected, "no difference is above chance and above its floor")
    why = f"`{rows[0]['feature']}`: {rows[0]['why']}"
    return Verdict(name, "bad" if drifted else "watch", value, expected, why)


def freshness_verdict(p95_seconds: float | None, budget_seconds: float) -> Verdict:
    """Are 95 % of the events learned within the budget, both in seconds? Up to twice it is ``watch``."""
    name, expected = "freshness", f"p95 up to {_shown(budget_seconds)} s"
    if p95_seconds is None:
        return Verdict(name, "unknown", "-", expected, "no latency was recorded")
    value = f"p95 {_shown(p95_seconds, 3)} s"
    if p95_seconds <= budget_seconds:
        return Verdict(name, "good", value, expected, "events reach the served model in time")
    status: Status = "watch" if p95_seconds <= 2.0 * budget_seconds else "bad"
    return Verdict(name, status, value, expected, f"{p95_seconds / budget_seconds:.1f} times the budget")


def accounting_verdict(difference: Mapping[str, int] | None) -> Verdict:
    """Is every row accounted for? Takes what `monitoring.accounting.Accounting.check` gives."""
    name, expected = "rows accounted for", "0 rows between read and accounted for"
    if difference is None:
        return Verdict(name, "unknown", "-", expected, "rows were not counted")
    open_kinds = {kind: rows for kind, rows in difference.items() if rows}
    value = f"{sum(abs(rows) for rows in difference.values())} rows"
    if not open_kinds:
        return Verdict(name, "good", value, expected, "every row read is in exactly one class")
    told = [f"{abs(n)} {kind} rows {'lost' if n > 0 else 'counted twice'}" for kind, n in open_kinds.items()]
    return Verdict(name, "bad", value, expected, ", ".join(told))


def recovery_verdict(is_exact: bool | None) -> Verdict:
    """Was the state after a crash and recovery the state of the run that was not killed, bit by bit?"""
    name, expected = "recovery", "the same digest as the run that was not killed"
    if is_exact is None:
        return Verdict(name, "unknown", "-", expected, "no crash was tried")
    if is_exact:
        return Verdict(
            name, "good", "exact", expected, "killed and resumed, the state is identical bit by bit"
        )
    return Verdict(name, "bad", "differs", expected, "rows were lost or learned twice across the crash")


def overall_status(verdicts: Iterable[Verdict | Mapping[str, Any]]) -> Status:
    """The worst status: bad, then watch, then unknown, then good; unknown if there is none.

    Examples
    --------
    >>> overall_status([recovery_verdict(True), recovery_verdict(None)])
    'unknown'
    """
    found = {line.status if isinstance(line, Verdict) else line["status"] for line in verdicts}
    order: tuple[Status, ...] = ("bad", "watch", "unknown", "good")
    return next((status for status in order if status in found), "unknown")


def verdict_table(
    *,
    totals: Mapping[str, Mapping[str, Any]] | None = None,
    base_rate_log_loss: float | None = None,
    difference: PairedDifference | None = None,
    consistency: Mapping[str, Any] | None = None,
    drift: Sequence[Mapping[str, Any]] | None = None,
    freshness_p95_seconds: float | None = None,
    freshness_budget_seconds: float = 60.0,
    accounting_difference: Mapping[str, int] | None = None,
    recovery_exact: bool | None = None,
) -> list[dict[str, str]]:
    """All verdicts, in the order a reviewer asks.

    Parameters
    ----------
    totals : ``totals`` of `monitoring.quality_table.quality_table`, with ``student`` and, if any, ``teacher``
    base_rate_log_loss : `monitoring.base_rate.running_base_rate_log_loss` over the same rows
    difference : `monitoring.quality.paired_log_loss` of the student and the teacher
    consistency, drift, accounting_difference : results of the functions of these names
    freshness_p95_seconds, freshness_budget_seconds : float
    recovery_exact : bool

    Returns
    -------
    list of dict
        ``name, status`` (good, watch, bad, unknown), ``value, expected, why``, all strings. What was not
        given is unknown.

    Examples
    --------
    >>> table = verdict_table(base_rate_log_loss=0.2, totals={"student": {"log_loss": 0.3, "pcoc": None}})
    >>> table[0]["status"], table[1]["status"]
    ('bad', 'unknown')
    """
    student = (totals or {}).get("student")
    teacher = (totals or {}).get("teacher")
    student_loss = None if student is None else student["log_loss"]
    lines = [
        base_rate_verdict(student_loss, base_rate_log_loss),
        teacher_verdict(student_loss, None if teacher is None else teacher["log_loss"], difference),
        pcoc_verdict(student, "PCOC of the student"),
        consistency_verdict(consistency),
        drift_verdict(drift),
        freshness_verdict(freshness_p95_seconds, freshness_budget_seconds),
        accounting_verdict(accounting_difference),
        recovery_verdict(recovery_exact),
    ]
    return [asdict(line) for line in lines]
