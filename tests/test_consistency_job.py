"""The consistency job over logs of a real endpoint: it agrees with itself and finds what was doctored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from jobs.cli import cli
from jobs.consistency import check_consistency, column_names
from jobs.release import point
from jobs.serve import ServeProcess
from pipelines.errors import DataError, StaleStateError
from tests.releases import SPEC, impressions, publish

ROWS = 200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two releases and a log of impressions served by either, in batches of 1, 7 and 64."""
    folder = tmp_path_factory.mktemp("world")
    releases = folder / "releases"
    old, new = publish(releases, 1), publish(releases, 2)
    rows = impressions(ROWS)
    batches = [rows[:1], rows[1:8], rows[8:72], rows[72:80], rows[80:]]
    for path, chosen in ((old, batches[:3]), (new, batches[3:])):
        point(releases, "CURRENT", path.name)
        with ServeProcess(folder / "serve", releases).start() as server:
            for batch in chosen:
                answer = httpx.post(
                    f"{server.url}/score", json={"impressions": batch}, timeout=30.0, trust_env=False
                )
                assert answer.status_code == 200, answer.text
    shutil.copyfile(server.served, folder / "served.jsonl")
    yield folder


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def check(folder: Path) -> dict[str, Any]:
    return check_consistency(folder / "served.jsonl", folder / "releases")


def doctor(folder: Path, change: Callable[[int, dict[str, Any]], object]) -> None:
    """Change lines of the log."""
    path = folder / "served.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        change(number, line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_was_served_is_what_is_rescored_whatever_the_batches_were(world: Path) -> None:
    outcome = check(world)
    assert (outcome["status"], outcome["rows"], outcome["rows_over_gate"]) == ("good", ROWS, 0)
    assert outcome["max_abs_delta_logit"] < 1e-5
    assert outcome["p99_abs_delta_logit"] <= outcome["max_abs_delta_logit"]
    assert outcome["releases"] == {"student-0001-0000000001": 72, "student-0001-0000000002": 128}
    assert outcome["features"] == []
    assert set(outcome["tasks"]) == {"click", "conversion"}


def test_a_feature_that_served_another_bucket_is_named_with_its_first_row(copy: Path) -> None:
    history = column_names(SPEC).index("history[2]")

    def change(number: int, line: dict[str, Any]) -> None:
        if number in (30, 31, 150):
            line["buckets"][history] += 1

    doctor(copy, change)
    outcome = check(copy)
    assert (outcome["status"], outcome["first_differing_feature"]) == ("bad", "history[2]")
    assert outcome["features"] == [
        {"feature": "history[2]", "rows": 3, "first_row": 30, "share": 3 / ROWS},
    ]


def test_a_number_that_differs_in_its_last_bit_is_found(copy: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number == 5:
            line["numbers"][0] += 1e-6

    doctor(copy, change)
    assert check(copy)["first_differing_feature"] == "age (number)"


def test_an_impression_that_was_served_other_values_is_found_in_features_and_logits(copy: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number >= 100:
            line["impression"]["item_id"] = "another"

    doctor(copy, change)
    outcome = check(copy)
    assert (outcome["status"], outcome["first_differing_feature"]) == ("bad", "item_id")
    assert outcome["features"][0]["first_row"] == 100
    assert outcome["max_abs_delta_logit"] > 1e-4


def test_one_logit_off_by_more_than_the_gate_is_enough(copy: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number == 7:
            line["logit"]["conversion"] += 2e-4

    doctor(copy, change)
    outcome = check(copy)
    assert (outcome["status"], outcome["rows_over_gate"]) == ("bad", 1)
    assert outcome["max_abs_delta_logit"] == pytest.approx(2e-4, rel=1e-2)
    assert outcome["tasks"]["conversion"]["worst_row"] == 7
    assert outcome["tasks"]["click"]["status"] == "good"


def test_a_probability_that_was_calibrated_otherwise_is_found(copy: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        line["probability"]["click"] *= 0.9

    doctor(copy, change)
    outcome = check(copy)
    assert (outcome["status"], outcome["rows_over_gate"]) == ("bad", 0)
    assert "probabilities differ" in outcome["why"]


def test_a_task_that_was_not_logged_breaks_the_gate(copy: Path) -> None:
    doctor(copy, lambda number, line: line["logit"].pop("click") if number == 3 else None)
    assert check(copy)["tasks"]["click"]["rows_over_gate"] == 1


def test_a_damaged_release_is_refused_and_named(copy: Path) -> None:
    weights = copy / "releases" / "student-0001-0000000001" / "click" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(StaleStateError, match=r"click/student\.safetensors"):
        check(copy)


def test_a_release_that_was_swapped_under_its_name_is_found(copy: Path) -> None:
    shutil.rmtree(copy / "releases" / "student-0001-0000000002")
    publish(copy / "releases", 2, bias=3.0)
    outcome = check(copy)
    assert outcome["status"] == "bad"
    assert outcome["rows_of_changed_releases"] == 128
    assert outcome["rows_over_gate"] == 256  # both tasks
    assert "changed since" in outcome["why"]


def test_rows_of_removed_releases_and_torn_lines_are_counted(copy: Path) -> None:
    shutil.rmtree(copy / "releases" / "student-0001-0000000001")
    with (copy / "served.jsonl").open("a") as file:
        file.write('{"torn')
    outcome = check(copy)
    assert (outcome["status"], outcome["rows"]) == ("good", 128)
    assert (outcome["rows_without_release"], outcome["unreadable_lines"]) == (72, 1)


def test_a_log_that_is_missing_or_empty_is_a_data_error(copy: Path) -> None:
    (copy / "served.jsonl").write_text("")
    with pytest.raises(DataError, match="expected impressions"):
        check(copy)
    (copy / "served.jsonl").unlink()
    with pytest.raises(DataError, match="no log of served impressions"):
        check(copy)


def test_a_release_name_in_the_log_cannot_leave_the_folder(copy: Path) -> None:
    doctor(copy, lambda number, line: line.update(release="../../etc"))
    with pytest.raises(DataError, match="expected a release name"):
        check(copy)


def test_command_writes_the_figures_and_gates_by_exit_code(copy: Path) -> None:
    arguments = ["consistency", "--served", str(copy / "served.jsonl"), "--releases", str(copy / "releases")]
    out = copy / "out" / "report.json"
    good = CliRunner().invoke(cli, [*arguments, "--out", str(out)])
    assert good.exit_code == 0, good.output
    assert json.loads(out.read_text()) == json.loads(good.stdout)

    def change(number: int, line: dict[str, Any]) -> None:
        line["buckets"][0] += 1

    doctor(copy, change)
    bad = CliRunner().invoke(cli, arguments)
    assert bad.exit_code == 1
    assert "`user_id` first" in bad.stderr
    (copy / "served.jsonl").unlink()
    assert CliRunner().invoke(cli, arguments).exit_code == 3
