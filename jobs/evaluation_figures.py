"""The figures of one task: quality, level over time, tests of calibration, comparisons, regret."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitoring.calibration_tests import calibration_verdict
from monitoring.inputs import BoolArray, FloatArray, IntArray
from monitoring.quality import Figures, log_loss, normalized_entropy, paired_log_loss, quality, row_log_loss
from monitoring.quality_table import quality_table
from monitoring.reliability import expected_calibration_error, reliability_table
from monitoring.truth import truth_quality
from pipelines.duration import DAY_MS, HOUR_MS

__all__ = ["JudgedRows", "task_figures", "task_reliability", "timeline"]

RELIABILITY_BINS = 20
# So many points can be told apart in a plot of half a page.
_TIMELINE_BINS = 120
_WIDTHS = tuple(hours * HOUR_MS for hours in (1, 2, 3, 4, 6, 8, 12, 24))


@dataclass(frozen=True)
class JudgedRows:
    """Predictions of one task beside what came of them; all arrays (n,).

    Attributes
    ----------
    predictors : dict of name to probability
        ``student`` first.
    label, mature : bool
    predicted_at : int64, ms
    user : int64
        -1 where unknown.
    base_rates : dict of rule to probability
        What the base rate could have said at ``predicted_at``.
    truth : float64, optional
        The exact probability.
    weight : float64, optional
        1 without it.
    """

    predictors: dict[str, FloatArray]
    label: BoolArray
    mature: BoolArray
    predicted_at: IntArray
    user: IntArray
    base_rates: dict[str, FloatArray]
    truth: FloatArray | None = None
    weight: FloatArray | None = None

    def mature_rows(self) -> JudgedRows:
        """The rows whose label is final; all rows while there is none."""
        kept = self.mature
        if kept.all() or not kept.any():
            return self
        return JudgedRows(
            {name: values[kept] for name, values in self.predictors.items()},
            self.label[kept],
            self.mature[kept],
            self.predicted_at[kept],
            self.user[kept],
            {name: values[kept] for name, values in self.base_rates.items()},
            None if self.truth is None else self.truth[kept],
            None if self.weight is None else self.weight[kept],
        )


def task_figures(rows: JudgedRows) -> dict[str, Any]:
    """Everything that ``metrics.json`` says of one task.

    ``totals``, ``by_hour`` and ``by_maturity`` cover all rows. ``base_rate``, ``paired``, ``calibration``
    and ``timeline`` cover rows with a final label (``judged_on`` says ``mature``), because a provisional
    negative may still turn; while no window has closed they cover all rows (``provisional``). ``regret``
    needs no label and covers all rows.
    """
    judged = rows.mature_rows()
    rule = min(
        judged.base_rates,
        key=lambda name: log_loss(judged.label, judged.base_rates[name], judged.weight) or 0.0,
    )
    figures: dict[str, Any] = {
        "judged_on": "mature" if rows.mature.any() else "provisional",
        **quality_table(rows.predictors, rows.label, rows.predicted_at, rows.mature, rows.user, rows.weight),
        "base_rate": {
            "rule": rule,
            "log_loss": log_loss(rows.label, rows.base_rates[rule], rows.weight),
            "judged": _without_ranking(quality(judged.label, judged.base_rates[rule], weight=judged.weight)),
        },
        "paired": _paired(judged, rule),
        "calibration": {
            name: calibration_verdict(judged.label, probability, judged.weight)
            for name, probability in judged.predictors.items()
        },
        "timeline": timeline(judged, rule),
    }
    if rows.truth is not None:
        figures["regret"] = _regret(rows, judged, rows.truth, rule)
    return figures


def task_reliability(rows: JudgedRows) -> dict[str, Any]:
    """Reliability table and expected calibration error of each predictor, over the rows that are judged."""
    judged = rows.mature_rows()
    found = {}
    for name, probability in judged.predictors.items():
        error = expected_calibration_error(judged.label, probability, RELIABILITY_BINS, judged.weight)
        found[name] = {
            "table": reliability_table(judged.label, probability, RELIABILITY_BINS, judged.weight),
            "error": None if error is None else asdict(error),
        }
    return found


def _without_ranking(figures: Figures) -> Figures:
    # One rate for all who are shown at one time ranks nobody.
    return {name: value for name, value in figures.items() if name not in ("auc", "gauc")}


def _paired(judged: JudgedRows, rule: str) -> dict[str, Any]:
    """Mean log loss of the student less each other's on the same rows, with its standard error."""
    others = {name: values for name, values in judged.predictors.items() if name != "student"}
    others["base_rate"] = judged.base_rates[rule]
    student = judged.predictors["student"]
    return {
        f"student_less_{name}": asdict(paired_log_loss(judged.label, student, other, judged.weight))
        for name, other in others.items()
    }


def _regret(rows: JudgedRows, judged: JudgedRows, truth: FloatArray, rule: str) -> dict[str, Any]:
    """Mean KL(truth || predicted) and the true PCOC of each predictor; the truth's own quality."""
    found: dict[str, Any] = {
        name: truth_quality(truth, probability) for name, probability in rows.predictors.items()
    }
    found["base_rate"] = truth_quality(truth, rows.base_rates[rule])
    oracle = found["student"]["oracle_log_loss"]
    regrets = {
        name: {key: value for key, value in figures.items() if key != "oracle_log_loss"}
        for name, figures in found.items()
    }
    known = judged.truth if judged.truth is not None else truth
    return {
        **regrets,
        "oracle_log_loss": oracle,
        "oracle": quality(judged.label, known, judged.user, judged.weight),
    }


def timeline(judged: JudgedRows, rule: str) -> dict[str, Any]:
    """Quality over time in at most 120 bins of equal width, at least an hour each.

    Returns
    -------
    dict
        ``bin_ms``; ``start`` (ms), ``rows``, ``positives``, a value a bin; for each predictor and
        ``base_rate`` the lists ``log_loss`` and ``mean_probability``, from which bins can be added up, and
        ``ne`` and ``pcoc``, None where the rows cannot give them. Bins without rows are left out.
    """
    time = judged.predicted_at
    width = _bin_width(int(time.min()), int(time.max()))
    start, place = np.unique(time // width, return_inverse=True)
    bins = len(start)
    label, weight = judged.label, judged.weight
    count = np.bincount(place, weight, bins)
    positives = np.bincount(place[label], None if weight is None else weight[label], bins)
    found: dict[str, Any] = {
        "bin_ms": width,
        "start": (start * width).tolist(),
        "rows": count.tolist(),
        "positives": positives.tolist(),
    }
    for name, probability in (*judged.predictors.items(), ("base_rate", judged.base_rates[rule])):
        share = 1.0 if weight is None else weight
        loss = np.bincount(place, share * row_log_loss(label, probability), bins) / count
        predicted = np.asarray(np.bincount(place, share * probability, bins), np.float64)
        found[name] = _bin_figures(loss, predicted, positives, count)
    return found


def _bin_figures(
    loss: FloatArray,
    predicted: FloatArray,
    positives: NDArray[Any],
    count: NDArray[Any],
) -> dict[str, list[float | None]]:
    rates = (positives / count).tolist()
    levels = zip(predicted.tolist(), positives.tolist(), strict=True)
    return {
        "log_loss": loss.tolist(),
        "mean_probability": (predicted / count).tolist(),
        "ne": [normalized_entropy(one, rate) for one, rate in zip(loss.tolist(), rates, strict=True)],
        "pcoc": [total / observed if observed else None for total, observed in levels],
    }


def _bin_width(first: int, last: int) -> int:
    """The least of the usual widths that needs at most 120 bins; whole days beyond the usual ones."""
    wanted = (last - first) / (_TIMELINE_BINS - 1)
    return next((width for width in _WIDTHS if width >= wanted), -(-int(wanted) // DAY_MS) * DAY_MS)
