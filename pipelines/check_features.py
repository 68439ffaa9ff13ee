"""Columns that betray what a model must not know: the label, or whether its window has closed.

Looked at are the columns that a model sees, buckets and numbers, one at a time, on a sample of the rows.

label
    AUC of the column for the label, among mature rows and among open ones. No honest column knows the label.
maturity
    AUC for "open" around the moment at which windows stop being closed, `as_of` less the label window. Items
    come and go, so any such cut in time can be told by a column that drifts. Beside it therefore stands the
    largest AUC at cuts where nothing happens, within the mature rows: only what is beyond that is betrayal.
clock
    AUC of a number for "in the last third of the time" against the first. A number that does nothing but grow
    (age of the row, processing time) is one that the model will never see again.
kind
    Policies that say a positive anew when it comes learn it among fresh rows of a later hour. AUC of how
    unusual the column's value is among the fresh rows of that hour: the hour of day gives it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.check_auc import Classes, fitted_auc, ordered_auc, quantile_codes, rarity_auc
from pipelines.check_findings import Finding, at_most, told
from pipelines.config import Task
from pipelines.config_sections import AttributionConfig, ChecksConfig
from pipelines.duration import HOUR_MS
from pipelines.feature_spec import FeatureSpec
from pipelines.hashing import mix
from pipelines.snapshot_manifest import SnapshotManifest

__all__ = ["SAMPLED_COLUMNS", "FeatureSample", "SampleCollector", "feature_findings"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SAMPLED_COLUMNS = ("label", "weight", "mature", "event_time", "outcome_known_at", "buckets", "numbers")
# Below so many rows of the smaller class an AUC says nothing certain.
_LEAST_SUPPORT = 50
_PLACEBOS = 6
_BINS = 32
_NEVER = np.iinfo(np.int64).min
# Told apart from the hash that negative sampling goes by, so that the sample is even.
_SALT = np.uint64(0x5EED0F5A3D1E)


@dataclass(frozen=True)
class FeatureSample:
    """Sampled rows of one task; matrices (n, columns), the rest (n,). Times in ms.

    ``outcome`` is when the label rose from 0, a large negative number where it is 0. ``half`` is a coin.
    """

    buckets: NDArray[np.int32]
    numbers: NDArray[np.float32]
    label: Floats
    weight: Floats
    mature: Flags
    opened: Ints
    outcome: Ints
    half: Flags

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class _Column:
    """One column of the sample: its values, and numbers from 0 for them."""

    name: str
    code: Ints
    value: Floats | None


class SampleCollector:
    """Keeps a share of the rows of one task by a stable hash: the same rows for any order of files."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._parts: list[pa.RecordBatch] = []
        self._half: list[Flags] = []

    def update(self, chunk: pa.RecordBatch, hashes: NDArray[np.uint64]) -> None:
        """Take in a chunk with `SAMPLED_COLUMNS`; ``hashes`` are those of its sample ids."""
        own = mix(hashes, np.full(len(hashes), _SALT))
        kept = np.flatnonzero((own >> np.uint64(11)).astype(np.float64) < self.share * 2.0**53)
        if len(kept):
            self._parts.append(chunk.select(list(SAMPLED_COLUMNS)).take(pa.array(kept)))
            self._half.append((own[kept] & np.uint64(1)).astype(np.bool_))

    def sample(self) -> FeatureSample | None:
        """What was kept; None if nothing."""
        if not self._parts:
            return None
        table = pa.Table.from_batches(self._parts)

        def column(name: str, kind: Any) -> NDArray[Any]:
            return np.asarray(table.column(name).to_numpy()).astype(kind)

        outcome = table.column("outcome_known_at").fill_null(_NEVER)
        return FeatureSample(
            buckets=_matrix(table.column("buckets")),
            numbers=_matrix(table.column("numbers")),
            label=column("label", np.float64),
            weight=column("weight", np.float64),
            mature=column("mature", np.bool_),
            opened=column("event_time", np.int64),
            outcome=np.asarray(outcome.to_numpy(), np.int64),
            half=np.concatenate(self._half),
        )


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    array = column.combine_chunks()
    width = array.type.list_size
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(len(array), width)


def feature_findings(
    sample: FeatureSample | None,
    manifest: SnapshotManifest,
    task: Task,
    spec: FeatureSpec,
    limits: ChecksConfig,
) -> list[Finding]:
    """What each column knows of label, maturity, time and kind."""
    if sample is None or len(sample) == 0:
        return [told("features", "label, told by a column", task, None, "auc", "there are no rows")]
    rule = AttributionConfig.model_validate(manifest.config["attribution"])
    closing = manifest.as_of - rule.width(task) - rule.allowed_lateness
    policy = _policy(manifest, task)
    found: list[Finding] = []
    for column in _columns(sample, spec):
        found += _of_label(sample, column, task, limits)
        found.append(_of_maturity(sample, column, task, closing, manifest, limits))
        if column.value is not None:
            found.append(_of_time(sample, column, task, limits))
        if policy not in ("wait", "relabel"):
            found.append(_of_kind(sample, column, task, rule.observation(task), limits))
    return found


def _policy(manifest: SnapshotManifest, task: Task) -> str:
    labels = manifest.config.get("labels", {})
    return str(labels.get(task, {}).get("policy") or labels.get("policy", "auto"))


def _columns(sample: FeatureSample, spec: FeatureSpec) -> Iterator[_Column]:
    seen: dict[int, int] = {}
    for place, field in enumerate(spec.column_field):
        number = seen[field] = seen.get(field, -1) + 1
        name = spec.field_names[field]
        several = spec.column_field.count(field) > 1
        code = np.unique(sample.buckets[:, place], return_inverse=True)[1].astype(np.int64)
        yield _Column(f"{name}[{number}]" if several else name, code, None)
    for place, part in enumerate(spec.numeric):
        value = sample.numbers[:, place].astype(np.float64)
        yield _Column(f"{part.name} (number)", quantile_codes(value, _BINS), value)


def _auc(column: _Column, classes: Classes, rows: Flags) -> float | None:
    """The larger of what order and what single values tell."""
    chosen = classes.take(rows)
    if chosen.support < _LEAST_SUPPORT:
        return None
    fitted = fitted_auc(column.code[rows], chosen)
    ordered = None if column.value is None else ordered_auc(column.value[rows], chosen)
    return max((auc for auc in (fitted, ordered) if auc is not None), default=None)


def _of_label(sample: FeatureSample, column: _Column, task: Task, limits: ChecksConfig) -> list[Finding]:
    classes = Classes(sample.weight * sample.label, sample.weight * (1.0 - sample.label), sample.half)
    found = []
    for name, rows in (("mature", sample.mature), ("open", ~sample.mature)):
        check, subject = f"label of {name} windows, told by a column", f"{task} {column.name}"
        auc = _auc(column, classes, rows)
        if auc is None:
            found.append(told("features", check, subject, None, "auc", _too_few(classes.take(rows))))
        else:
            found.append(at_most("features", check, subject, auc, limits.leak_auc, "auc"))
    return found


def _too_few(classes: Classes) -> str:
    return f"{classes.support} rows of one class; at least {_LEAST_SUPPORT} are needed"


def _of_maturity(
    sample: FeatureSample,
    column: _Column,
    task: Task,
    closing: int,
    manifest: SnapshotManifest,
    limits: ChecksConfig,
) -> Finding:
    check, subject = "closing of the window, told by a column", f"{task} {column.name}"
    # Two stretches of the mature time at least are needed to compare with.
    width = min(manifest.as_of - closing, (closing - manifest.since) // 3)
    if width <= 0:
        return told("features", check, subject, None, "auc", "no stretch of mature windows to compare with")
    here = _cut_auc(sample, column, closing, width)
    if here is None:
        note = f"fewer than {_LEAST_SUPPORT} rows within one side of the closing"
        return told("features", check, subject, None, "auc", note)
    cuts = range(1, min(_PLACEBOS, (closing - manifest.since) // width - 1) + 1)
    elsewhere = [_cut_auc(sample, column, closing - cut * width, width) for cut in cuts]
    drift = max((auc for auc in elsewhere if auc is not None), default=0.5)
    note = f"{drift:.3f} at cuts where nothing closes"
    if drift > limits.kind_auc:
        note += ": its values change with time"
        return at_most("features", check, subject, here, limits.kind_auc, "auc", note, beyond="warning")
    return at_most("features", check, subject, here, limits.kind_auc, "auc", note)


def _cut_auc(sample: FeatureSample, column: _Column, cut: int, width: int) -> float | None:
    """How well a column tells the rows within ``width`` (ms) after a moment from those before."""
    near = (sample.opened >= cut - width) & (sample.opened < cut + width)
    later = (sample.opened >= cut).astype(np.float64)
    return _auc(column, Classes(sample.weight * later, sample.weight * (1.0 - later), sample.half), near)


def _of_time(sample: FeatureSample, column: _Column, task: Task, limits: ChecksConfig) -> Finding:
    check, subject = "number that grows with time", f"{task} {column.name}"
    low, high = int(sample.opened.min()), int(sample.opened.max())
    first = sample.opened < low + (high - low) / 3
    last = sample.opened > high - (high - low) / 3
    classes = Classes(sample.weight * last, sample.weight * first, sample.half)
    if column.value is None or classes.support < _LEAST_SUPPORT:
        return told("features", check, subject, None, "auc", _too_few(classes))
    auc = ordered_auc(column.value, classes) or 0.5
    return at_most("features", check, subject, auc, limits.leak_auc, "auc")


def _of_kind(
    sample: FeatureSample, column: _Column, task: Task, observation: int, limits: ChecksConfig
) -> Finding:
    """A delayed positive is said in the hour in which it became known, among the fresh rows of that hour."""
    check, subject = "positives said later, told by a column", f"{task} {column.name}"
    late = np.flatnonzero((sample.outcome != _NEVER) & (sample.outcome > sample.opened + observation))
    n, m = len(sample), len(late)
    if m < _LEAST_SUPPORT:
        note = f"{m} positives come after the observation window; at least {_LEAST_SUPPORT} are needed"
        return told("features", check, subject, None, "auc", note)
    both = np.concatenate([np.arange(n), late])
    classes = Classes(
        np.concatenate([np.zeros(n), sample.weight[late]]),
        np.concatenate([sample.weight, np.zeros(m)]),
        sample.half[both],
    )
    stratum = np.concatenate([sample.opened, sample.outcome[late]]) // HOUR_MS
    auc = rarity_auc(column.code[both], stratum, classes)
    if auc is None:
        return told("features", check, subject, None, "auc", "no hour has both")
    note = "policies that say positives anew must not batch-normalise" if auc > limits.kind_auc else ""
    return at_most("features", check, subject, auc, limits.kind_auc, "auc", note, beyond="warning")
