"""The commands `samples check` and `samples show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipelines.duration import DAY_MS
from pipelines.errors import DataError
from pipelines.snapshot import MANIFEST_NAME
from pipelines.snapshot_check import check_snapshot
from tests.snapshot_files import AS_OF, RULE, sample_rows, write_snapshot

if TYPE_CHECKING:
    pass


def run(*arguments: str) -> Any:
    from jobs.cli import cli

    return CliRunner().invoke(cli, ["samples", *arguments])


def test_check_prints_every_figure_and_tells_all_that_failed(tmp_path: Path) -> None:
    rows = sample_rows(300)
    rows[4] |= {"known_at": AS_OF + 1}
    rows[5] |= {"weight": -1.0}
    events = {"click": {"credited": 1, "orphan": 9, "duplicate": 0, "read": 10}}
    snapshot = write_snapshot(tmp_path, {"conversion": rows}, changes={"events": events})
    out = tmp_path / "check.json"
    done = run("check", "--snapshot", str(snapshot), "--json", str(out))
    assert done.exit_code == 3, done.output
    for told in (
        "known_at lies after as_of",
        "weight is not above 0",
        "events whose impression is not known",
        "events that found their window in time",
    ):
        assert told in done.stdout
        assert told in done.stderr
    assert "rules that rows keep" in done.stdout
    document = json.loads(out.read_text())
    assert document["verdict"] == "failed"
    assert document["failed"] == sum(own["verdict"] == "failed" for own in document["findings"]) >= 4
    assert run("check", "--snapshot", str(snapshot), "--json", "-").stdout.startswith("{")


def test_limits_of_the_configuration_decide(tmp_path: Path) -> None:
    events = {"click": {"credited": 10, "orphan": 1, "duplicate": 0, "read": 11}}
    snapshot = str(write_snapshot(tmp_path, {"conversion": sample_rows(300)}, changes={"events": events}))
    assert run("check", "--snapshot", snapshot).exit_code == 3
    done = run("check", "--snapshot", snapshot, "--set", "checks.orphan_rate=0.2")
    assert done.exit_code == 0, done.output
    assert "sound, 300 conversion rows" in done.stdout
    assert run("check", "--snapshot", snapshot, "--set", "checks.orphans=0.2").exit_code == 2


def test_train_and_test_are_compared_by_the_command(tmp_path: Path) -> None:
    rows = sample_rows(200)
    train = write_snapshot(tmp_path, {"conversion": rows[:150]}, name="train")
    test = write_snapshot(tmp_path, {"conversion": rows[140:]}, name="test")
    done = run("check", "--snapshot", str(train), "--against", str(test))
    assert done.exit_code == 3
    assert "test rows that were trained on" in done.stderr
    days = ["2026-01-02T00:00:00Z/2026-01-03T00:00:00Z", "2026-01-04T00:10:00Z/2026-01-05T00:00:00Z"]
    # The first snapshot was cut off in the middle of its last day, which is no matter here.
    calm = ("--set", "checks.completeness=0")
    apart = run("check", "--snapshot", str(train), "--train", days[0], "--test", days[1], *calm)
    assert apart.exit_code == 0, apart.output
    assert run("check", "--snapshot", str(train), "--train", days[0]).exit_code == 2
    assert run("check", "--snapshot", str(train), "--spark-conf", "a=b").exit_code == 2
    assert run("check", "--snapshot", str(train), "--lake", str(tmp_path)).exit_code == 3


def test_show_prints_naive_present_and_final_rates_by_day(tmp_path: Path) -> None:
    rows = sample_rows(600)
    snapshot = write_snapshot(tmp_path, {"conversion": rows}, changes={"base": "older"})
    done = run("show", "--snapshot", str(snapshot), "--json", str(tmp_path / "show.json"))
    assert done.exit_code == 0, done.output
    assert "labels as of" in done.stdout
    assert "2026-01-05 00:00:00 UTC" in done.stdout
    document = json.loads((tmp_path / "show.json").read_text())["tasks"]["conversion"]
    assert [day["day"] for day in document["days"]] == ["2026-01-02", "2026-01-03", "2026-01-04"]
    for day in document["days"]:
        own = [row for row in rows if str(np.datetime64(row["event_time"], "ms"))[:10] == day["day"]]
        end = (own[0]["event_time"] // DAY_MS + 1) * DAY_MS
        naive = [row for row in own if row["label"] and row["outcome_known_at"] < end]
        mature = [row for row in own if row["mature"]]
        labels = [row["label"] for row in own]
        assert day["rows"] == len(own)
        assert day["naive_rate"] == pytest.approx(len(naive) / len(own))
        assert day["rate"] == pytest.approx(np.mean(labels))
        if mature:
            assert day["mature_rate"] == pytest.approx(np.mean([row["label"] for row in mature]))
        assert day["closed"] == (end + DAY_MS + RULE.allowed_lateness <= AS_OF)
        if day["closed"]:
            assert day["missed"] == pytest.approx(1 - len(naive) / sum(labels))
        for rate in (day["naive_rate"], day["rate"]):
            assert f"{100 * rate:.3f} %" in done.stdout
    whole = document["whole"]
    assert (whole["rows"], whole["closed"], whole["partitions"]) == (600, 1, 3)
    as_json = run("show", "--snapshot", str(snapshot), "--json", "-")
    assert json.loads(as_json.stdout)["base"] == "older"


def test_folder_that_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    for name in ("check", "show"):
        done = run(name, "--snapshot", str(tmp_path))
        assert done.exit_code == 3
        assert MANIFEST_NAME in done.output
    with pytest.raises(DataError, match=MANIFEST_NAME):
        check_snapshot(tmp_path)
