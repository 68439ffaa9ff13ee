"""MLflow, for real: the server's life, runs, the registry, the outbox and the page in a browser."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from jobs.cli import cli
from jobs.mlflow_server import TrackingServer
from jobs.release import TaskFiles, write_release
from jobs.tracking import Tracking
from jobs.tracking_outbox import Drain, TrackingOutbox
from pipelines.errors import ConfigError, DataError, SetupError, StaleStateError, TransientError
from pipelines.feature_spec import Categorical, FeatureSpec
from tests.browser import browser_page

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)
HOUR = 3_600_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running.start()


@pytest.fixture
def tracking(server: TrackingServer, request: pytest.FixtureRequest) -> Tracking:
    return Tracking(server.uri, request.node.name, f"model-{request.node.name}")


def a_release(root: Path, step: int = 7, content: bytes = b"trees") -> Path:
    return write_release(
        root,
        kind="student",
        epoch=1,
        step=step,
        parent=None,
        spec=FeatureSpec(categorical=(Categorical(name="user_id", buckets=8),)),
        config_toml="",
        segments=("campaign_id",),
        tasks={"click": TaskFiles("student", {"student.safetensors": content}, {"kind": "identity"})},
        last_event_time=1_700_000_000_000,
        learned_events=12345,
    )


# ---- the server ----


def test_server_keeps_its_database_in_write_ahead_mode_and_in_its_own_folder(server: TrackingServer) -> None:
    with sqlite3.connect(server.database) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert server.uri.startswith("http://127.0.0.1:")


def test_server_is_one_process_bound_to_the_loopback_address(server: TrackingServer) -> None:
    pid = server.pid()
    assert pid is not None
    tether = psutil.Process(pid)
    (application,) = tether.children(recursive=True)
    listening = [c.laddr.ip for c in application.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_a_second_server_on_the_same_folder_is_refused(server: TrackingServer) -> None:
    with pytest.raises(SetupError, match="already serves"):
        TrackingServer(server.folder).start()


def test_a_port_in_use_is_a_setup_error_that_names_it(server: TrackingServer, tmp_path: Path) -> None:
    port = int(server.uri.rsplit(":", 1)[1])
    with pytest.raises(SetupError, match=f"cannot listen on 127.0.0.1:{port}"):
        TrackingServer(tmp_path).start(port)
    assert TrackingServer(tmp_path).pid() is None


def test_a_folder_that_cannot_be_written_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="not writable"):
        TrackingServer(tmp_path / "file" / "mlflow").start()


def test_record_of_a_process_that_is_gone_is_taken_as_left_over(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    record = {"name": "mlflow", "pid": gone.pid, "created": time.time(), "port": 1, "details": {}}
    (tmp_path / "mlflow.json").write_text(json.dumps(record))
    assert TrackingServer(tmp_path).pid() is None
    assert not (tmp_path / "mlflow.json").exists()


def test_a_process_number_that_was_used_again_is_not_taken_for_the_server(tmp_path: Path) -> None:
    record = {"name": "mlflow", "pid": os.getpid(), "created": 1.0, "port": 1, "details": {}}
    (tmp_path / "mlflow.json").write_text(json.dumps(record))
    server = TrackingServer(tmp_path)
    assert server.pid() is None
    server.stop()  # and must not end this very process


def test_server_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from jobs.mlflow_server import TrackingServer; import os, signal\n"
        f"TrackingServer(Path({str(tmp_path)!r})).start(wait=False)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while TrackingServer(tmp_path).pid() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert TrackingServer(tmp_path).pid() is None
    database = str(tmp_path / "mlflow.db")
    assert not [p.pid for p in psutil.process_iter() if database in _environment(p)]


def _environment(process: psutil.Process) -> str:
    try:
        return str(process.environ())
    except psutil.Error:
        return ""


def test_up_status_and_down_commands_give_the_address_and_the_documented_exit_codes(tmp_path: Path) -> None:
    data = ["--data", str(tmp_path)]
    assert CliRunner().invoke(cli, ["tracking", "status", *data]).exit_code == 1
    up = CliRunner().invoke(cli, ["tracking", "up", *data])
    try:
        assert up.exit_code == 0, up.output
        uri = up.stdout.strip()
        assert CliRunner().invoke(cli, ["tracking", "status", *data]).stdout.strip() == uri
        again = CliRunner().invoke(cli, ["tracking", "up", *data])
        assert (again.exit_code, again.stdout.strip()) == (0, uri)
    finally:
        assert CliRunner().invoke(cli, ["tracking", "down", *data]).exit_code == 0
    assert CliRunner().invoke(cli, ["tracking", "status", *data]).exit_code == 1


# ---- runs ----


def test_experiment_opens_in_model_training(tracking: Tracking) -> None:
    experiment = tracking.client().get_experiment(tracking.experiment_id())
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_worker_that_is_started_again_goes_on_with_its_run(tracking: Tracking) -> None:
    first = tracking.run("worker", {"job": "stream"}, key="worker-1")
    first.finish()
    again = Tracking(tracking.uri, tracking.experiment).run("worker", key="worker-1")
    other = tracking.run("worker", key="worker-2")
    assert again.run_id == first.run_id != other.run_id
    info = tracking.client().get_run(first.run_id)
    assert (info.info.status, info.data.tags["job"]) == ("RUNNING", "stream")


def test_metrics_keep_step_and_event_time_drop_what_is_not_finite_and_are_idempotent(
    tracking: Tracking,
) -> None:
    run = tracking.run("worker")
    rows = [("quality/ne", 0.9 - k / 1e4, k, k * HOUR) for k in range(1500)]
    rows += [("calib/pcoc", math.nan, 0, 0), ("calib/pcoc", math.inf, 1, HOUR), ("calib/pcoc", 1.0, 2, 7)]
    run.log_metrics(rows)
    run.log_metrics(rows)
    client = tracking.client()
    history = client.get_metric_history(run.run_id, "quality/ne")
    assert sorted((m.step, m.timestamp, m.value) for m in history) == [
        (k, k * HOUR, 0.9 - k / 1e4) for k in range(1500)
    ]
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "calib/pcoc")] == [(2, 1.0)]


def test_parameters_are_flat_and_the_first_value_stays(
    tracking: Tracking, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracking.run("worker")
    run.log_params({"student": {"batch_rows": 256, "hidden": (64, 32)}})
    run.log_params({"student": {"batch_rows": 512}, "labels.policy": "fnw"})
    assert tracking.client().get_run(run.run_id).data.params == {
        "student.batch_rows": "256",
        "student.hidden": "(64, 32)",
        "labels.policy": "fnw",
    }
    assert "student.batch_rows = 256" in caplog.text


def test_a_note_longer_than_mlflow_keeps_is_cut_visibly(tracking: Tracking) -> None:
    run = tracking.run("worker")
    run.note("x" * 20_000)
    note = tracking.client().get_run(run.run_id).data.tags["mlflow.note.content"]
    assert len(note) == 8000
    assert note.endswith("(cut here: longer than MLflow keeps)")


def test_files_and_figures_arrive_through_the_server(tracking: Tracking, tmp_path: Path) -> None:
    run = tracking.run("worker")
    (tmp_path / "report.html").write_text("<p>fine</p>")
    run.log_artifact(tmp_path / "report.html", "report")
    run.log_figure(PNG, "reliability")
    run.log_image(PNG, "reliability", 3, 3 * HOUR)
    fetched = tracking.client().download_artifacts(run.run_id, "report/report.html", str(tmp_path))
    assert Path(fetched).read_text() == "<p>fine</p>"
    fetched = tracking.client().download_artifacts(run.run_id, "figures/reliability.png", str(tmp_path))
    assert Path(fetched).read_bytes() == PNG
    assert any("reliability" in a.path for a in tracking.client().list_artifacts(run.run_id, "images"))
    with pytest.raises(DataError, match="There is none"):
        run.log_artifact(tmp_path / "missing.html")


def test_mlflow_being_away_is_a_transient_error(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="does not answer"):
        Tracking("http://127.0.0.1:9", "x").run("worker")


def test_a_proxy_for_the_outside_world_is_not_asked_for_the_loopback_address(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    assert tracking.run("worker").run_id
    assert os.environ["no_proxy"] == "example.org,127.0.0.1"


def test_an_empty_address_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="address of an MLflow server"):
        Tracking("", "x")


# ---- the registry ----


def test_release_is_registered_once_with_its_files_and_aliases_move(
    tracking: Tracking, tmp_path: Path
) -> None:
    run = tracking.run("worker")
    first, second = a_release(tmp_path / "releases", 7), a_release(tmp_path / "releases", 8)
    assert run.register(first, ["champion", "last_good"]) == "1"
    assert run.register(first) == "1"
    assert run.register(second, ["champion"]) == "2"
    client, model = tracking.client(), tracking.registered_model
    champion = client.get_model_version_by_alias(model, "champion")
    assert (champion.version, champion.tags["release"]) == ("2", "student-0001-0000000008")
    good = client.get_model_version_by_alias(model, "last_good")
    assert good.tags["digest"] == json.loads((first / "MANIFEST.json").read_text())["digest"]
    assert "12,345" in str(good.description)
    fetched = client.download_artifacts(run.run_id, f"releases/{first.name}", str(tmp_path))
    assert {p.name: p.read_bytes() for p in Path(fetched).rglob("*") if p.is_file()} == {
        p.name: p.read_bytes() for p in first.rglob("*") if p.is_file()
    }


def test_another_release_of_the_same_name_is_not_registered(tracking: Tracking, tmp_path: Path) -> None:
    run = tracking.run("worker")
    run.register(a_release(tmp_path / "one", content=b"trees"))
    with pytest.raises(StaleStateError, match="another release named student-0001-0000000007"):
        run.register(a_release(tmp_path / "two", content=b"other trees"))


def test_an_unknown_alias_is_refused(tracking: Tracking, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="champion, challenger, teacher, last_good"):
        tracking.run("worker").register(a_release(tmp_path), ["winner"])


# ---- the page ----


def test_page_shows_note_charts_by_section_report_and_registered_release_with_its_alias(
    tracking: Tracking, tmp_path: Path
) -> None:
    run = tracking.run("worker", {"job": "stream"})
    for hour in range(24):
        point = (hour, 1_700_000_000_000 + hour * HOUR)
        run.log_metrics([("quality/ne", 0.9 - hour / 100, *point), ("calib/pcoc", 1.0 + hour / 1000, *point)])
    run.note("## Verdict: good\n\n| figure | student | teacher |\n|---|---|---|\n| NE | 0.67 | 0.71 |\n")
    (tmp_path / "report.html").write_text("<h1>One page</h1>")
    run.log_artifact(tmp_path / "report.html")
    run.register(a_release(tmp_path / "releases"), ["champion"])
    with browser_page(width=1400, height=1200) as browser:
        page = browser.page

        def shows(url: str, *texts: str) -> None:
            page.goto(url)
            for text in texts:
                page.get_by_text(text).first.wait_for(timeout=30_000)

        shows(tracking.run_url(run.run_id), "Verdict: good", "0.71", "Model training", "calib/pcoc")
        cells = page.get_by_role("cell").all_inner_texts()
        assert {"NE", "0.67"} <= {text.strip() for text in cells}
        shows(tracking.run_url(run.run_id, "model-metrics"), "calib", "quality", "pcoc")
        page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for(timeout=30_000)
        shows(tracking.experiment_url(), "quality", "worker")
        shows(tracking.run_url(run.run_id, "artifacts/report.html"), "report.html")
        page.frame_locator("iframe").get_by_text("One page").wait_for(timeout=30_000)
        shows(tracking.model_url(), "champion", "student-0001-0000000007", "Version 1")
    assert not [url for url in browser.requests if not url.startswith((tracking.uri, "blob:", "about:"))]


# ---- the outbox ----


def test_outbox_sends_everything_in_order_and_ends_empty(server: TrackingServer, tmp_path: Path) -> None:
    release = a_release(tmp_path / "releases")
    (tmp_path / "report.html").write_text("first")
    with TrackingOutbox(tmp_path / "outbox", server.uri, "outbox", "outbox-model") as outbox:
        run = outbox.run("worker", {"job": "stream"})
        run.log_params({"seed": 17})
        run.log_metrics([("quality/ne", 0.8, 1, HOUR)])
        run.log_artifact(tmp_path / "report.html")
        (tmp_path / "report.html").write_text("changed after it was handed over")
        run.register(release, ["champion"])
        run.note("# good")
        run.finish()
        assert outbox.close(60.0) == 0
    tracking = Tracking(server.uri, "outbox", "outbox-model")
    client = tracking.client()
    (found,) = client.search_runs([tracking.experiment_id()])
    assert (found.info.status, found.data.params, found.data.metrics) == (
        "FINISHED",
        {"seed": "17"},
        {"quality/ne": 0.8},
    )
    assert found.data.tags["mlflow.note.content"] == "# good"
    fetched = client.download_artifacts(found.info.run_id, "report.html", str(tmp_path))
    assert Path(fetched).read_text() == "first"
    assert client.get_model_version_by_alias("outbox-model", "champion").run_id == found.info.run_id
    assert not list((tmp_path / "outbox" / "spool").iterdir())


def test_records_survive_a_killed_worker_and_a_server_that_is_down(tmp_path: Path) -> None:
    server = TrackingServer(tmp_path / "mlflow").start()
    uri = server.uri
    server.stop()
    program = (
        "from pathlib import Path; from jobs.tracking_outbox import TrackingOutbox; import os, signal\n"
        f"run = TrackingOutbox(Path({str(tmp_path / 'outbox')!r}), {uri!r}, 'x').run('worker')\n"
        "for k in range(5): run.log_metrics([('quality/ne', 1.0 - k / 10, k, k)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    outbox = TrackingOutbox(tmp_path / "outbox", uri, "x")
    try:
        assert outbox.pending() == 6
        outbox.run("worker").log_metrics([("quality/ne", 0.5, 5, 5)])
        assert outbox.close(0.0) == 8
        with server.start():
            assert server.uri == uri
            tracking = Tracking(uri, "x")
            Drain(tmp_path / "outbox", tracking).send_pending()
            assert outbox.pending() == 0
            (found,) = tracking.client().search_runs([tracking.experiment_id()])
            history = tracking.client().get_metric_history(found.info.run_id, "quality/ne")
            assert [(m.step, m.value) for m in history] == [(k, 1.0 - k / 10) for k in range(6)]
    finally:
        server.stop()


def test_what_mlflow_refuses_is_set_aside_and_does_not_hold_up_the_rest(
    tracking: Tracking, tmp_path: Path
) -> None:
    outbox = TrackingOutbox(tmp_path, tracking.uri, tracking.experiment)
    run = outbox.run("worker")
    run.log_metrics([("not/a/valid/name?!", 1.0, 0, 0)])
    (tmp_path / "student-0001-0000000001").mkdir()
    run.register(tmp_path / "student-0001-0000000001")
    with (tmp_path / "outbox.jsonl").open("a") as file:
        file.write('{"op": "torn\n')
    run.log_metrics([("quality/ne", 0.7, 0, 0)])
    assert outbox.close(60.0) == 0
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [("refused" in r["reason"], "no MANIFEST" in r["reason"]) for r in rejected] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    (found,) = tracking.client().search_runs([tracking.experiment_id()])
    assert found.data.metrics == {"quality/ne": 0.7}


def test_two_writers_on_one_outbox_are_refused(tmp_path: Path) -> None:
    outbox = TrackingOutbox(tmp_path, "http://127.0.0.1:9", "x")
    try:
        with pytest.raises(StaleStateError, match="another process writes"):
            TrackingOutbox(tmp_path, "http://127.0.0.1:9", "x")
    finally:
        outbox.close(0.0)


def test_a_writer_with_patience_waits_for_the_one_that_is_about_to_end(tmp_path: Path) -> None:
    first = TrackingOutbox(tmp_path, "http://127.0.0.1:9", "x")
    first.append({"op": "finish", "run": "first", "status": "FINISHED"})
    ending = threading.Timer(0.5, first.close, [0.0])
    ending.start()
    second = TrackingOutbox(tmp_path, "http://127.0.0.1:9", "x", patience_s=60.0)
    try:
        assert second.pending() == 1
    finally:
        second.close(0.0)
        ending.join()


def test_an_outbox_on_a_full_disk_says_so_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    outbox = TrackingOutbox(tmp_path, "http://127.0.0.1:9", "x")
    there, outbox._file = outbox._file, os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(SetupError, match=r"cannot write to the outbox .*: No space left on device"):
        outbox.append({"op": "finish", "run": "first", "status": "FINISHED"})
    os.close(outbox._file)
    outbox._file = there
    outbox.append({"op": "finish", "run": "first", "status": "FINISHED"})
    assert outbox.close(0.0) == 1


def test_without_an_address_nothing_is_recorded(tmp_path: Path) -> None:
    with TrackingOutbox(tmp_path / "outbox", "", "x") as outbox:
        run = outbox.run("worker")
        run.log_metrics([("quality/ne", 0.5, 0, 0)])
        run.log_figure(PNG, "reliability")
        assert outbox.pending() == 0
    assert not (tmp_path / "outbox").exists()
