"""The same weights with another calibration, as a release of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.release import CALIBRATOR, CONFIG, Release, TaskFiles, list_releases, read_verified, write_release
from jobs.release_manifest import Manifest, parse_name
from pipelines.config import Task

if TYPE_CHECKING:
    from calibration.chain import CalibrationChain

__all__ = ["write_recalibrated"]


def write_recalibrated(
    release: Release, chains: Mapping[Task, CalibrationChain], extra: Mapping[str, Any]
) -> Path:
    """Write a release beside another one: its models as they are, the calibration of some tasks new.

    Weights and calibration never come apart: what is served changes in one piece, and goes back in one.

    Parameters
    ----------
    release : Release
        The parent of the new one, which is named after it with ``-c1``, ``-c2``, ...
    chains : mapping of task to CalibrationChain
        Tasks that are not named keep theirs.
    extra : mapping
        JSON data for readers, beside those of the parent.

    Returns
    -------
    Path
        The new release, or the one that was written before with this calibration.
    """
    chosen = {**release.calibrators, **chains}
    root, parent = release.path.parent, release.manifest
    epoch, step, kind, _ = parse_name(release.name)
    family = [name for name in list_releases(root) if parse_name(name)[:3] == (epoch, step, kind)]
    digests = {f"{task}/{CALIBRATOR}": chain.digest() for task, chain in chosen.items()}
    for name in family:
        there = Manifest.read(root / name)
        if there.parent == release.name and digests.items() <= there.files.items():
            return root / name
    files = read_verified(release.path, parent)
    return write_release(
        root,
        kind=parent.kind,
        epoch=epoch,
        step=step,
        calibration=max(parse_name(name)[3] for name in family) + 1,
        parent=release.name,
        spec=release.spec,
        config_toml=files[CONFIG].decode(),
        segments=parent.segments,
        tasks={
            task: TaskFiles(entry.model, _of_task(files, task), chosen[task].state(), entry.sampling)
            for task, entry in parent.tasks.items()
        },
        last_event_time=parent.last_event_time,
        learned_events=parent.learned_events,
        extra={**parent.extra, **extra},
    )


def _of_task(files: Mapping[str, bytes], task: Task) -> dict[str, bytes]:
    own = {name.partition("/")[2]: content for name, content in files.items() if name.startswith(f"{task}/")}
    del own[CALIBRATOR]
    return own
