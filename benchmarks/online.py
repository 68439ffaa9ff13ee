"""What online learning is worth on a real log, and what each part of it adds.

::

    make bench-online ARGS='--events FOLDER --task conversion --set attribution.attribution_window=1d'
    make bench-online ARGS='--events FOLDER --task click --only retrained'

Every line is a whole backtest of the log: train on its first quarter, then predict each impression before
anything later is known, and learn. One part is changed at a time: replay, frozen layers, distillation, the
label policy. Beside the student stand the models that do not learn online: the teacher and the first student,
both frozen, and ``retrained``: the teacher fitted again every hour of event time to all that was known by
then, calibrated, and taken to be ready at once. Judged on windows that have closed: log loss (nats), AUC and
PCOC, predicted over observed (1 is right). Seconds are of the whole backtest, or of all the fits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.retraining import retrained_probability
from jobs.backtest import Backtest, run_backtest
from jobs.evaluation import evaluate
from pipelines.config import Config, Task, load_config
from pipelines.config_sections import Policy
from pipelines.duration import parse_duration
from pipelines.event_files import EventFiles

__all__ = ["main"]

# The parts, but for the policies: what changes, and how it is told.
_PARTS = {
    "replay.ratio=0": "no replay",
    "replay.ratio=1": "replay 1 : 1",
    "student.frozen=[]": "nothing frozen",
    "distillation.weight=0": "no distillation",
    "distillation.weight=1": "distillation 1 : 1",
}


def row(title: str, figures: dict[str, Any], seconds: float | None = None) -> str:
    """A line of the table."""
    told = [f"{figures['log_loss']:.4f}", f"{figures['auc']:.4f}", f"{figures['pcoc']:.3f}"]
    return f"| {' | '.join([title, *told, '' if seconds is None else f'{seconds:.0f}'])} |"


def judged(predictions: pa.Table, files: EventFiles, config: Config, task: Task) -> dict[str, Any]:
    """Figures by predictor, over the windows that have closed."""
    found = evaluate(predictions, files.tables, config.attribution).metrics[task]
    return dict(found["by_maturity"]["mature"])


def run(files: EventFiles, config: Config) -> tuple[Backtest, float]:
    """A backtest and its seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        result = run_backtest(config, files, Path(out))
    return result, time.monotonic() - began


def variants(base: list[str], policies: list[str]) -> Iterator[tuple[str, Config]]:
    """Title and configuration of each change."""
    for change, title in _PARTS.items():
        yield title, load_config(None, [*base, change])
    for policy in policies:
        yield f"policy {policy}", load_config(None, [*base, f"labels.policy={policy}"])


def retrained_row(
    result: Backtest, files: EventFiles, config: Config, task: Task, every: int
) -> tuple[str, dict[str, Any], float]:
    """Title, figures and seconds of the teacher fitted again and again."""
    own = result.predictions.filter(pc.equal(pc.cast(result.predictions["task"], pa.string()), task))
    began = time.monotonic()
    probability, fits = retrained_probability(
        own, files, result.first.student, result.loop.config, task, every
    )
    seconds = time.monotonic() - began
    place = own.schema.get_field_index("probability")
    replaced = own.set_column(place, "probability", pa.array(probability, own.schema.field(place).type))
    known = np.isfinite(probability)
    figures = judged(replaced.filter(pa.array(known)), files, config, task)
    return f"teacher fitted {fits} times", figures["student"], seconds


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--task", choices=("click", "conversion"), required=True)
    parser.add_argument("--every", default="1h", help="event time between two fits of the teacher")
    parser.add_argument("--policies", nargs="*", default=list(get_args(Policy)), choices=get_args(Policy))
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", choices=("parts", "retrained"))
    given = parser.parse_args()
    files, task = EventFiles(given.events), given.task
    print(f"{given.events.name}, task {task}\n")
    print("| model | log loss | AUC | PCOC | s |\n|---|---|---|---|---|")
    base = [f"labels.tasks=['{task}']", *given.settings]
    config = load_config(None, base)
    result, seconds = run(files, config)
    figures = judged(result.predictions, files, config, task)
    policy = result.loop.config.policy(task)
    print(row(f"online, default (policy {policy})", figures["student"], seconds))
    print(row("the same, uncalibrated", figures["student_uncalibrated"]))
    print(row("first student, frozen", figures["stale"]))
    print(row("teacher, frozen", figures["teacher"]), flush=True)
    if given.only != "parts":
        title, own, seconds = retrained_row(result, files, config, task, parse_duration(given.every))
        print(row(title, own, seconds), flush=True)
    if given.only != "retrained":
        for title, changed in variants(base, given.policies):
            result, seconds = run(files, changed)
            own = judged(result.predictions, files, changed, task)["student"]
            print(row(title, own, seconds), flush=True)


if __name__ == "__main__":
    main()
