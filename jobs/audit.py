"""Answers from a worker's ledger: what became of rows, and in which step an event was learned.

Classes are counted, not kept by row: for a range of offsets the answer is about whole commits, those in which
a row of the range was read, and its sum is checked. A row that was pending then is trained in a later commit,
which counts it there as trained and as one pending less. From the first commit on the counts are absolute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.audit_log import CommitLine, learned_rows, read_lines
from jobs.audit_published import first_published, published_releases
from jobs.hold import HeldSegment, Hold
from jobs.predictions import PREDICTION_SCHEMA
from jobs.state_head import head_state
from monitoring.accounting import CLASSES
from pipelines.cursor import TopicPartition
from pipelines.events import KINDS
from pipelines.hashing import hash_text
from pipelines.joiner import TASKS
from pipelines.label_news import CONFIRM, FIRST, POSITIVE
from pipelines.slot_table import hash_ids

__all__ = ["audit_event", "audit_rows"]

Limits = Mapping[TopicPartition, int]
_SAID = {FIRST: "first", POSITIVE: "positive", CONFIRM: "confirm"}


def audit_rows(state: Path, start: Limits | None = None, stop: Limits | None = None) -> dict[str, Any]:
    """Rows by kind and class of the commits that read a range of offsets.

    Parameters
    ----------
    state : Path
        The worker's folder.
    start, stop : mapping of (topic, partition) to offset, optional
        The range of each partition is ``[start, stop)``; where one is missing it has no bound. With neither,
        all commits.

    Returns
    -------
    dict
        ``commits``, ``steps``, ``epochs``, ``releases``; ``offsets``: first and next offset of the commits by
        partition; ``read`` and ``classes`` by kind; ``difference``, which is 0 for each kind; and
        ``is_whole``, whether the commits begin with the first one, so that the classes are absolute.

    Raises
    ------
    DataError
        If the folder is not a worker's, or nothing has been committed.
    StaleStateError
        If the ledger is not that of the checkpoint.
    """
    _, volatile = head_state(state)
    lines = read_lines(state / "audit", volatile["audit"])
    limits = {*(start or {}), *(stop or {})}
    chosen = [line for line in lines if not limits or _reads(line, limits, start or {}, stop or {})]
    read = {kind: sum(line.read[kind] for line in chosen) for kind in KINDS}
    classes = {
        kind: {name: sum(line.classes.get(kind, {}).get(name, 0) for line in chosen) for name in CLASSES}
        for kind in KINDS
    }
    return {
        "commits": len(chosen),
        "is_whole": bool(chosen) and chosen[0] is lines[0],
        "steps": [chosen[0].steps[0], chosen[-1].steps[1]] if chosen else None,
        "epochs": sorted({line.epoch for line in chosen}),
        "releases": _releases(chosen, published_releases(state / "audit")),
        "offsets": _offsets(chosen),
        "read": read,
        "classes": classes,
        "difference": {kind: read[kind] - sum(classes[kind].values()) for kind in KINDS},
    }


def audit_event(state: Path, event: str) -> dict[str, Any]:
    """Where an event was predicted, learned, dead-lettered or held.

    Parameters
    ----------
    state : Path
        The worker's folder.
    event : str
        An impression id, or the event id of a click or conversion.

    Returns
    -------
    dict
        ``predicted``: by task, with the release that was the newest then; ``learned``: by task, with step,
        label, and the first release published since, None if there is none yet; ``as_outcome``: the same
        for rows that an outcome with this id made positive; ``dead_letters``: positions of letters whose
        payload has the id in it; ``held``: whether it waits in the hold.
    """
    plain, volatile = head_state(state)
    lines = read_lines(state / "audit", volatile["audit"])
    low, high = hash_ids([event])[0].tolist()
    outcome = hash_text(event)
    published = published_releases(state / "audit")
    learned: list[dict[str, Any]] = []
    as_outcome: list[dict[str, Any]] = []
    for line, table in learned_rows(state / "audit", lines):
        own = pc.and_(
            pc.equal(table["key_low"], _unsigned(low)), pc.equal(table["key_high"], _unsigned(high))
        )
        learned += [_learned(row, line, published) for row in table.filter(own).to_pylist()]
        as_outcome += [
            _learned(row, line, published)
            for row in table.filter(pc.equal(table["outcome"], _unsigned(outcome))).to_pylist()
        ]
    return {
        "event": event,
        "committed_steps": plain["step"],
        "predicted": _predicted(state / "predictions", event),
        "learned": learned,
        "as_outcome": as_outcome,
        "dead_letters": _letters(state / "dead_letters.jsonl", event),
        "held": _is_held(state / "hold", volatile["breaker"]["segments"], event),
    }


def _unsigned(value: int) -> pa.Scalar:
    return pa.scalar(value, pa.uint64())


def _reads(line: CommitLine, limits: set[TopicPartition], start: Limits, stop: Limits) -> bool:
    """Whether a commit has read a row of one of the ranges."""
    before, after = _places(line.before), _places(line.after)
    for partition in limits & set(after):
        first, last = before.get(partition, (0, 0)), after[partition]
        if first == last:
            continue
        begins_before = partition not in stop or first[0] < stop[partition]
        # A next row of 0 is the begin of a message that has not been read.
        ends_behind = partition not in start or last > (start[partition], 0)
        if begins_before and ends_behind:
            return True
    return False


def _places(cursor: Sequence[Sequence[Any]]) -> dict[TopicPartition, tuple[int, int]]:
    return {(topic, partition): (offset, row) for topic, partition, offset, row, _ in cursor}


def _offsets(lines: Sequence[CommitLine]) -> dict[str, list[int]]:
    if not lines:
        return {}
    first, last = _places(lines[0].before), _places(lines[-1].after)
    return {
        f"{topic}:{partition}": [first.get((topic, partition), (0, 0))[0], offset + (row > 0)]
        for (topic, partition), (offset, row) in sorted(last.items())
    }


def _releases(lines: Sequence[CommitLine], published: Sequence[str]) -> list[str]:
    """The releases that hold what commits have learned, each once, in order."""
    names = [first_published(line.candidate, published) for line in lines]
    return list(dict.fromkeys(name for name in names if name is not None))


def _learned(row: Mapping[str, Any], line: CommitLine, published: Sequence[str]) -> dict[str, Any]:
    return {
        "task": TASKS[row["task"]],
        "row": _SAID[row["said"]],
        "label": round(float(row["label"]), 6),
        "step": row["step"],
        "epoch": line.epoch,
        "release": first_published(line.candidate, published),
    }


def _predicted(folder: Path, event: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    columns = ["impression_id", "task", "predicted_at", "probability", "release"]
    schema = pa.schema([PREDICTION_SCHEMA.field(name) for name in columns])
    for path in sorted(folder.glob("[0-9]*.parquet")):
        table = pq.read_table(path, schema=schema, filters=[("impression_id", "=", event)])
        found += [{**row, "segment": path.name} for row in table.to_pylist()]
    return [{name: value for name, value in row.items() if name != "impression_id"} for row in found]


def _letters(path: Path, event: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    letters = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if event in line:
                letter = json.loads(line)
                if event in letter["payload"]:
                    letters.append({name: letter[name] for name in letter if name != "payload"})
    return letters


def _is_held(folder: Path, segments: Sequence[Mapping[str, Any]], event: str) -> bool:
    hold = Hold(folder)
    return any(hold.has_id(HeldSegment(**segment), event) for segment in segments)
