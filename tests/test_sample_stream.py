"""A stream of samples against brute force on all rows at once, whatever the files, shards and batches."""

from __future__ import annotations

import gc
import threading
import traceback
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import spearmanr

from pipelines.errors import DataError, StaleStateError
from pipelines.sample_stream import SampleStream, to_training_set
from pipelines.stream_columns import TRAINING_COLUMNS
from tests.sample_files import BEGIN, COLUMNS, MATRICES, sample_rows, write_rows
from tests.stream_files import LAYOUTS, keys, row_keys, tables, written


@settings(max_examples=40)
@given(LAYOUTS, st.integers(1, 30), st.integers(1, 3), st.booleans(), st.booleans())
def test_batches_are_slices_of_the_rows_of_all_epochs(
    layout: list[list[int]], size: int, epochs: int, drop_last: bool, ahead: bool
) -> None:
    every = tables(layout).column("user_key").to_pylist() * epochs
    expected = [every[start : start + size] for start in range(0, len(every), size)]
    if drop_last:
        expected = [part for part in expected if len(part) == size]
    with written(layout) as files:
        batches = SampleStream.of(files).repeat(epochs).batch(size, drop_last)
        found = [
            batch.column("user_key").to_pylist() for batch in (batches.prefetch(2) if ahead else batches)
        ]
    assert found == expected


@settings(max_examples=20)
@given(LAYOUTS)
def test_training_sets_hold_the_values_of_the_files(layout: list[list[int]]) -> None:
    table = tables(layout)
    with written(layout) as files:
        found = [
            to_training_set(batch)
            for batch in SampleStream.of(files, matrices=MATRICES).batch(max(table.num_rows, 1))
        ]
    assert [len(rows) for rows in found] == [table.num_rows] * (table.num_rows > 0)
    for rows in found:
        for name in TRAINING_COLUMNS.names:
            assert getattr(rows, name).tolist() == table.column(name).to_pylist()
        assert rows.buckets.dtype == np.int32
        assert rows.numbers.dtype == rows.label.dtype == rows.weight.dtype == np.float32
        assert rows.mature.dtype == np.bool_


@settings(max_examples=40)
@given(LAYOUTS, st.integers(1, 7))
def test_shards_are_disjoint_complete_balanced_and_in_order(layout: list[list[int]], world: int) -> None:
    every = tables(layout).column("user_key").to_pylist()
    with written(layout) as files:
        shards = [row_keys(SampleStream.of(files).shard(rank, world)) for rank in range(world)]
        assert [SampleStream.of(files).shard(rank, world).epoch_rows for rank in range(world)] == [
            len(shard) for shard in shards
        ]
    assert sorted(key for shard in shards for key in shard) == sorted(every)
    place = {key: number for number, key in enumerate(every)}
    for shard in shards:
        assert [place[key] for key in shard] == sorted(place[key] for key in shard)
    largest_group = max((rows for groups in layout for rows in groups), default=0)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= min(largest_group, -(-len(every) // (8 * world)))


def test_shards_of_one_row_group_go_through_the_same_times(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(800), [800])
    for rank in range(4):
        shard = row_keys(SampleStream.of([file]).shard(rank, 4))
        assert len(shard) == 200
        assert np.mean(shard) == pytest.approx(399.5, abs=80)


@settings(max_examples=40)
@given(LAYOUTS, st.integers(1, 3), st.booleans())
def test_time_order_is_that_of_a_sort_of_all_rows(
    layout: list[list[int]], world: int, statistics: bool
) -> None:
    table = tables(layout)
    with written(layout, statistics=statistics) as files:
        for rank in range(world):
            shard = SampleStream.of(files, COLUMNS).shard(rank, world)
            own = set(row_keys(shard))
            found = [row for batch in shard.in_time_order().batch(4) for row in batch.to_pylist()]
            expected = [row for row in table.to_pylist() if row["user_key"] in own]
            expected.sort(key=lambda row: (row["event_time"], row["sample_id"]))
            assert found == expected


@pytest.mark.parametrize("rows", [3_000, 200_000])
def test_files_that_overlap_in_time_are_merged_chunk_by_chunk(tmp_path: Path, rows: int) -> None:
    noise = np.random.default_rng(4)
    files, times = [], []
    for number in range(5):
        opened = np.sort(noise.integers(0, rows // 2, rows))
        table = pa.table({"event_time": opened, "sample_id": [f"{number}-{k:07d}" for k in range(rows)]})
        times.append(opened)
        files.append(write_rows(tmp_path / f"{number}.parquet", table, [rows // 2, rows - rows // 2]))
    columns = pa.schema([("event_time", pa.int64()), ("sample_id", pa.string())])
    merged = pa.Table.from_batches(list(SampleStream.of(files, columns).in_time_order().batch(10_000)))
    every = pa.concat_tables(pq.read_table(file.location) for file in files)
    assert merged.equals(every.sort_by([("event_time", "ascending"), ("sample_id", "ascending")]))


def test_file_that_is_not_sorted_cannot_be_put_in_time_order(tmp_path: Path) -> None:
    table = sample_rows(50)
    file = write_rows(tmp_path / "a.parquet", table.take(list(range(49, -1, -1))), [50])
    with pytest.raises(DataError, match=r"a\.parquet: expected rows ordered by event_time"):
        row_keys(SampleStream.of([file]).in_time_order())


@settings(max_examples=40)
@given(LAYOUTS, st.integers(1, 40), st.integers(0, 9), st.integers(1, 3))
def test_shuffled_epochs_are_permutations_and_follow_from_the_seed(
    layout: list[list[int]], buffer_rows: int, seed: int, world: int
) -> None:
    with written(layout) as files:
        shard = SampleStream.of(files).shard(world - 1, world)
        plain = row_keys(shard)
        shuffled = shard.shuffle(buffer_rows, seed).repeat(2)
        found = row_keys(shuffled)
        assert sorted(found[: len(plain)]) == sorted(found[len(plain) :]) == sorted(plain)
        assert row_keys(shuffled) == found
        assert row_keys(shard.shuffle(None)) == plain


def test_each_epoch_and_each_seed_has_an_order_of_its_own(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(300), [30] * 10)
    stream = SampleStream.of([file])
    found = row_keys(stream.shuffle(60, 1).repeat(2))
    assert found[:300] != found[300:]
    assert row_keys(stream.shuffle(60, 2)) != found[:300]


def adjacency(order: NDArray[np.int64]) -> float:
    """Mean distance in time rank of rows that follow each other, over that of a random permutation, n / 3."""
    return float(np.abs(np.diff(order)).mean() / (len(order) / 3))


@pytest.mark.parametrize(
    ("groups", "pieces", "buffer_rows", "near_random"),
    [
        (80, 80, 256, 0.8),
        (80, 80, 2_000, 0.8),
        (80, 80, 20_000, 0.98),
        (8, 64, 2_000, 0.8),
        (1, 16, 2_000, 0.8),
    ],
)
def test_shuffled_rows_stand_anywhere_in_time(
    tmp_path: Path, groups: int, pieces: int, buffer_rows: int, near_random: float
) -> None:
    n, seeds = 20_000, 20
    table = pa.table({"user_key": np.arange(n)})
    file = write_rows(tmp_path / "a.parquet", table, [n // groups] * groups)
    stream = SampleStream.of([file], table.schema)
    correlations = []
    for seed in range(seeds):
        order = np.array(row_keys(stream.shuffle(buffer_rows, seed)))
        correlations.append(float(spearmanr(np.arange(n), order).statistic))
        assert adjacency(order) > near_random
    # The rank correlation of a random order of so many pieces has mean 0 and deviation 1 / sqrt(pieces - 1).
    assert abs(np.mean(correlations)) < 4 / np.sqrt((pieces - 1) * seeds)
    assert np.std(correlations) < 1.5 / np.sqrt(pieces - 1)


@settings(max_examples=40)
@given(LAYOUTS, st.data())
def test_stream_can_be_entered_at_any_row(layout: list[list[int]], data: st.DataObject) -> None:
    with written(layout) as files:
        stream = SampleStream.of(files).repeat(2)
        order = data.draw(st.sampled_from(["files", "time", "shuffled", "shard", "part", "filter"]))
        if order == "time":
            stream = stream.in_time_order()
        elif order == "shuffled":
            stream = stream.shuffle(data.draw(st.integers(1, 20)), 3)
        elif order == "shard":
            stream = stream.shard(1, 2).shuffle(7)
        elif order == "part":
            stream = stream.in_time_order().part(3, 11)
        elif order == "filter":
            stream = stream.filter("observed_share", 0.3)
        every = row_keys(stream)
        rows = data.draw(st.integers(0, len(every)))
        assert row_keys(stream.start_at(rows)) == every[rows:]
        with pytest.raises(StaleStateError, match="expected a position within"):
            row_keys(stream.start_at(len(every) + 1))


@settings(max_examples=40)
@given(LAYOUTS, st.integers(1, 9), st.integers(0, 12), st.booleans())
def test_killed_reader_goes_on_behind_the_last_batch_it_was_given(
    layout: list[list[int]], size: int, batches: int, ahead: bool
) -> None:
    with written(layout) as files:
        stream = SampleStream.of(files).shuffle(8, 5).repeat(2)
        plain = stream.batch(size)
        reader = iter(plain.prefetch(3) if ahead else plain)
        before = [key for batch in islice(reader, batches) for key in batch.column("user_key").to_pylist()]
        state = reader.state()
        reader.close()
        assert state.rows == len(before)
        assert before + keys(stream.start_at(state).batch(size)) == row_keys(stream)


def test_state_of_another_stream_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(30), [10, 20])
    stream = SampleStream.of([file]).shuffle(8, 5)
    reader = iter(stream.batch(4))
    next(reader)
    state = reader.state()
    others = [
        stream.shuffle(8, 6),
        stream.shuffle(9, 5),
        stream.shuffle(None).in_time_order(),
        stream.shard(0, 2),
        stream.filter("weight", 1.0),
        stream.part(2),
        SampleStream.of([file, file]).shuffle(8, 5),
    ]
    for other in others:
        with pytest.raises(StaleStateError, match="expected the state of the stream"):
            other.start_at(state)
    assert stream.repeat(4).select("user_key").start_at(state).position == 4


@settings(max_examples=40)
@given(
    LAYOUTS,
    st.none() | st.integers(-2, 30),
    st.none() | st.integers(-2, 30),
    st.none() | st.floats(0, 1, width=32),
    st.booleans(),
    st.integers(1, 3),
)
def test_filter_keeps_the_rows_inside_its_bounds(
    layout: list[list[int]],
    since: int | None,
    until: int | None,
    share: float | None,
    statistics: bool,
    world: int,
) -> None:
    low, high = (None if bound is None else BEGIN + bound for bound in (since, until))
    table = tables(layout)
    time, shown = table.column("event_time").to_numpy(), table.column("observed_share").to_numpy()
    inside = np.ones(len(time), bool)
    inside &= (low is None) | (time >= (low or 0))
    inside &= (high is None) | (time < (high or 0))
    inside &= (share is None) | (shown >= (share or 0))
    expected = table.column("user_key").to_numpy()[inside].tolist()
    with written(layout, statistics=statistics) as files:
        stream = SampleStream.of(files).filter("event_time", low, high).filter("observed_share", share)
        stream = stream.select("user_key")
        assert row_keys(stream) == expected
        assert stream.epoch_rows == len(expected)
        shards = [row_keys(stream.shard(rank, world).shuffle(6)) for rank in range(world)]
    assert sorted(key for shard in shards for key in shard) == sorted(expected)


def test_null_is_outside_every_bound(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([1, None, 3, 4])})
    file = write_rows(tmp_path / "a.parquet", table, [2, 2])
    stream = SampleStream.of([file], table.schema).filter("x", 0)
    assert [batch.column("x").to_pylist() for batch in stream.batch(9)] == [[1, 3, 4]]


def test_row_groups_outside_the_bounds_are_not_read(tmp_path: Path) -> None:
    table = sample_rows(400, span=1_000)
    file = write_rows(tmp_path / "a.parquet", table, [100] * 4)
    path = Path(file.location)
    about = pq.read_metadata(path)
    middle = int(table.column("event_time").to_numpy()[200])
    # Spoil the first half's pages: whoever reads them fails.
    columns = [about.row_group(2).column(column) for column in range(about.num_columns)]
    end = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
    content = bytearray(path.read_bytes())
    content[4:end] = bytes(end - 4)
    path.write_bytes(content)
    stream = SampleStream.of([file]).filter("event_time", middle + 1)
    assert row_keys(stream)[-1] == 399
    with pytest.raises(DataError, match="cut off or altered"):
        row_keys(SampleStream.of([file]))


@settings(max_examples=40)
@given(LAYOUTS, st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_part_is_a_slice_of_each_epoch(layout: list[list[int]], first: int, rows: int, in_time: bool) -> None:
    with written(layout) as files:
        stream = SampleStream.of(files).in_time_order() if in_time else SampleStream.of(files)
        expected = row_keys(stream)[first : first + rows]
        part = stream.part(first, first + rows)
        assert row_keys(part.repeat(2)) == expected * 2
        assert part.epoch_rows == len(expected)
        assert row_keys(stream.part(first)) == row_keys(stream)[first:]


def test_streams_are_values_and_each_iteration_starts_over(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(30), [10, 20])
    stream = SampleStream.of([file])
    batches = stream.batch(7).map(lambda batch: batch.column("user_key").to_pylist()).prefetch(2)
    stream.shuffle(5)
    assert (
        list(batches)
        == list(batches)
        == [list(range(start, min(start + 7, 30))) for start in range(0, 30, 7)]
    )
    first, second = iter(batches), iter(batches)
    assert [next(first), next(second), next(first)] == [[*range(7)], [*range(7)], [*range(7, 14)]]


def test_repeat_without_a_number_goes_on_for_ever(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(10), [10])
    reader = iter(SampleStream.of([file]).repeat().batch(25, drop_last=True))
    assert [batch.num_rows for batch in islice(reader, 40)] == [25] * 40
    with pytest.raises(DataError, match="no row is inside the bounds"):
        next(iter(SampleStream.of([file]).filter("weight", 9.0).repeat().batch(5)))


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sample-prefetch"]


def test_consumer_that_stops_early_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(500), [50] * 10)
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    batches = SampleStream.of([file]).shuffle(60).repeat().batch(4).prefetch(1).map(len).prefetch(3)
    for size in batches:
        assert size == 4
        break
    assert prefetch_threads() == []
    reader = iter(batches)
    next(reader)
    assert len(prefetch_threads()) == 2
    reader.close()
    assert prefetch_threads() == []
    del reader
    with pytest.raises(RuntimeError, match="out of memory"):
        for _ in batches:
            raise RuntimeError("out of memory")
    gc.collect()
    assert prefetch_threads() == []
    assert len(list(opened.iterdir())) == before


def broken(batch: pa.RecordBatch) -> int:
    if 12 in batch.column("user_key").to_pylist():
        raise ValueError("twelve")
    return len(batch)


@pytest.mark.parametrize("ahead", [False, True])
def test_error_in_map_reaches_the_consumer_in_its_place_with_its_traceback(
    tmp_path: Path, ahead: bool
) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(40), [40])
    batches = SampleStream.of([file]).batch(5).map(broken)
    found = []
    with pytest.raises(ValueError, match="twelve") as raised:
        for size in batches.prefetch(4) if ahead else batches:
            found.append(size)
    assert found == [5, 5]
    assert "broken" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert prefetch_threads() == []


def test_prefetch_is_at_most_so_many_batches_ahead(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", sample_rows(200), [200])
    made: list[int] = []
    proceed = threading.Semaphore(0)

    def count(batch: pa.RecordBatch) -> int:
        made.append(batch.num_rows)
        proceed.release()
        return len(made)

    reader = iter(SampleStream.of([file]).batch(5).map(count).prefetch(3))
    assert next(reader) == 1
    # One handed out, three on the shelf, and one made that waits for room.
    for _ in range(5):
        assert proceed.acquire(timeout=10)
    assert not proceed.acquire(timeout=0.05)
    assert len(made) == 5
    assert list(reader) == list(range(2, 41))
