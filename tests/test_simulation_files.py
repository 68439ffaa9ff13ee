"""Simulated logs as files, their settings, and the command that writes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.simulate import command
from pipelines.duration import HOUR_MS, MINUTE_MS
from pipelines.errors import ConfigError, DataError
from pipelines.events import TOPICS, feature_names
from pipelines.simulation_config import SimulationConfig, read_simulation_config
from pipelines.simulation_files import write_simulation
from pipelines.simulator import Simulation, simulate


@pytest.fixture(scope="module")
def faulty() -> Simulation:
    return simulate(SimulationConfig(impressions=20_000, seed=5, faults=0.02))


def tables_of(simulation: Simulation) -> tuple[pa.Table, pa.Table, pa.Table]:
    return simulation.impressions, simulation.clicks, simulation.conversions


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"impressions": 0}, "impressions must be at least 1. Received: 0"),
        ({"impressions": 1.5}, "impressions must be a whole number. Received: 1.5"),
        ({"days": float("nan")}, "days must be a finite number. Received: nan"),
        ({"days": -1}, r"days must lie in \(0, 366\]. Received: -1"),
        ({"faults": 0.7}, r"faults must lie in \[0, 0.5\]. Received: 0.7"),
        ({"base_click_rate": 0.9}, "base_click_rate must lie in"),
        ({"seed": -1}, "seed must be at least 0. Received: -1"),
        ({"campaigns": 5}, "5 campaigns < 24 advertisers"),
        ({"items": 100}, "100 items < 240 campaigns"),
        ({"attribution_window": 5}, "attribution_window must be at least 60000. Received: 5"),
    ],
)
def test_config_quotes_a_value_that_does_not_fit(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimulationConfig(**wrong)


def test_unknown_config_key_is_refused_and_the_nearest_one_named() -> None:
    with pytest.raises(ConfigError, match="unknown simulation key impresions") as caught:
        SimulationConfig.from_mapping({"impresions": 5})
    assert caught.value.hint == "did you mean impressions?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("impressions = 5", r"expected a section \[simulation\] in .* Received: impressions"),
        ("[simulation", "is not valid TOML"),
        ("[simulation]\nattribution_window = 'soon'", "attribution_window: expected a duration"),
        ("[simulation]\ndayz = 3", "unknown simulation key dayz"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "simulation.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_simulation_config(path)


def test_base_rate_that_the_window_cannot_hold_is_refused() -> None:
    config = SimulationConfig(impressions=1_000, attribution_window=MINUTE_MS)
    with pytest.raises(ConfigError, match="base_conversion_rate must be less than"):
        simulate(config)


def test_smallest_world_can_be_simulated() -> None:
    log = simulate(
        SimulationConfig(impressions=1, days=0.01, campaigns=1, advertisers=1, items=1, positions=1)
    )
    assert log.truth.num_rows == 1


# --- files ---------------------------------------------------------------------------------------------


def test_parquet_files_hold_the_tables_and_the_truth_stands_apart(tmp_path: Path, faulty: Simulation) -> None:
    written = write_simulation(faulty, tmp_path)
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    for topic, table in zip(TOPICS, tables_of(faulty), strict=True):
        (path,) = tmp_path.glob(f"{topic}*")
        assert pq.read_table(path).equals(table)
    assert pq.read_table(tmp_path / "truth.parquet").equals(faulty.truth)


def test_truth_is_not_among_the_event_files(tmp_path: Path, faulty: Simulation) -> None:
    write_simulation(faulty, tmp_path)
    events = {path.name for topic in TOPICS for path in tmp_path.glob(f"{topic}*")}
    assert events == {"impressions.parquet", "clicks.parquet", "conversions.parquet"}


def test_json_lines_hold_the_same_events_with_features_as_an_object(tmp_path: Path) -> None:
    log = simulate(SimulationConfig(impressions=2_000, days=1, faults=0.05))
    write_simulation(log, tmp_path, "jsonl")
    lines = [json.loads(line) for line in (tmp_path / "impressions.jsonl").read_text().splitlines()]
    rows = log.impressions.to_pylist()
    names = feature_names(log.impressions)
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["features"] == {name: row[name] for name in names if row[name] is not None}
        contract = {
            "event_id",
            "impression_id",
            "event_time",
            "arrival_time",
            "user_id",
            "item_id",
            "position",
        }
        assert {name: line[name] for name in line if name != "features"} == {
            name: row[name] for name in contract
        }
    conversions = [json.loads(line) for line in (tmp_path / "conversions.jsonl").read_text().splitlines()]
    assert [line.get("op", "assert") for line in conversions] == log.conversions["op"].to_pylist()
    assert all("value" in line for line in conversions if "op" not in line)
    malformed = [json.loads(line) for line in (tmp_path / "malformed.jsonl").read_text().splitlines()]
    assert malformed == [dataclasses.asdict(message) for message in log.malformed]


def test_settings_beside_the_log_reproduce_it(tmp_path: Path) -> None:
    config = SimulationConfig(impressions=1_000, days=0.5, seed=8, attribution_window=12 * HOUR_MS)
    write_simulation(simulate(config), tmp_path)
    assert read_simulation_config(tmp_path / "simulation.toml") == config
    settings = tomllib.loads((tmp_path / "simulation.toml").read_text())
    assert settings["attribution"] == {"click_window": "30m", "attribution_window": "12h"}
    assert settings["counts"]["impressions"] > 900


def test_log_in_another_format_replaces_the_former_one(tmp_path: Path) -> None:
    log = simulate(SimulationConfig(impressions=100, days=0.1))
    write_simulation(log, tmp_path, "parquet")
    write_simulation(log, tmp_path, "jsonl")
    assert not list(tmp_path.glob("impressions*.parquet"))


def test_events_that_were_not_simulated_are_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "impressions.parquet"
    precious.write_bytes(b"real events")
    with pytest.raises(DataError, match=r"impressions\.parquet and no simulation\.toml"):
        write_simulation(simulate(SimulationConfig(impressions=10, days=0.1)), tmp_path)
    assert precious.read_bytes() == b"real events"


# --- command line --------------------------------------------------------------------------------------


def test_command_writes_a_log_and_prints_its_summary_as_toml(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--impressions", "2000", "--days", "1", "--seed", "4"]
    more = ["--start", "2026-03-01T00:00:00Z", "--attribution-window", "6h", "--faults", "0"]
    result = CliRunner().invoke(command, [*arguments, *more], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr == ""
    summary = tomllib.loads(result.stdout)
    assert summary["start"] == "2026-03-01T00:00:00Z"
    assert summary["end"] == "2026-03-02T00:00:00Z"
    assert summary["attribution_window"] == "6h"
    assert summary["mean_click_probability"] == pytest.approx(0.09)
    assert summary["counts"]["impressions"] == pq.read_table(tmp_path / "impressions.parquet").num_rows
    assert sorted(summary["files"]) == sorted(path.name for path in tmp_path.iterdir())


def test_command_repeats_a_log_from_its_settings(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runner = CliRunner()
    runner.invoke(
        command, ["--out", str(one), "--impressions", "500", "--days", "0.2"], catch_exceptions=False
    )
    settings = str(one / "simulation.toml")
    runner.invoke(command, ["--out", str(two), "--config", settings], catch_exceptions=False)
    assert digests(one) == digests(two)


def test_command_refuses_a_wrong_value_before_it_simulates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attribution_window"):
        CliRunner().invoke(
            command, ["--out", str(tmp_path), "--attribution-window", "3 moons"], catch_exceptions=False
        )
    assert not list(tmp_path.iterdir())
