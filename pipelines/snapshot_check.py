"""``samples check``: is a snapshot what its manifest says, and does it say only what was known?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.errors import DataError
from pipelines.snapshot import read_manifest, read_rows, verify_files
from pipelines.snapshot_manifest import SnapshotManifest

__all__ = ["check_snapshot"]

_COLUMNS = [
    "sample_id",
    "label",
    "event_time",
    "known_at",
    "outcome_known_at",
    "elapsed",
    "mature",
    "weight",
    "observed_share",
]


def check_snapshot(path: Path) -> list[str]:
    """Check a snapshot; returns what is wrong with it, empty if nothing is.

    1. Every file of the manifest is there with its size and digest, and the feature spec has its digest.
    2. No sample appears twice, and the rows are as many as the manifest says.
    3. Windows opened inside the snapshot's window; nothing became known after ``as_of`` or before its
       window opened.
    4. A label is 1 exactly where an outcome is known; mature rows have seen their whole window.

    Raises
    ------
    DataError
        If there is no readable manifest.
    """
    manifest = read_manifest(path)
    try:
        verify_files(path, manifest)
    except DataError as error:
        return [error.message]
    return [
        f"{task}: {finding}"
        for task in manifest.tasks
        for finding in _check_task(manifest, task, read_rows(path, task, _COLUMNS, verify=False))
    ]


def _check_task(manifest: SnapshotManifest, task: Task, rows: pa.Table) -> list[str]:
    summary = manifest.tasks[task]
    label, opened = rows.column("label").to_numpy(), rows.column("event_time").to_numpy()
    known_at, mature = rows.column("known_at").to_numpy(), rows.column("mature").to_numpy()
    is_known = rows.column("outcome_known_at").is_valid().to_numpy()
    outcome = pc.fill_null(rows.column("outcome_known_at"), manifest.as_of).to_numpy()
    elapsed, share = rows.column("elapsed").to_numpy(), rows.column("observed_share").to_numpy()
    weight = rows.column("weight").to_numpy()
    width = AttributionConfig.model_validate(manifest.config["attribution"]).width(task)
    distinct = pc.count_distinct(rows.column("sample_id")).as_py()
    faults = {
        "sample_id appears more than once": np.arange(rows.num_rows) >= distinct,
        "label lies outside [0, 1]": ~((label >= 0) & (label <= 1)),
        "the window opened outside the snapshot's window": (opened < manifest.since)
        | (opened >= manifest.as_of),
        "known_at lies after as_of": known_at > manifest.as_of,
        "the outcome became known after known_at": is_known & (outcome > known_at),
        "the outcome became known before the window opened": is_known & (outcome < opened),
        "a label above 0 without a known outcome, or the reverse": is_known != (label > 0),
        "elapsed is not the age of the window, at most its width": elapsed
        != np.minimum(manifest.as_of - opened, width),
        "mature before its window has passed": mature & (elapsed < width),
        "mature but observed_share is not 1": mature & (share != 1),
        "observed_share lies outside [0, 1]": ~((share >= 0) & (share <= 1)),
        "weight is not above 0": ~(weight > 0),
    }
    findings = [f"{name} ({int(bad.sum())} rows)" for name, bad in faults.items() if bad.any()]
    original = ~pc.match_substring(rows.column("sample_id"), "#").to_numpy()
    positives = float(label[original].sum(dtype=np.float64))
    if rows.num_rows != summary.rows or positives != summary.positives:
        findings.append(
            f"expected {summary.rows} rows with {summary.positives:g} positives, as in the manifest. "
            f"Found {rows.num_rows} with {positives:g}"
        )
    return findings
