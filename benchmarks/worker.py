"""How many events a second the online worker learns from a real broker, beside loops that do less.

::

    make bench-worker ARGS='--impressions 120000'

A log of 26 categorical and 8 numeric features is sent to a broker of its own, as JSON and packed; a student
with embeddings of 16, two cross layers and an MLP learns the clicks. Timed from the first step that learns to
the last commit, on one thread: wall-clock time, of which the share of commits. Beside it on the same rows:
the bare torch loop on ready tensors (predict and learn in the same batches; nothing is read, joined,
calibrated, accounted for or kept), Vowpal Wabbit with factorised interactions and without, and River's
factorisation machine, one row at a time.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.backtest import Rows, rows_after_warm_up
from benchmarks.first_releases import train_first
from benchmarks.one_row_at_a_time import river_rate, vowpal_wabbit_rate
from benchmarks.worker_log import write_log
from jobs.broker import Broker
from jobs.produce import Format, produce
from jobs.single_thread import use_one_thread
from jobs.worker import Worker
from pipelines.config import Config, load_config
from pipelines.config_sections import KafkaConfig, TopicsConfig
from pipelines.duration import parse_duration
from pipelines.event_files import EventFiles

__all__ = ["main"]

_OTHERS_ROWS = 10_000
_WARM_UP = 0.25


@dataclass(frozen=True)
class Run:
    """What one worker did.

    Attributes
    ----------
    events, rows : int
        Events read and rows learned.
    seconds : float
        Wall-clock time from the first step that learns to the last commit.
    committing : float
        Seconds in which a commit was on its way, beside learning.
    pauses : ndarray
        Seconds for which learning stopped, by commit.
    """

    events: int
    rows: int
    seconds: float
    committing: float
    pauses: NDArray[np.float64]


def settings(frozen: bool) -> Config:
    """The model that is measured; all layers learn unless ``frozen``."""
    chosen = [
        "labels.tasks=['click']",
        "labels.policy=fnw",
        "attribution.click_window=10m",
        "student.model=dcn",
        "student.embedding_dim=16",
        "student.cross_layers=2",
        "student.batch_rows=1024",
        "student.warmup_epochs=1",
        "teacher.rounds=30",
        "replay.ratio=0",
        f"student.frozen={['cross', 'dense'] if frozen else []}".replace("'", '"'),
    ]
    return load_config(None, [text.replace("'", '"') for text in chosen])


def run_worker(config: Config, releases: Path, state: Path) -> Run:
    """One worker from the beginning of the topics to their end."""
    began, committing = [0.0, 0], []
    worker = Worker(config, releases, state, until_end=True)
    begin, commit = worker.loop.begin, worker.commits.commit

    def timed_begin(*given: Any, **named: Any) -> None:
        began[:] = [time.perf_counter(), sum(worker.loop.read.values())]
        begin(*given, **named)

    def timed_commit(*given: Any) -> None:
        start = time.perf_counter()
        commit(*given)
        if began[1]:
            committing.append(time.perf_counter() - start)

    with (
        mock.patch.object(worker.loop, "begin", timed_begin),
        mock.patch.object(worker.commits, "commit", timed_commit),
    ):
        worker.run()
    seconds = time.perf_counter() - began[0]
    events = sum(worker.loop.read.values()) - int(began[1])
    pauses = np.array(worker.pauses_ms) / 1000
    return Run(events, worker.loop.learned_events, seconds, sum(committing), pauses)


def bare_torch(rows: Rows, config: Config, frozen: bool) -> float:
    """Rows a second of predict and learn by plain torch: embeddings, cross layers, MLP, Adagrad."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    student = config.student
    buckets = torch.from_numpy(rows.features.buckets.astype(np.int64))
    numbers, label = torch.from_numpy(rows.features.numbers), torch.from_numpy(rows.label)
    table = nn.Embedding(int(buckets.max()) + 1, student.embedding_dim, sparse=True)
    wide = nn.Embedding(int(buckets.max()) + 1, 1, sparse=True)
    width = buckets.shape[1] * student.embedding_dim + numbers.shape[1]
    cross = nn.ModuleList([nn.Linear(width, width) for _ in range(student.cross_layers)])
    sizes = (width, *student.hidden)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    deep = nn.Sequential(*layers)
    last = nn.Linear(width + sizes[-1], 1)
    small = [parameter for part in (cross, deep, last) for parameter in part.parameters()]
    for parameter in small:
        parameter.requires_grad_(not frozen)
    learning = [*table.parameters(), *wide.parameters(), *([] if frozen else small)]
    optimizer = torch.optim.Adagrad(learning, lr=student.learning_rate)
    loss = nn.BCEWithLogitsLoss()

    def logit(part: slice) -> Any:
        dense = torch.cat([table(buckets[part]).flatten(1), numbers[part]], dim=1)
        crossed = dense
        for layer in cross:
            crossed = dense * layer(crossed) + crossed
        return last(torch.cat([crossed, deep(dense)], dim=1)).squeeze(1) + wide(buckets[part]).sum((1, 2))

    began = time.perf_counter()
    for start in range(0, len(rows), student.batch_rows):
        part = slice(start, start + student.batch_rows)
        with torch.no_grad():
            logit(part)
        optimizer.zero_grad()
        loss(logit(part), label[part]).backward()
        optimizer.step()
    return len(rows) / (time.perf_counter() - began)


def vowpal_wabbit(rows: Rows, options: str) -> float:
    """Rows a second of predict and learn, from parsed text."""
    lines = [
        f"{1 if clicked else -1} |a {' '.join(map(str, row[:13]))} |b {' '.join(map(str, row[13:]))}"
        for row, clicked in zip(rows.features.buckets[:_OTHERS_ROWS].tolist(), rows.label, strict=False)
    ]
    return vowpal_wabbit_rate(lines, options, time.perf_counter)


def river(rows: Rows) -> float:
    """Rows a second of predict and learn of a factorisation machine, from ready dicts."""
    from river.facto import FMClassifier

    chosen = rows.features.buckets[: _OTHERS_ROWS // 20].tolist()
    model = FMClassifier(n_factors=16, seed=1)
    return river_rate(model, chosen, rows.label[: len(chosen)].tolist(), time.perf_counter)


def main() -> None:
    """Measure all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--impressions", type=int, default=120_000)
    impressions = parser.parse_args().impressions
    use_one_thread()
    with tempfile.TemporaryDirectory(prefix="ctrstream-bench-worker-") as name:
        compare(Path(name), impressions)


def told(form: str, every: str, run: Run, bare: float) -> str:
    """A line on one worker."""
    learned = run.rows / run.seconds
    p99 = 1000 * float(np.quantile(run.pauses, 0.99)) if len(run.pauses) else 0.0
    return (
        f"worker, {form:<6}, a commit each {every} {run.events / run.seconds:>9,.0f} events/s "
        f"{learned:>9,.0f} rows learned/s {learned / bare:>6.2f} x bare; learning paused for commits "
        f"{run.pauses.sum() / run.seconds:.2%} of the time, p99 {p99:.1f} ms; "
        f"committing beside it {run.committing / run.seconds:.0%}"
    )


def compare(work: Path, impressions: int) -> None:
    """All runs on one log."""
    write_log(work / "log", impressions)
    files = EventFiles(work / "log")
    with Broker(work / "broker").start() as broker:
        made = {form: _produced(files, form, broker.bootstrap_servers) for form in _FORMS}
        for frozen in (True, False):
            config = settings(frozen)
            folder = work / ("frozen" if frozen else "full")
            folder.mkdir()
            releases, result = train_first(work / "log", config, folder, _WARM_UP)
            rows = rows_after_warm_up(result, files, config)
            bare = bare_torch(rows, config, frozen)
            print(f"\n{folder.name} training; bare torch loop: {bare:,.0f} rows/s")
            for form, kafka in made.items():
                for every in ("2s", "1d"):
                    stream = config.stream.model_copy(update={"publish_every": parse_duration(every)})
                    own = folder / f"{form}-{every}"
                    shutil.copytree(releases, own / "releases")
                    chosen = config.model_copy(update={"kafka": kafka, "stream": stream})
                    run = run_worker(chosen, own / "releases", own / "state")
                    print(told(form, every, run, bare), flush=True)
    print("\none row at a time, rows/s:")
    for title, options in (("linear", ""), ("-q ab", "-q ab"), ("--lrq ab16", "--lrq ab16")):
        print(f"vowpal wabbit {title:<11} {vowpal_wabbit(rows, options):>9,.0f}")
    print(f"river FMClassifier        {river(rows):>9,.0f}")


_FORMS: tuple[Format, ...] = ("json", "packed")


def _produced(files: EventFiles, form: Format, servers: str) -> KafkaConfig:
    topics = TopicsConfig(**{kind: f"{form}-{kind}" for kind in TopicsConfig.model_fields})
    kafka = KafkaConfig(bootstrap_servers=servers, topics=topics)
    report = produce(files, Config(kafka=kafka), form=form)
    print(f"sent {form}: {sum(report.rows.values()):,} events in {report.seconds:.1f} s")
    return kafka


if __name__ == "__main__":
    main()
