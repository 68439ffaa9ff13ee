"""Merging partitions gives one order, whatever the partitioning and the polling."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.conform import conform
from pipelines.events import CLICK, DEAD_LETTER, IMPRESSION, DeadLetter
from pipelines.hashing import hash_column, hash_text
from pipelines.merge import FIRST_KEY, PartitionMerge, PartitionRows

EventRow = tuple[int, int, str]  # arrival time, kind, event id ("" is a dead letter)


def partition_rows(kind: int, rows: list[tuple[int, str]], first_offset: int) -> PartitionRows:
    bad = np.array([name == "" for _, name in rows])
    good = [(time, name) for time, name in rows if name]
    columns = {
        "event_id": [name for _, name in good],
        "impression_id": [name for _, name in good],
        "event_time": [time for time, _ in good],
    }
    if kind == IMPRESSION:
        columns |= {"user_id": ["u"] * len(good), "item_id": ["i"] * len(good)}
    table = conform(kind, pa.table(columns))
    hashes = np.zeros(len(rows), np.uint64)
    if good:
        hashes[~bad] = hash_column(table.column("event_id"))
    return PartitionRows(
        kind,
        np.array([0 if name == "" else time for time, name in rows], np.int64),
        hashes,
        bad,
        np.arange(first_offset, first_offset + len(rows)),
        np.zeros(len(rows), np.int32),
        np.zeros(len(rows), np.int64),
        table,
        [DeadLetter("t", 0, first_offset + n, 0, "bad", "") for n in np.flatnonzero(bad).tolist()],
    )


def names_of(blocks: list) -> list[tuple[int, str]]:
    found = []
    for block in blocks:
        seen = [0, 0, 0, 0]
        for kind in block.kind.tolist():
            if kind == DEAD_LETTER:
                found.append((kind, str(block.dead_letters[seen[3]].offset)))
            else:
                found.append((kind, block.tables[kind].column("event_id")[seen[kind]].as_py()))
            seen[kind] += 1
    return found


events = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([IMPRESSION, CLICK]), st.uuids()), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(
    events=events,
    partitions=st.integers(1, 3),
    chunk=st.integers(1, 9),
    most=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_any_partitioning_and_polling_reproduces_the_global_order(
    events, partitions, chunk, most, seed
) -> None:
    log = sorted((time, kind, hash_text(str(name)), str(name)) for time, kind, name in events)
    parts = {(kind, n): [] for kind in (IMPRESSION, CLICK) for n in range(partitions)}
    for time, kind, digest, name in log:
        parts[kind, digest % partitions].append((time, name))
    keys = list(parts)
    merge = PartitionMerge([FIRST_KEY] * len(keys))
    position = dict.fromkeys(keys, 0)
    rng, blocks = np.random.default_rng(seed), []
    while True:
        pending = [n for n, key in enumerate(keys) if position[key] < len(parts[key])]
        if pending:
            n = int(rng.choice(pending))
            start = position[keys[n]]
            rows = parts[keys[n]][start : start + chunk]
            merge.add(n, partition_rows(keys[n][0], rows, start))
            position[keys[n]] = start + len(rows)
        block = merge.take([position[key] < len(parts[key]) for key in keys], most)
        if block is not None:
            blocks.append(block)
        elif not pending:
            break
    assert names_of(blocks) == [(kind, name) for _, kind, _, name in log]
    arrivals = np.concatenate([block.arrival_time for block in blocks]) if blocks else np.zeros(0)
    assert (np.diff(arrivals) >= 0).all()


def test_a_partition_that_may_still_speak_holds_the_others_back() -> None:
    merge = PartitionMerge([FIRST_KEY, FIRST_KEY])
    merge.add(0, partition_rows(IMPRESSION, [(1, "a"), (5, "b"), (9, "c")], 0))
    assert merge.take([True, True], 10) is None
    merge.add(1, partition_rows(CLICK, [(5, "d")], 0))
    assert names_of([merge.take([True, True], 10)]) == [(0, "a"), (0, "b"), (1, "d")]
    assert merge.take([True, True], 10) is None
    assert names_of([merge.take([True, False], 10)]) == [(0, "c")]


def test_dead_letters_keep_their_place_behind_the_row_before_them() -> None:
    merge = PartitionMerge([FIRST_KEY])
    merge.add(0, partition_rows(CLICK, [(3, "a"), (0, ""), (4, "b")], 0))
    block = merge.take([False], 10)
    assert names_of([block]) == [(1, "a"), (3, "1"), (1, "b")]
    assert block.arrival_time.tolist() == [3, 3, 4]


def test_arrival_time_never_goes_back_within_a_partition_even_across_reads() -> None:
    merge = PartitionMerge([FIRST_KEY])
    merge.add(0, partition_rows(CLICK, [(8, "a")], 0))
    merge.add(0, partition_rows(CLICK, [(2, "b"), (9, "c")], 1))
    block = merge.take([False], 10)
    assert block.arrival_time.tolist() == [8, 8, 9]
    assert names_of([block]) == [(1, "a"), (1, "b"), (1, "c")]
