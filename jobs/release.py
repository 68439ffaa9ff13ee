"""A release: an immutable directory with everything needed to predict, never a model without its calibrator.

::

    student-0001-0000001234/
      MANIFEST.json          see `jobs.release_manifest`
      feature_spec.toml
      config.toml
      click/                 one folder a task
        student.json, student.safetensors | gbdt.txt, encoding.safetensors
        calibrator.json

Nothing in it is code: arrays, text and JSON only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibration.state import canonical_json
from jobs.release_manifest import MANIFEST, Kind, Manifest, ModelKind, TaskEntry, release_name
from jobs.release_pointer import (
    CURRENT,
    LAST_GOOD,
    TEACHER,
    TEMPORARY,
    garbage_collect,
    list_releases,
    point,
    pointed,
)
from pipelines.config import Task
from pipelines.errors import DataError, SetupError, StaleStateError
from pipelines.feature_spec import FeatureSpec
from pipelines.features import Encoded, encode_rows
from pipelines.synced_files import sync_folder, write_synced

if TYPE_CHECKING:
    from calibration.chain import CalibrationChain
    from models.base import Model

__all__ = [
    "CURRENT",
    "LAST_GOOD",
    "TEACHER",
    "Release",
    "Scored",
    "TaskFiles",
    "garbage_collect",
    "list_releases",
    "load_model",
    "point",
    "pointed",
    "read_verified",
    "release_name",
    "write_release",
]

FEATURE_SPEC = "feature_spec.toml"
CONFIG = "config.toml"
CALIBRATOR = "calibrator.json"


@dataclass(frozen=True)
class TaskFiles:
    """What one task of a release is written from.

    Attributes
    ----------
    model_kind : str
        ``gbdt`` or ``student``.
    model_files : mapping
        ``to_files()`` of the model.
    calibrator_state : mapping
        ``state()`` of the calibrator: plain JSON data.
    sampling : mapping
        Sampling constants for the manifest's readers; by default the calibrator's
        ``negative_sampling_rate``.
    """

    model_kind: ModelKind
    model_files: Mapping[str, bytes]
    calibrator_state: Mapping[str, Any]
    sampling: Mapping[str, float] = field(default_factory=dict)


class Scored(NamedTuple):
    """Predictions of one task, each of shape (n,)."""

    logit: NDArray[np.float64]
    probability: NDArray[np.float64]


def write_release(
    root: Path,
    *,
    kind: Kind,
    epoch: int,
    step: int,
    parent: str | None,
    spec: FeatureSpec,
    config_toml: str,
    segments: tuple[str, ...],
    tasks: Mapping[Task, TaskFiles],
    last_event_time: int,
    learned_events: int,
    calibration: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a release; when it returns, the release is on disk, whole.

    1. Write the files into a temporary directory and fsync each, MANIFEST.json last.
    2. Fsync the directories.
    3. Rename to the final name and fsync the root.

    Parameters
    ----------
    root : Path
        Folder of releases; created when missing.
    kind, epoch, step, calibration
        They make the name.
    parent : str, optional
        What it was learned from.
    spec : FeatureSpec
    config_toml : str
        ``dump_config`` of the configuration.
    segments : tuple of str
        Calibration segments, as given to ``encode``.
    tasks : mapping of task to TaskFiles
    last_event_time : int
        Event time of the newest event learned, ms.
    learned_events : int
    extra : mapping, optional
        JSON data for readers, such as ``produced_at``; not part of the release's digest.

    Returns
    -------
    Path
        ``root / name``. Writing the same release again gives the one that is there.

    Raises
    ------
    StaleStateError
        If another release has that name, or the one that is there is damaged.
    SetupError
        If the folder cannot be written to.
    """
    files = {FEATURE_SPEC: spec.to_toml().encode(), CONFIG: config_toml.encode()}
    for task, parts in tasks.items():
        for name, content in parts.model_files.items():
            files[f"{task}/{_plain(name)}"] = content
        # Its sha256 in the manifest is the chain's own digest.
        files[f"{task}/{CALIBRATOR}"] = canonical_json(parts.calibrator_state).encode()
    manifest = Manifest(
        name=release_name(kind, epoch, step, calibration),
        kind=kind,
        epoch=epoch,
        step=step,
        parent=parent,
        tasks={task: TaskEntry(model=t.model_kind, sampling=_sampling(t)) for task, t in tasks.items()},
        feature_spec_digest=spec.digest(),
        hash_seed=spec.hash_seed,
        segments=segments,
        last_event_time=last_event_time,
        learned_events=learned_events,
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        code_version=_code_version(),
        extra=dict(extra or {}),
    ).signed()
    target = root / manifest.name
    try:
        if not _write_directory(target, {**files, MANIFEST: manifest.to_bytes()}):
            _check_same(target, manifest)
    except OSError as error:
        raise SetupError(f"cannot write the release {target}: {error.strerror}.") from error
    return target


class Release:
    """A loaded release: models and calibrators that are known to be what was written.

    Attributes
    ----------
    path : Path
    manifest : Manifest
    spec : FeatureSpec
    config_toml : str
    models : dict
        Task to model.
    calibrators : dict
        Task to calibrator.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        spec: FeatureSpec,
        config_toml: str,
        models: Mapping[Task, Model],
        calibrators: Mapping[Task, CalibrationChain],
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.spec = spec
        self.config_toml = config_toml
        self.models = dict(models)
        self.calibrators = dict(calibrators)

    @classmethod
    def load(cls, path: Path) -> Release:
        """Read a release and verify the sha256 of every file.

        Raises
        ------
        DataError
            If there is no release at that path.
        StaleStateError
            If a file is missing, changed or added; it is named.
        """
        from calibration.chain import CalibrationChain

        manifest = Manifest.read(path)
        files = read_verified(path, manifest)
        spec = FeatureSpec.from_toml(files[FEATURE_SPEC].decode(), str(path / FEATURE_SPEC))
        if spec.digest() != manifest.feature_spec_digest:
            raise StaleStateError(
                f"{path}: expected a feature spec with the digest {manifest.feature_spec_digest}. "
                f"This version of the program gives {spec.digest()}.",
                hint="serve the release with the version that wrote it: " + manifest.code_version,
            )
        models: dict[Task, Model] = {}
        calibrators: dict[Task, CalibrationChain] = {}
        for task, entry in manifest.tasks.items():
            own = {name.split("/", 1)[1]: data for name, data in files.items() if name.startswith(f"{task}/")}
            calibrators[task] = CalibrationChain.from_json(own.pop(CALIBRATOR))
            _check_calibrator(path / task, calibrators[task], manifest, task)
            models[task] = load_model(entry.model, own, spec)
        return cls(path, manifest, spec, files[CONFIG].decode(), models, calibrators)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def kind(self) -> Kind:
        return self.manifest.kind

    @property
    def epoch(self) -> int:
        return self.manifest.epoch

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def segments(self) -> tuple[str, ...]:
        return self.manifest.segments

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(self.models)

    @property
    def last_event_time(self) -> int:
        """Event time of the newest event learned, ms."""
        return self.manifest.last_event_time

    def digest(self) -> str:
        """sha256 of what the release is: its files and its place in the line, hexadecimal."""
        return self.manifest.digest

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Encoded:
        """Encode impressions given as mappings with this release's spec and segments."""
        return encode_rows(list(rows), self.spec, self.segments)

    def logit(self, encoded: Encoded) -> dict[Task, NDArray[np.float64]]:
        """The models' logits, before calibration, each of shape (n,)."""
        return {
            task: model.predict_logit(encoded.buckets, encoded.numbers, encoded.ids)
            for task, model in self.models.items()
        }

    def score(self, encoded: Encoded) -> dict[Task, Scored]:
        """Logit and calibrated probability of each task."""
        return {
            task: Scored(logit, self.calibrators[task].transform(logit, encoded.segment_key))
            for task, logit in self.logit(encoded).items()
        }

    def probability(self, encoded: Encoded) -> dict[Task, NDArray[np.float64]]:
        """The calibrated probabilities, each of shape (n,)."""
        return {task: scored.probability for task, scored in self.score(encoded).items()}


def read_verified(path: Path, manifest: Manifest) -> dict[str, bytes]:
    """Content of every file of a release, checked against the manifest.

    Raises
    ------
    StaleStateError
        If a file is missing, changed or not in the manifest; it is named.
    """
    hint = "the release is damaged; roll back to one that loads"
    present = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    added = sorted(present - set(manifest.files))
    if added:
        raise StaleStateError(f"{path} holds a file that is not in its manifest: {added[0]}.", hint=hint)
    missing = sorted(set(manifest.files) - present)
    if missing:
        raise StaleStateError(f"{path / missing[0]} is in the manifest but missing.", hint=hint)
    files = {}
    for name, expected in manifest.files.items():
        files[name] = (path / name).read_bytes()
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise StaleStateError(
                f"{path / name}: expected the sha256 {expected}, got {found}.",
                hint=hint,
            )
    return files


def load_model(kind: ModelKind, files: Mapping[str, bytes], spec: FeatureSpec) -> Model:
    """The model of one task, from its files in a release."""
    # Inside: a release of trees must not import torch, nor one of networks LightGBM.
    if kind == "gbdt":
        from models.gbdt import GbdtModel

        return GbdtModel.from_files(files, spec)
    from models.student import Student

    return Student.from_files(files, spec)


def _check_calibrator(where: Path, calibrator: CalibrationChain, manifest: Manifest, task: Task) -> None:
    recorded = manifest.files[f"{task}/{CALIBRATOR}"]
    if calibrator.digest() != recorded:
        raise StaleStateError(
            f"{where / CALIBRATOR}: expected calibration with the digest {recorded}. "
            f"This version of the program reads one with {calibrator.digest()}.",
            hint="serve the release with the version that wrote it: " + manifest.code_version,
        )
    # Columns in another order would be corrected by other segments' factors, and nobody would notice.
    if calibrator.segments is not None and calibrator.segments.config.columns != manifest.segments:
        raise StaleStateError(
            f"{where / CALIBRATOR}: expected the calibration segments {manifest.segments}. "
            f"Received: {calibrator.segments.config.columns}."
        )


def _sampling(parts: TaskFiles) -> dict[str, float]:
    rate = parts.calibrator_state.get("negative_sampling_rate")
    return dict(parts.sampling) or ({} if rate is None else {"negative_sampling_rate": rate})


def _plain(name: str) -> str:
    if Path(name).name != name or name in (CALIBRATOR, ""):
        raise DataError(f"expected a plain file name for a model file. Received: {name!r}.")
    return name


@cache
def _code_version() -> str:
    return version("ctrstream")


def _write_directory(target: Path, files: Mapping[str, bytes]) -> bool:
    """Steps 1 to 3 of `write_release`; False, and nothing is changed, where the target is there already."""
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{uuid.uuid4().hex}")
    paths = {temporary / name: content for name, content in files.items()}
    try:
        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        for path, content in paths.items():  # 1
            write_synced(path, content)
        for folder in {path.parent for path in paths}:  # 2
            sync_folder(folder)
        try:
            os.rename(temporary, target)  # 3
        except OSError:
            if target.is_dir():  # another writer was first
                return False
            raise
        sync_folder(target.parent)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_same(target: Path, manifest: Manifest) -> None:
    there = Manifest.read(target)
    if there.digest != manifest.digest:
        names = there.files.keys() | manifest.files.keys()
        differing = sorted(name for name in names if there.files.get(name) != manifest.files.get(name))
        raise StaleStateError(
            f"a different release named {target.name} is already in {target.parent} "
            f"(differs in {', '.join(differing) or 'its manifest'}). A release is never changed.",
            hint="two workers write here, or a new worker reuses an epoch: start it with a later one",
        )
    read_verified(target, there)
