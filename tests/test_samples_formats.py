"""A published log goes through ``ctrstream samples ingest`` and ``build``: once, and with its own labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from jobs.cli import cli
from jobs.samples_ingest_command import FORMATS
from pipelines.adapters import ADAPTERS
from pipelines.lake import lake_batches, read_lake
from pipelines.snapshot import read_rows
from tests.test_adapters import ATTRIBUTION, hashed, write_taobao

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DAY = 86_400
LINES = 4_000


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["samples", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def write_attribution(folder: Path, n: int = LINES, seed: int = 3) -> list[dict[str, Any]]:
    """A log of ten days; returns what its lines say."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    rows = []
    for second in np.sort(rng.integers(0, 10 * DAY, n)).tolist():
        clicked, bought = bool(rng.random() < 0.4), bool(rng.random() < 0.3)
        delay = int(rng.exponential(4 * DAY)) if rng.random() < 0.9 else int(rng.integers(0, 12))
        row = {
            "timestamp": second,
            "uid": int(rng.integers(0, 400)),
            "campaign": int(rng.integers(0, 20)) * 40_009,
            "conversion": int(bought),
            "conversion_timestamp": second + delay if bought else -1,
            "conversion_id": int(rng.integers(0, 10**6)) if bought else -1,
            "attribution": 0,
            "click": int(clicked),
            "click_pos": 0 if bought else -1,
            "click_nb": 1 if bought else -1,
            "cost": 0.0001,
            "cpo": 0.25,
            "time_since_last_click": -1,
            **{f"cat{k}": int(rng.integers(0, 3 * k)) for k in range(1, 10)},
        }
        row["line"] = "\t".join(map(str, row.values()))
        rows.append(row)
    text = "\n".join([ATTRIBUTION, *(row["line"] for row in rows), "broken"]) + "\n"
    (folder / f"log-{seed}.tsv").write_text(text)
    return rows


def test_labels_of_a_published_log_are_its_own(shared_spark: SparkSession, tmp_path: Path) -> None:
    rows = write_attribution(tmp_path / "log")
    given = ("ingest", "--lake", tmp_path / "lake", "--events", tmp_path / "log", "--master", "local[2]")
    report = json.loads(run(*given, "--format", "criteo-attribution", "--origin", "2025-03-01T00:00:00Z"))
    clicks, sales = (sum(row[name] for row in rows) for name in ("click", "conversion"))
    assert report["rows"] == {"impression": LINES, "click": clicks, "conversion": sales}
    assert (report["dead_letters"], report["files"]) == (1, ["log-3.tsv"])

    window = (
        "--window",
        "9d",
        "--as-of",
        "2025-03-11T00:00:00Z",
        "--set",
        "attribution.attribution_window=5d",
    )
    snapshot = run("build", "--lake", tmp_path / "lake", "--out", tmp_path / "out", *window).strip()
    labels = {
        (task, row["impression_id"]): row["label"]
        for task in ("click", "conversion")
        for row in read_rows(snapshot, task, ["impression_id", "label"]).to_pylist()
    }
    expected: dict[tuple[str, str], int] = {}
    for row in rows:
        shown, sold = row["timestamp"], row["conversion_timestamp"] if row["conversion"] else None
        if shown >= DAY:
            expected["click", hashed(row["line"])] = row["click"]
        clicked = shown + 10 if sold is None else min(shown + 10, sold)
        if row["click"] and DAY <= clicked < 10 * DAY:
            has_sold = sold is not None and sold - clicked <= 5 * DAY and sold <= 10 * DAY
            expected["conversion", hashed(row["line"])] = int(has_sold)
    assert labels == expected
    assert 0 < sum(label for (task, _), label in labels.items() if task == "conversion") < sales


def test_log_is_ingested_once_and_only_in_one_way(shared_spark: SparkSession, tmp_path: Path) -> None:
    log, lake, options = tmp_path / "log", tmp_path / "lake", tmp_path / "options.toml"
    write_attribution(log, 50)
    given = ("ingest", "--lake", lake, "--events", log, "--format")
    first = json.loads(run(*given, "criteo-attribution"))
    again = json.loads(run(*given, "criteo-attribution"))
    assert (again["files"], again["files_known"], again["dead_letters"]) == ([], ["log-3.tsv"], 0)
    assert again["lake_version"] == first["lake_version"]
    options.write_text('credit = "linear"')
    told = run(*given, "criteo-attribution", "--mapping", options, code=3)
    assert "was ingested as criteo-attribution@" in " ".join(told.split())
    # Where the files are is no such option.
    options.write_text('files = ["log-*.tsv"]')
    write_attribution(log, 20, seed=4)
    more = json.loads(run(*given, "criteo-attribution", "--mapping", options))
    assert (more["files"], more["rows"]["impression"]) == (["log-4.tsv"], 20)
    assert read_lake(shared_spark, lake).where("kind = 'impression'").count() == 70


def test_tables_of_a_log_may_change_and_make_no_batch_alone(
    shared_spark: SparkSession, tmp_path: Path
) -> None:
    log, lake = tmp_path / "log", tmp_path / "lake"
    log.mkdir()
    write_taobao(log)
    given = ("ingest", "--lake", lake, "--events", log, "--format", "taobao")
    assert json.loads(run(*given))["dead_letters"] == 3
    profile = log / "user_profile.csv"
    profile.write_text(profile.read_text() + "449818,1,1,1,1,1,1,1,1\n")
    assert json.loads(run(*given))["files"] == []
    header = (log / "raw_sample.csv").read_text().splitlines()[0]
    (log / "raw_sample-2.csv").write_text(f"{header}\n449818,1494638999,3,430548_1007,1,0\n")
    report = json.loads(run(*given))
    assert (report["files"], report["dead_letters"]) == (["raw_sample-2.csv", "user_profile.csv"], 0)
    newest = read_lake(shared_spark, lake).where("source = 'raw_sample-2.csv'").collect()
    assert [json.loads(row["features"])["age_level"] for row in newest] == ["1"]
    assert len(lake_batches(lake)) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--format", "avazu"], "expected --events with --format"),
        (["--events", ".", "--mapping", "x.toml"], "expected --format with --mapping"),
        (["--events", ".", "--format", "table"], "expected --mapping FILE.toml"),
        (["--events", ".", "--format", "table", "--mapping", "absent.toml"], "cannot read the mapping"),
        (["--events", ".", "--format", "avazu", "--origin", "2026-01-01T00:00:00Z"], "dates already"),
        (["--events", ".", "--format", "criteo"], "criteo-attribution"),
    ],
)
def test_wrong_use_is_told(tmp_path: Path, arguments: list[str], told: str) -> None:
    output = run("ingest", "--lake", tmp_path / "lake", *arguments, code=2)
    assert told in " ".join(output.split())


def test_formats_of_the_command_are_those_there_are() -> None:
    assert tuple(ADAPTERS) == FORMATS
