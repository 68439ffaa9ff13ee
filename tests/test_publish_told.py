"""What the gate decides reaches the outbox: figures by step, and aliases with the releases they move to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.decision_log import DECISIONS, append_decision, read_decisions
from jobs.publish_decision import Decision
from jobs.release import garbage_collect
from jobs.release_manifest import Manifest
from jobs.worker_tracking import WorkerTracking
from pipelines.config import load_config
from tests.releases import publish

FIGURES = {
    "rows": 5000,
    "log_loss": 0.21,
    "second_log_loss": 0.2,
    "worse_z": 5.5,
    "pcoc": 1.1,
    "level_z": 0.0,
}


def decision(candidate: str, **changes: Any) -> Decision:
    common: dict[str, Any] = {
        "candidate": candidate,
        "clock": 1_700_000_000_000,
        "verdict": "published",
        "standing": {"click": "good"},
        "reasons": (),
        "figures": {"click": FIGURES},
        "growth": {"click": 1.5},
    }
    return Decision(**{**common, **changes})


@pytest.fixture
def told(tmp_path: Path) -> list[dict[str, Any]]:
    """What waits in the outbox, of an MLflow that is away, after a trial, a proof and a return."""
    # Nothing listens on port 9: all of it stays in the outbox.
    tracking = WorkerTracking(load_config(None, ['tracking.uri="http://127.0.0.1:9"']), tmp_path / "state")
    names = [publish(tmp_path / "releases", step).name for step in range(1, 5)]
    for one in (
        decision(names[0], begins_trial=True),
        decision(names[2], proven=names[0]),
        decision(names[3], verdict="refused", reasons=("click: worse",), returned_to=names[0]),
    ):
        tracking.decided(one, tmp_path / "releases")
    assert garbage_collect(tmp_path / "releases", 1) == names[:3]
    tracking._outbox.close(timeout_s=0.0)
    lines = (tmp_path / "state/outbox/outbox.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_figures_go_to_the_steps_of_the_loop_in_event_time(told: list[dict[str, Any]]) -> None:
    rows = [tuple(row) for record in told if record["op"] == "metrics" for row in record["rows"]]
    clock = 1_700_000_000_000
    assert ("gate/click/worse_z", 5.5, 4, clock) in rows
    assert ("gate/click/weight_growth", 1.5, 1, clock) in rows
    assert [value for name, value, *_ in rows if name == "gate/published"] == [1.0, 1.0, 0.0]


def test_aliases_move_with_releases_that_outlive_their_collection(told: list[dict[str, Any]]) -> None:
    registered = [record for record in told if record["op"] == "register"]
    assert [record["aliases"] for record in registered] == [
        ["champion", "challenger"],
        ["last_good"],
        ["champion"],
    ]
    for record in registered:
        manifest = Manifest.read(Path(record["path"]))
        assert manifest.name == "student-0001-0000000001"
        assert all((Path(record["path"]) / name).is_file() for name in manifest.files)


def test_why_something_was_refused_is_a_tag(told: list[dict[str, Any]]) -> None:
    tags = [record["tags"] for record in told if record["op"] == "tags"]
    assert tags == [{"gate.refused": "student-0001-0000000004: click: worse"}]


def test_decisions_are_kept_once_each_and_only_so_many(tmp_path: Path) -> None:
    assert read_decisions(tmp_path) == []
    for number in range(2500):
        for _ in range(2):
            append_decision(tmp_path, {"candidate": number})
    kept = [one["candidate"] for one in read_decisions(tmp_path)]
    assert kept == list(range(2500 - len(kept), 2500))
    assert 1000 <= len(kept) <= 2000
    with (tmp_path / DECISIONS).open("a") as file:
        file.write('{"candidate": 25')
    assert len(read_decisions(tmp_path)) == len(kept)
    append_decision(tmp_path, {"candidate": 2500})
    assert read_decisions(tmp_path)[-1] == {"candidate": 2500}


def test_a_decision_is_json_whatever_its_figures() -> None:
    about = decision(
        "student-0001-0000000001", figures={"click": {"worse_z": float("inf"), "z": None}}
    ).about()
    assert json.loads(json.dumps(about, allow_nan=False))["figures"] == {
        "click": {"worse_z": "inf", "z": None}
    }


def test_one_more_of_the_same_is_no_news() -> None:
    fine, bad = decision("a"), decision("b", verdict="refused", reasons=("click: worse",))
    assert not fine.is_news(None)
    assert bad.is_news(fine)
    assert not bad.is_news(bad)
    assert fine.is_news(bad)
    assert decision("c", proven="a").is_news(fine)
