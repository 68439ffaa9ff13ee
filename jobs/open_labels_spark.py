"""Rows whose outcome may still come, in Spark: what they say of a probability, without waiting.

A row that shows no outcome yet, when the share ``s`` of the outcomes would be known, has the probability
``1 - p s``. Two uses follow:

- `seen_logit`: the model predicts "seen by now" with ``p s``, so every metric and test of calibration holds
  for the label as it stands against that probability. Settled rows have ``s = 1`` and stay as they are.
- `soft_label`: to fit ``p`` itself, a row without an outcome counts as ``r = p (1 - s) / (1 - p s)`` of a
  positive: the chance that it comes (the E-step of EM; `jobs.first_calibration` does the same in numpy).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.platt import PlattCalibrator
from jobs.calibration_folds import fold_sketches_of
from pipelines.config import Task

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["seen_logit", "soft_label", "with_soft_labels"]

_CHANGE = 1e-4
_STEPS = 20


def seen_logit(logit: Column, share: Column) -> Column:
    """Log-odds of ``p s``: ``z + ln s - ln(1 + e^z (1 - s))``."""
    from pyspark.sql import functions as F

    return F.when(share >= 1.0, logit).otherwise(logit + F.log(share) - F.log1p(F.exp(logit) * (1.0 - share)))


def soft_label(label: Column, logit: Column, share: Column) -> Column:
    """``y + (1 - y) r`` with ``r = (1 - s) / (1 - s + e^-z)``, the chance that the outcome still comes."""
    from pyspark.sql import functions as F

    later = (1.0 - share) / (1.0 - share + F.exp(-logit))
    return F.when(share >= 1.0, label).otherwise(label + (1.0 - label) * later)


def with_soft_labels(rows: DataFrame, release: str, task: Task) -> DataFrame:
    """The rows with the soft labels of EM: Platt's line from them, they from the line, until it rests.

    Parameters
    ----------
    rows : DataFrame
        `jobs.held_out_rows.SCORED_COLUMNS`, the logit after the correction of the sampling; read once a
        step, so they should be kept.
    release, task
        As for `jobs.calibration_folds.fold_sketches_of`.
    """
    from pyspark.sql import functions as F

    slope, intercept = 1.0, 0.0
    for _ in range(_STEPS):
        calibrated = F.col("logit") * slope + intercept
        soft = rows.withColumn("label", soft_label(F.col("label"), calibrated, F.col("share")))
        line = PlattCalibrator.fit_sketch(fold_sketches_of(soft, release, task, 1).sketches[0])
        change = abs(line.slope - slope) + abs(line.intercept - intercept)
        slope, intercept = line.slope, line.intercept
        if change < _CHANGE:
            break
    return soft
