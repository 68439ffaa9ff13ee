"""The report's plots over time, as SVG in data URIs: student, teacher and frozen student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.report_blocks import Figure, FigureRow, decimal, moment, signed
from jobs.report_reliability import ReliabilitySeries, reliability_figure
from jobs.report_svg import svg_figure
from monitoring.quality import normalized_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TimeBins", "task_figures", "time_bins"]

Floats = NDArray[np.float64]

# Fewer positives make PCOC of one point jump by more than a reader could use.
_POSITIVES_A_POINT = 50
_POINTS = 60
# Told apart by line as well as by colour.
_STYLES: dict[str, dict[str, Any]] = {
    "base_rate": {"color": "#6b7680", "linestyle": (0, (1, 1.6)), "linewidth": 1.3},
    "teacher": {"color": "#b4620f", "linestyle": (0, (5, 2)), "linewidth": 1.5},
    "stale": {"color": "#7d4e9e", "linestyle": (0, (4, 1.5, 1, 1.5)), "linewidth": 1.5},
    "student": {"color": "#1f5fa8", "linestyle": "-", "linewidth": 2.0},
}
_LABELS = {
    "student": "student",
    "teacher": "teacher",
    "stale": "frozen student",
    "base_rate": "base rate",
}


class TimeBins:
    """Quality over time, in bins wide enough to be read.

    Attributes
    ----------
    start : (n,) int64
        ms.
    width : int
        ms.
    rows, positives : (n,) float64
    loss, predicted : dict of predictor to (n,) float64
        Sums over the rows of each bin: log loss in nats, probability.
    """

    def __init__(self, timeline: Mapping[str, Any]) -> None:
        starts = np.asarray(timeline["start"], np.int64)
        rows, positives = (np.asarray(timeline[name], np.float64) for name in ("rows", "positives"))
        span = int(starts[-1] - starts[0]) // timeline["bin_ms"] + 1
        wanted = int(min(_POINTS, max(1.0, positives.sum() / _POSITIVES_A_POINT), span))
        together = -(-span // wanted)
        self.width = together * int(timeline["bin_ms"])
        place, index = np.unique((starts - starts[0]) // self.width, return_inverse=True)
        self.start = starts[0] + place * self.width

        def added(values: Floats) -> Floats:
            return np.asarray(np.bincount(index, values, len(place)), np.float64)

        self.rows, self.positives = added(rows), added(positives)
        self.loss: dict[str, Floats] = {}
        self.predicted: dict[str, Floats] = {}
        for name in _STYLES:
            if name in timeline:
                one = timeline[name]
                self.loss[name] = added(np.asarray(one["log_loss"]) * rows)
                self.predicted[name] = added(np.asarray(one["mean_probability"]) * rows)

    def ne(self, name: str) -> Floats:
        """Normalised entropy of each bin, NaN where its base rate is 0 or 1."""
        values = [
            normalized_entropy(loss, rate)
            for loss, rate in zip(self.loss[name] / self.rows, self.positives / self.rows, strict=True)
        ]
        return np.array([np.nan if value is None else value for value in values])

    def pcoc(self, name: str) -> Floats:
        """Predicted over observed in each bin, NaN without positives."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.positives > 0, self.predicted[name] / self.positives, np.nan)

    def gain(self, name: str) -> Floats:
        """Log loss of the student less another's, nats a row."""
        return (self.loss["student"] - self.loss[name]) / self.rows


def time_bins(timeline: Mapping[str, Any]) -> TimeBins:
    """Bins for the plots, from ``timeline`` of ``metrics.json``."""
    return TimeBins(timeline)


def task_figures(task: str, found: Mapping[str, Any], reliability: Mapping[str, Any] | None) -> FigureRow:
    """All plots of one task."""
    bins = time_bins(found["timeline"])
    figures = [] if reliability is None else [_reliability_plot(task, reliability)]
    return FigureRow((*figures, _ne_plot(task, bins), _pcoc_plot(task, bins), _gain_plot(task, bins)))


def _reliability_plot(task: str, reliability: Mapping[str, Any]) -> Figure:
    """Student before and after calibration, teacher."""
    styles = (
        (
            "student_uncalibrated",
            "student, before",
            {"color": "#8a959f", "marker": "o", "markerfacecolor": "white"},
        ),
        ("teacher", "teacher", {"color": "#b4620f", "marker": "s", "markersize": 3.5}),
        ("student", "student, calibrated", {"color": "#1f5fa8", "marker": "o"}),
    )
    series = [
        ReliabilitySeries(label, tuple(reliability[name]["table"]), style, name == "student")
        for name, label, style in styles
        if name in reliability
    ]
    return reliability_figure(task, series)


def _ne_plot(task: str, bins: TimeBins) -> Figure:
    series = {name: bins.ne(name) for name in bins.loss}

    def draw(axes: Axes) -> None:
        _lines(axes, bins, series)
        shown = np.concatenate([values[np.isfinite(values)] for values in series.values()])
        if len(shown):
            low, high = float(shown.min()), float(np.quantile(shown, 0.98))
            axes.set_ylim(low - 0.05 * (high - low) - 0.005, high + 0.12 * (high - low) + 0.01)
        axes.set_ylabel("NE")

    note = f"Lower is better; 1 knows only the rate. Each point is {_width_words(bins)}."
    return svg_figure(
        draw, "Normalised entropy over time", _alt(task, "Normalised entropy", bins, series), note
    )


def _pcoc_plot(task: str, bins: TimeBins) -> Figure:
    series = {name: bins.pcoc(name) for name in bins.loss if name != "base_rate"}

    def draw(axes: Axes) -> None:
        axes.axhspan(0.95, 1.05, color="#dcefe3", zorder=0, linewidth=0)
        axes.axhline(1.0, color="#9aa5ae", linewidth=1, zorder=1)
        _lines(axes, bins, series)
        shown = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in series.values()])
        low, high = np.quantile(shown, [0.01, 0.99]) if len(shown) else (0.8, 1.25)
        axes.set_yscale("log")
        axes.set_ylim(max(0.2, min(0.8, 0.95 * float(low))), min(5.0, max(1.25, 1.05 * float(high))))
        ticks = [tick for tick in (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)]
        first, last = axes.get_ylim()
        inside = [tick for tick in ticks if first <= tick <= last]
        axes.set_yticks(inside, [f"{tick:g}" for tick in inside])
        axes.minorticks_off()
        axes.set_ylabel("PCOC")

    note = "1 is right, above 1 over-predicts; the band is 0.95 to 1.05."
    return svg_figure(draw, "PCOC over time", _alt(task, "PCOC", bins, series), note)


def _gain_plot(task: str, bins: TimeBins) -> Figure:
    compared: tuple[str, ...] = ("teacher", "stale")
    others = [name for name in compared if name in bins.loss] or ["base_rate"]
    series = {name: bins.gain(name) for name in others}

    def draw(axes: Axes) -> None:
        times = _times(bins)
        axes.axhline(0.0, color="#9aa5ae", linewidth=1, zorder=1)
        style = _STYLES[others[0]]
        axes.bar(
            times + np.timedelta64(bins.width // 2, "ms"),
            series[others[0]],
            width=np.timedelta64(int(0.8 * bins.width), "ms"),
            color=style["color"],
            alpha=0.55,
            label=f"student less {_LABELS[others[0]]}",
            zorder=2,
        )
        for name in others[1:]:
            axes.plot(
                times + np.timedelta64(bins.width // 2, "ms"),
                series[name],
                label=f"student less {_LABELS[name]}",
                zorder=3,
                **_STYLES[name],
            )
        _time_axis(axes)
        axes.set_ylabel("Δ log loss, nats")

    total = {name: float((bins.loss["student"] - bins.loss[name]).sum() / bins.rows.sum()) for name in others}
    means = ", ".join(f"less {_LABELS[name]} {signed(mean)}" for name, mean in total.items())
    alt = (
        f"Log loss of the student less the others' for the {task} task over time. Mean: student {means} nats."
    )
    note = f"Below 0 the student is better. Each bar is {_width_words(bins)}."
    return svg_figure(draw, "What learning online is worth", alt, note)


def _lines(axes: Axes, bins: TimeBins, series: Mapping[str, Floats]) -> None:
    middle = _times(bins) + np.timedelta64(bins.width // 2, "ms")
    for name in _STYLES:
        if name in series:
            axes.plot(middle, series[name], label=_LABELS[name], zorder=3, **_STYLES[name])
    _time_axis(axes)


def _times(bins: TimeBins) -> NDArray[np.datetime64]:
    return np.asarray(bins.start, "datetime64[ms]")


def _time_axis(axes: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=7)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.margins(x=0.01)


def _width_words(bins: TimeBins) -> str:
    hours = bins.width / 3_600_000
    if hours < 1.5:
        return "one hour"
    return f"{hours:g} hours" if hours < 48 else f"{hours / 24:g} days"


def _alt(task: str, what: str, bins: TimeBins, series: Mapping[str, Floats]) -> str:
    def middle(values: Floats) -> str:
        known = values[np.isfinite(values)]
        return decimal(float(np.median(known)), 3) if len(known) else "unknown"

    first, last = int(bins.start[0]), int(bins.start[-1]) + bins.width
    parts = ", ".join(f"{_LABELS[name]} {middle(values)}" for name, values in series.items())
    return f"{what} of the {task} task from {moment(first)} to {moment(last)}. Median: {parts}."
