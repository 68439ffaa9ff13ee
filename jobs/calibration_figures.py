"""What one sketch says of the calibration of its logits, as plain data for the record and the page."""

from __future__ import annotations

from typing import Any

from calibration.sketch import LogitSketch
from monitoring.binned import binned_calibration_error, binned_quality, binned_smooth_error
from monitoring.binned_parts import binned_brier_parts
from monitoring.binned_tests import binned_tests
from monitoring.bounded import Bounded

__all__ = ["LEVEL", "calibration_figures", "rejected"]

# A test says no below this, divided by the number of tests (Bonferroni).
LEVEL = 0.01

_NAMES = ("log_loss", "ne", "rig", "brier", "auc", "pcoc", "pcoc_low", "pcoc_high")


def calibration_figures(sketch: LogitSketch) -> dict[str, Any]:
    """Every figure and test of a sketch's rows.

    Returns
    -------
    dict
        ``rows``, ``positives``, ``effective_rows`` and ``base_rate``; by name the figures of
        `monitoring.binned.BinnedQuality`, ``ece``, ``ece_null``, ``ece_relative``, ``ece_null_relative``,
        ``smooth_ece`` and ``smooth_ece_null``, ``brier_reliability``, ``brier_resolution`` and
        ``brier_uncertainty``; ``errors``, by name how far a figure is at most from that of the rows
        themselves; ``tests``, by name ``statistic``, ``p_value`` and ``null``. None where the rows cannot
        tell.
    """
    bins = sketch.binned()
    quality, grouped, smooth = binned_quality(bins), binned_calibration_error(bins), binned_smooth_error(bins)
    bounded: dict[str, Bounded | None] = {name: getattr(quality, name) for name in _NAMES}
    if grouped is not None:
        bounded |= {
            "ece": grouped.ece,
            "ece_null": grouped.null,
            "ece_relative": grouped.relative,
            "ece_null_relative": grouped.null_relative,
        }
    if smooth is not None:
        bounded["smooth_ece"] = smooth.smooth_ece
    parts = binned_brier_parts(bins)
    if parts is not None:
        bounded["brier_reliability"] = parts.reliability
        bounded["brier_resolution"] = Bounded(parts.resolution, 0.0)
        bounded["brier_uncertainty"] = Bounded(parts.uncertainty, 0.0)
    found: dict[str, Any] = {
        "rows": quality.rows,
        "positives": quality.positives,
        "effective_rows": quality.effective_rows,
        "base_rate": quality.base_rate,
        **{name: None if value is None else float(value.value) for name, value in bounded.items()},
        "smooth_ece_null": None if smooth is None else smooth.null,
        "errors": {name: float(value.error) for name, value in bounded.items() if value is not None},
        "tests": {
            one.name: {
                "statistic": None if one.statistic is None else one.statistic.value,
                "p_value": None if one.p_value is None else one.p_value.value,
                "null": one.null,
            }
            for one in (binned_tests(bins) if quality.rows else ())
        },
    }
    return found


def rejected(figures: dict[str, Any]) -> list[str]:
    """Names of the tests that reject, at ``LEVEL`` for all of them together."""
    tests = figures["tests"]
    return [
        name
        for name, one in tests.items()
        if one["p_value"] is not None and one["p_value"] * len(tests) < LEVEL
    ]
