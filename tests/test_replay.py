"""Replay draws from yesterday after this time of day, every row as likely as any other, within its bound."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.replay import Columns, ReplayBuffer

MIDNIGHT = 20_000 * DAY_MS


def rows(known_at: np.ndarray) -> Columns:
    return {"known_at": np.asarray(known_at, np.int64), "row": np.arange(len(known_at))}


def filled(rows_per_hour: int = 1_000_000, days: int = 3, every: int = MINUTE_MS) -> ReplayBuffer:
    """A row a minute for some days before and after midnight, added hour by hour as a stream does."""
    buffer = ReplayBuffer(rows_per_hour, seed=3)
    times = np.arange(MIDNIGHT - DAY_MS, MIDNIGHT + (days - 2) * DAY_MS, every)
    for hour in np.unique(times // HOUR_MS):
        buffer.add(rows(times[times // HOUR_MS == hour]))
    return buffer


@pytest.mark.parametrize("time_of_day", [5 * MINUTE_MS, HOUR_MS, 9 * HOUR_MS + 17 * MINUTE_MS, 22 * HOUR_MS])
def test_only_yesterdays_rows_from_after_this_time_of_day_are_drawn(time_of_day: int) -> None:
    clock = MIDNIGHT + time_of_day
    buffer = ReplayBuffer(10_000, seed=3)
    times = np.arange(MIDNIGHT - DAY_MS, clock, MINUTE_MS)
    for hour in np.unique(times // HOUR_MS):
        buffer.add(rows(times[times // HOUR_MS == hour]))
    drawn = buffer.draw(20_000, clock, step=1)
    assert drawn is not None
    expected = times[(times > clock - DAY_MS) & (times < MIDNIGHT)]
    assert np.array_equal(np.unique(drawn["known_at"]), expected)


def test_nothing_is_drawn_on_the_first_day_or_after_a_gap_of_a_day() -> None:
    buffer = ReplayBuffer(100, seed=1)
    buffer.add(rows(np.array([MIDNIGHT + HOUR_MS])))
    assert buffer.draw(5, MIDNIGHT + 2 * HOUR_MS, step=1) is None
    assert buffer.draw(5, MIDNIGHT + 3 * DAY_MS, step=1) is None
    assert filled().draw(0, MIDNIGHT + HOUR_MS, step=1) is None


def test_an_hour_never_holds_more_than_its_bound_and_old_hours_are_dropped() -> None:
    buffer = filled(rows_per_hour=16, days=4, every=10_000)
    arrays, hours = buffer.state()
    held = [len(column) for name, column in arrays.items() if name.endswith("known_at")]
    assert max(held) <= 16
    assert min(held) >= 8  # thinning halves, it does not empty
    assert len(hours) == 26


def test_thinning_leaves_every_row_of_a_day_equally_likely() -> None:
    # One busy hour of 4,000 rows that is thinned hard, and one of 500 that is not.
    buffer = ReplayBuffer(rows_per_hour=500, seed=9)
    busy, quiet = MIDNIGHT - 10 * HOUR_MS, MIDNIGHT - 8 * HOUR_MS
    for start in range(0, 4_000, 250):
        buffer.add(rows(busy + np.arange(start, start + 250)))
    buffer.add(rows(quiet + np.arange(500)))
    n = 40_000
    drawn = buffer.draw(n, MIDNIGHT + HOUR_MS, step=4)
    assert drawn is not None
    from_busy = drawn["known_at"] < quiet
    share, expected = from_busy.mean(), 4_000 / 4_500
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    # Within the thinned hour the rows kept are spread evenly over it.
    position = drawn["known_at"][from_busy] - busy
    assert abs(position.mean() / 4_000 - 0.5) < 0.02


def test_the_same_seed_and_step_give_the_same_rows_and_another_step_gives_others() -> None:
    clock = MIDNIGHT + 2 * HOUR_MS
    first, again = filled().draw(50, clock, step=7), filled().draw(50, clock, step=7)
    other = filled().draw(50, clock, step=8)
    assert first is not None
    assert again is not None
    assert other is not None
    assert np.array_equal(first["row"], again["row"])
    assert not np.array_equal(first["known_at"], other["known_at"])


def test_a_buffer_restored_from_its_state_goes_on_identically() -> None:
    buffer, restored = filled(rows_per_hour=10), ReplayBuffer(10, seed=3)
    restored.load_state(*buffer.state())
    later = rows(MIDNIGHT + DAY_MS + np.arange(100) * MINUTE_MS)
    for each in (buffer, restored):
        each.add(later)
    clock = MIDNIGHT + DAY_MS + 2 * HOUR_MS
    for step in range(5):
        expected, found = buffer.draw(30, clock, step), restored.draw(30, clock, step)
        assert expected is not None
        assert found is not None
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert restored.state()[1] == buffer.state()[1]
