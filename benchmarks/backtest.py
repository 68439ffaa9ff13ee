"""How fast the backtest learns online on one core, where the time goes, and what a bare loop needs.

::

    make bench-backtest ARGS='--impressions 200000'

Everything is timed in one run on one thread, in seconds of processor time, so that a busy machine changes
little: the loop of `jobs.backtest` with the share of each part; a bare torch loop (embeddings, MLP, Adagrad)
on ready tensors of the same rows in batches of the same size, which joins nothing, calibrates nothing and
knows every label at once; Vowpal Wabbit and river (logistic regression) on the first of the same rows, where
they are installed.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.one_row_at_a_time import river_rate, vowpal_wabbit_rate
from jobs import backtest, prepared
from jobs.backtest import Backtest, run_backtest
from jobs.online import OnlineLoop
from pipelines.config import Config, load_config
from pipelines.event_files import EventFiles
from pipelines.features import Encoded, encode
from pipelines.outcomes import latest_arrival, outcomes_as_of
from pipelines.simulation_files import write_simulation
from pipelines.simulator import SimulationConfig, simulate

__all__ = ["main"]

# What the loop does in a step, and where. The rest is bookkeeping: replay, progressive figures, accounting.
_PARTS = {"_predict": "predict", "_join": "join", "_learn": "learn", "_calibrate": "calibrate"}
_OTHERS_ROWS = 20_000


@dataclass(frozen=True)
class Rows:
    """Impressions after the warm-up as ready arrays; ``label`` (n,) is 1 where there was a click."""

    features: Encoded
    label: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.label)


def simulated_log(impressions: int) -> Path:
    """A simulated log in the temporary folder; made once."""
    config = SimulationConfig(impressions=impressions)
    folder = Path(tempfile.gettempdir()) / f"ctrstream-bench-{config.impressions}-{config.seed}"
    if not (folder / "truth.parquet").exists():
        print(f"simulating {impressions:,} impressions into {folder}")
        write_simulation(simulate(config), folder)
    return folder


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, adding the seconds that it takes to ``seconds[name]``."""

    def run(*given: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return function(*given, **named)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - began

    return run


def run_loop(config: Config, files: EventFiles) -> tuple[Backtest, dict[str, float]]:
    """The backtest, and the seconds of its online part: ``online``, and of each part of it."""
    seconds: dict[str, float] = {}
    replay, prepare = backtest._replay, prepared.prepare

    def with_timers(*given: Any) -> Any:
        # From here on: what the warm-up prepares and joins is not what is asked about.
        with ExitStack() as patches:
            for name, part in _PARTS.items():
                original = getattr(OnlineLoop, name)
                patches.enter_context(mock.patch.object(OnlineLoop, name, timed(seconds, part, original)))
            patches.enter_context(mock.patch.object(prepared, "prepare", timed(seconds, "prepare", prepare)))
            return timed(seconds, "online", replay)(*given)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(backtest, "_replay", with_timers):
        return run_backtest(config, files, Path(folder)), seconds


def rows_after_warm_up(result: Backtest, files: EventFiles, config: Config) -> Rows:
    """What the loop learned the click task from, with the labels that it ended up with."""
    shown = files.impressions
    shown = shown.filter(files.impression_arrival_time >= result.warm_up_until)
    outcome = outcomes_as_of(files.tables, config.attribution, latest_arrival(files.tables))["click"]
    clicked = set(np.asarray(outcome.impression_id)[outcome.label > 0].tolist())
    label = np.array([name in clicked for name in shown["impression_id"].to_pylist()], np.float32)
    first = result.first.student
    return Rows(encode(shown, first.spec, first.segments), label)


def bare_torch(rows: Rows, config: Config) -> float:
    """Rows a second of predict and learn with nothing around it."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    student = config.student
    buckets = torch.from_numpy(rows.features.buckets.astype(np.int64))
    numbers = torch.from_numpy(rows.features.numbers)
    label = torch.from_numpy(rows.label)
    table = nn.Embedding(int(buckets.max()) + 1, student.embedding_dim, sparse=True)
    inputs = buckets.shape[1] * student.embedding_dim + numbers.shape[1]
    sizes = (inputs, *student.hidden)
    layers = [
        layer
        for size, following in itertools.pairwise(sizes)
        for layer in (nn.Linear(size, following), nn.ReLU())
    ]
    network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
    optimizer = torch.optim.Adagrad([*table.parameters(), *network.parameters()], lr=student.learning_rate)
    loss = nn.BCEWithLogitsLoss()
    began = time.process_time()
    for start in range(0, len(rows), student.batch_rows):
        part = slice(start, start + student.batch_rows)
        optimizer.zero_grad()
        embedded = table(buckets[part]).flatten(1)
        logit = network(torch.cat([embedded, numbers[part]], dim=1)).squeeze(1)
        loss(logit, label[part]).backward()
        optimizer.step()
    return len(rows) / (time.process_time() - began)


def vowpal_wabbit(rows: Rows) -> float:
    """Rows a second of predict and learn, one row at a time, from parsed text."""
    lines = [
        f"{1 if clicked else -1} |f {' '.join(map(str, row))}"
        for row, clicked in zip(rows.features.buckets[:_OTHERS_ROWS].tolist(), rows.label, strict=False)
    ]
    return vowpal_wabbit_rate(lines, "", time.process_time)


def river(rows: Rows) -> float:
    """Rows a second of predict and learn of a logistic regression, one row at a time, from ready dicts."""
    from river.linear_model import LogisticRegression

    chosen = rows.features.buckets[:_OTHERS_ROWS].tolist()
    return river_rate(LogisticRegression(), chosen, rows.label[: len(chosen)].tolist(), time.process_time)


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backtest", description=__doc__.split("\n")[0])
    parser.add_argument("--impressions", type=int, default=200_000)
    impressions = parser.parse_args().impressions
    config = load_config(None, ["attribution.attribution_window=24h"])
    files = EventFiles(simulated_log(impressions))
    result, seconds = run_loop(config, files)
    online = seconds.pop("online")
    events, learned = result.events / online, result.loop.learned_events / online
    print(f"wall time: {', '.join(f'{name} {wall:.1f} s' for name, wall in result.seconds.items())}")
    print(f"online: {result.events:,} events in {online:.1f} s: {events:,.0f} events/s on one core")
    print(
        f"        {result.loop.learned_events:,} rows, {len(result.loop.tasks)} tasks: {learned:,.0f} rows/s"
    )
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    for name, taken in [*parts, ("rest", online - sum(seconds.values()))]:
        print(f"        {name:<10} {taken / online:6.1%}")
    rows = rows_after_warm_up(result, files, config)
    others: dict[str, Callable[[], float]] = {
        "bare torch": lambda: bare_torch(rows, config),
        "vowpal wabbit": lambda: vowpal_wabbit(rows),
        "river": lambda: river(rows),
    }
    for name, run in others.items():
        try:
            found = run()
        except ModuleNotFoundError:
            print(f"{name}: not installed (make setup-bench)")
            continue
        print(f"{name}: {found:,.0f} rows/s, {found / learned:.2f} x the whole loop")


if __name__ == "__main__":
    main()
