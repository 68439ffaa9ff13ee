"""Dynamic tables: what they cost beside hashed ones, and that their memory stays bounded while ids churn.

::

    make bench-tables                        # rows a second
    make bench-tables ARGS='--memory 3600'   # half an hour with a TTL, half without

Traffic goes through days: three times as much at noon as at midnight. Every day brings new users and items;
an id is drawn by how popular it is and by its age, half as often with each day. A batch is predicted,
its ids are seen, it is learned from, as in the worker; encoding is left out, for it is the same for both.

Memory is that of a process which does this and nothing else, at each hour of event time. The run without a
TTL has room for all ids that come. Both append to ``memory.jsonl``; ``memory.png`` shows them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from jobs.single_thread import use_one_thread
from models.learn_batch import LearnBatch
from models.student import Student
from pipelines.config_sections import StudentConfig
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.feature_spec import Categorical, FeatureSpec
from pipelines.hashing import mix

__all__ = ["main"]

_BATCH = 256
_FIELDS = 10
_CHURNING = ("user_id", "item_id")
_FOREVER = "100000d"
_STYLES: dict[str, dict[str, Any]] = {
    "without": {"label": "without TTL", "color": "#b4620f", "linestyle": (0, (5, 2))},
    "ttl": {"label": "TTL of 2 days", "color": "#1f5fa8", "linestyle": "-"},
}


@dataclass(frozen=True)
class Batch:
    """Rows of one moment."""

    buckets: NDArray[np.int32]
    ids: NDArray[np.int64]
    label: NDArray[np.float64]
    now: int


class Traffic:
    """Batches without end.

    Parameters
    ----------
    rows_a_day : int
    new_ids : int
        Of each churning field, each day.
    """

    def __init__(self, rows_a_day: int, new_ids: int, seed: int = 1) -> None:
        self.spec = FeatureSpec(
            categorical=tuple(
                Categorical(name=name, buckets=65_536)
                for name in (*_CHURNING, *(f"c{n}" for n in range(_FIELDS - len(_CHURNING))))
            ),
            dynamic=_CHURNING,
        )
        self._rows_a_day, self._new_ids = rows_a_day, new_ids
        self._noise = np.random.default_rng(seed)
        self._offsets = np.array(self.spec.offsets, np.int64)

    def batches(self) -> Iterator[Batch]:
        now = 1000.0 * DAY_MS
        while True:
            hour = now % DAY_MS / HOUR_MS
            now += DAY_MS / self._rows_a_day * _BATCH / (1.0 - 0.5 * np.cos(hour / 12.0 * np.pi))
            yield self._batch(int(now))

    def _batch(self, now: int) -> Batch:
        noise = self._noise
        born = now // DAY_MS - (noise.geometric(0.5, (_BATCH, len(_CHURNING))) - 1)
        popular = (self._new_ids * noise.random((_BATCH, len(_CHURNING))) ** 3).astype(np.int64)
        number = (born * self._new_ids + popular) * len(_CHURNING) + np.arange(len(_CHURNING))
        keys = mix(np.full(number.size, 7, np.uint64), number.ravel().astype(np.uint64)).reshape(number.shape)
        stable = noise.zipf(1.3, (_BATCH, _FIELDS - len(_CHURNING))) % 65_535
        inside = np.concatenate([(keys % np.uint64(65_535)).astype(np.int64), stable], axis=1) + 1
        likely = 0.1 + 0.4 * (popular[:, 0] % 2)
        label = (noise.random(_BATCH) < likely).astype(np.float64)
        return Batch((inside + self._offsets).astype(np.int32), keys.view(np.int64), label, now)


def make_student(spec: FeatureSpec, **tables: Any) -> Student:
    return Student.create(spec, StudentConfig.model_validate({"tables": tables}))


def step(student: Student, batch: Batch) -> None:
    """What the worker does with a batch."""
    none = np.zeros((_BATCH, 0), np.float32)
    one = np.ones(_BATCH)
    student.predict_logit(batch.buckets, none, batch.ids)
    student.see(batch.buckets, batch.ids, batch.now)
    student.learn(
        LearnBatch(batch.buckets, none, batch.label, one, True, one * np.nan, "wait", 0.0, ids=batch.ids)
    )


def speed(batches: int, rows_a_day: int, new_ids: int) -> dict[str, Any]:
    """Rows a second of either kind, in turns, so that both see the same machine."""
    traffic = Traffic(rows_a_day, new_ids)
    students = {
        "hashed": make_student(traffic.spec, capacity=0),
        "dynamic": make_student(traffic.spec, ttl="2d"),
    }
    taken = dict.fromkeys(students, 0.0)
    for number, batch in enumerate(traffic.batches()):
        if number == 2 * batches:
            break
        for name, student in students.items():
            began = time.perf_counter()
            step(student, batch)
            # The first half fills the tables.
            taken[name] += time.perf_counter() - began if number >= batches else 0.0
    table = students["dynamic"].ids
    found: dict[str, Any] = {f"{name}_rows_s": round(batches * _BATCH / s) for name, s in taken.items()}
    found["dynamic_over_hashed_time"] = round(taken["dynamic"] / taken["hashed"], 2)
    found["ids"] = 0 if table is None else len(table)
    return found


def run_memory(kind: str, seconds: float, rows_a_day: int, new_ids: int, out: Path) -> None:
    """One run of days, for so many seconds; a line an hour of event time."""
    traffic = Traffic(rows_a_day, new_ids)
    student = make_student(
        traffic.spec, capacity=1 << 26, ttl="2d" if kind == "ttl" else _FOREVER, filter_cells=1 << 20
    )
    process, began, first, hour, rows = psutil.Process(), time.perf_counter(), 0, -1, 0
    with (out / "memory.jsonl").open("a", encoding="utf-8") as file:
        for batch in traffic.batches():
            step(student, batch)
            rows, first = rows + _BATCH, first or batch.now
            if batch.now // HOUR_MS != hour and student.ids is not None:
                hour = batch.now // HOUR_MS
                line = {
                    "run": kind,
                    "day": round((batch.now - first) / DAY_MS, 4),
                    "rows": rows,
                    "rss_mib": round(process.memory_info().rss / 2**20, 1),
                    "ids": len(student.ids),
                    "id_rows": student.ids.slots,
                }
                file.write(json.dumps(line) + "\n")
                if time.perf_counter() - began > seconds:
                    return


def memory(seconds: float, rows_a_day: int, new_ids: int, out: Path) -> dict[str, Any]:
    """Both runs, each in a process of its own, and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.jsonl").unlink(missing_ok=True)
    for kind in _STYLES:
        subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.tables", "--run", kind, "--out", str(out)),
                *("--memory", str(seconds / len(_STYLES))),
                *("--rows-a-day", str(rows_a_day), "--new-ids", str(new_ids)),
            ],
            check=True,
        )
    lines = [json.loads(line) for line in (out / "memory.jsonl").read_text(encoding="utf-8").splitlines()]
    runs = {kind: [line for line in lines if line["run"] == kind] for kind in _STYLES}
    plot(runs, out / "memory.png")
    return {kind: summary(found) for kind, found in runs.items()}


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a run was at its middle and at its end, and how its memory grew between."""
    middle, last = lines[len(lines) // 2], lines[-1]
    days = last["day"] - middle["day"]
    return {
        "days": last["day"],
        "rows": last["rows"],
        "rss_mib": [middle["rss_mib"], last["rss_mib"]],
        "ids": [middle["ids"], last["ids"]],
        "mib_a_day_since_the_middle": round((last["rss_mib"] - middle["rss_mib"]) / days, 2) if days else 0.0,
    }


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for kind, lines in runs.items():
        days = [line["day"] for line in lines]
        above.plot(days, [line["rss_mib"] for line in lines], **_STYLES[kind])
        below.plot(days, [line["ids"] / 1000 for line in lines], **_STYLES[kind])
    above.set_ylabel("resident memory, MiB")
    above.margins(y=0.3)
    below.set_ylabel("ids with a row, thousands")
    below.set_xlabel("days of event time")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    canvas.print_figure(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--batches", type=int, default=1500, help="measured, after as many to fill the tables"
    )
    parser.add_argument("--memory", type=float, help="seconds of both runs together, instead of the speed")
    parser.add_argument("--rows-a-day", type=int, default=200_000, help="of event time")
    parser.add_argument("--new-ids", type=int, default=50_000, help="a day and field")
    parser.add_argument("--out", type=Path, default=Path("runs/tables-memory"))
    parser.add_argument("--run", choices=list(_STYLES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    use_one_thread()
    traffic = (options.rows_a_day, options.new_ids)
    if options.run is not None:
        run_memory(options.run, options.memory, *traffic, options.out)
    elif options.memory is not None:
        print(json.dumps(memory(options.memory, *traffic, options.out), indent=1))
    else:
        print(json.dumps(speed(options.batches, *traffic), indent=1))


if __name__ == "__main__":
    main()
