"""Which calibration method the rows can pay for, by cross-validation on sketches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.base import Calibrator, checked_rows
from calibration.beta import BetaCalibrator
from calibration.histogram import HistogramCalibrator
from calibration.identity import IdentityCalibrator
from calibration.isotonic import IsotonicCalibrator
from calibration.link import LOGIT_LIMIT, FloatArray
from calibration.plain_isotonic import PlainIsotonicCalibrator
from calibration.platt import PlattCalibrator
from calibration.sketch import LogitSketch
from calibration.temperature import TemperatureCalibrator
from pipelines.errors import ConfigError

__all__ = ["METHODS", "Selection", "fit_method", "fold_sketches", "select_method"]

# From the simplest to the richest; then those that are compared but never chosen, because they lose ranks.
METHODS: dict[str, type[Calibrator]] = {
    method.kind: method
    for method in (
        IdentityCalibrator,
        TemperatureCalibrator,
        PlattCalibrator,
        BetaCalibrator,
        IsotonicCalibrator,
        HistogramCalibrator,
        PlainIsotonicCalibrator,
    )
}


@dataclass(frozen=True, slots=True)
class Selection:
    """What cross-validation found.

    Attributes
    ----------
    method : str
        The choice.
    log_loss : dict of str to float
        Held-out log loss by method, nats; empty where there was nothing to compare.
    standard_error : dict of str to float
        Of each method's excess over the best strict one, paired row by row.
    """

    method: str
    log_loss: dict[str, float]
    standard_error: dict[str, float]


def fit_method(method: str, sketch: LogitSketch) -> Calibrator:
    """The calibrator of that name, fitted to the sketch and frozen; ``ConfigError`` for an unknown name."""
    if method in METHODS:
        return METHODS[method].fit_sketch(sketch).frozen()
    raise ConfigError(f"unknown calibration method {method!r}; expected one of {['auto', *METHODS]}.")


def fold_sketches(
    logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None, *, folds: int = 5
) -> list[LogitSketch]:
    """Deal rows to ``folds`` sketches by a hash of the row number: always the same way.

    Raises
    ------
    ConfigError
        Fewer than 2 folds.
    DataError
        Bad values.
    """
    if folds < 2:
        raise ConfigError(f"cross-validation needs at least 2 folds; got {folds}.")
    z, y, w = checked_rows(logit, label, weight)
    fold = _mixed(len(z)) % np.uint64(folds)
    sketches = [LogitSketch() for _ in range(folds)]
    for number, sketch in enumerate(sketches):
        mine = fold == number
        sketch.update(z[mine], y[mine], w[mine])
    return sketches


def select_method(folds: Sequence[LogitSketch]) -> Selection:
    """Simplest strict method whose held-out log loss is within one standard error of the best strict one's.

    Each fold is predicted by calibrators fitted to all others (their sum minus the fold, exact on
    sketches). With ``d`` the difference, row by row, between a method's loss and that of the best strict
    method, a method qualifies if ``mean(d) <= standard error of mean(d)``; of those, the first of ``none,
    temperature, platt, beta, isotonic`` is taken. The error is paired because the losses of two methods on
    one row are nearly the same number. ``histogram`` and ``plain_isotonic`` are compared and never chosen:
    they lose ranks, whatever their log loss.

    ``none`` and ``temperature`` have no level. A level that is off by ``z`` of its standard errors costs
    about ``z / 2`` standard errors of the paired loss, so that what the rule lets pass is a level that a
    test at two standard errors would let pass too.

    Parameters
    ----------
    folds : sequence of LogitSketch
        Disjoint rows each; empty ones are left out. Fewer than two with rows: ``none``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logit = rng.normal(-3.0, 1.0, 50_000)
    >>> label = rng.random(50_000) < 1.0 / (1.0 + np.exp(0.5 - 0.7 * logit))
    >>> select_method(fold_sketches(logit, label)).method
    'platt'
    """
    held = [sketch for sketch in folds if sketch.rows > 0.0]
    if len(held) < 2:
        return Selection("none", {}, {})
    total = sum(held, LogitSketch())
    rows = total.rows
    # By method: losses of a positive and of a negative in each (fold, bin), beside how many there are.
    losses: dict[str, list[FloatArray]] = {method: [] for method in METHODS}
    counts: list[FloatArray] = []
    for fold in held:
        others = total - fold
        logit, weight, positives, _ = fold.bins()
        counts.append(np.stack([positives, weight - positives]))
        for method in METHODS:
            calibrated = fit_method(method, others).transform_logit(logit)
            losses[method].append(_losses(np.clip(calibrated, -LOGIT_LIMIT, LOGIT_LIMIT)))
    count = np.concatenate(counts, axis=1)
    loss = {method: np.concatenate(parts, axis=1) for method, parts in losses.items()}
    mean = {method: float((count * loss[method]).sum()) / rows for method in METHODS}
    strict = [kind for kind, method in METHODS.items() if method.is_strict]
    best = min(strict, key=lambda method: mean[method])
    error = {method: _standard_error(loss[method] - loss[best], count, rows) for method in METHODS}
    choice = next(method for method in strict if mean[method] - mean[best] <= error[method])
    return Selection(choice, mean, error)


def _losses(logit: FloatArray) -> FloatArray:
    """Log loss of a positive and of a negative at each logit, shape (2, n)."""
    return np.stack([np.logaddexp(0.0, -logit), np.logaddexp(0.0, logit)])


def _standard_error(difference: FloatArray, count: FloatArray, rows: float) -> float:
    mean = float((count * difference).sum()) / rows
    variance = float((count * (difference - mean) ** 2).sum()) / rows
    return math.sqrt(variance / rows)


def _mixed(rows: int) -> npt.NDArray[np.uint64]:
    """SplitMix64 of 0, 1, 2, …: well mixed, so that neither sorted nor periodic rows bias a fold."""
    x = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
