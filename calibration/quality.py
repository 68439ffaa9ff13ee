"""What a sketch says about quality: pure formulas on sums per bin of logit, in increasing order of logit.

Each function takes three arrays of shape ``(bins,)`` over the bins that hold rows, or some of them:

- ``rows``: Σ weight,
- ``positives``: Σ weight x label,
- ``expected``: Σ weight x probability, with the probability the model really gave.

``nan`` means undefined: no rows, or one class where two are needed. Read the values so: log loss and NE
lower is better, NE 1 is a predictor that knows the base rate only; PCOC above 1 over-predicts and its
relative standard error is about 1/sqrt(positives); ECE of a *perfect* model is not 0, judge it beside the
base rate and the support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calibration.link import FloatArray
from calibration.pooling import equal_starts

__all__ = ["ReliabilityTable", "auc", "ece", "log_loss", "ne", "pcoc", "reliability"]

# Half a unit of the sketch's fixed point: what a bin's mean probability can honestly be when its sum says 0.
_SMALLEST_MEAN = 2.0**-33


def mean_probability(rows: FloatArray, expected: FloatArray) -> FloatArray:
    """Mean probability per bin, kept inside (0, 1); ``rows`` > 0."""
    clipped: FloatArray = np.clip(expected / rows, _SMALLEST_MEAN, 1.0 - _SMALLEST_MEAN)
    return clipped


def log_loss(rows: FloatArray, positives: FloatArray, probability: FloatArray) -> float:
    """Mean negative log likelihood in nats when every row of a bin is given the bin's ``probability``."""
    total = float(rows.sum())
    if total <= 0.0:
        return math.nan
    negatives = rows - positives
    return float(-(positives * np.log(probability) + negatives * np.log1p(-probability)).sum()) / total


def ne(rows: FloatArray, positives: FloatArray, probability: FloatArray) -> float:
    """Normalised entropy: log loss ÷ entropy of the base rate of these very rows (He et al. 2014)."""
    total, clicked = float(rows.sum()), float(positives.sum())
    if not 0.0 < clicked < total:
        return math.nan
    rate = clicked / total
    entropy = -(rate * math.log(rate) + (1.0 - rate) * math.log1p(-rate))
    return log_loss(rows, positives, probability) / entropy


def pcoc(positives: FloatArray, expected: FloatArray) -> float:
    """Σ predicted ÷ Σ observed; above 1 over-predicts."""
    clicked = float(positives.sum())
    return float(expected.sum()) / clicked if clicked > 0.0 else math.nan


def auc(rows: FloatArray, positives: FloatArray) -> float:
    """Area under the ROC curve; rows of one bin count as ties (half)."""
    negatives = rows - positives
    pairs = float(positives.sum()) * float(negatives.sum())
    if pairs <= 0.0:
        return math.nan
    negatives_below = np.cumsum(negatives) - negatives
    return float((positives * (negatives_below + 0.5 * negatives)).sum()) / pairs


@dataclass(frozen=True, slots=True)
class ReliabilityTable:
    """Predicted against observed, by group of neighbouring bins; arrays of shape ``(groups,)``.

    Attributes
    ----------
    rows, positives, expected : ndarray
        Weighted sums: support, observed and predicted positives.
    lowest_logit, highest_logit : ndarray
        Bounds of the group in logits.
    """

    rows: FloatArray
    positives: FloatArray
    expected: FloatArray
    lowest_logit: FloatArray
    highest_logit: FloatArray

    @property
    def predicted_rate(self) -> FloatArray:
        """Mean probability of the group."""
        mean: FloatArray = self.expected / self.rows
        return mean

    @property
    def observed_rate(self) -> FloatArray:
        """Observed rate of the group."""
        rate: FloatArray = self.positives / self.rows
        return rate


def reliability(
    rows: FloatArray,
    positives: FloatArray,
    expected: FloatArray,
    lower_edge: FloatArray,
    upper_edge: FloatArray,
    groups: int,
) -> ReliabilityTable:
    """Cut the bins into at most ``groups`` groups of nearly equal weight (a bin is never split)."""
    if not len(rows):
        empty = np.zeros(0)
        return ReliabilityTable(empty, empty, empty, empty, empty)
    starts = equal_starts(rows, groups)
    ends = np.append(starts[1:], len(rows)) - 1
    return ReliabilityTable(
        rows=np.add.reduceat(rows, starts),
        positives=np.add.reduceat(positives, starts),
        expected=np.add.reduceat(expected, starts),
        lowest_logit=lower_edge[starts],
        highest_logit=upper_edge[ends],
    )


def ece(table: ReliabilityTable) -> float:
    """Expected calibration error over the table's groups: Σ |predicted - observed| ÷ Σ rows."""
    total = float(table.rows.sum())
    return float(np.abs(table.expected - table.positives).sum()) / total if total > 0.0 else math.nan
