"""What a worker leaves at the end of a log, in a form that two workers can be compared by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.checkpoint import CheckpointStore, state_digest
from jobs.predictions import PredictionLog
from jobs.release import pointed, read_verified
from jobs.release_manifest import Manifest
from monitoring.accounting import Accounting

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a worker has left at the end of a log; nothing in it depends on when it was killed.

    Attributes
    ----------
    digest : str
        State digest: weights, slots, admission counters, joiner, replay, calibrators, metrics, cursor.
    predictions : str
        sha256 over all predictions.
    letters : list of str
        Lines of the file of dead letters, sorted.
    accounted : dict
        Rows by kind and class.
    difference : dict
        Rows read less rows accounted for, by kind.
    release : dict
        What the newest release is, but for the epoch.
    told : dict
        What MLflow comes to know: the last value of every point of quality, and the release that is champion.
    strays : list of str
        Half-written files, and whole ones that no commit names.
    """

    digest: str
    predictions: str
    letters: list[str]
    accounted: dict[str, dict[str, int]]
    difference: dict[str, int]
    release: dict[str, Any]
    told: dict[str, Any]
    strays: list[str]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """Read it from ``state`` and ``releases`` in a folder; every file is verified."""
        state = folder / "state"
        found = CheckpointStore(state).load()
        assert found is not None, f"no checkpoint in {folder}"
        assert found.path.name == CheckpointStore(state).head(), "the head is corrupt"
        assert state_digest(found.arrays, found.plain) == found.manifest["digest"]
        accounting = Accounting.from_state(found.plain["accounting"])
        letters = (state / "dead_letters.jsonl").read_bytes()
        assert letters.endswith(b"\n")
        return cls(
            digest=found.manifest["digest"],
            predictions=_digest(PredictionLog(state / "predictions").read(found.manifest["outputs"])),
            letters=sorted(letters.decode().splitlines()),
            accounted=accounting.value(),
            difference=accounting.check(found.plain["read"]),
            release=_release(folder / "releases", found.manifest["digest"]),
            told=_told(state / "outbox" / "outbox.jsonl", folder / "releases"),
            strays=_strays(state, set(found.manifest["outputs"])),
        )

    @property
    def rows(self) -> int:
        """Rows accounted for."""
        return sum(sum(classes.values()) for classes in self.accounted.values())

    @property
    def unaccounted(self) -> int:
        """Rows read that are in no class, or in two."""
        return sum(map(abs, self.difference.values()))

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same."""
        return [one.name for one in fields(self) if getattr(self, one.name) != getattr(other, one.name)]


def _digest(table: pa.Table) -> str:
    """sha256 over the predictions in an order of their own, without the release that was newest then."""
    table = table.drop_columns(["release"]).set_column(1, "task", table["task"].cast(pa.string()))
    table = table.sort_by(
        [("task", "ascending"), ("arrived_at", "ascending"), ("impression_id", "ascending")]
    )
    total = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        values = column.to_pylist() if column.type == pa.string() else column.to_numpy().tobytes().hex()
        total.update(f"{name}|{json.dumps(values)}|".encode())
    return total.hexdigest()


def _release(root: Path, digest: str) -> dict[str, Any]:
    newest = pointed(root, "CURRENT")
    assert newest is not None, f"no release in {root}"
    manifest = Manifest.read(root / newest)
    read_verified(root / newest, manifest)
    assert manifest.extra["state_digest"] == digest, f"{newest} was not cut from the last commit"
    return manifest.model_dump(
        mode="json", exclude={"name", "epoch", "parent", "digest", "extra", "code_version"}
    )


def _told(outbox: Path, releases: Path) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for line in outbox.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if record["op"] == "metrics":
            quality = [row for row in record["rows"] if row[0].startswith("quality/")]
            told.update({f"{key} at {step}": (value, time) for key, value, step, time in quality})
        elif record["op"] == "register" and "champion" in record["aliases"]:
            told["is champion"] = Path(record["path"]).name == pointed(releases, "CURRENT")
    return told


def _strays(state: Path, outputs: set[str]) -> list[str]:
    segments = {path.name for path in (state / "predictions").iterdir()}
    half = {path.name for path in (state / "checkpoints").glob(".tmp-*")}
    half |= {path.name for path in state.glob(".running*")}
    return sorted((segments ^ outputs) | half)
