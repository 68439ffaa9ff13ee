"""The scoring endpoint over real HTTP: answers, hot reload, refusals, its logs and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from click.testing import CliRunner

from jobs.cli import cli
from jobs.release import Release, point
from jobs.release_watch import ReleaseWatch
from jobs.scoring_app import create_app
from jobs.serve import ServeProcess, listen
from jobs.served_log import ServedLog
from pipelines.errors import DataError, StaleStateError
from tests.releases import impressions, publish

DEADLINE_S = 30.0


class Scorer:
    """The application over two releases, the older one in service, on a real socket in a thread."""

    def __init__(self, folder: Path) -> None:
        self.releases, self.folder = folder / "releases", folder / "serve"
        self.old, self.new = publish(self.releases, 10), publish(self.releases, 20)
        point(self.releases, "CURRENT", self.old.name)
        self.served, self.loaded = self.folder / "served.jsonl", self.folder / "loaded.jsonl"
        self.client = httpx.Client(timeout=DEADLINE_S, trust_env=False)

    @contextlib.contextmanager
    def running(self) -> Iterator[Scorer]:
        served = ServedLog(self.served)
        app = create_app(ReleaseWatch(self.releases, self.loaded), served, reload_every=50)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        listening = listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join()
            listening.close()

    def url(self, path: str) -> str:
        return f"{self.address}{path}"

    def score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        answer = self.client.post(self.url("/score"), json={"impressions": rows})
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def health(self) -> dict[str, Any]:
        document: dict[str, Any] = self.client.get(self.url("/healthz")).json()
        return document


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Scorer]:
    made = Scorer(tmp_path)
    with made.running(), made.client:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    """For tests that change nothing."""
    made = Scorer(tmp_path_factory.mktemp("shared"))
    with made.running(), made.client:
        yield made


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- answers ----


@pytest.mark.parametrize("count", [1, 64])
def test_answers_are_what_the_release_says(shared: Scorer, count: int) -> None:
    rows = impressions(count, seed=3)
    answer = shared.score(rows)
    release = Release.load(shared.old)
    expected = release.score(release.encode(rows))
    assert answer["release"] == shared.old.name
    assert [row["impression_id"] for row in answer["impressions"]] == [row["impression_id"] for row in rows]
    for task, scored in expected.items():
        served = [row["tasks"][task] for row in answer["impressions"]]
        np.testing.assert_allclose([row["logit"] for row in served], scored.logit, atol=1e-6)
        np.testing.assert_allclose([row["probability"] for row in served], scored.probability, atol=1e-6)


def test_healthz_and_release_say_what_is_served(shared: Scorer) -> None:
    health = shared.health()
    release = Release.load(shared.old)
    assert (health["status"], health["release"], health["digest"], health["problem"]) == (
        "ok",
        shared.old.name,
        release.digest(),
        None,
    )
    assert health["age_s"] >= 0
    manifest = shared.client.get(shared.url("/release")).json()
    assert manifest == json.loads((shared.old / "MANIFEST.json").read_text())


def test_metrics_count_requests_and_name_the_release(shared: Scorer) -> None:
    shared.score(impressions(3))
    page = shared.client.get(shared.url("/metrics")).text
    assert 'ctrstream_requests_total{code="200"}' in page
    assert f'ctrstream_release_info{{release="{shared.old.name}"}} 1.0' in page
    assert "ctrstream_score_seconds_bucket" in page


ONE = {"impression_id": "a", "user_id": "u", "item_id": "i", "event_time": 1}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"impressions": []}, ["impressions", "at least 1", "Received: []"]),
        ({"impressions": [{**ONE, "user_id": 5}]}, ["impressions.0.user_id", "valid string", "Received: 5"]),
        (
            {"impressions": [ONE, {**ONE, "event_time": "now"}]},
            ["impressions.1.event_time", "Received: 'now'"],
        ),
        ({"impressions": [{**ONE, "postion": 3}]}, ["impressions.0.postion", "expected", "position"]),
        (
            {"impressions": [{**ONE, "features": {"x": {}}}]},
            ["features.x", "a list of strings", "Received: {}"],
        ),
        ({"impressions": [{**ONE, "features": {"age": "old"}}]}, ["age is numeric", "'old'"]),
        ({"impressions": [ONE] * 1001}, ["at most 1000"]),
        ({"rows": [ONE]}, ["impressions: Field required"]),
    ],
)
def test_a_bad_request_is_told_what_was_expected_and_received(
    shared: Scorer, body: dict[str, Any], words: list[str]
) -> None:
    answer = shared.client.post(shared.url("/score"), json=body)
    assert answer.status_code == 422
    assert all(word in answer.json()["error"] for word in words), answer.text


def test_a_body_that_is_not_json_or_holds_nan_is_refused(shared: Scorer) -> None:
    answer = shared.client.post(shared.url("/score"), content=b"{")
    assert (answer.status_code, "Invalid JSON" in answer.text) == (422, True)
    text = json.dumps({"impressions": [{**ONE, "features": {"age": float("nan")}}]})
    assert shared.client.post(shared.url("/score"), content=text).status_code == 422


def test_a_body_that_is_too_large_is_refused(shared: Scorer) -> None:
    answer = shared.client.post(shared.url("/score"), content=b" " * (5 << 20))
    assert (answer.status_code, "at most 4194304 bytes" in answer.text) == (413, True)
    assert shared.score(impressions(1))["release"] == shared.old.name


# ---- reload ----


def test_a_new_release_is_taken_up_while_requests_go_on_each_answered_by_one_release(scorer: Scorer) -> None:
    rows, releases, stop = impressions(16), [], threading.Event()
    expected = {}
    for path in (scorer.old, scorer.new):
        release = Release.load(path)
        expected[path.name] = release.score(release.encode(rows))["click"].logit

    def ask() -> None:
        while not stop.is_set():
            answer = scorer.score(rows)
            logits = [row["tasks"]["click"]["logit"] for row in answer["impressions"]]
            np.testing.assert_allclose(logits, expected[answer["release"]], atol=1e-6)
            releases.append(answer["release"])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        wait_until(lambda: len(releases) > 5)
        point(scorer.releases, "CURRENT", scorer.new.name)
        wait_until(lambda: releases[-1] == scorer.new.name)
    finally:
        stop.set()
        thread.join()
    assert releases == sorted(releases), "answers went back to the older release"
    loaded = lines(scorer.loaded)
    assert [line["release"] for line in loaded] == [scorer.old.name, scorer.new.name]
    assert loaded[0]["loaded_at_ms"] < loaded[1]["loaded_at_ms"]
    assert loaded[1]["last_event_time"] == 1_700_000_000_020


def test_a_damaged_release_is_refused_said_and_the_old_one_goes_on(scorer: Scorer) -> None:
    weights = scorer.new / "click" / "student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    point(scorer.releases, "CURRENT", scorer.new.name)
    wait_until(lambda: scorer.health()["status"] == "held back")
    assert "click/student.safetensors: expected the sha256" in scorer.health()["problem"]
    assert scorer.score(impressions(1))["release"] == scorer.old.name
    later = publish(scorer.releases, 30)
    point(scorer.releases, "CURRENT", later.name)
    wait_until(lambda: scorer.health()["release"] == later.name)
    assert scorer.health()["problem"] is None


def test_serving_goes_back_only_when_the_pointer_says_rollback(scorer: Scorer) -> None:
    point(scorer.releases, "CURRENT", scorer.new.name)
    wait_until(lambda: scorer.health()["release"] == scorer.new.name)
    (scorer.releases / "CURRENT").write_text(f"{scorer.old.name}\n")
    wait_until(lambda: scorer.health()["status"] == "held back")
    assert "without saying rollback" in scorer.health()["problem"]
    assert scorer.health()["release"] == scorer.new.name
    (scorer.releases / "CURRENT").write_text(f"{scorer.new.name}\n")
    wait_until(lambda: scorer.health()["status"] == "ok")
    arguments = ["release", "rollback", "--releases", str(scorer.releases), scorer.old.name]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    wait_until(lambda: scorer.health()["release"] == scorer.old.name)


def test_a_pointer_that_has_gone_leaves_the_release_in_service(scorer: Scorer) -> None:
    (scorer.releases / "CURRENT").unlink()
    wait_until(lambda: scorer.health()["status"] == "held back")
    assert scorer.score(impressions(1))["release"] == scorer.old.name


def test_a_release_that_predicts_nan_never_comes_into_service(tmp_path: Path) -> None:
    good = publish(tmp_path, 1)
    point(tmp_path, "CURRENT", good.name)
    watch = ReleaseWatch(tmp_path)
    broken = publish(tmp_path, 2, bias=float("nan"))
    point(tmp_path, "CURRENT", broken.name)
    assert not watch.poll()
    assert watch.problem is not None
    assert "not a finite logit" in watch.problem or "NaN" in watch.problem
    assert watch.current.release.name == good.name


def test_a_refused_release_is_tried_again_later(tmp_path: Path) -> None:
    good, late = publish(tmp_path, 1), publish(tmp_path, 2)
    point(tmp_path, "CURRENT", good.name)
    now = 0
    watch = ReleaseWatch(tmp_path, clock=lambda: now)
    hidden = late.rename(tmp_path / "elsewhere")
    (tmp_path / "CURRENT").write_text(f"{late.name}\n")
    assert not watch.poll()
    hidden.rename(late)
    assert not watch.poll(), "at once would mean reading a damaged release over and over"
    now = 60_000
    assert watch.poll()
    assert (watch.current.release.name, watch.problem, watch.refusals) == (late.name, None, 1)


# ---- the log and the process ----


def test_every_answer_is_in_the_log_after_a_clean_end(tmp_path: Path) -> None:
    scorer, rows = Scorer(tmp_path), impressions(40)
    with scorer.running(), scorer.client:
        answers = [scorer.score([row]) for row in rows[:20]] + [scorer.score(rows[20:])]
    logged = lines(scorer.served)
    assert [line["impression"] for line in logged] == rows
    served = [(row["impression_id"], row["tasks"]) for answer in answers for row in answer["impressions"]]
    assert served == [
        (
            line["impression"]["impression_id"],
            {
                task: {"logit": line["logit"][task], "probability": line["probability"][task]}
                for task in line["logit"]
            },
        )
        for line in logged
    ]
    release = Release.load(scorer.old)
    encoded = release.encode(rows)
    np.testing.assert_array_equal([line["buckets"] for line in logged], encoded.buckets)
    np.testing.assert_array_equal(np.array([line["numbers"] for line in logged], np.float32), encoded.numbers)
    assert {line["request_id"] for line in logged[20:]} == {answers[-1]["request_id"]}


def test_a_process_that_was_killed_leaves_a_log_that_the_next_one_goes_on_with(tmp_path: Path) -> None:
    point(tmp_path, "CURRENT", publish(tmp_path, 1).name)
    process = ServeProcess(tmp_path / "serve", tmp_path)

    def score(count: int) -> None:
        body = {"impressions": impressions(count)}
        answer = httpx.post(f"{process.url}/score", json=body, timeout=DEADLINE_S, trust_env=False)
        assert answer.status_code == 200

    with process.start():
        score(2)
        wait_until(lambda: process.served.stat().st_size > 0)
        process.kill()
        with process.served.open("ab") as file:
            file.write(b'{"torn')
        process.start()
        score(1)
    text = process.served.read_text().splitlines()
    assert [line.startswith('{"request_id"') for line in text] == [True, True, False, True]
    assert len(lines(process.loaded)) == 2


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "serve", *arguments], capture_output=True, text=True, check=False
    )


def test_a_port_in_use_is_one_message_and_exit_code_1(tmp_path: Path) -> None:
    point(tmp_path, "CURRENT", publish(tmp_path, 1).name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command("--releases", str(tmp_path), "--port", port, "--log", str(tmp_path / "served.jsonl"))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_release_is_one_message_with_a_remedy_and_exit_code_3(tmp_path: Path) -> None:
    done = command("--releases", str(tmp_path), "--port", "0", "--log", str(tmp_path / "served.jsonl"))
    assert done.returncode == 3
    assert "there is no release to serve" in done.stderr
    assert "hint: " in done.stderr
    with pytest.raises(DataError):
        ReleaseWatch(tmp_path)


def test_a_damaged_release_at_the_start_is_refused(tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    point(tmp_path, "CURRENT", path.name)
    (path / "config.toml").write_text("")
    with pytest.raises(StaleStateError, match=r"config\.toml"):
        ReleaseWatch(tmp_path)


def test_the_address_is_printed_and_sigterm_ends_the_server_cleanly(tmp_path: Path) -> None:
    point(tmp_path, "CURRENT", publish(tmp_path, 1).name)
    log_path = tmp_path / "out" / "served.jsonl"
    arguments = ["serve", "--releases", str(tmp_path), "--port", "0", "--log", str(log_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    rows = {"impressions": impressions(5)}
    assert httpx.post(f"{url}/score", json=rows, timeout=DEADLINE_S, trust_env=False).status_code == 200
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(DEADLINE_S) in (0, -signal.SIGTERM)
    process.stdout.close()
    assert len(lines(log_path)) == 5
