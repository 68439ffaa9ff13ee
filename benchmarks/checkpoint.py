"""What a commit costs: whole tables against the rows that changed, and how long learning stops for it.

::

    make bench-checkpoint ARGS='--rows 1000000 --dim 16 --touched 0.01'

One student's tables: embeddings, first-order weights and the accumulator of each. Between two commits a
share of the rows, drawn evenly, changes: the worst case for the hashing of blocks. Each commit is written,
synced and made the head; a *full* one copies, hashes and writes all, a *delta* what changed. The pause is the
time in which the learning thread copies; the rest is the committing thread's.

While deltas are committed in a thread, the learning thread goes on touching rows. Its longest turn beside a
commit and alone tells what the commit takes from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.checkpoint import CheckpointStore
from jobs.commit_thread import CommitThread
from jobs.single_thread import use_one_thread
from models.student import Student
from models.table_rows import TableRows
from pipelines.config_sections import StudentConfig
from pipelines.feature_spec import Categorical, FeatureSpec

__all__ = ["main"]

Changes = tuple[dict[str, NDArray[Any]], dict[str, TableRows]]


def make_student(rows: int, dim: int) -> Student:
    spec = FeatureSpec(categorical=(Categorical(name="item_id", buckets=rows),))
    return Student.create(spec, StudentConfig(model="fm", embedding_dim=dim))


def touch(student: Student, share: float, rng: np.random.Generator, hot: int | None = None) -> list[float]:
    """Draw a share of all rows, of the first ``hot`` if given, and change them by the optimizers alone.

    In batches of 256; returns the ms of each.
    """
    turns, batch = [], 256
    optimizers = student.table_optimizers()
    size = len(student.weights["embedding"])
    for _ in range(max(int(size * share) // batch, 1)):
        began = time.perf_counter()
        rows = torch.from_numpy(rng.integers(1, hot or size, batch))
        for name, optimizer in optimizers.items():
            optimizer.step(rows, torch.full((batch, *student.weights[name].shape[1:]), 0.1))
        turns.append((time.perf_counter() - began) * 1000)
    return turns


def commit(store: CheckpointStore, step: int, changes: Changes) -> None:
    arrays, tables = changes
    store.commit(step, arrays, {"step": step}, tables=tables, cursor=[], outputs=[], volatile={})


def whole(student: Student) -> Changes:
    student.take_changes()
    return student.state(), {}


def measure(root: Path, student: Student, share: float, commits: int, take: Any) -> dict[str, float]:
    """Commits one after the other: medians of the pause, of all of it, and of the bytes written."""
    store = CheckpointStore(root, keep=2, deltas=commits)
    store.open()
    student.load_state(student.state())  # so that the first commit holds whole tables
    rng, pauses, totals, sizes = np.random.default_rng(1), [], [], []
    for step in range(commits + 1):
        touch(student, share, rng)
        began = time.perf_counter()
        changes = take(student)
        paused = time.perf_counter()
        commit(store, step, changes)
        if step:  # the first is a base whichever way
            pauses.append((paused - began) * 1000)
            totals.append(time.perf_counter() - began)
            sizes.append(size_of(store.folder / store.names()[-1]))
    return {
        "mib": round(float(np.median(sizes)) / 2**20, 2),
        "seconds": round(float(np.median(totals)), 4),
        "pause_p50_ms": round(float(np.median(pauses)), 2),
        "pause_p99_ms": round(float(np.quantile(pauses, 0.99)), 2),
    }


def measure_thread(root: Path, student: Student, share: float, commits: int) -> dict[str, float]:
    """The worker's way: deltas and bases in a thread, learning going on beside them."""
    store, thread = CheckpointStore(root, keep=2, deltas=16), CommitThread()
    store.open()
    student.load_state(student.state())  # so that the first commit holds whole tables
    rng, pauses, beside = np.random.default_rng(2), [], list[float]()
    alone = touch(student, 10 * share, rng)
    began = time.perf_counter()
    for step in range(commits):
        taken = time.perf_counter()
        changes = student.take_changes()
        thread.start(lambda step=step, changes=changes: commit(store, step, changes))  # type: ignore[misc]
        if step:
            pauses.append((time.perf_counter() - taken) * 1000)
        turns = touch(student, share, rng)
        while not thread.is_free():
            # As long as it takes: of a few rows, so that it does not add to what changes.
            turns += touch(student, share / 10, rng, hot=2560)
        if step:
            beside += turns
    return {
        "commits": commits,
        "commits_a_second": round(commits / (time.perf_counter() - began), 2),
        "pause_p50_ms": round(float(np.median(pauses)), 2),
        "pause_p99_ms": round(float(np.quantile(pauses, 0.99)), 2),
        "turn_alone_p50_ms": round(float(np.median(alone)), 3),
        "turn_beside_p50_ms": round(float(np.median(beside)), 3),
        "turn_beside_p99_ms": round(float(np.quantile(beside, 0.99)), 3),
        "turn_beside_max_ms": round(max(beside), 3),
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--touched", type=float, default=0.01, help="share of the rows between two commits")
    parser.add_argument("--commits", type=int, default=20)
    options = parser.parse_args()
    use_one_thread()
    student = make_student(options.rows, options.dim)
    found: dict[str, Any] = {"rows": options.rows, "dim": options.dim, "touched": options.touched}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        common = (student, options.touched, options.commits)
        found["full"] = measure(root / "full", *common, whole)
        found["delta"] = measure(root / "delta", *common, Student.take_changes)
        found["in_a_thread"] = measure_thread(root / "thread", *common)
        began = time.perf_counter()
        CheckpointStore(root / "delta").load()
        found["load_and_verify_s"] = round(time.perf_counter() - began, 3)
        found["chain"] = options.commits
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
