"""AUC from a histogram: the mergeable companion of `monitoring.ranking.auc`.

Counts of positives and negatives in bins of the logit add up over batches, windows and partitions; the area
under the ROC curve of the binned logits is a pure formula of them. Rows of the same bin count as ties, so
the exact AUC lies within ``value() ± error()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from monitoring.bounded import Bounded
from monitoring.inputs import FloatArray, binary_label, log_odds, probability_array, weight_array
from pipelines.errors import DataError

__all__ = ["RankHistogram", "auc_of_bins"]

# 4096 bins over logits in [-16, 16): a bin is 1/128 wide, 0.8 % of the odds.
_BINS = 4096
_LOW, _WIDTH = -16.0, 32.0 / _BINS


def auc_of_bins(positive: FloatArray, negative: FloatArray) -> Bounded | None:
    """AUC of counts (or weights) by bin, ascending; rows of a bin are ties. None if one class is absent.

    How the rows of a bin are ranked among themselves decides on its pairs: half of them, either way, is the
    most that the value can be off.

    Examples
    --------
    >>> auc_of_bins(np.array([1.0, 3.0]), np.array([3.0, 1.0]))
    Bounded(value=0.75, error=0.1875)
    """
    pairs = float(positive.sum() * negative.sum())
    if pairs == 0.0:
        return None
    below = np.cumsum(negative) - negative
    value = float(positive @ (below + 0.5 * negative)) / pairs
    return Bounded(value, 0.5 * float(positive @ negative) / pairs)


class RankHistogram:
    """Positives and negatives in 4096 equal bins of the logit, clipped to [-16, 16).

    Examples
    --------
    >>> rng = np.random.default_rng(7)
    >>> probability = rng.beta(1, 20, size=20_000)
    >>> label = rng.random(20_000) < probability
    >>> first, second = RankHistogram(), RankHistogram()
    >>> first.update(label[:5000], probability[:5000])
    >>> second.update(label[5000:], probability[5000:])
    >>> from monitoring.ranking import auc
    >>> both = first.merge(second)
    >>> abs(both.value() - auc(label, probability)) <= both.error() < 1e-3
    True
    """

    def __init__(self) -> None:
        self.positive: FloatArray = np.zeros(_BINS, dtype=np.float64)
        self.negative: FloatArray = np.zeros(_BINS, dtype=np.float64)

    def update(
        self, label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None
    ) -> None:
        """Count rows: ``label`` (n,) in {0, 1}, ``probability`` (n,) in [0, 1]."""
        labels = binary_label(label)
        logit = log_odds(probability_array(probability, labels.shape[0]))
        weights = weight_array(weight, labels.shape[0])
        place = np.clip((logit - _LOW) / _WIDTH, 0, _BINS - 1).astype(np.int64)
        mass = np.ones(labels.shape[0]) if weights is None else weights
        self.positive += np.bincount(place[labels], mass[labels], _BINS)
        self.negative += np.bincount(place[~labels], mass[~labels], _BINS)

    def merge(self, other: RankHistogram) -> RankHistogram:
        """Return the histogram of both sets of rows; neither input changes."""
        both = RankHistogram()
        both.positive = self.positive + other.positive
        both.negative = self.negative + other.negative
        return both

    def value(self) -> float | None:
        """AUC of the binned logits; None if one class is absent."""
        found = auc_of_bins(self.positive, self.negative)
        return None if found is None else found.value

    def error(self) -> float | None:
        """Largest possible distance to the exact AUC: half the share of pairs that fell in one bin."""
        found = auc_of_bins(self.positive, self.negative)
        return None if found is None else found.error

    def state(self) -> dict[str, Any]:
        """JSON state: the bins that hold rows."""
        used = np.flatnonzero(self.positive + self.negative)
        return {
            "bins": _BINS,
            "index": used.tolist(),
            "positive": self.positive[used].tolist(),
            "negative": self.negative[used].tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RankHistogram:
        """Inverse of `state`, exact; DataError if it was written with other bins."""
        if state["bins"] != _BINS:
            raise DataError(f"expected a rank histogram of {_BINS} bins, received one of {state['bins']}.")
        histogram = cls()
        used = np.asarray(state["index"], dtype=np.int64)
        histogram.positive[used] = state["positive"]
        histogram.negative[used] = state["negative"]
        return histogram
