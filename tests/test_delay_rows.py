"""Outcomes out of a snapshot, and the likelihood by which delay models are judged."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_rows import DelayRows, delay_loss, whole
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import DataError

WINDOW = 4 * DAY_MS
AS_OF = 10 * DAY_MS


def samples() -> pa.Table:
    """Rows of a snapshot: an old positive, twice; a young one; one that rose before it opened; a negative."""
    rows = [
        ("a", 1.0, DAY_MS, DAY_MS + HOUR_MS),
        ("b", 0.5, 9 * DAY_MS, 9 * DAY_MS + 2 * HOUR_MS),
        ("a", 1.0, DAY_MS, DAY_MS + HOUR_MS),
        ("c", 1.0, 8 * DAY_MS, 8 * DAY_MS - 5),
        ("d", 0.0, DAY_MS, None),
    ]
    name, label, opened, known = zip(*rows, strict=True)
    return pa.table(
        {
            "sample_id": pa.array(name),
            "label": pa.array(label, pa.float32()),
            "event_time": pa.array(opened, pa.int64()),
            "outcome_known_at": pa.array(known, pa.int64()),
            "segment_key": pa.array([[n, 10 + n] for n in range(5)], pa.list_(pa.int64())),
            "buckets": pa.array([[n, n + 1] for n in range(5)], pa.list_(pa.int32())),
            "numbers": pa.array([[]] * 5, pa.list_(pa.float32())),
        }
    )


def of_delays(delay: list[int], follow_up: list[int]) -> DelayRows:
    n = len(delay)
    nothing = np.zeros((n, 0), np.int64)
    return DelayRows(
        nothing.astype(np.int32),
        nothing.astype(np.float32),
        nothing,
        np.arange(n),
        np.array(delay),
        np.array(follow_up),
    )


def test_positives_of_a_snapshot_count_once_with_their_delay_and_follow_up() -> None:
    rows = DelayRows.from_samples(samples(), AS_OF, WINDOW, segments=(1,))
    assert rows.opened.tolist() == [DAY_MS, 9 * DAY_MS, 8 * DAY_MS]
    assert rows.delay.tolist() == [HOUR_MS, 2 * HOUR_MS, 0]
    assert rows.follow_up.tolist() == [WINDOW, DAY_MS, 2 * DAY_MS]
    assert rows.segment_key.tolist() == [[10], [11], [13]]
    assert rows.buckets.tolist() == [[0, 1], [1, 2], [3, 4]]
    assert rows.numbers.shape == (3, 0)
    assert len(rows.closed(WINDOW)) == 1
    assert len(DelayRows.from_samples(samples().slice(4), AS_OF, WINDOW)) == 0


def test_later_windows_are_held_out() -> None:
    rows = of_delays([1] * 100, [5] * 100)
    train, held_out = rows.split(0.2)
    assert len(held_out) == 20 and train.opened.max() < held_out.opened.min()
    assert [len(part) for part in of_delays([], []).split(0.2)] == [0, 0]


def test_loss_is_the_likelihood_of_the_bin_given_that_it_could_be_seen() -> None:
    # Exponential delays in closed form.
    mean, grid = 12 * HOUR_MS, DelayGrid(WINDOW, 20)
    points = np.linspace(0, WINDOW, 200_001)[1:]
    inside = stats.expon.cdf(WINDOW, scale=mean)
    curve = DelayCurve(points, stats.expon.cdf(points, scale=mean) / inside, 1e6)
    delay, follow_up = [HOUR_MS, 3 * HOUR_MS, 2 * DAY_MS], [WINDOW, 6 * HOUR_MS, 3 * DAY_MS]
    rows = whole(of_delays(delay, follow_up), grid)
    assert len(rows) == 3
    edges = grid.edges()
    expected = []
    for d, u in zip(delay, follow_up, strict=True):
        k = int(np.searchsorted(edges, d))
        reached = edges[edges <= u * (1 + 1e-9)].max()
        within = np.diff(stats.expon.cdf(edges[k - 1 : k + 1], scale=mean))[0]
        expected.append(-np.log(within / stats.expon.cdf(reached, scale=mean)))
    np.testing.assert_allclose(delay_loss(curve, rows, grid), expected, rtol=1e-3)


def test_bin_held_for_impossible_costs_much_but_not_everything() -> None:
    curve = DelayCurve(np.array([1.0, 2.0]), np.array([0.5, 1.0]), 100.0)
    loss = delay_loss(curve, of_delays([3 * DAY_MS], [WINDOW]), DelayGrid(WINDOW, 20))
    assert 15 < loss[0] < 20


def test_delay_beyond_its_follow_up_is_refused() -> None:
    with pytest.raises(DataError, match="row 1"):
        of_delays([1, 9], [5, 5])
