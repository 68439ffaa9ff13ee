"""The demo, small: real Kafka, Spark and MLflow, a real crash, and pages seen in a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.mlflow_server import TrackingServer
from tests.browser import browser_page

SIZE = ("--impressions", "24000", "--live-seconds", "5", "--live-rate", "600", "--seed", "11")
# Small commits, so that a short stream is killed between two of them.
QUICK = ("--set", "stream.publish_every=300ms", "--set", "teacher.rounds=20")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "jobs.cli", "demo", "--out", str(out), *SIZE, *QUICK]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "COLUMNS": "120"}
    )
    logs = "".join(path.read_text()[-2000:] for path in sorted(out.glob("**/worker.log")))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:] + logs
    (out / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    yield out


@pytest.fixture(scope="module")
def summary(demo: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((demo / "summary.json").read_text())
    return document


def test_worker_killed_in_mid_stream_ends_with_the_state_of_one_that_was_not(summary: dict[str, Any]) -> None:
    recovery = summary["recovery"]
    assert recovery["exact"] is True
    assert recovery["digest"] == recovery["reference_digest"]
    assert 0 < recovery["killed_at_step"] < recovery["steps"]


def test_every_row_of_the_log_is_in_one_class(summary: dict[str, Any]) -> None:
    rows = dict(summary["rows"])
    assert rows.pop("read") == rows.pop("in_log") == sum(rows.values()) > 0


def test_served_rows_rescore_to_the_same_logit(summary: dict[str, Any]) -> None:
    assert summary["consistency"]["rows"] > 50
    assert summary["consistency"]["max_abs_delta_logit"] < 1e-4


def test_summary_has_the_contract(summary: dict[str, Any]) -> None:
    contract = {"stages", "rows", "recovery", "quality", "freshness_s", "consistency", "links"}
    assert contract <= set(summary)
    assert summary["freshness_s"]["p50"] is not None
    for task in ("click", "conversion"):
        assert {"student", "student_uncalibrated", "teacher", "truth"} <= set(summary["quality"][task])
    assert "judge and report" in summary["stages"]


def test_online_student_is_closer_to_the_truth_than_the_frozen_teacher(summary: dict[str, Any]) -> None:
    click = summary["quality"]["click"]
    assert click["student"]["regret"] < click["teacher"]["regret"]


def test_terminal_ends_with_the_tables(demo: Path) -> None:
    said = (demo / "stdout.txt").read_text()
    for words in ("student (online), calibrated", "truth", "accounted for", "exact", "freshness", "report"):
        assert words in said


def test_report_shows_the_figures_in_a_browser(demo: Path, summary: dict[str, Any]) -> None:
    with browser_page() as browser:
        browser.page.goto((demo / "report.html").as_uri())
        text = browser.page.inner_text("body")
        assert f"{summary['quality']['click']['student']['ne']:.3f}" in text
        assert f"{summary['rows']['read']:,}" in text
        assert browser.problems == []
        assert browser.requests == [(demo / "report.html").as_uri()]


def test_run_page_of_mlflow_shows_verdicts_and_figures_in_a_browser(
    demo: Path, summary: dict[str, Any]
) -> None:
    with TrackingServer(demo / "mlflow").start() as server, browser_page(width=1400, height=1400) as browser:
        assert server.uri == summary["links"]["mlflow"]
        browser.page.goto(summary["links"]["review run"])
        browser.page.wait_for_selector("text=beats the running base rate", timeout=60_000)
        assert "review" in browser.page.inner_text("body")
        browser.page.goto(summary["links"]["review run"].replace("?", "/model-metrics?"))
        browser.page.wait_for_selector("text=quality/click/student", timeout=60_000)
