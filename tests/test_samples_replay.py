"""Replayed rows are yesterday's, every one as likely as any other, the same for any order of files."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.errors import ConfigError, DataError
from pipelines.replay import ReplayBuffer
from pipelines.replay_draw import REPLAY_SCHEMA, ReplayWindow, draw_replay
from pipelines.replay_rows import read_references, replay_rows, write_references
from pipelines.snapshot import MANIFEST_NAME
from tests.snapshot_files import AS_OF, Row, hour_of, sample_rows, write_snapshot

MIDNIGHT = AS_OF
T = MIDNIGHT + 5 * HOUR_MS + 20 * MINUTE_MS


def eligible(rows: list[Row], by: str = "event_time") -> list[Row]:
    """The rule once more, row by row."""
    return [row for row in rows if T - DAY_MS < row[by] < MIDNIGHT and row["known_at"] <= T]


def moments(sample_id: str, seed: int, until: float) -> list[float]:
    """The moments of one row's process, in plain Python."""
    found: list[float] = []
    moment, number = 0.0, 0
    while True:
        own = xxhash.xxh64_intdigest(f"{seed}:{number}".encode(), 42)
        upper = xxhash.xxh64_intdigest(sample_id.encode(), own) >> 11
        moment -= math.log((upper + 1) / 2**53)
        if moment > until:
            return found
        found.append(moment)
        number += 1


def brute_force(rows: list[Row], n: int, seed: int) -> list[str]:
    """Sample ids of the first n moments of all rows."""
    every = [(moment, row["sample_id"]) for row in rows for moment in moments(row["sample_id"], seed, 40.0)]
    return [name for _, name in sorted(every)[:n]]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return sample_rows(600, "click", seed=3, as_of=T)


@pytest.fixture(scope="module")
def snapshot(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshot(tmp_path_factory.mktemp("replay"), {"click": rows}, as_of=T)


@pytest.mark.parametrize("n", [1, 40, 1_000])
def test_draws_are_the_first_moments_of_all_rows_processes(snapshot: Path, rows: list[Row], n: int) -> None:
    drawn = draw_replay(snapshot, ReplayWindow(T), n, seed=11)
    own = eligible(rows)
    assert drawn.pool == {"click": len(own)}
    assert 50 < len(own) < len(rows)
    assert drawn.references.column("sample_id").to_pylist() == brute_force(own, n, 11)
    assert drawn.references.column("draw").to_pylist() == list(range(n))


def test_a_reference_names_the_row_it_stands_for(snapshot: Path, rows: list[Row]) -> None:
    by_id = {row["sample_id"]: row for row in rows}
    references = draw_replay(snapshot, ReplayWindow(T), 200, seed=2).references
    assert references.schema.equals(REPLAY_SCHEMA)
    for reference in references.to_pylist():
        row = by_id[reference["sample_id"]]
        for name in ("impression_id", "task", "event_time", "known_at", "weight"):
            assert reference[name] == row[name]


def test_other_files_and_row_groups_draw_the_same_rows(
    snapshot: Path, rows: list[Row], tmp_path: Path
) -> None:
    shuffled = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    other = write_snapshot(tmp_path, {"click": shuffled}, as_of=T, files=4, group_rows=7)
    names = [
        draw_replay(place, ReplayWindow(T), 300, seed=5).references.column("sample_id").to_pylist()
        for place in (snapshot, other)
    ]
    assert names[0] == names[1]


@settings(max_examples=15)
@given(n=st.integers(1, 300), more=st.integers(1, 300), seed=st.integers(-5, 2**40))
def test_fewer_draws_are_the_first_of_more(snapshot: Path, n: int, more: int, seed: int) -> None:
    few, many = (
        draw_replay(snapshot, ReplayWindow(T), count, seed).references.column("sample_id").to_pylist()
        for count in (n, n + more)
    )
    assert few == many[:n]


def test_another_seed_draws_other_rows(snapshot: Path) -> None:
    first, again, other = (
        draw_replay(snapshot, ReplayWindow(T), 50, seed).references.column("sample_id").to_pylist()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_nothing_is_drawn_that_was_known_only_later(tmp_path: Path) -> None:
    # Labelled a day after T: the rows of windows that were still open at T are known only after it.
    rows = sample_rows(800, "conversion", seed=4, as_of=T + DAY_MS)
    snapshot = write_snapshot(tmp_path, {"conversion": rows}, as_of=T + DAY_MS)
    with_open = [row for row in rows if T - DAY_MS < row["event_time"] < MIDNIGHT]
    assert with_open
    assert draw_replay(snapshot, ReplayWindow(T), 10).pool == {"conversion": 0}
    found = draw_replay(snapshot, ReplayWindow(T, "known_at"), 5_000)
    times = found.references.column("known_at").to_numpy()
    assert found.pool == {"conversion": len(eligible(rows, "known_at"))}
    assert times.min() > T - DAY_MS
    assert times.max() < MIDNIGHT


def test_every_row_is_as_likely_as_any_other(snapshot: Path, rows: list[Row]) -> None:
    own = eligible(rows)
    drawn = draw_replay(snapshot, ReplayWindow(T), 100 * len(own), seed=8).references
    counts = Counter(drawn.column("sample_id").to_pylist())
    assert chisquare([counts[row["sample_id"]] for row in own]).pvalue > 0.001


def test_hours_are_mixed_in_the_proportions_of_the_workers_buffer(tmp_path: Path) -> None:
    # Traffic that is uneven over the day, so that proportions differ between hours.
    noise = np.random.default_rng(9)
    rows = sample_rows(6_000, "conversion", seed=9, as_of=T, days=4)
    thinned = [row for row in rows if noise.random() < 0.2 + 0.8 * (hour_of(row["known_at"]) % 24) / 24]
    snapshot = write_snapshot(tmp_path, {"conversion": thinned}, as_of=T, days=4)
    buffer = ReplayBuffer(rows_per_hour=10_000, seed=1)
    known = np.sort([row["known_at"] for row in thinned if row["known_at"] < T])
    buffer.add({"known_at": known[known > T - 2 * DAY_MS]})
    n = 20_000
    from_buffer = buffer.draw(n, T, step=1)
    assert from_buffer is not None
    from_snapshot = draw_replay(snapshot, ReplayWindow(T, "known_at"), n, seed=1).references
    hours = range(hour_of(T - DAY_MS), hour_of(MIDNIGHT))
    table = [
        [Counter((times // HOUR_MS).tolist())[hour] for hour in hours]
        for times in (from_buffer["known_at"], from_snapshot.column("known_at").to_numpy())
    ]
    assert min(map(min, table)) > 50
    assert chi2_contingency(table).pvalue > 0.001


def test_references_lead_back_to_the_rows(snapshot: Path, rows: list[Row], tmp_path: Path) -> None:
    window, file = ReplayWindow(T), tmp_path / "replay.parquet"
    draw = draw_replay(snapshot, window, 300, seed=6)
    write_references(file, draw, "s", window, 6)
    training = replay_rows(snapshot, file, "click")
    by_id = {row["sample_id"]: row for row in rows}
    drawn = [by_id[name] for name in draw.references.column("sample_id").to_pylist()]
    assert len(set(draw.references.column("sample_id").to_pylist())) < 300
    assert training.event_time.tolist() == [row["event_time"] for row in drawn]
    assert training.label.tolist() == [row["label"] for row in drawn]
    assert training.buckets.tolist() == [row["buckets"] for row in drawn]
    assert training.mature.tolist() == [row["mature"] for row in drawn]
    _, about = read_references(file)
    assert about == {"snapshot": "s", "as_of": T, "by": "event_time", "seed": 6, "pool": draw.pool}


def test_references_follow_a_relabelled_snapshot_into_the_folders_beside_it(
    rows: list[Row], tmp_path: Path
) -> None:
    base = write_snapshot(tmp_path, {"click": rows}, name="a", as_of=T)
    younger = tmp_path / "b"
    younger.mkdir()
    (younger / "feature_spec.toml").write_bytes((base / "feature_spec.toml").read_bytes())
    manifest = json.loads((base / MANIFEST_NAME).read_text())
    (younger / MANIFEST_NAME).write_text(json.dumps(manifest | {"snapshot_id": "b", "base": "a"}))
    window, file = ReplayWindow(T), tmp_path / "replay.parquet"
    draw = draw_replay(younger, window, 30, seed=1)
    assert {name.partition("/")[0] for name in draw.references.column("file").to_pylist()} == {"a"}
    write_references(file, draw, "b", window, 1)
    assert len(replay_rows(younger, file, "click")) == 30


def test_references_that_do_not_fit_are_refused(snapshot: Path, rows: list[Row], tmp_path: Path) -> None:
    window, file = ReplayWindow(T), tmp_path / "replay.parquet"
    write_references(file, draw_replay(snapshot, window, 20), "another", window, 0)
    with pytest.raises(DataError, match="expected references to rows of s"):
        replay_rows(snapshot, file, "click")
    write_references(file, draw_replay(snapshot, window, 20), "s", window, 0)
    with pytest.raises(DataError, match="no rows of the task conversion"):
        replay_rows(snapshot, file, "conversion")
    renamed = [row | {"sample_id": f"x{row['sample_id']}"} for row in rows]
    altered = write_snapshot(tmp_path, {"click": renamed}, as_of=T)
    with pytest.raises(DataError, match="expected the rows that"):
        replay_rows(altered, file, "click")
    with pytest.raises(DataError, match="no such file"):
        read_references(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="samples replay"):
        read_references(next(snapshot.rglob("*.parquet")))
    with pytest.raises(ConfigError, match="at least 1 row"):
        draw_replay(snapshot, window, 0)


def test_command_writes_the_file_and_names_it(snapshot: Path, tmp_path: Path) -> None:
    from jobs.cli import cli

    out = tmp_path / "sub" / "replay.parquet"
    arguments = ["samples", "replay", "--snapshot", str(snapshot), "--rows", "25", "--seed", "4"]
    at = "2026-01-05T05:20:00Z"
    done = CliRunner().invoke(cli, [*arguments, "--as-of", at, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    table, about = read_references(out)
    expected = draw_replay(snapshot, ReplayWindow(T), 25, seed=4).references
    assert table.equals(expected)
    assert about["as_of"] == T
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_day_without_rows_is_refused(snapshot: Path, tmp_path: Path) -> None:
    from jobs.cli import cli

    arguments = ["samples", "replay", "--snapshot", str(snapshot), "--rows", "5"]
    out = tmp_path / "replay.parquet"
    done = CliRunner().invoke(cli, [*arguments, "--as-of", "2026-03-01T05:00:00Z", "--out", str(out)])
    assert done.exit_code == 3
    assert "between 2026-02-28T05:00:00Z and 2026-03-01T00:00:00Z" in done.output
    assert not out.exists()
