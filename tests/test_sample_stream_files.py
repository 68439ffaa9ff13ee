"""Which files and which calls a stream of samples refuses; its memory does not grow with the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import ConfigError, DataError
from pipelines.sample_stream import DataFile, SampleStream, to_training_set
from pipelines.stream_order import shard_of
from tests.sample_files import MATRICES, sample_rows, write_rows
from tests.stream_files import row_keys


def test_file_is_found_by_path_or_uri(tmp_path: Path) -> None:
    path = tmp_path / "task=click, day=2026-01-05"
    path.mkdir()
    file = write_rows(path / "part 0.parquet", sample_rows(20), [20])
    for location in (file.location, f"file://{file.location}", f"file:{file.location}"):
        assert row_keys(SampleStream.of([DataFile(location, 20)])) == list(range(20))


def test_missing_truncated_or_altered_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "part-0.parquet"
    file = write_rows(path, sample_rows(3_000), [3_000])
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"part-0\.parquet: expected 2999 rows\. Received 3000"):
        row_keys(SampleStream.of([DataFile(file.location, 2_999)]))
    path.write_bytes(content[:-100])
    with pytest.raises(
        DataError, match=r"part-0\.parquet: expected a Parquet file with 3000 rows\. Received"
    ):
        row_keys(SampleStream.of([file]))
    path.write_bytes(content[:4] + bytes(len(content) // 3) + content[4 + len(content) // 3 :])
    with pytest.raises(DataError, match=r"part-0\.parquet: .*\nhint: the file was cut off or altered"):
        row_keys(SampleStream.of([file]))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"part-0\.parquet: expected a Parquet file"):
        row_keys(SampleStream.of([file]))
    path.unlink()
    for location in (file.location, f"file://{file.location}"):
        with pytest.raises(DataError, match=r"part-0\.parquet: .*Received: no such file"):
            row_keys(SampleStream.of([DataFile(location, 3_000)]))


def test_column_of_another_type_or_missing_is_refused_by_name(tmp_path: Path) -> None:
    table = sample_rows(5)
    label = table.set_column(
        table.column_names.index("label"), "label", table.column("label").cast(pa.int8())
    )
    file = write_rows(tmp_path / "a.parquet", label, [5])
    with pytest.raises(DataError, match=r"a\.parquet: column label: expected float\. Received: int8"):
        row_keys(SampleStream.of([file]))
    assert row_keys(SampleStream.of([file]).select("user_key", "buckets")) == list(range(5))
    file = write_rows(tmp_path / "b.parquet", table.drop_columns(["weight"]), [5])
    with pytest.raises(DataError, match=r"b\.parquet: expected a column weight"):
        row_keys(SampleStream.of([file]))


def test_matrix_with_rows_of_another_width_or_nulls_is_refused(tmp_path: Path) -> None:
    kind = pa.list_(pa.int32())
    schema = pa.schema([("buckets", kind)])
    for rows, found in (
        ([[1, 2, 3], [4, 5]], "Received 2 in one"),
        ([[1, 2, 3], None], "Received a null"),
        ([[1, 2, 3], [4, None, 5]], "Received a null among them"),
    ):
        file = write_rows(tmp_path / "a.parquet", pa.table({"buckets": pa.array(rows, kind)}), [2])
        with pytest.raises(DataError, match=rf"a\.parquet: column buckets: .*{found}"):
            list(SampleStream.of([file], schema, {"buckets": 3}).batch(2))


def test_matrix_may_have_no_columns_or_a_fixed_size_in_the_file(tmp_path: Path) -> None:
    empty = pa.table({"x": pa.array([[]] * 7, pa.list_(pa.float32())), "user_key": np.arange(7)})
    file = write_rows(tmp_path / "a.parquet", empty, [3, 4])
    stream = SampleStream.of([file], empty.schema, {"x": 0})
    assert [batch.num_rows for batch in stream.shuffle(4).batch(5)] == [5, 2]
    fixed = pa.table({"x": pa.array([[1, 2]] * 3, pa.list_(pa.int32(), 2))})
    file = write_rows(tmp_path / "b.parquet", fixed, [3])
    (batch,) = SampleStream.of([file], fixed.schema, {"x": 2}).batch(5)
    assert batch.column("x").to_pylist() == [[1, 2]] * 3
    with pytest.raises(DataError, match=r"expected 3 values in each row\. Received 2"):
        list(SampleStream.of([file], fixed.schema, {"x": 3}).batch(5))


def test_null_cannot_be_trained_on(tmp_path: Path) -> None:
    table = sample_rows(3)
    label = pa.array([1.0, None, 0.0], pa.float32())
    file = write_rows(
        tmp_path / "a.parquet", table.set_column(table.column_names.index("label"), "label", label), [3]
    )
    with pytest.raises(DataError, match="column label: expected a value in each row"):
        list(SampleStream.of([file], matrices=MATRICES).batch(3).map(to_training_set))


def test_misuse_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    stream = SampleStream.of([write_rows(tmp_path / "a.parquet", sample_rows(3), [3])])
    with pytest.raises(ConfigError, match="0 <= rank < world"):
        stream.shard(2, 2)
    with pytest.raises(ConfigError, match="expected a whole stream"):
        stream.shard(0, 2).shard(0, 2)
    with pytest.raises(ConfigError, match="expected a whole stream"):
        stream.part(1).part(1)
    with pytest.raises(ConfigError, match="0 <= first <= last"):
        stream.part(2, 1)
    with pytest.raises(ConfigError, match="at least 1 epoch"):
        stream.repeat(0)
    with pytest.raises(ConfigError, match="a buffer of at least 1 row"):
        stream.shuffle(0)
    with pytest.raises(ConfigError, match="a seed of at least 0"):
        stream.shuffle(1, -1)
    with pytest.raises(ConfigError, match="batches of at least 1 row"):
        stream.batch(0)
    with pytest.raises(ConfigError, match="at least 1 batch"):
        stream.batch(1).prefetch(0)
    with pytest.raises(ConfigError, match="a position of at least 0"):
        stream.start_at(-1)
    with pytest.raises(ConfigError, match="expected a column among"):
        stream.select("price")
    with pytest.raises(ConfigError, match="bounds of type int64 for event_time"):
        stream.filter("event_time", 0.5)
    with pytest.raises(ConfigError, match="bounds of type bool for mature"):
        stream.filter("mature", "yes")
    with pytest.raises(ConfigError, match="expected a list column"):
        SampleStream.of(stream.files, matrices={"label": 3})


def test_shard_of_many_row_groups_cuts_none() -> None:
    from pipelines.stream_files import Piece

    pieces = [Piece(0, group, 0, 100, False) for group in range(240)]
    for rank in range(8):
        assert {len(piece) for piece in shard_of(pieces, rank, 8)} == {100}


_MEMORY_OF_TWO_PASSES = """
import json, sys
from pathlib import Path
from pipelines.sample_stream import DataFile, SampleStream, to_training_set
from tests.sample_files import MATRICES

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

def rows(files, order):
    stream = SampleStream.of(files, matrices={**MATRICES, "buckets": 24})
    stream = {"files": stream, "time": stream.in_time_order(), "shuffled": stream.shuffle(65_536)}[order]
    return sum(len(batch) for batch in stream.batch(4_096).map(to_training_set).prefetch(2))

files, order = [DataFile(*file) for file in json.loads(sys.argv[1])], sys.argv[2]
begin = kib("VmRSS")
rows(files[:3], order)
first = kib("VmHWM")
print(rows(files, order), first - begin, kib("VmHWM") - first)
"""


@pytest.fixture(scope="module")
def five_days(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Three files of each day that overlap, with 91 MB of rows a day."""
    rows = 200_000
    table = sample_rows(rows, buckets=24)
    assert 3 * table.drop_columns(["sample_id"]).nbytes > 91e6
    files = []
    for day in range(5):
        time = pa.array(table.column("event_time").to_numpy() + day * 86_400_000)
        moved = table.set_column(table.column_names.index("event_time"), "event_time", time)
        path = tmp_path_factory.mktemp("days") / f"{day}.parquet"
        files += [(write_rows(path, moved, [50_000] * 4).location, rows)] * 3
    return files


@pytest.mark.parametrize("order", ["files", "time", "shuffled"])
def test_memory_does_not_grow_with_the_rows(five_days: list[tuple[str, int]], order: str) -> None:
    command = [sys.executable, "-c", _MEMORY_OF_TWO_PASSES, json.dumps(five_days), order]
    root = Path(__file__).resolve().parents[1]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    count, one_day, further = map(int, printed.split())
    assert count == 15 * 200_000
    assert one_day < 400 * 1024
    # Four more days are 365 MB.
    assert further < 90 * 1024
