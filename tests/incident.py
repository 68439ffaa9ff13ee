"""A log with an incident in Kafka, and workers over it: for the tests of what operators see and do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from click.testing import CliRunner

from jobs.audit import audit_rows
from jobs.broker import Broker
from jobs.checkpoint import state_digest
from jobs.cli import cli
from jobs.online_state import loop_state
from jobs.produce import produce
from jobs.state_head import head_state
from jobs.worker import Worker
from monitoring.accounting import Accounting
from pipelines.config import Config
from pipelines.config_sections import BreakerConfig
from pipelines.event_files import EventFiles
from tests.small_run import SmallRun
from tests.workers import ready_worker, with_topics

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
        config = self.config.model_copy(update={"breaker": options.pop("breaker", BREAKER)})
        return ready_worker(self.small_run, folder, options.pop("config", config), **options)


def silent_log(small_run: SmallRun, folder: Path, silent: tuple[int, int]) -> EventFiles:
    folder.mkdir()
    for name, table in zip(("impressions", "clicks", "conversions"), small_run.files.tables, strict=True):
        arrival = table["arrival_time"]
        keep = pc.or_(pc.less(arrival, silent[0]), pc.greater_equal(arrival, silent[1]))
        pq.write_table(table if name == "impressions" else table.filter(keep), folder / f"{name}.parquet")
    shutil.copy(small_run.events / "malformed.jsonl", folder)
    return EventFiles(folder)


def make_incident(small_run: SmallRun, broker: Broker, folder: Path) -> Incident:
    """Send the log and read it without a breaker."""
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
