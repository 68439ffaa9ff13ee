"""How long and how large a build of samples is, beside DuckDB doing the same join on the same files.

::

    make bench-samples ARGS='--millions 1 3 10'

For each size: a lake of 30 days (clicks 30 %, conversions 5 % of the impressions), then in processes of
their own, one after the other: DuckDB's join; the same join by Spark, which a build begins with
(`benchmarks.samples_join`); `samples build` as of the last day, which encodes, sorts, counts and describes as
well; `samples build` as of the day before, and from that `samples relabel`. With an attribution window of
twelve hours two of the 30 days are built again. All must find the same rows and positives. Printed are
wall-clock seconds, seconds of processor time, peak memory of all processes together, and ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.samples_data import START, write_lake
from pipelines.duration import DAY_MS
from pipelines.snapshot import read_manifest

__all__ = ["main"]

_DAYS = 30
_WINDOW_MS = DAY_MS // 2
_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    output: str


def measure(command: list[str]) -> Measured:
    """Run a command; time and memory of it and all its children.

    Raises
    ------
    SystemExit
        If it fails; its words are shown.
    """
    began = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, cpu, done = [0.0], {}, threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL_S):
            total = 0.0
            try:
                tree = [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for one in tree:
                try:
                    total += one.memory_full_info().pss
                    used = one.cpu_times()
                    cpu[one.pid] = used.user + used.system
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-3000:]}")
    return Measured(seconds, sum(cpu.values()), peak[0] / 2**20, output)


def lake_of(millions: float) -> Path:
    """A lake in the temporary folder; made once."""
    folder = Path(tempfile.gettempdir()) / f"ctrstream-bench-samples-{millions:g}m"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_lake(folder, int(millions * 1_000_000), days=_DAYS)
        (folder / "complete").touch()
    return folder


def samples(*arguments: str, threads: int) -> list[str]:
    """A samples command on this machine's cores."""
    master = ["--master", f"local[{threads}]", "--set", f"attribution.attribution_window={_WINDOW_MS}ms"]
    return [sys.executable, "-m", "jobs.cli", "samples", *arguments, *master]


def counts_of(snapshot: str) -> dict[str, list[int]]:
    """Rows and positives of each task."""
    tasks = read_manifest(snapshot).tasks
    return {task: [summary.rows, round(summary.positives)] for task, summary in tasks.items()}


def compare(millions: float, work: Path, threads: int) -> dict[str, Measured]:
    """All runs at one size, checked against each other."""
    lake = lake_of(millions)
    last = START + _DAYS * DAY_MS

    def join(name: str) -> Measured:
        command = [sys.executable, "-m", f"benchmarks.samples_{name}", str(lake), str(work / name)]
        command += ["--as-of", str(last), "--since", str(START), "--threads", str(threads)]
        return measure([*command, "--attribution-window", str(_WINDOW_MS)])

    runs = {name: join(name) for name in ("duckdb", "join")}

    def build(out: str, day: int, days: int) -> Measured:
        moment = f"2026-01-{day:02d}T00:00:00Z" if day <= 31 else "2026-02-01T00:00:00Z"
        options = ["--lake", str(lake), "--out", str(work / out), "--as-of", moment, "--window", f"{days}d"]
        return measure(samples("build", *options, "--spec", str(spec), threads=threads))

    spec = work / "features.toml"
    spec.write_text(_SPEC, encoding="utf-8")
    runs["build"] = build("whole", 31, _DAYS)
    base = build("base", 30, _DAYS - 1)
    relabel = ["--lake", str(lake), "--base", base.output.strip(), "--as-of", "2026-01-31T00:00:00Z"]
    runs["relabel"] = measure(samples("relabel", *relabel, "--window", f"{_DAYS}d", threads=threads))
    found = counts_of(runs["build"].output.strip())
    expected = json.loads(runs["duckdb"].output)
    joined = json.loads(runs["join"].output)
    again = counts_of(runs["relabel"].output.strip())
    if not found == expected == again == joined:
        raise SystemExit(f"they disagree: DuckDB {expected}, join {joined}, build {found}, relabel {again}")
    return runs


_SPEC = "\n".join(
    f'[[categorical]]\nname = "{name}"\nbuckets = {buckets}\n'
    for name, buckets in (
        ("user_id", 100_000), ("item_id", 20_000), ("ad_id", 5_000), ("campaign_id", 600), ("device", 16),
        ("site", 4_000), ("country", 128), ("os", 16), ("slot", 32), ("advertiser_id", 256),
    )
) + "\n".join(
    f'[[numeric]]\nname = "{name}"\nlow = 0.0\nhigh = {high}\nmean = {high / 2}\nstd = {high / 4}\n'
    for name, high in (("price", 20.0), ("age_days", 400.0))
)  # fmt: skip


def main() -> None:
    """Compare at each size and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--millions", type=float, nargs="+", default=[1.0, 3.0, 10.0], help="impressions, in millions"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.threads} threads; wall-clock s (processor s, peak MB)")
    names, ratios = ("DuckDB", "join", "build", "relabel"), ("join/DuckDB", "build/DuckDB", "relabel/build")
    print(f"{'millions':>9}{''.join(f'{name:>21}' for name in names)}{''.join(f'{r:>14}' for r in ratios)}")
    totals: list[tuple[float, float]] = []
    for millions in options.millions:
        with tempfile.TemporaryDirectory(prefix="ctrstream-bench-") as work:
            runs = compare(millions, Path(work), options.threads)
        cells = "".join(
            f"{f'{run.seconds:.1f} ({run.cpu_seconds:.0f}, {run.peak_mb:.0f})':>21}" for run in runs.values()
        )
        seconds = {name: run.seconds for name, run in runs.items()}
        build = seconds["build"]
        shares = (seconds["join"] / seconds["duckdb"], build / seconds["duckdb"], seconds["relabel"] / build)
        print(f"{millions:>9g}{cells}{''.join(f'{share:>14.2f}' for share in shares)}", flush=True)
        totals.append((millions, build))
    for (small, before), (large, after) in itertools.pairwise(totals):
        power = math.log(after / before) / math.log(large / small)
        print(f"from {small:g} to {large:g} million: time grows with the power {power:.2f} of the rows")


if __name__ == "__main__":
    main()
