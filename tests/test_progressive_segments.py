"""Sums by segment are those of its rows, bounded, and come back from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from jobs.checkpoint import CheckpointStore
from jobs.cli import cli
from jobs.online_state import loop_state
from jobs.progressive_segments import SegmentQuality
from pipelines.hashing import HASH_SEED, hash_text
from tests.small_run import SmallRun

Floats = NDArray[np.float64]


def rows(seed: int, n: int, values: int) -> tuple[NDArray[np.int64], Floats, Floats]:
    rng = np.random.default_rng(seed)
    keys = np.stack([rng.zipf(1.5, n) % values, rng.integers(-3, 3, n)], axis=1)
    p = rng.uniform(0.05, 0.6, n)
    return keys, (rng.random(n) < p * (1 + keys[:, 1] / 10)).astype(float), p


def fed(quality: SegmentQuality, *given: NDArray[Any], batch: int = 97) -> SegmentQuality:
    for start in range(0, len(given[0]), batch):
        keys, label, p = (values[start : start + batch] for values in given)
        quality.update("click", keys, label, p)
    return quality


def test_sums_are_those_of_the_rows_one_by_one() -> None:
    keys, label, p = rows(1, 3_000, 30)
    quality = fed(SegmentQuality(("campaign_id", "site_id")), keys, label, p)
    found = {(row.field, row.key): row for row in quality.rows()}
    for column, name in enumerate(("campaign_id", "site_id")):
        for value in np.unique(keys[:, column]).tolist():
            own = keys[:, column] == value
            row = found.pop((name, f"{value % 2**64:016x}"))
            assert (row.rows, row.positives) == (own.sum(), label[own].sum())
            assert row.expected == pytest.approx(p[own].sum())
            assert row.log_loss == pytest.approx(-np.log(np.where(label[own] > 0, p[own], 1 - p[own])).mean())
            spread = np.sqrt((p[own] * (1 - p[own])).sum())
            assert row.z == pytest.approx((label[own].sum() - p[own].sum()) / spread)
    assert not found
    assert quality.others() == []


def test_the_worst_have_the_largest_z_of_those_with_enough_rows() -> None:
    quality = SegmentQuality(("site_id",))
    keys = np.repeat([1, 2, 3, 4], [400, 400, 20, 404])[:, None]
    # Site 3 is off by a factor, on few rows.
    label = np.concatenate([np.tile([1, 0], 200), np.tile([1, 0, 0, 0], 100), np.ones(20), np.zeros(404)])
    quality.update("click", keys, label.astype(float), np.full(len(keys), 0.25))
    worst = quality.worst(2)
    assert [row.key[-1] for row in worst] == ["4", "1"]
    assert [row.pcoc for row in worst] == [None, 0.5]
    assert [row.z for row in worst] == pytest.approx([-101 / 75.75**0.5, 100 / 75**0.5])


def test_no_more_values_are_kept_than_the_bound_and_no_row_is_lost() -> None:
    keys, label, p = rows(2, 5_000, 500)
    quality = fed(SegmentQuality(("campaign_id", "site_id"), maximum=64), keys, label, p)
    kept = [row for row in quality.rows() if row.field == "campaign_id"]
    (other,) = quality.others()
    assert (other.field, other.key) == ("campaign_id", "other")
    assert len(kept) <= 64
    assert sum(row.rows for row in kept) + other.rows == 5_000
    assert sum(row.expected for row in kept) + other.expected == pytest.approx(p.sum())
    value, count = np.unique(keys[:, 0], return_counts=True)
    common = {f"{one:016x}" for one in value[count > 300].tolist()}
    assert common <= {row.key for row in kept}


def test_the_least_supported_go_and_of_equals_the_larger_keys() -> None:
    quality = SegmentQuality(("campaign_id",), maximum=8)
    keys = np.array([5, 5, 1, 2, 3, 4, 6, 7, 8, 9])[:, None]
    quality.update("click", keys, np.zeros(10), np.full(10, 0.5))
    assert [int(row.key, 16) for row in quality.rows()] == [1, 2, 3, 4, 5, 6, 7]
    assert quality.others()[0].rows == 2


def test_a_restored_table_goes_on_to_the_same_bits() -> None:
    keys, label, p = rows(3, 4_000, 300)
    names = ("campaign_id", "site_id")
    whole = fed(SegmentQuality(names, 64), keys, label, p, batch=100)
    half = fed(SegmentQuality(names, 64), keys[:2_000], label[:2_000], p[:2_000], batch=100)
    restored = SegmentQuality(names, 64)
    restored.load_state(half.state())
    again = fed(restored, keys[2_000:], label[2_000:], p[2_000:], batch=100).state()
    expected = whole.state()
    assert again.keys() == expected.keys()
    assert all(np.array_equal(again[name], values) for name, values in expected.items())


def test_rows_without_a_prediction_and_logs_without_segments_give_nothing() -> None:
    quality = SegmentQuality(("campaign_id",))
    quality.update("click", np.array([[1], [2]]), np.zeros(2), np.array([np.nan, 0.5]))
    assert [(row.key[-1], row.rows) for row in quality.rows()] == [("2", 1)]
    none = SegmentQuality(())
    none.update("click", np.zeros((1, 0), np.int64), np.zeros(1), np.full(1, 0.5))
    assert none.state() == {}


def test_segments_of_a_run_add_up_to_its_mature_totals(small_run: SmallRun) -> None:
    loop = small_run.backtest.loop
    for task in loop.tasks:
        total = loop.progressive.totals(task, "student")
        own = [row for row in loop.segments.rows() if row.task == task]
        assert {row.field for row in own} == {"campaign_id"}
        assert sum(row.rows for row in own) == total.rows
        assert sum(row.positives for row in own) == pytest.approx(total.positive_sum)
        assert sum(row.expected for row in own) == pytest.approx(total.probability_sum)
    campaigns = set(small_run.files.impressions["campaign_id"].to_pylist())
    known = {f"{hash_text(str(name), HASH_SEED):016x}" for name in campaigns}
    assert {row.key for row in loop.segments.rows()} <= known | {"0" * 16}


def test_the_command_prints_the_segments_of_the_head(small_run: SmallRun, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 3)
    store.open()
    loop = small_run.backtest.loop
    store.commit(loop.step_number, *loop_state(loop), cursor=[], outputs=[], volatile={})

    def run(*more: str) -> str:
        result = CliRunner().invoke(cli, ["checkpoint", "segments", str(tmp_path), *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    worst = json.loads(run("--limit", "3", "--json"))
    assert [row["key"] for row in worst] == [row.key for row in loop.segments.worst(3)]
    assert abs(worst[0]["z"]) >= abs(worst[1]["z"])
    printed = run("--limit", "3").splitlines()
    assert len(printed) == 4
    assert worst[0]["key"] in printed[1]
    assert len(json.loads(run("--all", "--json"))) == len(list(loop.segments.rows()))
