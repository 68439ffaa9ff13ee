"""The worker on a real broker behind the gate: poisoned it goes back, recovered it goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.broker import Broker
from jobs.cli import cli
from jobs.decision_log import read_decisions
from jobs.produce import produce
from jobs.release import Release, list_releases, pointed
from jobs.release_manifest import Manifest, parse_name
from jobs.release_pointer import Pointer, point, read_pointer
from jobs.worker import Worker
from pipelines.config import Config
from tests.publish_line import with_rules
from tests.small_run import SmallRun
from tests.workers import Killed, ready_worker, with_topics

# Steps after the warm-up whose labels are learned the wrong way round.
POISONED = range(24, 32)


@pytest.fixture(scope="module")
def config(small_run: SmallRun, broker: Broker) -> Config:
    config = with_topics(with_rules(small_run.config), broker.bootstrap_servers, "gate")
    produce(small_run.files, config)
    return config


def poison(worker: Worker, small_run: SmallRun) -> None:
    """Let the worker learn flipped labels for a while; by step, so that a replay learns the same."""
    truth = worker.loop._columns
    begins = small_run.warm_loop().step_number

    def columns(task: Any, examples: Any) -> Any:
        found = truth(task, examples)
        if task == "click" and worker.loop.tasks and worker.loop.step_number - begins in POISONED:
            found["label"] = 1 - found["label"]
        return found

    worker.loop._columns = columns  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def poisoned(
    small_run: SmallRun, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("poisoned")
    worker = ready_worker(small_run, folder, config)
    poison(worker, small_run)
    worker.run()
    assert worker.digest is not None
    return folder, worker.digest


def test_a_poisoned_worker_goes_back_to_last_good_and_publishes_once_it_has_recovered(
    poisoned: tuple[Path, str],
) -> None:
    releases = poisoned[0] / "releases"
    decisions = read_decisions(releases)
    refused = next(one for one in decisions if one["verdict"] == "refused")
    back = next(one["returned_to"] for one in decisions if "returned_to" in one)
    assert any("click: log loss more than 2.0% above" in reason for reason in refused["reasons"])
    assert parse_name(back) < parse_name(refused["candidate"])
    assert refused["candidate"] not in list_releases(releases)
    current, good = pointed(releases, "CURRENT"), pointed(releases, "last_good")
    assert current is not None
    assert good is not None
    assert parse_name(refused["candidate"]) < parse_name(current)
    assert parse_name(back) < parse_name(good) <= parse_name(current)
    manifest = Manifest.read(releases / current)
    assert manifest.extra["gate"]["standing"]["click"] == "good"
    assert Release.load(releases / good).name == good


def test_the_command_shows_what_the_gate_has_said(poisoned: tuple[Path, str]) -> None:
    releases = str(poisoned[0] / "releases")
    listed = CliRunner().invoke(cli, ["release", "list", "--releases", releases])
    assert listed.exit_code == 0
    assert "click=good" in listed.output
    said = CliRunner().invoke(cli, ["release", "decisions", "--releases", releases])
    assert said.exit_code == 0
    assert "refused" in said.output
    assert "CURRENT back to" in said.output
    rows = json.loads(CliRunner().invoke(cli, ["release", "list", "--json", "--releases", releases]).output)
    assert rows[-1]["gate"]["verdict"] == "published"


def test_the_gate_does_not_change_what_is_learned(
    poisoned: tuple[Path, str], small_run: SmallRun, config: Config, tmp_path: Path
) -> None:
    without = config.model_copy(update={"publish": config.publish.model_copy(update={"gate": False})})
    worker = ready_worker(small_run, tmp_path, without)
    poison(worker, small_run)
    worker.run()
    assert worker.digest == poisoned[1]
    assert read_decisions(tmp_path / "releases") == []


@pytest.mark.parametrize(("alias", "is_before"), [("CURRENT", True), ("CURRENT", False), ("last_good", True)])
def test_killed_where_a_pointer_moves_it_ends_in_the_same_state_with_pointers_that_agree(
    poisoned: tuple[Path, str],
    small_run: SmallRun,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alias: str,
    is_before: bool,
) -> None:
    worker = ready_worker(small_run, tmp_path, config)
    poison(worker, small_run)
    moves = itertools.count()
    # The first time that last_good is set is no proof: the folder had none.
    moment = 0 if alias == "CURRENT" else 1

    def killed(root: Path, name: str, *given: Any, **named: Any) -> bool:
        is_moment = name == alias and next(moves) == moment
        if is_moment and is_before:
            raise Killed
        moved = point(root, name, *given, **named)
        if is_moment:
            raise Killed
        return moved

    with monkeypatch.context() as patch:
        patch.setattr("jobs.publish_control.point", killed)
        patch.setattr(worker, "close", lambda: None)
        with pytest.raises(Killed):
            worker.run()
    worker.commits.end()
    worker._thread.finish()
    worker.source.close()

    releases = tmp_path / "releases"
    again = ready_worker(small_run, tmp_path, config)
    if alias == "CURRENT":
        # Before it consumes anything it has gone back.
        assert read_pointer(releases, "CURRENT") == Pointer(
            pointed(releases, "last_good") or "", rollback=True
        )
    else:
        assert parse_name(pointed(releases, "last_good") or "")[1] > 0
    poison(again, small_run)
    again.run()
    assert again.digest == poisoned[1]
    current, good = pointed(releases, "CURRENT"), pointed(releases, "last_good")
    assert current is not None
    assert good is not None
    assert Manifest.read(releases / current).extra["state_digest"] == poisoned[1]
    assert parse_name(good) < parse_name(current)
