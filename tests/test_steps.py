"""Steps are cut by the events alone, not by how blocks were read or where dead letters stand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.prepared import FrozenModels, prepare
from jobs.steps import StepCutter
from pipelines.conform import conform
from pipelines.events import CLICK, DEAD_LETTER, DeadLetter, EventBlock, contract_schema
from pipelines.feature_spec import FeatureSpec


def block_of(rows: list[tuple[int, bool]]) -> EventBlock:
    good = [n for n, (_, bad) in enumerate(rows) if not bad]
    names = [f"c{rows[n][0]}" for n in good]
    times = [rows[n][0] for n in good]
    clicks = conform(CLICK, pa.table({"event_id": names, "impression_id": names, "event_time": times}))
    n = len(rows)
    return EventBlock(
        (contract_schema(0).empty_table(), clicks, contract_schema(2).empty_table()),
        np.array([DEAD_LETTER if bad else CLICK for _, bad in rows], np.int8),
        np.array([time for time, _ in rows], np.int64),
        np.zeros(n, np.int32),
        np.arange(n),
        np.zeros(n, np.int32),
        [DeadLetter("clicks", 0, time, 0, "bad", "") for time, bad in rows if bad],
    )


def steps_of(rows: list[tuple[int, bool]], cuts: list[int], begins_at: int) -> tuple[list[list[str]], int]:
    cutter = StepCutter(
        lambda block: prepare(block, FeatureSpec(), (), FrozenModels(), {"clicks": CLICK}), 4, begins_at
    )
    bounds = sorted({0, len(rows), *(cut % (len(rows) + 1) for cut in cuts)})
    whole = block_of(rows)
    steps = [step for a, b in pairwise(bounds) for step in cutter.feed(whole.slice(a, b))]
    steps += list(cutter.flush())
    dead = sum(len(step.dead_letters) for step in steps)
    return [step.clicks.impression_id for step in steps if len(step.clicks)], dead


@settings(max_examples=150)
@given(
    good=st.integers(0, 40),
    dead_at=st.lists(st.integers(0, 40), max_size=6),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    begins_at=st.integers(0, 45),
)
def test_steps_do_not_depend_on_blocks_or_dead_letters(
    good: int, dead_at: list[int], cuts: list[int], begins_at: int
) -> None:
    clean = [(time, False) for time in range(good)]
    dirty = sorted(clean + [(time, True) for time in dead_at])
    expected, _ = steps_of(clean, [], begins_at) if good else ([], 0)
    found, dead = steps_of(dirty, cuts, begins_at) if dirty else ([], 0)
    assert found == expected
    assert dead == len(dead_at)


def test_a_step_ends_where_learning_begins() -> None:
    steps, _ = steps_of([(time, False) for time in range(10)], [], 3)
    assert steps == [["c0", "c1", "c2"], ["c3", "c4", "c5", "c6"], ["c7", "c8", "c9"]]
