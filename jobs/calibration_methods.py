"""Every method on the same held-out rows: what cross-validation and the tests say of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibration.moved_sketch import moved
from calibration.selection import METHODS, fit_method, select_method
from calibration.sketch import LogitSketch
from jobs.calibration_figures import calibration_figures

__all__ = ["MethodFigures", "Methods", "compare_methods"]


@dataclass(frozen=True)
class MethodFigures:
    """One method, fitted to all folds but one and judged on that one, over all folds.

    Attributes
    ----------
    method : str
    is_strict : bool
        Whether it keeps every rank; else it is shown but never chosen.
    log_loss, standard_error : float
        Nats a row; the error is of the excess over the best strict method, paired row by row.
    figures : dict
        `jobs.calibration_figures.calibration_figures` of its held-out predictions.
    """

    method: str
    is_strict: bool
    log_loss: float
    standard_error: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Methods:
    """All methods, and the one that is taken."""

    choice: str
    methods: tuple[MethodFigures, ...]


def compare_methods(folds: Sequence[LogitSketch], method: str) -> Methods:
    """Judge all methods; take the one asked for, by ``auto`` that of `calibration.selection.select_method`.

    Parameters
    ----------
    folds : sequence of LogitSketch
        Disjoint rows, after the correction of the sampling; two or more with rows.
    method : str
    """
    held = [sketch for sketch in folds if sketch.rows > 0.0]
    total = sum(held, LogitSketch())
    selection = select_method(held)
    found = []
    for name, kind in METHODS.items():
        predicted = LogitSketch()
        for fold in held:
            predicted.merge(moved(fold, fit_method(name, total - fold)))
        found.append(
            MethodFigures(
                name,
                kind.is_strict,
                selection.log_loss[name],
                selection.standard_error[name],
                calibration_figures(predicted),
            )
        )
    return Methods(selection.method if method == "auto" else method, tuple(found))
