"""The breaker's figures against brute force over rows; its decisions, its state, its hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.hold import Hold
from monitoring.breaker import ArrivedRows, Breaker
from monitoring.stall import LagWatch, StallWatch
from pipelines.config import load_config
from pipelines.config_sections import BreakerConfig
from pipelines.errors import ConfigError, StaleStateError
from pipelines.event_files import EventFiles
from pipelines.events import EventBlock
from tests.small_run import SmallRun

# All bounds open: each test closes those that it is about.
CONFIG = BreakerConfig(
    window=1_000,
    min_impressions=1,
    min_outcomes=1,
    click_rate_change=(0.0, 1e9),
    click_coverage=0.0,
    null_rise=1.0,
)
HOUR, DAY = 3_600_000, 86_400_000
NONE = np.zeros(0, np.int64)


def arrived(
    impressions: list[int],
    clicks: list[tuple[int, bool]] | None = None,
    conversions: list[tuple[int, bool]] | None = None,
    nulls: list[bool] | None = None,
) -> ArrivedRows:
    clicks, conversions = clicks or [], conversions or []
    return ArrivedRows(
        np.array(impressions, np.int64),
        np.array([at for at, _ in clicks], np.int64),
        np.array([at for at, _ in conversions], np.int64),
        np.array([is_known for _, is_known in clicks], np.bool_),
        np.array([is_known for _, is_known in conversions], np.bool_),
        {} if nulls is None else {"price": np.array(nulls, np.bool_)},
    )


rows = st.lists(
    st.tuples(st.integers(0, 12_000), st.sampled_from("icv"), st.booleans()), min_size=1, max_size=80
)


@given(rows, st.integers(1, 9))
@settings(max_examples=150)
def test_figures_are_those_of_the_rows_in_the_window(events: list[tuple[int, str, bool]], size: int) -> None:
    events = sorted(events)
    breaker = Breaker(CONFIG)
    for start in range(0, len(events), size):
        step = events[start : start + size]
        own = [(at, flag) for at, kind, flag in step if kind == "i"]
        breaker.observe(
            arrived(
                [at for at, _ in own],
                [(at, flag) for at, kind, flag in step if kind == "c"],
                [(at, flag) for at, kind, flag in step if kind == "v"],
                [flag for _, flag in own],
            ),
            clock=step[-1][0],
        )
    clock, first_clock = events[-1][0], events[min(size, len(events)) - 1][0]
    begin = (clock // 100 - 9) * 100
    inside = [event for event in events if event[0] >= begin]
    before = [event for event in events if event[0] < begin]

    def share(kind: str, among: list[tuple[int, str, bool]]) -> float | None:
        flags = [flag for _, own, flag in among if own == kind]
        return sum(flags) / len(flags) if flags else None

    found = breaker.figures()
    impressions = sum(kind == "i" for _, kind, _ in inside)
    clicks = sum(kind == "c" for _, kind, _ in inside)
    assert found["click_rate"] == (clicks / impressions if impressions else None)
    assert found["click_coverage"] == share("c", inside)
    assert found["conversion_coverage"] == share("v", inside)
    assert found["null_rate"] == share("i", inside)
    # Of the baseline a row a day older than its newest part counts half.
    newest = max((at // 100 for at, _, _ in before), default=0)
    weight = [0.5 ** ((newest - at // 100) * 100 / DAY) for at, _, _ in before]
    shown = sum(w for w, (_, kind, _) in zip(weight, before, strict=True) if kind == "i")
    empty = sum(w for w, (_, kind, flag) in zip(weight, before, strict=True) if kind == "i" and flag)
    clicked = sum(w for w, (_, kind, _) in zip(weight, before, strict=True) if kind == "c")
    if impressions and shown >= 1 and clock - first_clock >= 7_000:
        now = share("i", inside)
        assert now is not None
        assert found["null_rise"] == pytest.approx(max(now - empty / shown, 0.0), abs=1e-12)
        expected = clicked / shown * impressions
        change = (clicks + 1) / (expected + 1) if max(expected, clicks) >= 1 else None
        assert found["click_rate_change"] == pytest.approx(change)
    else:
        assert found["null_rise"] is found["click_rate_change"] is None
    is_full = clock - first_clock >= 1_000
    rate = len(inside) / ((clock - begin + 1) / 1000) if is_full else None
    assert found["rows_per_second"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("bounds", "step", "reason"),
    [
        ({"click_rate": (0.1, 1.0)}, arrived([5, 6, 7]), "click_rate is 0, below 0.1"),
        ({"click_rate": (0.0, 0.5)}, arrived([5], [(6, True)]), "click_rate is 1, above 0.5"),
        (
            {"click_coverage": 0.8},
            arrived([5, 5], [(6, True), (6, False)]),
            "click_coverage is 0.5, below 0.8",
        ),
        ({"conversion_coverage": 0.8}, arrived([5], [], [(6, False)]), "conversion_coverage is 0, below 0.8"),
        ({"null_rate": 0.2}, arrived([5, 6], nulls=[True, False]), "null_rate is 0.5, above 0.2"),
    ],
)
def test_each_bound_trips_and_says_why(bounds: dict[str, Any], step: ArrivedRows, reason: str) -> None:
    breaker = Breaker(CONFIG.model_copy(update=bounds))
    trip = breaker.observe(step, clock=7)
    assert trip is not None
    assert trip.reasons == (reason,)
    assert trip.clock == 7
    assert Breaker(CONFIG).observe(step, clock=7) is None


def test_a_feature_that_is_filled_no_longer_and_a_stream_that_thins_out_trip() -> None:
    breaker = Breaker(CONFIG.model_copy(update={"null_rise": 0.5, "rows_per_second": (3.0, 100.0)}))
    trips = [breaker.observe(arrived([at], nulls=[at > 8_000]), clock=at) for at in range(0, 9_000, 100)]
    assert next(trip.reasons for trip in trips if trip) == ("null_rise is 0.6, above 0.5",)
    breaker.restart()
    slow = [breaker.observe(arrived([at], nulls=[False]), clock=at) for at in range(9_000, 14_000, 500)]
    assert slow[:2] == [None, None]  # the window is not full yet
    trip = slow[2]
    assert trip is not None
    assert trip.reasons[0].startswith("rows_per_second is")


def test_too_few_rows_are_not_judged() -> None:
    config = BreakerConfig(enabled=True, window=1_000, min_impressions=10, click_rate=(0.1, 1.0))
    breaker = Breaker(config)
    assert breaker.observe(arrived(list(range(9))), clock=8) is None
    assert breaker.observe(arrived([9]), clock=9) is not None


def hours_of(rng: np.random.Generator, begin: int, end: int, clicks: bool = True) -> Iterator[ArrivedRows]:
    """Minutes of ordinary days: nights with a tenth of the rows and a third of the click rate."""
    for minute in range(begin, end, 60_000):
        day = 0.5 - 0.5 * np.cos(2 * np.pi * minute / DAY)
        impressions = rng.poisson(120 + 1_080 * day)
        clicked = rng.poisson(impressions * (0.03 + 0.06 * day)) if clicks else 0
        shown = sorted(rng.integers(minute, minute + 60_000, impressions).tolist())
        # Visitors who have not logged in: more of them at night.
        nulls = (rng.random(impressions) < 0.5 - 0.3 * day).tolist()
        known = [
            (int(at), bool(rng.random() < 0.97)) for at in rng.integers(minute, minute + 60_000, clicked)
        ]
        yield arrived(shown, known, known[::20], nulls)


def test_the_defaults_let_ordinary_days_pass_and_stop_what_is_none() -> None:
    config, rng = BreakerConfig(), np.random.default_rng(11)
    assert config.enabled
    breaker, clock = Breaker(config), 0
    for step in hours_of(rng, 0, 3 * DAY):
        clock += 60_000
        assert breaker.observe(step, clock - 1) is None
    ordinary = breaker.state()
    looked = set()
    for hour in (0, 6, 12, 18):
        breaker.load_state(ordinary)
        begin = 3 * DAY + hour * HOUR
        assert not any(breaker.observe(s, c) for s, c in steps_of(hours_of(rng, 3 * DAY, begin), 3 * DAY))
        dark = steps_of(hours_of(rng, begin, begin + HOUR, clicks=False), begin)
        trip = next(found for found in (breaker.observe(s, c) for s, c in dark) if found)
        assert trip.reasons[0].startswith("click_rate_change")
        # Once the window holds hardly a click; of a night's few somewhat earlier.
        assert 0.5 * config.window <= trip.clock - begin <= 1.2 * config.window
        looked.add(hour)
    assert looked == {0, 6, 12, 18}
    breaker.load_state(ordinary)
    blind = [arrived([3 * DAY + at], [(3 * DAY + at, False)] * 9) for at in range(0, config.window, 60_000)]
    found = [breaker.observe(step, int(step.impressions[0])) for step in blind]
    assert any("click_coverage" in reason for trip in found if trip for reason in trip.reasons)


def steps_of(steps: Iterator[ArrivedRows], begin: int) -> Iterator[tuple[ArrivedRows, int]]:
    return ((step, begin + (number + 1) * 60_000 - 1) for number, step in enumerate(steps))


def test_a_log_that_begins_is_not_compared_with_its_first_minutes() -> None:
    # Clicks come half an hour after their impressions: at first there are none.
    breaker, rng = Breaker(BreakerConfig()), np.random.default_rng(12)
    for minute in range(0, 4 * HOUR, 60_000):
        clicks = 0 if minute < HOUR // 2 else rng.poisson(15)
        step = arrived([minute] * 300, [(minute, True)] * clicks)
        assert breaker.observe(step, minute + 59_999) is None


def test_after_a_discard_the_baseline_stays_and_after_a_resume_it_begins_anew() -> None:
    config = CONFIG.model_copy(update={"click_rate_change": (0.5, 2.0), "min_outcomes": 4})
    breaker = Breaker(config)

    def trips(begin: int, end: int, clicks: int) -> list[int]:
        steps = ((at, arrived([at] * 4, [(at, True)] * clicks)) for at in range(begin, end, 100))
        return [at for at, step in steps if breaker.observe(step, at)]

    assert not trips(0, 9_000, 2)
    (first, *_) = trips(9_000, 10_000, 0)
    breaker.restart(keep_baseline=True)
    assert trips(first + 100, first + 2_000, 0)  # still not what it was before
    breaker.restart()
    assert not trips(first + 2_000, first + 20_000, 0)


def test_a_restored_breaker_goes_on_identically() -> None:
    rng = np.random.default_rng(3)
    breaker, restored = Breaker(CONFIG), Breaker(CONFIG)
    for clock in range(0, 9_000, 150):
        step = arrived(
            sorted(rng.integers(clock, clock + 150, 5).tolist()),
            [(clock, bool(rng.random() < 0.5))],
            nulls=(rng.random(5) < 0.3).tolist(),
        )
        fresh = Breaker(CONFIG)
        fresh.load_state(restored.state())
        restored = fresh
        breaker.observe(step, clock + 149)
        restored.observe(step, clock + 149)
        assert restored.figures() == breaker.figures()
    assert restored.state() == breaker.state()


def test_bounds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="click_rate"):
        load_config(None, ["breaker.click_rate=[0.5, 0.1]"])
    with pytest.raises(ConfigError, match=r"breaker\.click_rate"):
        load_config(None, ["breaker.click_rat=[0.1, 0.5]"])


# Hold ----------------------------------------------------------------------------------------------------


def held_blocks(small_run: SmallRun) -> list[EventBlock]:
    """Blocks with dead letters among them, as Kafka gives them."""
    files = EventFiles(small_run.events)
    blocks = list(files.blocks(0, 4_000, 500))
    assert any(block.dead_letters for block in blocks)
    return blocks


def same(left: EventBlock, right: EventBlock) -> None:
    for name in ("kind", "arrival_time", "partition", "offset", "row"):
        assert getattr(left, name).tolist() == getattr(right, name).tolist()
    assert [asdict(letter) for letter in left.dead_letters] == [
        asdict(letter) for letter in right.dead_letters
    ]
    for kind in range(3):
        assert left.tables[kind].to_pylist() == right.tables[kind].to_pylist()


def test_held_steps_come_back_as_they_were(small_run: SmallRun, tmp_path: Path) -> None:
    blocks, partitions = held_blocks(small_run), EventFiles(small_run.events).partitions
    hold = Hold(tmp_path)
    for number, block in enumerate(blocks):
        hold.add(block)
        if number % 3 == 2:
            hold.seal(f"{number}.arrow", partitions)
    hold.seal("last.arrow", partitions)
    again = Hold(tmp_path)
    for segment in hold.segments:
        steps = segment.in_memory()
        segment.write(tmp_path)
        assert steps is not None
        assert segment.in_memory() is None
        assert steps.ends == hold.read(segment, partitions).ends
        same(hold.read(segment, partitions).block, steps.block)
    again.load_state([segment.told() for segment in hold.segments])
    assert again.steps == len(blocks)
    found = []
    for segment in again.segments:
        steps = again.read(segment, partitions)
        for start, end in zip([0, *steps.ends[:-1]], steps.ends, strict=True):
            found.append(steps.block.slice(start, end))
    for left, right in zip(found, blocks, strict=True):
        same(left, right)


def test_partitions_are_told_by_name_and_one_that_is_gone_is_refused(
    small_run: SmallRun, tmp_path: Path
) -> None:
    block, partitions = held_blocks(small_run)[0], list(EventFiles(small_run.events).partitions)
    hold = Hold(tmp_path)
    hold.add(block)
    hold.seal("one.arrow", partitions)
    hold.segments[0].write(tmp_path)
    more = [("another", 0), *partitions]
    assert (hold.read(hold.segments[0], more).block.partition == block.partition + 1).all()
    with pytest.raises(StaleStateError, match="not read any more"):
        hold.read(hold.segments[0], [("another", 0)])


def test_a_damaged_segment_is_refused_and_unnamed_ones_are_removed(
    small_run: SmallRun, tmp_path: Path
) -> None:
    hold = Hold(tmp_path)
    for name in ("one.arrow", "two.arrow", "three.arrow"):
        hold.add(held_blocks(small_run)[0])
        hold.seal(name, EventFiles(small_run.events).partitions)
        hold.segments[-1].write(tmp_path)
    del hold.segments[:2]
    hold.keep_only({"two.arrow"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["three.arrow", "two.arrow"]
    content = bytearray((tmp_path / "three.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "three.arrow").write_bytes(content)
    with pytest.raises(StaleStateError, match="missing or corrupt"):
        hold.read(hold.segments[0], EventFiles(small_run.events).partitions)


def test_a_stall_is_a_position_that_stands_while_the_lag_does_not_shrink() -> None:
    watch = StallWatch(after_s=10)
    assert not any(watch.look(now, position=5, lag=0) for now in range(0, 100, 5))  # nothing to read
    assert not any(watch.look(now, position=now, lag=now) for now in range(100, 200, 5))  # slow, but reads
    assert [watch.look(now, position=195, lag=now) for now in (200, 204, 206)] == [False, False, True]


def test_a_lag_that_sinks_is_no_alarm_and_one_that_stays_is() -> None:
    watch = LagWatch(bound=100, after_s=10)
    assert not any(watch.look(now, 5_000 - now) for now in range(0, 1_000, 5))  # catches up
    told = [watch.look(now, 4_000 + now) for now in (995, 1_000, 1_004, 1_005, 1_020)]
    assert told == [False, False, False, True, True]  # the last low was at 995
    assert not watch.look(1_021, 3_000)
    assert not watch.look(1_100, 100)
    assert not any(LagWatch(bound=0, after_s=10).look(now, now) for now in range(0, 1_000, 5))
