"""The first calibrator of a model, from held-out rows whose labels may still change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from calibration.chain import CalibrationChain
from calibration.label_origin import LabelOrigin
from calibration.online import OnlineConfig, OnlinePlatt
from calibration.segments import SegmentConfig
from jobs.held_out import enough_of_both
from models.base import sigmoid
from models.losses import cure_base_rate, cure_posterior
from pipelines.training_set import TrainingSet

__all__ = ["fit_first_calibrator"]

_LARGEST_CHANGE = 1e-4
_MAXIMUM_STEPS = 50
_LARGEST_SHIFT = 30.0
# A line that starts from a fitted base is known better than one that starts from nothing: with wider
# deviations the first few hundred outcomes of a rare task move it by more than they know.
_ON_A_BASE = OnlineConfig(intercept_deviation=0.1, slope_deviation=0.03)
_ON_NOTHING = OnlineConfig(intercept_deviation=0.15, slope_deviation=0.1)


def fit_first_calibrator(
    logit: NDArray[np.float64],
    rows: TrainingSet,
    method: str,
    *,
    online: bool,
    segments: tuple[str, ...] = (),
    labels: LabelOrigin | None = None,
    traffic: float = 0.0,
) -> CalibrationChain:
    """Fit the shape of a chain to logits of rows that the model had not learned when it predicted them.

    1. The logits are shifted so that they expect as many positives as were seen. The level of the held-out
       window against the rows before it is drift, which the model that is used has learned by then: it has
       seen the held-out rows, too. Corrected once more here, it would count twice.
    2. A row without an outcome so far is a soft row: with ``r = P(y = 1 | nothing seen yet)`` it counts as
       ``r`` of a positive and ``1 - r`` of a negative. ``r`` needs a calibrated probability, so the two are
       found in turn (EM: Platt's line from the soft rows, soft rows from the line) until ``r`` rests.
    3. The method asked for is fitted to the shifted logits and the last soft rows. With a line that goes on
       learning, ``auto`` fixes nothing: a student unlearns the shape of its errors within days. What it would
       fix the line starts from, as Platt's, and uncertain.

    Parameters
    ----------
    logit : ndarray, shape (n,)
    rows : TrainingSet
    method : str
        ``auto`` or one of :data:`calibration.selection.METHODS`. Taken as ``none`` where there are
        fewer than 20 positives or negatives.
    online : bool
        Add a line that goes on learning.
    segments : tuple of str
        Names of the columns of ``rows.segment_key``; empty adds no segment correction.
    labels : LabelOrigin, optional
        What the line will learn from.
    traffic : float
        Rows of the log in a millisecond, in the mean over whole days if there are any; 0: not known.
    """
    is_enough = enough_of_both(rows) is None and method != "none"
    label, weight = rows.label.astype(np.float64), rows.weight.astype(np.float64)
    if is_enough:
        logit = logit + _level_shift(logit, rows, weight)
        label = _soft_labels(logit, rows, weight)
    starts_line = is_enough and online and method == "auto"
    if not is_enough or starts_line:
        method = "none"
    start = _ON_NOTHING if method == "none" else _ON_A_BASE
    chain = CalibrationChain.fit(
        logit,
        label,
        weight,
        method=method,
        online=_unhurried(start, rows, labels, traffic) if online else None,
        segments=SegmentConfig(segments) if segments else None,
        segment_keys=rows.segment_key if segments and is_enough else None,
    )
    chain.labels = labels if online else None
    if starts_line and CalibrationChain.fit(logit, label, weight).method != "none":
        _start(chain, CalibrationChain.fit(logit, label, weight, method="platt"))
    return chain


def _start(chain: CalibrationChain, platt: CalibrationChain) -> None:
    """Let the line of a chain begin as another chain's, which is straight."""
    line = chain.online
    if line is not None and line.centre is not None:
        low, high = platt.transform_logit([line.centre, line.centre + 1.0]).tolist()
        slope = max(high - low, line.config.minimum_slope)
        begun = replace(line.config, intercept=low - line.centre, slope=slope)
        chain.online = OnlinePlatt(begun, line.centre)


def _unhurried(
    config: OnlineConfig, rows: TrainingSet, labels: LabelOrigin | None, traffic: float
) -> OnlineConfig:
    """The line with no filter that remembers less than the rows of one label lag.

    What changes faster than labels come is over when it is heard of; following it adds noise, no knowledge,
    but the quickest filters would predict the labels as they arrive best. A filter remembers
    ``1 / sqrt(noise * p (1 - p))`` rows.
    """
    if labels is None or labels.lag == 0 or traffic <= 0.0 or len(rows) == 0:
        return config
    weight = rows.weight.astype(np.float64)
    rate = cure_base_rate(rows.label.astype(np.float64), rows.observed_share.astype(np.float64), weight)
    lagging = traffic * labels.lag * float(weight.mean())
    most = 1.0 / (rate * (1.0 - rate) * lagging**2 * config.intercept_noise)
    factors = tuple(factor for factor in config.noise_factors if factor <= most)
    return replace(config, noise_factors=factors or (most,))


def _level_shift(logit: NDArray[np.float64], rows: TrainingSet, weight: NDArray[np.float64]) -> float:
    exposure, seen = weight * rows.observed_share, float(np.sum(weight * rows.label))

    def excess(shift: float) -> float:
        return float(np.sum(exposure * sigmoid(logit + shift))) - seen

    # More seen than all could have given, by a delay curve that is off: no shift explains that.
    if excess(_LARGEST_SHIFT) <= 0.0:
        return 0.0
    return float(brentq(excess, -_LARGEST_SHIFT, _LARGEST_SHIFT))


def _soft_labels(
    logit: NDArray[np.float64], rows: TrainingSet, weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    label, share = rows.label.astype(np.float64), rows.observed_share.astype(np.float64)
    soft = label + (1.0 - label) * cure_posterior(logit, share)
    if (share >= 1.0).all():
        return soft
    for _ in range(_MAXIMUM_STEPS):
        line = CalibrationChain.fit(logit, soft, weight, method="platt")
        calibrated = np.asarray(line.transform_logit(logit), np.float64)
        before, soft = soft, label + (1.0 - label) * cure_posterior(calibrated, share)
        if float(np.max(np.abs(soft - before))) < _LARGEST_CHANGE:
            break
    return soft
