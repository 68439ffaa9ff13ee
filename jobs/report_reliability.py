"""Reliability diagrams on logit axes, where 0.001 against 0.002 is as visible as 0.1 against 0.2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.report_blocks import Figure
from jobs.report_svg import svg_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ReliabilitySeries", "reliability_figure"]

# Tick marks of a wide and of a narrow range of probabilities.
_COARSE = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)
_FINE = (
    *(n * 1e-3 for n in range(1, 10)),
    *(n * 1e-2 for n in (1, 1.5, 2, 3, 4, 5, 7)),
    *(n / 10 for n in range(1, 10)),
)


@dataclass(frozen=True)
class ReliabilitySeries:
    """One line of a diagram.

    Attributes
    ----------
    label : str
    table : tuple of mapping
        Rows of `monitoring.reliability.reliability_table`.
    style : mapping
        Of the line and its markers.
    is_main : bool
        Drawn on top, with its intervals.
    """

    label: str
    table: tuple[Mapping[str, Any], ...]
    style: Mapping[str, Any]
    is_main: bool


def reliability_figure(task: str, series: Sequence[ReliabilitySeries]) -> Figure:
    """Predicted against observed on logit axes."""
    tables = [(one, _finite_rows(one.table)) for one in series]
    ends = [row[key] for _, rows in tables for row in rows for key in ("predicted_logit", "observed_logit")]

    def draw(axes: Axes) -> None:
        low, high = (min(ends) - 0.4, max(ends) + 0.4) if ends else (-6.0, 0.0)
        axes.plot([low, high], [low, high], color="#9aa5ae", linewidth=1, zorder=1)
        for one, rows in tables:
            if rows:
                _draw_series(axes, one, rows)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        coarse, fine = (
            [p for p in marks if low <= np.log(p / (1 - p)) <= high] for marks in (_COARSE, _FINE)
        )
        ticks = coarse if len(coarse) >= 4 else fine
        places, names = [np.log(p / (1 - p)) for p in ticks], [f"{100 * p:g} %" for p in ticks]
        axes.set_xticks(places, names)
        axes.set_yticks(places, names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("observed")

    gaps = ", ".join(f"{one.label.replace(',', '')} {_gap(rows)}" for one, rows in tables)
    alt = f"Reliability diagram of the {task} task on logit axes. Mean distance in logits: {gaps}."
    note = (
        "Observed against predicted, on logit axes: below the line it over-predicts. Groups of equally many "
        "rows, 95 % intervals."
    )
    return svg_figure(draw, "Reliability", alt, note)


def _draw_series(axes: Axes, one: ReliabilitySeries, rows: Sequence[Mapping[str, Any]]) -> None:
    x, y = (np.array([row[key] for row in rows]) for key in ("predicted_logit", "observed_logit"))
    if one.is_main:
        spread = [
            [row["observed_logit"] - row["low_logit"] for row in rows],
            [row["high_logit"] - row["observed_logit"] for row in rows],
        ]
        axes.errorbar(
            x, y, spread, fmt="none", ecolor=one.style["color"], alpha=0.45, linewidth=1.2, zorder=3
        )
    options: dict[str, Any] = {"linewidth": 1.0, "markersize": 4.5, **one.style}
    options["zorder"] = 4 if one.is_main else 2
    axes.plot(x, y, label=one.label, **options)


def _gap(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "unknown"
    mean = float(np.mean([abs(row["predicted_logit"] - row["observed_logit"]) for row in rows]))
    return f"{mean:.2f}"


def _finite_rows(table: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Groups that have a place on logit axes: some positives and some negatives."""
    keys = ("predicted_logit", "observed_logit", "low_logit", "high_logit")
    return [row for row in table if all(row[key] is not None for key in keys)]
