"""Which segments a release's calibration corrects with most evidence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from calibration.chain import CalibrationChain
from calibration.segments import SegmentCorrection
from jobs.progressive_segments import key_text
from jobs.release import CALIBRATOR, read_verified
from jobs.release_manifest import Manifest
from monitoring.segment_report import SegmentCounts, worst_segments

__all__ = ["release_segments", "segment_counts"]


def segment_counts(segments: SegmentCorrection) -> list[SegmentCounts]:
    """What a correction has counted, level by level, for :func:`monitoring.segment_report.worst_segments`."""
    found = []
    for name, strength in zip(segments.config.names, segments.strength, strict=True):
        table = segments.segments(name)
        numbers = {
            column: np.array(table[column], np.float64)
            for column in ("rows", "positives", "dispersion", "gain")
        }
        found.append(
            SegmentCounts(
                level=name,
                key=np.array(table["key"], np.int64),
                expected=np.array(table["due"], np.float64),
                strength=strength,
                **numbers,
            )
        )
    return found


def release_segments(path: Path, false_discovery_rate: float = 0.05) -> list[dict[str, Any]]:
    """Findings of all tasks of a release, the most certain first; those of a task are judged together.

    Parameters
    ----------
    path : Path
        Of the release; its files are verified.
    false_discovery_rate : float

    Returns
    -------
    list of dict
        Fields of `monitoring.segment_report.SegmentFinding` but for ``place``, with ``task``; ``key`` holds
        the hashes of the level's columns as hexadecimal digits, joined by ``*``.
    """
    manifest = Manifest.read(path)
    files = read_verified(path, manifest)
    found: list[dict[str, Any]] = []
    for task in manifest.tasks:
        segments = CalibrationChain.from_state(json.loads(files[f"{task}/{CALIBRATOR}"])).segments
        if segments is None:
            continue
        values = {name: segments.segments(name)["values"] for name in segments.config.names}
        for one in worst_segments(segment_counts(segments), false_discovery_rate=false_discovery_rate):
            row = asdict(one)
            parts = values[one.level][row.pop("place")]
            found.append({"task": task, **row, "key": "*".join(map(key_text, parts)) or "all"})
    return sorted(found, key=lambda row: (row["p_value"], -row["lost_log_loss"]))
