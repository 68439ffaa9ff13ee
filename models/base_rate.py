"""The level that training starts from, taken from rows that need not be in memory."""

from __future__ import annotations

import numpy as np

from models.losses import cure_base_rate
from pipelines.training_set import TrainingRows

__all__ = ["base_rate_and_weight"]

# Rows whose sums are taken together: the same for rows in memory and in files, or the last bit would differ.
_SUMMED_ROWS = 65_536


def base_rate_and_weight(rows: TrainingRows) -> tuple[float, float]:
    """Share of positives once all outcomes are known, and the mean weight of a row.

    See `models.losses.cure_base_rate`. There must be rows.
    """
    sums = []
    for batch in rows.batches(_SUMMED_ROWS):
        weight = batch.weight.astype(np.float64)
        sums.append((np.sum(weight * batch.label), np.sum(weight * batch.observed_share), np.sum(weight)))
    positives, exposure, weights = np.array(sums, np.float64).T
    # To the base rate a batch is like one row that holds its sums.
    return cure_base_rate(positives, exposure, np.ones(len(sums))), float(weights.sum()) / len(rows)
