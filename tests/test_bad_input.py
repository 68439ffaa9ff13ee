"""Bad input gives one clear message and the documented exit code, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jobs.cli import cli
from tests.small_run import SETTINGS, SmallRun

FAST = [part for setting in SETTINGS for part in ("--set", setting)]


def ctrstream(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["--log-level", "error", *map(str, arguments)])


def said(result: Result, exit_code: int) -> str:
    """The one message of a command that failed as documented."""
    assert result.exit_code == exit_code, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Room for a small log."""
    folder = tmp_path / "events"
    folder.mkdir()
    return folder


def test_an_unknown_config_key_names_the_nearest_one(small_run: SmallRun, tmp_path: Path) -> None:
    result = ctrstream(
        *("backtest", "--events", small_run.events, "--out", tmp_path / "out"),
        *("--set", "student.batch_row=1"),
    )
    message = said(result, 2)
    assert "unknown config key student.batch_row." in message
    assert "did you mean student.batch_rows?" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("student.batch_rows=0", "student.batch_rows"),
        ("attribution.click_window=soon", "attribution.click_window"),
        ("backtest.warmup=150%", "between 0% and 100%"),
        ("labels.policy=hope", "labels.policy"),
    ],
)
def test_a_config_value_that_does_not_fit_is_named(
    small_run: SmallRun, tmp_path: Path, override: str, words: str
) -> None:
    out = tmp_path / "out"
    result = ctrstream("backtest", "--events", small_run.events, "--out", out, "--set", override)
    assert words in said(result, 2)


def test_a_malformed_line_is_a_dead_letter_with_its_position_and_the_rest_is_read(
    small_run: SmallRun, tmp_path: Path
) -> None:
    from pipelines.event_files import EventFiles

    folder = tmp_path / "events"
    shutil.copytree(small_run.events, folder)
    path = next(folder.glob("clicks*.jsonl"))
    lines = path.read_text().splitlines()
    lines.insert(4, '{"event_id": "x", "impression_id": 17}')
    path.write_text("\n".join(lines) + "\n")
    files = EventFiles(folder)
    assert files.clicks.num_rows == small_run.files.clicks.num_rows
    (letter,) = [one for one in files.dead_letters if one.source == path.name]
    assert (letter.partition, letter.offset) == (0, 4)
    assert "must be a string. Received: 17" in letter.reason
    assert '"x"' in letter.payload


def test_an_empty_events_folder_says_what_was_expected(log: Path, tmp_path: Path) -> None:
    message = said(ctrstream("backtest", "--events", log, "--out", tmp_path / "out"), 3)
    assert "expected impressions*.jsonl or impressions*.parquet" in message
    assert "(nothing)" in message


def test_a_folder_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    assert "No such file" in said(ctrstream("backtest", "--events", tmp_path / "no", "--out", tmp_path), 3)


def test_a_log_without_a_single_click_says_why_no_task_can_be_trained(
    small_run: SmallRun, log: Path, tmp_path: Path
) -> None:
    pq.write_table(small_run.files.impressions, log / "impressions.parquet")
    message = said(ctrstream("backtest", "--events", log, "--out", tmp_path / "out", *FAST), 3)
    assert "click: 0 positives among" in message


def test_a_log_in_which_everything_is_clicked_says_why_no_task_can_be_trained(
    small_run: SmallRun, log: Path, tmp_path: Path
) -> None:
    shown = small_run.files.impressions
    pq.write_table(shown, log / "impressions.parquet")
    clicked = shown.select(["impression_id", "event_time", "arrival_time"])
    ids = pa.array([f"{name}-click" for name in shown["impression_id"].to_pylist()])
    pq.write_table(clicked.append_column("event_id", ids), log / "clicks.parquet")
    message = said(ctrstream("backtest", "--events", log, "--out", tmp_path / "out", *FAST), 3)
    assert "negatives among" in message


@pytest.mark.parametrize(
    ("warmup", "words"), [("10m", "cannot be|no task can be"), ("90d", "warm-up of 90d")]
)
def test_a_warm_up_that_does_not_fit_the_log_is_told(
    small_run: SmallRun, tmp_path: Path, warmup: str, words: str
) -> None:
    result = ctrstream(
        *("backtest", "--events", str(small_run.events), "--out", str(tmp_path / "out"), *FAST),
        *("--set", f"backtest.warmup={warmup}"),
    )
    message = said(result, 3)
    assert any(word in message for word in words.split("|"))
    assert "backtest.warmup" in message


@pytest.mark.parametrize("place", ["under a file", "/proc"])
def test_an_output_folder_that_cannot_be_written_is_told_before_any_work(
    small_run: SmallRun, tmp_path: Path, place: str
) -> None:
    # Permission bits do not bind root, so the folder is one that nobody can make.
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out" if place == "under a file" else Path("/proc/ctrstream")
    began = time.monotonic()
    message = said(ctrstream("backtest", "--events", small_run.events, "--out", out), 1)
    assert "is not writable" in message
    assert "--out" in message
    assert time.monotonic() - began < 60
    releases = small_run.out / "releases"
    assert "--state" in said(ctrstream("stream", "--releases", releases, "--state", out), 1)


def test_releases_of_somebody_else_are_not_overwritten_by_a_backtest(
    small_run: SmallRun, tmp_path: Path
) -> None:
    small_run.first_releases(tmp_path / "releases")
    result = ctrstream("backtest", "--events", small_run.events, "--out", tmp_path, *FAST)
    assert "no backtest has written" in said(result, 2)
    assert (tmp_path / "releases" / "CURRENT").exists()


@pytest.fixture
def closed_port() -> int:
    """A port at which nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_missing_broker_is_told_in_time(small_run: SmallRun, tmp_path: Path, closed_port: int) -> None:
    address = f"127.0.0.1:{closed_port}"
    releases = small_run.first_releases(tmp_path / "releases")
    for arguments in (
        ("stream", "--releases", releases, "--state", tmp_path / "state", "--until-end"),
        ("produce", "--events", small_run.events),
    ):
        result = ctrstream(*arguments, "--bootstrap-servers", address, "--set", "kafka.connect_timeout=500ms")
        message = said(result, 1)
        assert f"no Kafka broker answers at {address}" in message
        assert "ctrstream broker up" in message


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield int(holder.getsockname()[1])


def test_a_port_in_use_is_named(small_run: SmallRun, tmp_path: Path, taken_port: int) -> None:
    result = ctrstream("broker", "up", "--data", tmp_path / "broker", "--port", str(taken_port))
    assert str(taken_port) in said(result, 1)
    releases = small_run.first_releases(tmp_path / "releases")
    served = ctrstream("serve", "--releases", releases, "--set", f"serve.port={taken_port}")
    assert str(taken_port) in said(served, 1)


def test_a_time_without_an_offset_is_bad_usage(tmp_path: Path) -> None:
    result = ctrstream(
        *("samples", "build", "--lake", tmp_path, "--out", tmp_path / "out"),
        *("--as-of", "2026-01-05T00:00:00", "--window", "24h"),
    )
    assert "names no time zone" in said(result, 2)


def test_a_corrupt_release_is_refused_by_name(small_run: SmallRun, tmp_path: Path) -> None:
    releases = small_run.first_releases(tmp_path / "releases")
    weights = next((releases / small_run.backtest.first.student.name).rglob("student.safetensors"))
    os.truncate(weights, weights.stat().st_size - 4)
    message = said(
        ctrstream("stream", "--releases", releases, "--state", tmp_path / "state", "--until-end"), 1
    )
    assert str(weights) in message
    assert "sha256" in message


def test_a_folder_without_releases_is_bad_input(tmp_path: Path) -> None:
    result = ctrstream("stream", "--releases", tmp_path, "--state", tmp_path / "state", "--until-end")
    assert "expected a release" in said(result, 3)


def test_the_report_of_a_backtest_says_what_was_not_learned(
    small_run: SmallRun, log: Path, tmp_path: Path
) -> None:
    # A log without conversions: one task runs, the other is skipped with its reason.
    for name, table in (("impressions", small_run.files.impressions), ("clicks", small_run.files.clicks)):
        pq.write_table(table, log / f"{name}.parquet")
    result = ctrstream("backtest", "--events", log, "--out", tmp_path / "out", *FAST)
    assert result.exit_code == 0, result.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "click" in metrics
    assert "0 positives" in metrics["skipped"]["conversion"]
