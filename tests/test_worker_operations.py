"""The worker's breaker, audit and metrics on a real broker."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from jobs import worker as worker_module
from jobs.audit import audit_event, audit_rows
from jobs.audit_log import read_lines
from jobs.breaker_request import write_request
from jobs.broker import Broker
from jobs.checkpoint import CheckpointStore, state_digest
from jobs.cli import cli
from jobs.hold import HeldSegment
from jobs.online_state import loop_state
from jobs.produce import produce
from jobs.release import list_releases
from jobs.state_head import head_state
from jobs.worker import Worker
from jobs.worker_breaker import BreakerCut
from monitoring.accounting import Accounting
from pipelines.config import Config
from pipelines.config_sections import BreakerConfig
from pipelines.errors import SetupError, StaleStateError
from pipelines.event_files import EventFiles
from tests.small_run import SmallRun
from tests.test_worker import Killed, TickingClock, crash, run_worker, with_topics

SEED = 20_260_112
DOCS = Path(__file__).parent.parent / "docs"
# 3 days of 12 000 impressions: some 170 an hour, of which a tenth are clicked.
BREAKER = BreakerConfig(
    window=4 * 3_600_000,
    min_impressions=200,
    min_outcomes=5,
    click_rate=(0.005, 0.9),
    click_rate_change=(0.0, 1e9),
    click_coverage=0.0,
    null_rise=1.0,
)


@dataclass(frozen=True)
class Incident:
    """A log in Kafka in which nobody clicks for twelve hours, and a run over it without a breaker."""

    small_run: SmallRun
    files: EventFiles
    config: Config
    silent: tuple[int, int]
    folder: Path
    loop_digest: str

    def worker(self, folder: Path, **options: Any) -> Worker:
        releases = folder / "releases"
        if not releases.exists():
            self.small_run.first_releases(releases)
        config = self.config.model_copy(update={"breaker": options.pop("breaker", BREAKER)})
        settings = {"until_end": True, "clock": TickingClock(), **options}
        worker = Worker(settings.pop("config", config), releases, folder / "state", **settings)
        # So that the ticks alone say when commits are made, however busy the machine is.
        thread, start = worker._thread, worker._thread.start

        def start_and_wait(work: Callable[[], None]) -> None:
            start(work)
            wait([thread._work] if thread._work is not None else [])

        thread.start = start_and_wait  # type: ignore[method-assign]
        return worker


def silent_log(small_run: SmallRun, folder: Path, silent: tuple[int, int]) -> EventFiles:
    folder.mkdir()
    for name, table in zip(("impressions", "clicks", "conversions"), small_run.files.tables, strict=True):
        arrival = table["arrival_time"]
        keep = pc.or_(pc.less(arrival, silent[0]), pc.greater_equal(arrival, silent[1]))
        pq.write_table(table if name == "impressions" else table.filter(keep), folder / f"{name}.parquet")
    shutil.copy(small_run.events / "malformed.jsonl", folder)
    return EventFiles(folder)


@pytest.fixture(scope="module")
def incident(small_run: SmallRun, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Incident:
    folder = tmp_path_factory.mktemp("incident")
    files = small_run.files
    begin = int(files.arrival_time[(small_run.warm_rows + files.rows) // 2])
    silent = (begin, begin + 12 * 3_600_000)
    files = silent_log(small_run, folder / "log", silent)
    config = with_topics(small_run.config, broker.bootstrap_servers, "operations")
    produce(files, config)
    found = Incident(small_run, files, config, silent, folder, "")
    worker = found.worker(folder, breaker=BreakerConfig(enabled=False))
    worker.run()
    return replace(found, loop_digest=state_digest(*loop_state(worker.loop)))


@pytest.fixture(scope="module")
def tripped(incident: Incident, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a worker whose breaker has opened, and that has read all: to be copied."""
    folder = tmp_path_factory.mktemp("tripped")
    incident.worker(folder).run()
    return folder


def checked(folder: Path, rows: int) -> dict[str, Any]:
    """State of the head, once its rows have been found to add up."""
    plain, _ = head_state(folder / "state")
    accounting = Accounting.from_state(plain["accounting"])
    assert set(accounting.check(plain["read"]).values()) == {0}
    assert sum(plain["read"].values()) == rows
    assert set(audit_rows(folder / "state")["difference"].values()) == {0}
    return plain


def run_cli(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


# Breaker -------------------------------------------------------------------------------------------------


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
    original, calls = getattr(owner, name), itertools.count()

    def killed(*given: Any, **named: Any) -> Any:
        is_last = next(calls) == after
        if is_last and before:
            raise Killed
        result = original(*given, **named)
        if is_last:
            raise Killed
        return result

    patch.setattr(owner, name, killed)


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


def test_held_rows_outlive_a_sigkill(incident: Incident, tripped: Path, tmp_path: Path) -> None:
    incident.small_run.first_releases(tmp_path / "releases")
    state = tmp_path / "state"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_worker", "models.gbdt", "lightgbm"])
    config = incident.config.model_copy(update={"breaker": BREAKER})
    process = context.Process(target=run_worker, args=(tmp_path, config))
    process.start()
    store, told = CheckpointStore(state), (0, "")
    try:
        while process.is_alive() and told[0] < 300:
            head = store.head()
            if head is not None and head != told[1]:
                breaker = head_state(state)[0]["breaker"]
                told = (sum(breaker["rows"].values()), head)
            time.sleep(0.002)
    finally:
        process.kill()
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


# Audit ---------------------------------------------------------------------------------------------------


def test_the_ledger_adds_up_to_the_checkpoint_and_by_offsets(incident: Incident) -> None:
    state = incident.folder / "state"
    plain, volatile = head_state(state)
    whole = audit_rows(state)
    assert whole["is_whole"]
    assert whole["read"] == plain["read"]
    assert whole["classes"] == Accounting.from_state(plain["accounting"]).value()
    lines = read_lines(state / "audit", volatile["audit"])
    assert len(lines) == whole["commits"] > 5
    # A message holds one row here, so offsets say how many rows a topic gave.
    topics = {f"operations-{kind}s": kind for kind in whole["read"]}
    for line in lines:
        rows = dict.fromkeys(whole["read"], 0)
        before = {(topic, partition): offset for topic, partition, offset, *_ in line.before}
        for topic, partition, offset, *_ in line.after:
            rows[topics[topic]] += offset - before[topic, partition]
        assert rows == line.read
        assert line.difference() == dict.fromkeys(rows, 0)


def test_a_range_of_offsets_is_answered_by_the_commits_that_read_it(incident: Incident) -> None:
    state, topic = incident.folder / "state", "operations-impressions"
    _, volatile = head_state(state)
    lines = read_lines(state / "audit", volatile["audit"])
    place = (topic, 0)
    ends = [next(o for t, p, o, *_ in line.after if (t, p) == place) for line in lines]
    starts = [next(o for t, p, o, *_ in line.before if (t, p) == place) for line in lines]
    third = 2
    found = audit_rows(state, {place: starts[third]}, {place: ends[third]})
    assert found["commits"] == 1
    assert not found["is_whole"]
    assert found["steps"] == list(lines[third].steps)
    wider = audit_rows(state, {place: starts[third] - 1}, {place: ends[third] + 1})
    assert wider["steps"] == [lines[third - 1].steps[0], lines[third + 1].steps[1]]
    assert set(wider["difference"].values()) == {0}
    assert audit_rows(state, {place: ends[-1]})["commits"] == 0
    printed = run_cli("audit", "--state", str(state), "--from", f"{topic}:0={starts[third]}")
    assert "classes are changes" in printed
    assert "difference" in printed


def test_an_event_is_learned_in_the_step_that_read_it(incident: Incident) -> None:
    state, files = incident.folder / "state", incident.files
    warm = sum(1 for _ in incident.small_run.steps(0, incident.small_run.warm_rows, files))
    steps = list(incident.small_run.steps(incident.small_run.warm_rows, None, files))
    clicks = dict(
        zip(*(files.clicks[name].to_pylist() for name in ("impression_id", "event_id")), strict=True)
    )
    shown_in = {
        name: at for at, step in reversed(list(enumerate(steps))) for name in step.arrivals.impression_id
    }
    clicked_in = {
        name: at for at, step in reversed(list(enumerate(steps))) for name in step.clicks.impression_id
    }
    both = [name for name in clicked_in if clicked_in[name] > shown_in.get(name, 10**9)]
    name = both[len(both) // 2]
    found = audit_event(state, name)
    assert [one["task"] for one in found["predicted"]] == ["click", "conversion"]
    rows = [(one["row"], one["label"], one["step"]) for one in found["learned"] if one["task"] == "click"]
    assert rows == [("first", 0.0, warm + shown_in[name]), ("positive", 1.0, warm + clicked_in[name])]
    # The release holds the step, and the one before does not.
    releases = audit_rows(state)["releases"]
    own = next(one["release"] for one in found["learned"] if one["row"] == "positive")
    later = int(own.rsplit("-", 1)[1])
    assert later > warm + clicked_in[name]
    place = releases.index(own)
    assert place == 0 or int(releases[place - 1].rsplit("-", 1)[1]) <= warm + clicked_in[name]
    by_click = audit_event(state, clicks[name])["as_outcome"]
    assert [one["step"] for one in by_click] == [warm + clicked_in[name]]
    assert f"step {warm + clicked_in[name]}" in run_cli("audit", "--state", str(state), "--event", name)
    unknown = CliRunner().invoke(cli, ["audit", "--state", str(state), "--event", "nobody"])
    assert unknown.exit_code == 3


def test_a_ledger_that_was_changed_is_refused(incident: Incident, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(incident.folder / "state", state)
    (path,) = (state / "audit").glob("commits-*.jsonl")
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join([text[0], text[1].replace('"epoch": 1', '"epoch": 2'), *text[2:]]))
    with pytest.raises(StaleStateError, match="changed or removed"):
        audit_rows(state)
    path.write_text("".join(text[:-1]))
    with pytest.raises(StaleStateError, match="last line"):
        audit_rows(state)
    path.write_text("".join([*text, "the half of a li"]))
    assert set(audit_rows(state)["difference"].values()) == {0}


# Metrics -------------------------------------------------------------------------------------------------


class Page(dict[str, Any]):
    """Families of metrics by name."""

    def value(self, name: str, **labels: str) -> float:
        family = self[name.removesuffix("_total")]
        (found,) = [one.value for one in family.samples if one.name == name and one.labels == labels]
        return float(found)


def scraped(port: int) -> Page:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return Page({family.name: family for family in families})


def test_metrics_say_what_the_worker_knows_and_the_documents_list_them(
    incident: Incident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = incident.config.stream.model_copy(update={"metrics": "127.0.0.1:0"})
    config = incident.config.model_copy(update={"stream": stream, "breaker": BREAKER})
    worker = incident.worker(tmp_path, config=config)
    port = worker.metrics.port
    assert port is not None
    pages: list[Page] = []
    monkeypatch.setattr(worker.tracking, "published", lambda release: pages.append(scraped(port)))
    worker.run()
    (page,) = pages
    assert page.value("ctrstream_breaker_open") == 1
    assert page.value("ctrstream_lag_alarm") == page.value("ctrstream_stalled") == 0
    assert 0 < page.value("ctrstream_hold_rows") <= worker.breaker.held_rows
    assert 0 < page.value("ctrstream_committed_step") <= worker.loop.step_number
    assert page.value("ctrstream_rows_unaccounted", kind="click") == 0
    classes = [one for one in page["ctrstream_rows"].samples if one.labels["kind"] == "impression"]
    read = page.value("ctrstream_rows_read_total", kind="impression")
    assert read == sum(one.value for one in classes) > 0
    # Every row that was learned has passed each stage once.
    counts = {
        sample.labels["stage"]: sample.value
        for sample in page["ctrstream_freshness_seconds"].samples
        if sample.name.endswith("_count")
    }
    assert counts["joined"] == counts["learned"] == counts["committed"] == counts["published"] > 1_000
    (sums,) = [
        sums for key, sums in worker.loop.progressive.trailing(24).items() if key == ("click", "student")
    ]
    ne = page.value("ctrstream_quality_ne", task="click", predictor="student", maturity="mature", hours="24")
    assert ne == pytest.approx(sums.value()["ne"])
    told = (DOCS / "operations.md").read_text()
    assert set(re.findall(r"^\| `(ctrstream_\w+?)(?:_total)?`", told, re.MULTILINE)) == set(page)
    with pytest.raises(OSError, match="refused"):
        scraped(port)


def test_an_address_in_use_is_told(incident: Incident, tmp_path: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        stream = incident.config.stream.model_copy(update={"metrics": f"127.0.0.1:{other.getsockname()[1]}"})
        config = incident.config.model_copy(update={"stream": stream})
        with pytest.raises(SetupError, match="cannot serve metrics"):
            incident.worker(tmp_path, config=config)


def test_logs_as_json_are_one_object_a_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--log-format", "json", "checkpoint", "list", str(tmp_path)])
    assert result.exit_code == 3
    from jobs.json_logs import JsonFormatter

    record = logging.makeLogRecord(
        {"levelname": "INFO", "name": "n", "msg": "a %s", "args": ("b",), "figures": {"x": 1}}
    )
    told = json.loads(JsonFormatter().format(record))
    assert (told["message"], told["figures"], told["level"]) == ("a b", {"x": 1}, "INFO")
