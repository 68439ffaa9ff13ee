"""The plots of a calibration: reliability before and after, and the cumulative differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.link import logit_of, sigmoid
from calibration.sketch import LogitSketch
from jobs.report_blocks import Figure, FigureRow
from jobs.report_reliability import ReliabilitySeries, reliability_figure
from jobs.report_svg import svg_figure
from monitoring.reliability import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["STAGE_NAMES", "calibration_figures_of", "reliability_rows"]

STAGE_NAMES = {
    "raw": "uncalibrated",
    "before": "calibration of the release",
    "after": "new calibration",
}
_STYLES: dict[str, dict[str, Any]] = {
    "raw": {"color": "#8a959f", "linestyle": (0, (1, 1.6))},
    "before": {"color": "#b4620f", "linestyle": (0, (5, 2))},
    "after": {"color": "#1f5fa8", "linestyle": "-"},
}
_MARKERS: dict[str, dict[str, Any]] = {
    "raw": {"marker": "o", "markerfacecolor": "white"},
    "before": {"marker": "s", "markersize": 3.5},
    "after": {"marker": "o"},
}
_GROUPS = 20
# 95 % of Brownian motions on [0, 1] stay within plus and minus this (the series of Anderson and Darling 1952
# for the absolute maximum: 1 - P = 4/π Σ (-1)^k / (2k + 1) exp(-(2k + 1)² π² / 8 x²)).
_BAND = 2.2414


def calibration_figures_of(task: str, sketches: Mapping[str, LogitSketch]) -> FigureRow:
    """Both plots of one task; sketches by stage."""
    series = [
        ReliabilitySeries(
            STAGE_NAMES[stage],
            tuple(reliability_rows(sketch)),
            {**_STYLES[stage], **_MARKERS[stage]},
            stage == "after",
        )
        for stage, sketch in sketches.items()
    ]
    return FigureRow((reliability_figure(task, series), _cumulative(task, sketches)))


def reliability_rows(sketch: LogitSketch, groups: int = _GROUPS) -> list[dict[str, float | None]]:
    """Groups of bins of nearly equal weight, as rows of `monitoring.reliability.reliability_table`."""
    table = sketch.reliability(groups)
    # A weighted row tells less than a row: the same share for all groups.
    support = table.rows * (sketch.effective_rows / sketch.rows)
    rows = []
    for predicted, observed, effective in zip(
        table.predicted_rate, table.observed_rate, support, strict=True
    ):
        low, high = wilson_interval(float(observed), float(effective))
        rows.append(
            {
                "predicted_logit": _place(predicted),
                "observed_logit": _place(observed),
                "low_logit": _place(low),
                "high_logit": _place(high),
            }
        )
    return rows


def _place(probability: float) -> float | None:
    return float(logit_of(np.array([probability]))[0]) if 0.0 < probability < 1.0 else None


def _cumulative(task: str, sketches: Mapping[str, LogitSketch]) -> Figure:
    """Cumulative differences, observed less predicted, in the order of the prediction."""
    found = {stage: _walk(sketch) for stage, sketch in sketches.items()}
    band = 100 * _BAND * found["after"][2]

    def draw(axes: Axes) -> None:
        axes.axhspan(-band, band, color="#1f5fa8", alpha=0.08, linewidth=0)
        axes.axhline(0.0, color="#9aa5ae", linewidth=1, zorder=1)
        for stage, (share, walk, _) in found.items():
            axes.plot(100 * share, 100 * walk, label=STAGE_NAMES[stage], linewidth=1.6, **_STYLES[stage])
        axes.set_xlabel("rows, from the lowest prediction, %")
        axes.set_ylabel("% of all positives")

    ends = ", ".join(
        f"{STAGE_NAMES[stage]} {100 * (walk.max() - walk.min()):.1f} %"
        for stage, (_, walk, _) in found.items()
    )
    note = (
        "Observed less predicted positives, added up from the lowest prediction: where the line rises, the "
        "model under-predicts. Inside the band for 95 of 100 calibrated models."
    )
    alt = f"Cumulative differences of the {task} task. From lowest to highest: {ends}."
    return svg_figure(draw, "Cumulative differences", alt, note)


def _walk(sketch: LogitSketch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Shares of the rows, differences over all positives, and the standard deviation of the last one."""
    bins = sketch.binned()
    logit, rows, positives, expected = sketch.bins()
    probability = sigmoid(logit)
    walk = np.concatenate([[0.0], np.cumsum(positives - expected)]) / sketch.positives
    share = np.concatenate([[0.0], np.cumsum(rows)]) / sketch.rows
    variance = float((bins.squares * probability * (1.0 - probability)).sum())
    return share, walk, float(np.sqrt(variance)) / sketch.positives
