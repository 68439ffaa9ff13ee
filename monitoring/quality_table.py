"""Quality of several predictors at once, in total, by hour and by maturity: ``metrics.json`` of one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from monitoring.inputs import (
    BoolArray,
    FloatArray,
    IntArray,
    binary_label,
    key_codes,
    probability_array,
    time_array,
    weight_array,
)
from monitoring.quality import Figures, normalized_entropy, row_log_loss
from monitoring.ranking import auc_by_group, dense_rank
from pipelines.duration import HOUR_MS
from pipelines.errors import DataError

__all__ = ["quality_table"]

_MATURITIES = ("mature", "provisional")


@dataclass(frozen=True)
class _Rows:
    """What all predictors share: labels, weights and users of the rows."""

    label: BoolArray
    weight: FloatArray | None
    user: IntArray | None
    users: int


@dataclass(frozen=True)
class _Predictor:
    probability: FloatArray
    loss: FloatArray
    rank: IntArray
    ranks: int


def _auc_of_groups(rows: _Rows, one: _Predictor, group: IntArray, groups: int) -> FloatArray:
    """AUC of each group, (groups,), NaN where it has one class."""
    found = auc_by_group(rows.label, one.rank, one.ranks, group, groups, rows.weight)
    value = np.full(groups, np.nan)
    value[found.group] = found.auc
    return value


def _gauc_of_groups(rows: _Rows, one: _Predictor, group: IntArray, groups: int) -> FloatArray:
    """GAUC of each group, (groups,): a user counts in a group with the impressions they have in it."""
    if rows.user is None or rows.users == 0:
        return np.full(groups, np.nan)
    known = rows.user >= 0
    if known.all():
        label, rank, weight, pair = rows.label, one.rank, rows.weight, group * rows.users + rows.user
    else:
        label, rank, pair = rows.label[known], one.rank[known], (group * rows.users + rows.user)[known]
        weight = None if rows.weight is None else rows.weight[known]
    found = auc_by_group(label, rank, one.ranks, pair, groups * rows.users, weight)
    both = ~np.isnan(found.auc)
    place, mass = found.group[both] // rows.users, found.mass[both]
    covered = np.bincount(place, mass, groups)
    total = np.bincount(place, mass * found.auc[both], groups)
    value = np.full(groups, np.nan)
    np.divide(total, covered, out=value, where=covered > 0)
    return value


def _figures_of_groups(rows: _Rows, one: _Predictor, group: IntArray, groups: int) -> list[Figures]:
    """The seven figures of each of the groups 0 .. groups - 1, absent groups included."""
    w = rows.weight
    count = np.bincount(group, minlength=groups)
    positives = np.bincount(group[rows.label], minlength=groups)
    mass = count if w is None else np.bincount(group, w, groups)
    positive_mass = positives if w is None else np.bincount(group[rows.label], w[rows.label], groups)
    loss = np.bincount(group, one.loss if w is None else one.loss * w, groups)
    predicted = np.bincount(group, one.probability if w is None else one.probability * w, groups)
    auc = _auc_of_groups(rows, one, group, groups)
    gauc = _gauc_of_groups(rows, one, group, groups)
    table: list[Figures] = []
    for place in range(groups):
        here = float(mass[place])
        mean = float(loss[place]) / here if here > 0 else None
        base = float(positive_mass[place]) / here if here > 0 else None
        table.append(
            {
                "rows": int(count[place]),
                "positives": int(positives[place]),
                "log_loss": mean,
                "ne": normalized_entropy(mean, base),
                "auc": None if np.isnan(auc[place]) else float(auc[place]),
                "gauc": None if np.isnan(gauc[place]) else float(gauc[place]),
                "pcoc": float(predicted[place] / positive_mass[place]) if positive_mass[place] > 0 else None,
            }
        )
    return table


def quality_table(
    predictors: Mapping[str, npt.ArrayLike],
    label: npt.ArrayLike,
    event_time: npt.ArrayLike,
    mature: npt.ArrayLike,
    user_key: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """Quality of each predictor in total, by hour and by maturity, in one pass.

    Parameters
    ----------
    predictors : dict of name -> probability (n,)
        For instance ``student``, ``student_uncalibrated``, ``teacher``, all for the same rows.
    label : (n,) in {0, 1}
    event_time : (n,) int64, milliseconds since the epoch, UTC
    mature : (n,) bool
        Whether the attribution window of the row has closed.
    user_key : (n,) int or str, optional
        Without it every ``gauc`` is None.
    weight : (n,) >= 0, optional

    Returns
    -------
    dict
        ``totals`` (predictor -> figures), ``by_hour`` (start of the hour in ms, as a decimal string because
        JSON keys are strings, ascending -> predictor -> figures) and ``by_maturity`` (``mature``,
        ``provisional`` -> predictor -> figures; both always there). Figures as in
        `monitoring.quality.quality`.

    Examples
    --------
    >>> table = quality_table({"student": [0.2, 0.6, 0.3]}, [0, 1, 0], [0, 5, HOUR_MS], [True, True, False])
    >>> list(table["by_hour"]), table["by_hour"]["0"]["student"]["auc"]
    (['0', '3600000'], 1.0)
    >>> table["by_maturity"]["provisional"]["student"]["rows"]
    1
    """
    labels = binary_label(label)
    n = labels.shape[0]
    user, users = (None, 0) if user_key is None else key_codes(user_key, n)
    rows = _Rows(labels, weight_array(weight, n), user, users)
    hours, hour = np.unique(time_array("event_time", event_time, n) // HOUR_MS, return_inverse=True)
    closed = np.asarray(mature)
    if closed.shape != (n,) or (n and closed.dtype != np.bool_):
        raise DataError(
            f"expected `mature` as {n} booleans, received {closed.dtype} of shape {closed.shape}."
        )
    groupings: dict[str, tuple[IntArray, list[str]]] = {
        "totals": (np.zeros(n, dtype=np.int64), ["all"]),
        "by_hour": (hour.astype(np.int64), [str(start * HOUR_MS) for start in hours.tolist()]),
        "by_maturity": (np.where(closed.astype(np.bool_), 0, 1).astype(np.int64), list(_MATURITIES)),
    }
    table: dict[str, Any] = {name: {key: {} for key in keys} for name, (_, keys) in groupings.items()}
    for predictor, given in predictors.items():
        probability = probability_array(given, n, predictor)
        one = _Predictor(probability, row_log_loss(labels, probability), *dense_rank(probability))
        for name, (group, keys) in groupings.items():
            for key, figures in zip(keys, _figures_of_groups(rows, one, group, len(keys)), strict=True):
                table[name][key][predictor] = figures
    table["totals"] = table["totals"]["all"]
    return table
