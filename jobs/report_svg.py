"""One plot as SVG in a data URI: the style of the page, text as text."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs.report_blocks import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["svg_figure"]

# Size in CSS pixels; the page scales plots with its columns.
_WIDTH, _HEIGHT = 440, 290
_FONT = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, system-ui, sans-serif"
_INK, _MUTED, _GRID = "#1c2733", "#55626f", "#e3e8ec"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "axes.edgecolor": "#b9c3cb",
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 11.0,
}


def svg_figure(draw: Callable[[Axes], None], title: str, alt: str, note: str) -> Figure:
    """Draw one plot, with a legend above it where it has labelled artists.

    Text stays text, set in the fonts of the page. The same data give the same bytes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    # Ids inside the SVG follow from this text and the content instead of chance.
    style: Any = {**_STYLE, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(_WIDTH / 72, _HEIGHT / 72), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            canvas.legend(
                handles[::-1],
                labels[::-1],
                loc="outside upper left",
                ncols=len(handles),
                handlelength=1.7,
                handletextpad=0.5,
                columnspacing=1.1,
            )
        target = io.StringIO()
        canvas.savefig(target, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = target.getvalue()
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONT}", svg[svg.index("<svg") :])
    encoded = base64.b64encode(svg.encode()).decode("ascii")
    return Figure(f"data:image/svg+xml;base64,{encoded}", alt, title, note, _WIDTH, _HEIGHT)
