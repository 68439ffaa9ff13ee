"""Judge recorded predictions by what came of the impressions: ``metrics.json`` and ``reliability.json``.

The labels are those of `pipelines.attribution`, as known at ``as_of``. The tasks click and view_through are
judged on every predicted impression. The conversion task predicts P(conversion | click), so it is judged on
impressions with a credited click only. An outcome of credit c counts as c of a positive and 1 - c of a
negative.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.evaluation_figures import JudgedRows, task_figures, task_reliability
from monitoring.inputs import key_codes
from pipelines.config import Task
from pipelines.config_sections import TASKS, AttributionConfig
from pipelines.errors import DataError
from pipelines.events import IMPRESSION, TOPICS
from pipelines.outcomes import NO_OUTCOME, Outcome, Tables, latest_arrival, outcomes_as_of

__all__ = ["METRICS_FILE", "RELIABILITY_FILE", "TASKS", "Evaluation", "evaluate"]

METRICS_FILE = "metrics.json"
RELIABILITY_FILE = "reliability.json"

_REQUIRED = ("impression_id", "task", "predicted_at", "logit", "probability")
# Column of the predictions, where it is there -> name of the predictor. The student comes first: what it is
# compared with follows.
_OPTIONAL_PREDICTORS = {"teacher_probability": "teacher", "stale_probability": "stale"}

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """What recorded predictions are worth.

    Attributes
    ----------
    metrics : dict
        Content of ``metrics.json``: by task ``totals``, ``by_hour``, ``by_maturity`` (the contract), and
        beside them ``rows``, ``judged_on``, ``base_rate``, ``paired``, ``calibration``, ``timeline`` and,
        where the truth is known, ``regret``; for all tasks ``as_of``, ``attribution``, ``warm_up_until``,
        ``log`` and ``skipped``.
    reliability : dict
        Content of ``reliability.json``: by task and predictor ``table`` (rows of
        `monitoring.reliability.reliability_table`) and ``error``.
    """

    metrics: dict[str, Any]
    reliability: dict[str, Any]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that were judged, in order."""
        return tuple(task for task in TASKS if task in self.metrics)

    def write(self, folder: Path) -> list[Path]:
        """Write both files, each complete or not at all; returns their paths."""
        written = []
        for name, document in ((METRICS_FILE, self.metrics), (RELIABILITY_FILE, self.reliability)):
            part = folder / f".{name}.part"
            part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            written.append(part.replace(folder / name))
        return written


def evaluate(
    predictions: pa.Table,
    tables: Tables,
    attribution: AttributionConfig,
    *,
    as_of: int | None = None,
    truth: pa.Table | None = None,
    warm_up_until: int | None = None,
    skipped: Mapping[str, str] | None = None,
) -> Evaluation:
    """Judge predictions by the outcomes of a log.

    Parameters
    ----------
    predictions : pa.Table
        ``impression_id, task, predicted_at`` (event time, ms), ``logit`` (the student's own),
        ``probability`` (calibrated); optional ``user_key`` (else the log's users), ``teacher_probability``,
        ``stale_probability``. Of several rows of one impression and task the first counts.
    tables : impressions, clicks, conversions
        The whole log, warm-up included: the running base rate learns from it as the models did.
    attribution : AttributionConfig
    as_of : int, optional
        Arrival time, ms; labels are those known then. Default: when the last event arrived.
    truth : pa.Table, optional
        ``impression_id, click_probability, conversion_probability``: the exact probabilities of a
        simulated log.
    warm_up_until : int, optional
        Where the predictions begin (arrival time, ms); only written down.
    skipped : mapping of task to reason, optional
        Tasks that were not predicted.

    Raises
    ------
    DataError
        If the predictions lack a column or hold values that are no probabilities, if none of them belongs
        to the log, or if the truth lacks an impression.
    """
    _check_columns(predictions)
    moment = latest_arrival(tables) if as_of is None else as_of
    outcomes = outcomes_as_of(tables, attribution, moment)
    reasons = dict(skipped or {})
    metrics: dict[str, Any] = {}
    reliability: dict[str, Any] = {}
    for task in attribution.tasks:
        own = predictions.filter(pc.equal(pc.cast(predictions["task"], pa.string()), task))
        if own.num_rows == 0:
            reasons.setdefault(task, "there are no predictions of this task")
            continue
        rows, counts = _judged_rows(own, task, outcomes[task], tables, truth)
        if counts["judged"] == 0:
            reasons.setdefault(task, _nothing_to_judge(task, counts))
            continue
        metrics[task] = {"rows": counts, **task_figures(rows)}
        reliability[task] = task_reliability(rows)
    if not metrics:
        told = "; ".join(f"{task}: {reason}" for task, reason in reasons.items())
        raise DataError(f"no prediction can be judged by this log. {told}.", hint=_WRONG_LOG)
    metrics["as_of"] = moment
    metrics["attribution"] = attribution.model_dump()
    metrics["warm_up_until"] = warm_up_until
    metrics["log"] = _extent(tables)
    metrics["skipped"] = {task: reason for task, reason in reasons.items() if task not in metrics}
    return Evaluation(metrics, reliability)


def _extent(tables: Tables) -> dict[str, Any]:
    """Events of each kind, and the first and last event time of the impressions (ms)."""
    ends = pc.min_max(tables[IMPRESSION].column("event_time")).as_py()
    counts = {topic: table.num_rows for topic, table in zip(TOPICS, tables, strict=True)}
    return {**counts, "first": ends["min"], "last": ends["max"]}


_WRONG_LOG = "give the folder of the log that was predicted with --events"


def _nothing_to_judge(task: Task, counts: Mapping[str, int]) -> str:
    if task == "conversion" and counts["not_clicked"]:
        return "none of the predicted impressions has a credited click"
    return "none of the predicted impressions is in the log"


def _check_columns(predictions: pa.Table) -> None:
    missing = [name for name in _REQUIRED if name not in predictions.column_names]
    if missing:
        raise DataError(
            f"expected predictions with the columns {', '.join(_REQUIRED)}. Missing: {', '.join(missing)}.",
            hint=f"found the columns {', '.join(predictions.column_names)}",
        )


def _judged_rows(
    own: pa.Table, task: Task, outcome: Outcome, tables: Tables, truth: pa.Table | None
) -> tuple[JudgedRows, dict[str, int]]:
    """Predictions of one task beside their outcomes, and what became of every recorded row."""
    own_ids = _text(own, "impression_id")
    own_place, is_repeated = _first_rows(own_ids)
    row = _place(own_ids, outcome.impression_id)[own_place]
    chosen = own_place[row >= 0]
    row = row[row >= 0]
    has_no_window = len(own_place) - len(row)
    counts = {"recorded": own.num_rows, "repeated": is_repeated, "judged": len(row)}
    counts |= {"not_clicked": 0, "not_in_log": has_no_window}
    if task == "conversion":
        known = int(
            (_place(own_ids.take(pa.array(own_place)), _text(tables[IMPRESSION], "impression_id")) >= 0).sum()
        )
        counts |= {"not_clicked": known - len(row), "not_in_log": len(own_place) - known}
    chosen, row, label, weight = _in_parts(chosen, row, outcome.label[row])
    used = own.take(pa.array(chosen))
    predicted_at = np.asarray(used["predicted_at"].to_numpy(), np.int64)
    return (
        JudgedRows(
            predictors=_predictors(used),
            label=label,
            mature=outcome.mature[row],
            predicted_at=predicted_at,
            user=_users(used, tables[IMPRESSION]),
            base_rates=_base_rates(outcome, row, predicted_at),
            truth=_truth(truth, task, _text(used, "impression_id")),
            weight=weight,
        ),
        counts,
    )


def _in_parts(chosen: Ints, row: Ints, label: Floats) -> tuple[Ints, Ints, NDArray[np.bool_], Floats | None]:
    """Rows with labels 0 and 1 and their weights: a soft label makes two; None where there is none."""
    soft = (label > 0) & (label < 1)
    if not soft.any():
        return chosen, row, label > 0, None
    positive = np.append(label > 0, np.zeros(int(soft.sum()), np.bool_))
    weight = np.append(np.where(soft, label, 1.0), 1.0 - label[soft])
    return np.append(chosen, chosen[soft]), np.append(row, row[soft]), positive, weight


def _first_rows(ids: pa.Array) -> tuple[Ints, int]:
    """Rows that hold an id for the first time, ascending, and how many rows do not."""
    encoded = ids.dictionary_encode()
    distinct, n = len(encoded.dictionary), len(ids)
    if distinct == n:
        return np.arange(n), 0
    first = np.zeros(distinct, np.int64)
    first[encoded.indices.to_numpy(zero_copy_only=False)[::-1]] = np.arange(n)[::-1]
    return np.sort(first), n - distinct


def _place(ids: pa.Array, among: pa.Array) -> Ints:
    """Row of each id in another column, -1 where it is not there."""
    found = pc.fill_null(pc.index_in(ids, value_set=among), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def _text(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return whole if pa.types.is_string(whole.type) else whole.cast(pa.string())


def _numbers(table: pa.Table, name: str) -> Floats:
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), np.float64)


def _predictors(used: pa.Table) -> dict[str, Floats]:
    """Probability of each predictor; one that the log of predictions has no values of is left out."""
    logit = _numbers(used, "logit")
    if not np.isfinite(logit).all():
        raise DataError(f"expected finite logits. Received {logit[~np.isfinite(logit)][0]} among them.")
    predictors = {"student": _numbers(used, "probability"), "student_uncalibrated": _sigmoid(logit)}
    for column, name in _OPTIONAL_PREDICTORS.items():
        if column in used.column_names:
            probability = _numbers(used, column)
            if not np.isnan(probability).all():
                predictors[name] = probability
    return predictors


def _sigmoid(logit: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -logit))


def _users(used: pa.Table, impressions: pa.Table) -> Ints:
    """A number for each user, by the predictions' own keys or else by the log's user ids."""
    if "user_key" in used.column_names:
        return key_codes(np.asarray(used["user_key"].to_numpy(), np.int64), used.num_rows)[0]
    row = _place(_text(used, "impression_id"), _text(impressions, "impression_id"))
    codes = _text(impressions, "user_id").dictionary_encode().indices
    known: Ints = np.append(pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64), -1)
    return known[row]


def _base_rates(outcome: Outcome, row: Ints, predicted_at: Ints) -> dict[str, Floats]:
    """Two ways to know the base rate when an impression is predicted, for the rows ``row`` of the outcome.

    ``closed_windows`` counts windows whose label is final: true to the rate, but late by a window.
    ``known_labels`` counts every window from its opening, as negative until its outcome is known: up to
    date, but low. Both start from half a positive and half a negative.
    """

    def before(times: Ints) -> Floats:
        return np.searchsorted(np.sort(times), predicted_at, side="left").astype(np.float64)

    positive = outcome.label > 0
    final, final_positive = before(outcome.closes), before(outcome.closes[positive])
    known = before(outcome.known)
    known_positive = before(outcome.outcome_known[outcome.outcome_known != NO_OUTCOME])
    return {
        "closed_windows": (0.5 + final_positive) / (1.0 + final),
        "known_labels": (0.5 + known_positive) / (1.0 + known),
    }


def _truth(truth: pa.Table | None, task: Task, ids: pa.Array) -> Floats | None:
    name = f"{task}_probability"
    if truth is None or (task == "view_through" and name not in truth.column_names):
        # The simulator's worlds have no conversions without a click.
        return None
    missing = [column for column in ("impression_id", name) if column not in truth.column_names]
    if missing:
        raise DataError(
            f"expected a truth table with impression_id and {name}. Missing: {', '.join(missing)}."
        )
    row = _place(ids, _text(truth, "impression_id"))
    absent = int((row < 0).sum())
    if absent:
        raise DataError(
            f"expected the truth of every judged impression. Missing: {absent} of {len(ids)}, such as "
            f"{ids[int(np.argmax(row < 0))]}.",
            hint="the truth file must be the one that was simulated together with the log",
        )
    return _numbers(truth, name)[row]
