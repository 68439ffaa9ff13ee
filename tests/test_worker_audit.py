"""Answers from the ledger of a worker on a real broker."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.audit import audit_event, audit_rows
from jobs.audit_log import read_lines
from jobs.cli import cli
from jobs.state_head import head_state
from monitoring.accounting import Accounting
from pipelines.errors import StaleStateError
from tests.incident import Incident, run_cli


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
