"""`ctrstream train`: the teacher and the first student, from a snapshot."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import config_options, writable_folder
from jobs.spark_options import location_option
from pipelines.errors import DataError

if TYPE_CHECKING:
    from jobs.publishing import FirstReleases
    from pipelines.config import Config, Task
    from pipelines.snapshot_manifest import SnapshotManifest

__all__ = ["command", "train"]

log = logging.getLogger(__name__)

_OUTCOMES_READ = 65_536


def train(snapshot: str | Path, releases: Path, config: Config) -> tuple[FirstReleases, dict[str, str]]:
    """Train on a snapshot and write the first releases; returns them and the tasks that were skipped.

    Rows are streamed from the snapshot's files, wherever they lie. Online learning begins with what arrives
    after the snapshot's ``as_of``.

    Raises
    ------
    DataError
        If the snapshot is damaged, or no task in it can be trained.
    """
    from jobs.calibration_labels import label_origin
    from jobs.publishing import write_first
    from jobs.single_thread import use_one_thread
    from jobs.training import train_models
    from pipelines.delay import DelayCurve
    from pipelines.label_plan import late_share, settle_labels, thinned
    from pipelines.snapshot import read_manifest, read_spec
    from pipelines.streamed_rows import StreamedRows

    use_one_thread()
    manifest = read_manifest(snapshot)
    spec = read_spec(snapshot).with_dynamic(config.features.dynamic)
    tasks = [task for task in config.labels.tasks if task in manifest.tasks]
    sets = {task: StreamedRows.of_snapshot(snapshot, task) for task in tasks}
    curves = {task: DelayCurve.from_state(manifest.tasks[task].delay_curve) for task in tasks}
    config = settle_labels(config, curves)
    labels = {
        task: label_origin(config, task, thinned(curve), _unevenness(snapshot, manifest, task))
        for task, curve in curves.items()
    }
    trained = train_models(sets, spec, config, segments=manifest.segments, labels=labels)
    for task, reason in trained.skipped.items():
        log.warning("task skipped task=%s reason=%r", task, reason)
    if not trained.models:
        raise DataError(
            f"no task can be trained on {snapshot}: "
            + "; ".join(f"{task}: {reason}" for task, reason in trained.skipped.items()),
            hint="build a snapshot with a longer window or a later --as-of",
        )
    first = write_first(
        releases,
        trained.models,
        spec,
        config,
        manifest.segments,
        warm_up_until=manifest.as_of + 1,
        rows=max(len(rows) for rows in sets.values()),
        figures={task: one.report for task, one in trained.models.items()},
        late_share={task: late_share(config, task, curve) for task, curve in curves.items()},
        delay=curves,
    )
    if config.tracking.uri:
        _track(config, first, manifest.snapshot_id, {t: one.report for t, one in trained.models.items()})
    return first, dict(trained.skipped)


def _unevenness(snapshot: str | Path, manifest: SnapshotManifest, task: Task) -> float | None:
    """How far delays depend on the time of day, from the outcomes in a snapshot."""
    import pyarrow as pa

    from pipelines.delay_evenness import delay_unevenness
    from pipelines.sample_stream import SampleStream
    from pipelines.snapshot import SAMPLE_SCHEMA, data_files

    schema = pa.schema([SAMPLE_SCHEMA.field(name) for name in ("label", "event_time", "outcome_known_at")])
    # Above 0, whatever the credit.
    outcomes = SampleStream.of(data_files(snapshot, task, manifest), schema).filter("label", 1e-30)
    rows = pa.Table.from_batches(outcomes.batch(_OUTCOMES_READ), schema)
    opened, known = (rows.column(name).to_numpy() for name in ("event_time", "outcome_known_at"))
    follow_up = manifest.as_of - opened
    return delay_unevenness(opened, (known - opened).clip(0, follow_up), follow_up)


def _track(config: Config, first: FirstReleases, snapshot: str, reports: Mapping[str, Any]) -> None:
    """One run for the trained candidates, and both releases in the registry."""
    from jobs.tracking import Tracking

    tracking = Tracking(config.tracking.uri, config.tracking.experiment, config.tracking.registered_model)
    run = tracking.run(f"train {snapshot}", {"job": "train", "snapshot": snapshot}, key=f"train/{snapshot}")
    run.log_params(config.model_dump(mode="json"))
    run.log_metrics(
        [
            (f"quality/{task}/{name}", float(value), 0, first.warm_up_until)
            for task, report in reports.items()
            for name, value in _numbers(report)
        ]
    )
    run.register(first.teacher.path, ["teacher"])
    run.register(first.student.path, ["champion", "last_good"])
    run.finish()


def _numbers(report: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found


@click.command()
@location_option("--snapshot", "A snapshot of `ctrstream samples build`.")
@click.option(
    "--releases",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the releases; created when missing.",
)
@config_options
def command(snapshot: str, releases: Path, config: Config) -> None:
    """Train teacher and first student, evaluate them on the next window, calibrate, write releases."""
    first, skipped = train(snapshot, writable_folder(releases, option="--releases"), config)
    click.echo(
        json.dumps(
            {
                "teacher": first.teacher.name,
                "student": first.student.name,
                "quality": first.student.manifest.extra["quality"],
                "skipped": skipped,
            },
            indent=1,
        )
    )
