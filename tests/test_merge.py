"""Merging partitions: the order of the event files again, however partitions and polls cut the log."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.events import DEAD_LETTER
from pipelines.merge import UNKNOWN_TIME, Merged, PartitionMerge


@dataclass(frozen=True, order=True)
class Row:
    arrival: int
    kind: int
    hash: int


def push(merge: PartitionMerge, partition: int, rows: list[Row]) -> None:
    merge.push(
        partition,
        np.array([row.arrival for row in rows], np.int64),
        np.array([row.kind for row in rows], np.int8),
        np.array([row.hash for row in rows], np.uint64),
    )


class Run:
    """Pushes logs in chunks and collects what is let go, as rows and as arrival times."""

    def __init__(self, logs: list[list[Row]], clocks: list[int] | None = None) -> None:
        self.logs = logs
        self.merge = PartitionMerge(clocks or [UNKNOWN_TIME] * len(logs))
        self.pushed = [0] * len(logs)
        self.taken = [0] * len(logs)
        self.order: list[tuple[int, Row]] = []
        self.arrival: list[int] = []

    def push(self, partition: int, count: int) -> None:
        start = self.pushed[partition]
        rows = self.logs[partition][start : start + count]
        push(self.merge, partition, rows)
        self.pushed[partition] += len(rows)

    def advance(self, idle: set[int] = frozenset()) -> Merged:  # type: ignore[assignment]
        ended = [
            pushed == len(log) or index in idle
            for index, (pushed, log) in enumerate(zip(self.pushed, self.logs, strict=True))
        ]
        merged = self.merge.advance(ended)
        for partition in merged.partition.tolist():
            self.order.append((partition, self.logs[partition][self.taken[partition]]))
            self.taken[partition] += 1
        self.arrival += merged.arrival_time.tolist()
        return merged

    def finish(self) -> None:
        for partition in range(len(self.logs)):
            self.push(partition, len(self.logs[partition]))
        self.advance()


def merged_by_heads(logs: list[list[Row]]) -> list[tuple[int, Row]]:
    """The definition: of the first rows of all partitions, the one with the smallest key goes first."""
    effective: list[list[tuple[Row, Row]]] = []
    for log in logs:
        greatest = Row(UNKNOWN_TIME, -1, 0)
        keyed = []
        for row in log:
            known = max(row.arrival, greatest.arrival)
            greatest = max(greatest, Row(known, row.kind, row.hash))
            keyed.append((greatest, row))
        effective.append(keyed)
    order = []
    while any(effective):
        _, partition = min((log[0][0], index) for index, log in enumerate(effective) if log)
        order.append((partition, effective[partition].pop(0)[1]))
    return order


rows = st.builds(Row, st.integers(0, 5), st.integers(0, 2), st.integers(0, 4))
dead = st.builds(Row, st.sampled_from([UNKNOWN_TIME, 2]), st.just(DEAD_LETTER), st.integers(0, 2))
steps = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=20)


@settings(max_examples=300)
@given(st.lists(st.lists(rows | dead, max_size=12), min_size=1, max_size=4), steps)
def test_any_polls_give_the_merge_by_heads(logs: list[list[Row]], polls: list[tuple[int, int, bool]]) -> None:
    run = Run(logs)
    for partition, count, advances in polls:
        run.push(partition % len(logs), count)
        if advances:
            run.advance()
    run.finish()
    assert run.order == merged_by_heads(logs)
    assert run.arrival == sorted(run.arrival)


@settings(max_examples=200)
@given(st.lists(rows | dead.filter(lambda row: row.arrival >= 0), max_size=40), st.integers(1, 4), steps)
def test_a_log_in_file_order_comes_out_in_file_order_for_any_partitions(
    log: list[Row], partitions: int, polls: list[tuple[int, int, bool]]
) -> None:
    ordered = sorted(log)  # the order of EventFiles: arrival, kind, hash
    # Equal keys are redeliveries of one event, which has one partition.
    logs: list[list[Row]] = [[] for _ in range(4 * partitions)]
    for row in ordered:
        logs[row.kind * partitions + row.hash % partitions].append(row)
    run = Run(logs)
    for partition, count, _ in polls:
        run.push(partition % len(logs), count)
        run.advance()
    run.finish()
    assert [row for _, row in run.order] == ordered
    assert run.arrival == [row.arrival for row in ordered]


@settings(max_examples=200)
@given(st.lists(st.lists(rows | dead, max_size=8), min_size=1, max_size=3), st.integers(0, 30))
def test_going_on_from_any_row_gives_the_rest_of_the_order(logs: list[list[Row]], cut: int) -> None:
    whole = Run(logs)
    whole.finish()
    cut = min(cut, len(whole.order))
    taken = [sum(partition == index for partition, _ in whole.order[:cut]) for index in range(len(logs))]
    clocks = [
        max(
            (time for (p, _), time in zip(whole.order[:cut], whole.arrival, strict=False) if p == index),
            default=UNKNOWN_TIME,
        )
        for index in range(len(logs))
    ]
    rest = Run([log[count:] for log, count in zip(logs, taken, strict=True)], clocks)
    rest.finish()
    assert rest.order == whole.order[cut:]
    assert rest.arrival == whole.arrival[cut:]


def test_nothing_is_let_go_while_a_partition_has_said_nothing() -> None:
    run = Run([[Row(1, 0, 0), Row(2, 0, 0)], [Row(5, 1, 0)]])
    run.push(0, 2)
    assert len(run.advance()) == 0
    assert run.merge.waiting == [2, 0]
    run.push(1, 1)
    assert len(run.advance()) == 3


def test_a_partition_that_has_spoken_holds_back_only_what_is_beyond_its_last_key() -> None:
    run = Run([[Row(1, 0, 0), Row(4, 0, 0)], [Row(3, 1, 0), Row(9, 1, 0)]])
    run.push(0, 2)
    run.push(1, 1)
    assert run.advance().arrival_time.tolist() == [1, 3]
    assert run.merge.waiting == [1, 0]


def test_an_idle_partition_holds_nothing_back_and_its_later_rows_do_not_go_back_in_time() -> None:
    run = Run([[Row(1, 0, 0), Row(8, 0, 0), Row(9, 0, 0)], [Row(3, 1, 0), Row(9, 1, 0)]])
    run.push(0, 2)
    assert run.advance(idle={1}).arrival_time.tolist() == [1, 8]
    run.push(1, 2)
    run.push(0, 1)
    assert run.advance().arrival_time.tolist() == [8, 9, 9]
    assert [partition for partition, _ in run.order] == [0, 0, 1, 0, 1]


def test_rows_that_do_not_tell_their_time_follow_the_row_before_them() -> None:
    run = Run([[Row(2, 0, 0), Row(UNKNOWN_TIME, DEAD_LETTER, 7), Row(6, 0, 0)], [Row(2, 1, 0), Row(3, 1, 0)]])
    run.finish()
    assert run.arrival == [2, 2, 2, 3, 6]
    assert [row.kind for _, row in run.order] == [0, 1, DEAD_LETTER, 1, 0]


@pytest.mark.parametrize("partitions", [1, 3])
def test_no_rows_at_all(partitions: int) -> None:
    merge = PartitionMerge([UNKNOWN_TIME] * partitions)
    push(merge, 0, [])
    assert len(merge.advance([True] * partitions)) == 0
