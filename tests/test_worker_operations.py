"""The worker's breaker on a real broker."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from jobs import worker as worker_module
from jobs.breaker_request import write_request
from jobs.checkpoint import CheckpointStore, state_digest
from jobs.cli import cli
from jobs.hold import HeldSegment
from jobs.online_state import loop_state
from jobs.produce import produce
from jobs.release import list_releases
from jobs.single_thread import use_one_thread
from jobs.state_head import head_state
from jobs.worker import Worker
from jobs.worker_breaker import BreakerCut
from monitoring.accounting import Accounting
from pipelines.config import Config
from pipelines.errors import StaleStateError
from tests.incident import BREAKER, Incident, checked, run_cli
from tests.torture_points import die
from tests.workers import Killed, crash, kill_in, ticking_worker, with_topics

SEED = 20_260_112


def test_a_silent_topic_trips_and_resuming_ends_where_no_breaker_would_have(
    incident: Incident, tripped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tripped, tmp_path, dirs_exist_ok=True)
    plain = checked(tmp_path, incident.files.rows)
    breaker, state = plain["breaker"], tmp_path / "state"
    assert breaker["mode"] == "holding"
    assert re.fullmatch(r"click_rate is \S+, below 0.005", breaker["last_trip"]["reasons"][0])
    # As soon as the window holds none of the clicks before the silence, give or take a part of it.
    assert incident.silent[0] < breaker["last_trip"]["clock"] <= incident.silent[0] + BREAKER.window * 1.1
    held = sum(breaker["rows"].values())
    assert held > 1_000
    assert sum(kinds.get("pending", 0) for kinds in plain["accounting"].values()) >= held
    # Nothing is published of what came after.
    newest = [name for name in list_releases(tmp_path / "releases") if name.startswith("student")][-1]
    assert newest.endswith(f"{plain['step']:010d}")

    status = json.loads(run_cli("breaker", "status", "--state", str(state), "--json", "-"))
    assert (status["mode"], status["held_rows"]) == ("holding", held + sum(breaker["dead"].values()))
    run_cli("breaker", "resume", "--state", str(state))
    assert "resume, not carried out yet" in run_cli("breaker", "status", "--state", str(state))
    again = incident.worker(tmp_path)
    committed, looks = again.breaker.committed, []

    def look(cut: BreakerCut, store: CheckpointStore) -> None:
        committed(cut, store)
        kept = [store.manifest(name)["volatile"]["breaker"]["segments"] for name in store.names()]
        needed = {segment["name"] for segments in kept for segment in segments}
        looks.append(len(needed))
        assert {path.name for path in (state / "hold").iterdir()} == needed

    monkeypatch.setattr(again.breaker, "committed", look)
    again.run()
    # What a checkpoint names is there as long as the checkpoint is, and no longer.
    assert looks[0] > 1
    assert sorted(looks, reverse=True) == looks
    assert state_digest(*loop_state(again.loop)) == incident.loop_digest
    plain = checked(tmp_path, incident.files.rows)
    assert plain["breaker"]["mode"] == "learning"
    assert not (state / "breaker_request.json").exists()
    refused = CliRunner().invoke(cli, ["breaker", "discard", "--state", str(state)])
    assert refused.exit_code == 3
    assert "nothing to discard" in refused.output


def test_discarded_rows_are_expired_and_their_offsets_written_down(
    incident: Incident, tmp_path: Path
) -> None:
    incident.worker(tmp_path).run()
    before = checked(tmp_path, incident.files.rows)
    run_cli("breaker", "discard", "--state", str(tmp_path / "state"))
    incident.worker(tmp_path).run()
    after = checked(tmp_path, incident.files.rows)
    for kind, rows in before["breaker"]["rows"].items():
        assert (
            after["accounting"][kind].get("expired", 0) == before["accounting"][kind].get("expired", 0) + rows
        )
    (entry,) = after["breaker"]["discarded"]
    assert entry["rows"] == before["breaker"]["rows"]
    # Of single-row messages each offset is a row.
    spans = [last[0] - first[0] + 1 for first, last in entry["offsets"].values()]
    assert sum(spans) == sum(entry["rows"].values()) + sum(entry["dead_letters"].values())
    assert after["step"] == before["step"]
    assert "discarded" in run_cli("breaker", "status", "--state", str(tmp_path / "state"))


def test_other_partitions_and_packed_messages_trip_at_the_same_step(
    incident: Incident, tripped: Path, tmp_path: Path
) -> None:
    servers = incident.config.kafka.bootstrap_servers
    config = with_topics(incident.config, servers, "operations-packed").model_copy(
        update={"breaker": BREAKER}
    )
    config = config.model_copy(update={"kafka": config.kafka.model_copy(update={"partitions": 3})})
    produce(incident.files, config, form="packed")
    worker = incident.worker(tmp_path, config=config)
    worker.run()
    plain, _ = head_state(tripped / "state")
    assert (worker.loop.step_number, worker.breaker.last_trip) == (
        plain["step"],
        plain["breaker"]["last_trip"],
    )
    assert worker.breaker.bounds.state() == plain["breaker"]["window"]


def killed_at(worker: Worker, patch: pytest.MonkeyPatch, moment: str, after: int) -> None:
    owner, name, before = {
        "before a step is held": (worker.breaker, "take", True),
        "after a step is held": (worker.breaker, "take", False),
        "before held rows are written": (HeldSegment, "write", True),
        "after held rows are written": (HeldSegment, "write", False),
        "before the ledger is written": (worker.commits.audit, "append", True),
        "after the ledger is written": (worker.commits.audit, "append", False),
        "before the head moves": (worker.store, "_move_head", True),
        "after the head has moved": (worker.store, "_move_head", False),
        "before held rows are removed": (worker.breaker.hold, "keep_only", True),
        "in a step": (worker.loop, "step", True),
    }[moment]
    kill_in(owner, name, patch, after, before=before)


def disturbed(
    incident: Incident, folder: Path, patches: pytest.MonkeyPatch, moments: list[tuple[str, int]]
) -> list[Any]:
    """Workers that are killed one after the other, and one that ends; returns where they were."""
    kills = []
    for moment, after in moments:
        worker = incident.worker(folder)
        with patches.context() as patch:
            killed_at(worker, patch, moment, after)
            patch.setattr(worker, "close", lambda: None)
            try:
                worker.run()
            except Killed:
                kills.append((moment, after, worker.loop.step_number, worker.breaker.held_rows))
            finally:
                crash(worker)
    incident.worker(folder).run()
    return kills


def test_a_worker_killed_while_it_holds_and_while_it_drains_ends_in_the_same_state(
    incident: Incident, tripped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(SEED)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    shutil.copytree(tripped, calm)
    holding = ["before a step is held", "after a step is held", "before held rows are written"]
    holding += ["after held rows are written", "before the head moves", "after the head has moved"]
    holding += ["before the ledger is written", "after the ledger is written"]
    moments = [(name, int(rng.integers(1, 6))) for name in rng.permutation(holding)]
    kills = disturbed(incident, rough, monkeypatch, moments)
    print(f"seed {SEED}: killed {kills}")
    assert len(kills) >= 4
    assert digest_of(rough) == digest_of(calm)
    for folder in (calm, rough):
        write_request(folder / "state", "resume")
    incident.worker(calm).run()
    draining = [
        "in a step",
        "before held rows are removed",
        "before the head moves",
        "after the head has moved",
    ]
    moments = [(name, int(rng.integers(0, 2))) for name in rng.permutation(draining)]
    kills = disturbed(incident, rough, monkeypatch, moments)
    print(f"seed {SEED}: killed {kills}")
    assert len(kills) >= 3
    assert digest_of(rough) == digest_of(calm)
    checked(rough, incident.files.rows)
    plain, _ = head_state(rough / "state")
    letters = (rough / "state/dead_letters.jsonl").read_text().splitlines()
    positions = [
        tuple(json.loads(line)[name] for name in ("source", "partition", "offset")) for line in letters
    ]
    counted = sum(kinds.get("dead_lettered", 0) for kinds in plain["accounting"].values())
    assert len(positions) == len(set(positions)) == counted


def hold_and_die(folder: Path, config: Config) -> None:
    """A worker that is killed in a step that it holds, when it has committed many."""
    use_one_thread()
    worker = ticking_worker(folder, config)
    take = worker.breaker.take

    def last(*given: Any) -> None:
        take(*given)
        if sum(head_state(folder / "state")[0]["breaker"]["rows"].values()) >= 300:
            die()

    worker.breaker.take = last  # type: ignore[method-assign, assignment]
    worker.run()


def test_held_rows_outlive_a_sigkill(incident: Incident, tripped: Path, tmp_path: Path) -> None:
    incident.small_run.first_releases(tmp_path / "releases")
    state = tmp_path / "state"
    config = incident.config.model_copy(update={"breaker": BREAKER})
    process = multiprocessing.get_context("forkserver").Process(target=hold_and_die, args=(tmp_path, config))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    breaker = head_state(state)[0]["breaker"]
    whole = head_state(tripped / "state")[0]["breaker"]
    assert breaker["mode"] == "holding"
    assert 300 <= sum(breaker["rows"].values()) < sum(whole["rows"].values())
    # Go on holding, then learn what is held: each time as if there had been no kill.
    incident.worker(tmp_path).run()
    assert digest_of(tmp_path) == digest_of(tripped)
    run_cli("breaker", "resume", "--state", str(state))
    worker = incident.worker(tmp_path)
    worker.run()
    assert state_digest(*loop_state(worker.loop)) == incident.loop_digest
    checked(tmp_path, incident.files.rows)


def test_held_rows_that_are_damaged_can_be_discarded_once_they_are_found_so(
    incident: Incident, tripped: Path, tmp_path: Path
) -> None:
    shutil.copytree(tripped, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "state"
    first, *_, last = sorted((state / "hold").glob("*.arrow"))
    assert first != last
    last.write_bytes(b"")
    run_cli("breaker", "resume", "--state", str(state))
    worker = incident.worker(tmp_path)
    with pytest.raises(StaleStateError, match="missing or corrupt"):
        worker.run()
    run_cli("breaker", "discard", "--state", str(state))
    incident.worker(tmp_path).run()
    plain = checked(tmp_path, incident.files.rows)
    (entry,) = plain["breaker"]["discarded"]
    held = head_state(tripped / "state")[0]["breaker"]["rows"]
    assert 0 < sum(entry["rows"].values()) <= sum(held.values())
    assert plain["breaker"]["mode"] == "learning"


def test_a_row_that_is_lost_ends_the_worker_before_it_commits(incident: Incident, tmp_path: Path) -> None:
    worker = incident.worker(tmp_path)
    step = worker.loop.step
    seen: list[str | None] = []

    def losing(events: Any) -> Any:
        result = step(events)
        if worker.digest is not None and not seen:
            seen.append(worker.store.head())
            worker.loop.read["click"] += 1
        return result

    worker.loop.step = losing  # type: ignore[method-assign]
    with pytest.raises(StaleStateError, match="rows were lost or counted twice"):
        worker.run()
    # A commit that was in flight may have come to its end; none with the wrong sum has.
    plain, _ = head_state(tmp_path / "state")
    assert set(Accounting.from_state(plain["accounting"]).check(plain["read"]).values()) == {0}
    assert seen[0] is not None


def digest_of(folder: Path) -> str:
    return run_cli("checkpoint", "digest", str(folder / "state")).strip()


def test_a_full_hold_waits_and_says_so(
    incident: Incident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = incident.worker(tmp_path, breaker=BREAKER.model_copy(update={"hold_rows": 300}))
    # Small polls: what has been polled when the hold is full is held as well.
    monkeypatch.setattr(worker_module, "_POLL_ROWS", 128)
    waited = []
    sleep = time.sleep

    def operator(seconds: float) -> None:
        if seconds != worker_module._FULL_RETRY_S:  # somebody else's
            sleep(seconds)
            return
        waited.append((worker.breaker.held_rows, worker.cursor.to_state()))
        if len(waited) % 3 == 0:
            write_request(tmp_path / "state", "discard")

    monkeypatch.setattr("jobs.worker.time.sleep", operator)
    worker.run()
    assert len(waited) >= 3
    assert waited[0] == waited[1] == waited[2]  # it reads nothing
    assert 300 <= waited[0][0] < 300 + 2 * 128
    assert "the hold is full" in caplog.text
    plain = checked(tmp_path, incident.files.rows)
    discarded = [sum(entry["rows"].values()) for entry in plain["breaker"]["discarded"]]
    assert discarded
    assert all(rows >= 200 for rows in discarded)
