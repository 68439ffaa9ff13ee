"""Training from files gives what training on the same rows in memory gives, bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.training import train_models
from jobs.training_split import TaskSplit, split_task
from models.student import Student
from pipelines.config import load_config
from pipelines.errors import DataError
from pipelines.stream_columns import TRAINING_COLUMNS
from pipelines.streamed_rows import StreamedRows
from pipelines.training_set import TrainingSet
from tests.sample_files import COLUMNS, write_rows
from tests.test_training import CONFIG, HOUR_MS, SPEC, censored, world


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def streamed(rows: TrainingSet, folder: Path, files: int = 3) -> StreamedRows:
    """The rows dealt out to files that overlap in time, in row groups of 700."""
    columns = {
        name: pa.array(list(values) if values.ndim > 1 else values, COLUMNS.field(name).type)
        for name in TRAINING_COLUMNS.names
        if (values := getattr(rows, name)) is not None
    }
    names = pa.array([f"{number:07d}" for number in range(len(rows))])
    table = pa.table({"sample_id": names, **columns}, schema=COLUMNS)
    made = []
    for number in range(files):
        own = table.take(np.arange(number, len(rows), files))
        groups = [700] * (own.num_rows // 700) + [own.num_rows % 700]
        made.append(write_rows(folder / f"{number}.parquet", own, groups))
    widths = {name: getattr(rows, name).shape[1] for name in ("buckets", "numbers", "segment_key")}
    return StreamedRows.of(made, widths)


def assert_equal(left: TrainingSet, right: TrainingSet) -> None:
    for name in TRAINING_COLUMNS.names:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


@pytest.mark.parametrize("teacher", ["network", "lightgbm"])
def test_models_and_report_are_those_of_the_rows_in_memory(tmp_path: Path, teacher: str) -> None:
    rows = censored(world(9_000, 1, segments=1)[0], 6.0 * HOUR_MS)
    weight = np.random.default_rng(3).uniform(0.5, 3.0, len(rows)).astype(np.float32)
    rows = replace(rows, weight=weight)
    config = load_config(None, [f"teacher.model={teacher}", "attribution.attribution_window=24h"])
    first = train_models({"conversion": rows}, SPEC, config).models["conversion"]
    again = train_models({"conversion": streamed(rows, tmp_path)}, SPEC, config).models["conversion"]
    assert again.report == first.report
    assert dict(again.teacher.to_files()) == dict(first.teacher.to_files())
    assert again.student.to_files(slots=True) == first.student.to_files(slots=True)
    assert again.student_calibrator.digest() == first.student_calibrator.digest()
    assert again.teacher_calibrator.digest() == first.teacher_calibrator.digest()


def test_student_fitted_to_a_stream_is_the_one_fitted_to_the_rows(tmp_path: Path) -> None:
    rows = world(70_000, 1)[0]
    config = load_config(None, ["student.batch_rows=4096", "student.warmup_epochs=2"]).student
    one, two = Student.create(SPEC, config), Student.create(SPEC, config)
    assert one.fit(rows) == two.fit(streamed(rows, tmp_path))
    assert one.to_files(slots=True) == two.to_files(slots=True)


@settings(max_examples=30)
@given(st.data())
def test_rows_in_files_are_split_at_the_row_at_which_rows_in_memory_are(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 400))
    rows = world(n, data.draw(st.integers(0, 99)))[0]
    # Traffic that grows or shrinks, several rows of one moment, and outcomes that come early or late.
    moments = np.linspace(0.0, 1.0, n) ** data.draw(st.sampled_from([0.2, 1.0, 5.0]))
    time = (moments * data.draw(st.sampled_from([50, 10_000]))).astype(np.int64)
    label = rows.label * (moments <= data.draw(st.sampled_from([0.3, 0.75, 0.9, 1.0])))
    share = np.random.default_rng(0).uniform(0.4, 1.0, n).astype(np.float32)
    rows = replace(rows, event_time=time, label=label.astype(np.float32), observed_share=share)
    at = data.draw(st.none() | st.integers(-1, 60))
    with tempfile.TemporaryDirectory() as folder:
        expected, found = split_task(rows, at), split_task(streamed(rows, Path(folder)), at)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
            return
        assert found.report == expected.report
        assert found.span == expected.span
        for name in ("used", "train", "held_out"):
            assert_equal(loaded(found, name), loaded(expected, name))


def loaded(split: TaskSplit, name: str) -> TrainingSet:
    rows = getattr(split, name)
    return rows.load() if isinstance(rows, StreamedRows) else rows


def test_task_without_enough_rows_is_skipped_with_the_reason(tmp_path: Path) -> None:
    rows = world(3_000, 1)[0]
    label = np.zeros(3_000, np.float32)
    label[-100:] = 1.0
    late = streamed(replace(rows, label=label), tmp_path)
    assert "before the held-out window" in train_models({"click": late}, SPEC, CONFIG).skipped["click"]
    none = streamed(replace(rows, label=label * 0), tmp_path)
    assert "0 positives among 3000 rows" in train_models({"click": none}, SPEC, CONFIG).skipped["click"]


def test_segments_are_the_columns_of_the_files(tmp_path: Path) -> None:
    rows = streamed(world(3_000, 1, segments=1)[0], tmp_path)
    with pytest.raises(DataError, match="2 calibration segments"):
        train_models({"click": rows}, SPEC, CONFIG, segments=("a", "b"))
