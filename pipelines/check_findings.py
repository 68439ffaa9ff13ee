"""What checks of a snapshot have found: figures, each beside its limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Finding", "Unit", "Verdict", "at_least", "at_most", "failed", "figure_text", "told"]

Verdict = Literal["ok", "warning", "failed", "told"]
Unit = Literal["count", "share", "auc"]


@dataclass(frozen=True)
class Finding:
    """One figure.

    Attributes
    ----------
    area : str
        Group of checks that it belongs to: ``files``, ``sums``, ``rows``, ...
    check : str
        What was counted or measured.
    subject : str
        Of what: a task, a column, a kind of event.
    figure : float or None
        None where it could not be measured; ``note`` says why.
    limit : float or None
        None where there is none.
    verdict : "ok", "warning", "failed" or "told"
        ``told`` is neither good nor bad.
    unit : "count", "share" or "auc"
    note : str
        Where it is, and what to make of it.
    is_least : bool
        Whether the limit is the least, not the most, that the figure may be.
    """

    area: str
    check: str
    subject: str
    figure: float | None
    limit: float | None
    verdict: Verdict
    unit: Unit
    note: str = ""
    is_least: bool = False

    @property
    def text(self) -> str:
        """One clause for an error message.

        Examples
        --------
        >>> at_most("rows", "weight is not above 0", "click", 3, 0, "count").text
        'click: weight is not above 0 (3, limit 0)'
        """
        limit = "" if self.limit is None else f", limit {figure_text(self.limit, self.unit)}"
        note = f"; {self.note}" if self.note else ""
        return f"{self.subject}: {self.check} ({figure_text(self.figure, self.unit)}{limit}{note})"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def at_most(
    area: str,
    check: str,
    subject: str,
    figure: float,
    limit: float,
    unit: Unit,
    note: str = "",
    *,
    beyond: Verdict = "failed",
) -> Finding:
    """A figure that must not exceed its limit; ``beyond`` is the verdict if it does."""
    verdict: Verdict = beyond if figure > limit else "ok"
    return Finding(area, check, subject, float(figure), float(limit), verdict, unit, note)


def at_least(
    area: str, check: str, subject: str, figure: float, limit: float, unit: Unit, note: str = ""
) -> Finding:
    """A figure that must reach its limit."""
    verdict: Verdict = "failed" if figure < limit else "ok"
    return Finding(area, check, subject, float(figure), float(limit), verdict, unit, note, is_least=True)


def told(
    area: str, check: str, subject: str, figure: float | None = None, unit: Unit = "count", note: str = ""
) -> Finding:
    """A figure without a limit, or one that could not be measured."""
    return Finding(area, check, subject, figure, None, "told", unit, note)


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Those beyond their limit."""
    return [finding for finding in findings if finding.verdict == "failed"]


def figure_text(figure: float | None, unit: Unit) -> str:
    """As it is printed.

    Examples
    --------
    >>> [figure_text(1234.0, "count"), figure_text(0.05, "share"), figure_text(None, "auc")]
    ['1,234', '5 %', '–']
    """
    if figure is None:
        return "–"
    if unit == "count":
        return f"{figure:,.0f}" if float(figure).is_integer() else f"{figure:,.2f}"
    if unit == "share":
        return f"{100 * figure:.3g} %"
    return f"{figure:.3f}"
