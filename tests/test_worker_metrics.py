"""What a worker on a real broker tells: metrics and logs."""

from __future__ import annotations

import json
import logging
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from jobs.cli import cli
from pipelines.errors import SetupError
from tests.incident import BREAKER, DOCS, Incident


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
