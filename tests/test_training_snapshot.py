"""`ctrstream train` takes its rows from the files of a snapshot that Spark wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from jobs import samples_build
from jobs.samples_ingest import ingest
from jobs.train import command
from jobs.training import train_models
from pipelines.config import Task
from pipelines.duration import DAY_MS
from pipelines.errors import DataError
from pipelines.snapshot import data_files, read_snapshot
from pipelines.stream_columns import TRAINING_COLUMNS
from pipelines.streamed_rows import StreamedRows
from tests.test_samples_build import AS_OF, CONFIG, SPEC, made, random_events, write_log

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

TASKS: tuple[Task, ...] = ("click", "conversion")


@pytest.fixture(scope="module")
def snapshot(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slices a day: their files overlap in time."""
    folder = tmp_path_factory.mktemp("training")
    ingest(spark, folder / "lake", CONFIG, events=write_log(folder / "log", random_events(3_000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_build, "_SLICE_ROWS", 250)
        return made(spark, folder / "lake", folder / "snapshots", AS_OF, 2 * DAY_MS, CONFIG, SPEC)


def test_streamed_snapshot_has_the_rows_and_the_order_of_the_loaded_one(snapshot: Path) -> None:
    for task in TASKS:
        assert len(data_files(snapshot, task)) >= 8
        expected = read_snapshot(snapshot, task)
        rows = StreamedRows.of_snapshot(snapshot, task)
        assert len(rows) == len(expected) > 100
        for found in (rows.load(), StreamedRows.of_snapshot(f"file://{snapshot}", task).load()):
            for name in TRAINING_COLUMNS.names:
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("teacher", ["network", "lightgbm"])
def test_command_trains_from_a_path_or_a_uri_what_the_loaded_rows_give(
    snapshot: Path, tmp_path: Path, teacher: str
) -> None:
    before = torch.get_num_threads()
    settings = ["--set", f"teacher.model={teacher}", "--set", "student.model=fm"]
    settings += ["--set", "attribution.click_window=30m", "--set", "attribution.attribution_window=1d"]
    printed: list[dict[str, Any]] = []
    for location in (str(snapshot), f"file://{snapshot}"):
        out = tmp_path / str(len(printed))
        arguments = ["--snapshot", location, "--releases", str(out), *settings]
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        printed.append(json.loads(result.stdout))
    assert printed[0] == printed[1]
    torch.set_num_threads(before)
    config = CONFIG.model_copy(
        update={
            "teacher": CONFIG.teacher.model_copy(update={"model": teacher}),
            "student": CONFIG.student.model_copy(update={"model": "fm"}),
        }
    )
    sets = {task: read_snapshot(snapshot, task) for task in TASKS}
    expected = train_models(sets, SPEC, config, segments=("campaign_id",))
    assert printed[0]["quality"] == {task: one.report for task, one in expected.models.items()}


def test_altered_snapshot_is_not_trained_on(snapshot: Path, tmp_path: Path) -> None:
    copy = tmp_path / snapshot.name
    shutil.copytree(snapshot, copy)
    file = Path(data_files(copy, "click")[0].location)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="was altered"):
        StreamedRows.of_snapshot(copy, "click")
