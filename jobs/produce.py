"""`ctrstream produce`: send an event log to Kafka, in its order of arrival."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from jobs.options import UtcTime, bootstrap_option, config_options

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.config_sections import KafkaConfig
    from pipelines.event_files import EventFiles

__all__ = ["ProduceReport", "command", "produce"]

Format = Literal["json", "packed"]
Progress = Callable[[str, int, int], None]

# Rows encoded at a time. kafka-python does not bound what waits to be sent, so at most two blocks do.
_BLOCK_ROWS = {"json": 16_384, "packed": 65_536}
# Large batches: most of the cost of a request does not depend on its size.
_LINGER_MS, _BATCH_BYTES = 50, 512 * 1024
# With a rate, a block is what is due in so many seconds: the stream is as smooth as that.
_PACE_S = 0.02
# Longer than kafka-python itself tries to deliver a message.
_ACKNOWLEDGE_TIMEOUT_S = 130.0
_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ProduceReport:
    """What was sent: rows by topic (malformed ones with their topic), messages, and seconds of wall time."""

    rows: dict[str, int]
    messages: int
    seconds: float


def produce(
    files: EventFiles,
    config: Config,
    *,
    start: int = 0,
    stop: int | None = None,
    rate: float | None = None,
    form: Format = "json",
    progress: Progress = lambda stage, done, total: None,
) -> ProduceReport:
    """Send rows ``[start, stop)`` of a log; topics that do not exist are created.

    The partition follows from the impression id alone and is the same in all topics. Rows that are no events
    are sent as they are, with the time at which they became known in a header.

    Parameters
    ----------
    files : EventFiles
    config : Config
    start, stop : int
        Places in the order of ``files``.
    rate : float, optional
        Rows a second; without it, as fast as it goes.
    form : {"json", "packed"}
        One event a message, or up to 256 neighbours of one partition.
    progress : callable
        Called with stage, rows done, rows in all.

    Raises
    ------
    TransientError
        If no broker answers, or it does not acknowledge what was sent.
    SetupError
        If a topic exists with another number of partitions.
    """
    from jobs.produce_messages import block_messages
    from jobs.topics import ensure_topics
    from pipelines.events import TOPICS
    from pipelines.kafka_client import client_options, make_producer

    kafka = config.kafka
    topics = [str(getattr(kafka.topics, name)) for name in TOPICS]
    stop = files.rows if stop is None else min(stop, files.rows)
    wanted = dict.fromkeys(topics, kafka.partitions) | {kafka.topics.dead_letters: 1}
    linger_ms = _LINGER_MS if rate is None else 1000 * _PACE_S / 4
    producer = make_producer(kafka, linger_ms=linger_ms, batch_size=_BATCH_BYTES)
    began = time.monotonic()
    rows: Counter[str] = Counter(dict.fromkeys(topics, 0))
    messages, done, waiting = 0, start, _Unacknowledged(kafka)
    try:
        ensure_topics(kafka.bootstrap_servers, wanted, client_options(kafka))
        for block in files.blocks(start, stop, _block_rows(form, rate)):
            if rate is not None:
                time.sleep(max(began + (done - start) / rate - time.monotonic(), 0.0))
            sent = []
            for message in block_messages(files, block, topics, kafka.partitions, form):
                sent.append(message.send(producer))
                rows[message.topic] += message.rows
            waiting.replace(sent)
            messages, done = messages + len(sent), done + len(block)
            progress("produce", done - start, stop - start)
        waiting.replace([])
    finally:
        producer.close(timeout=_CLOSE_TIMEOUT_S)
    return ProduceReport(dict(rows), messages, time.monotonic() - began)


def _block_rows(form: Format, rate: float | None) -> int:
    return _BLOCK_ROWS[form] if rate is None else max(1, min(round(rate * _PACE_S), _BLOCK_ROWS[form]))


class _Unacknowledged:
    """The messages of the last block: waited for while the next is on its way."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._sent: list[Any] = []

    def replace(self, sent: list[Any]) -> None:
        """Wait for the messages before these."""
        from kafka.errors import KafkaError

        from pipelines.kafka_client import broker_error

        before, self._sent = self._sent, sent
        try:
            for future in before:
                future.get(timeout=_ACKNOWLEDGE_TIMEOUT_S)
        except KafkaError as error:
            raise broker_error(self._config, error) from error


@click.command()
@click.option(
    "--events",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder with impressions*.parquet or .jsonl, clicks*, conversions*.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "packed"]),
    default="json",
    show_default=True,
    help="One event a message, or up to 256 of one partition.",
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Events a second; else at once.")
@click.option("--from", "since", type=UtcTime(), help="Only what arrived at this time or later (ISO-8601).")
@click.option("--until", type=UtcTime(), help="Only what arrived before this time (ISO-8601).")
@bootstrap_option
@config_options
def command(
    folder: Path,
    form: Format,
    rate: float | None,
    since: int | None,
    until: int | None,
    bootstrap_servers: str | None,
    config: Config,
) -> None:
    """Send an event log to Kafka, in its order of arrival.

    Topics that do not exist are created. Repeated and malformed rows are sent as they are.
    """
    import numpy as np

    from jobs.terminal import progress_bar
    from pipelines.event_files import EventFiles

    if bootstrap_servers is not None:
        kafka = config.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
        config = config.model_copy(update={"kafka": kafka})
    files = EventFiles(folder)
    start, stop = (
        default if moment is None else int(np.searchsorted(files.arrival_time, moment))
        for moment, default in ((since, 0), (until, files.rows))
    )
    with progress_bar() as progress:
        report = produce(
            files, config, start=start, stop=max(start, stop), rate=rate, form=form, progress=progress
        )
    click.echo(json.dumps(asdict(report)))
