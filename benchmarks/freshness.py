"""How long it takes from an event to the release that has learned it being served, and what memory does.

::

    make bench-freshness ARGS='--seconds 300 --rate 2000 --out runs/freshness'

A simulated log is sent to a real broker at a steady rate; the worker, a process of its own, learns, commits
and publishes every two seconds; the scoring endpoint, another, takes each new release. An event counts from
its reaching the broker until the first release that has learned from it, or a later one, is loaded by the
endpoint. Resident memory of the worker and of the endpoint, and how far the worker is behind, are looked at
every second; ``memory.png`` shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil

from benchmarks.first_releases import train_first
from jobs.broker import Broker
from jobs.demo_live import _wait_for_worker, _wait_until_learned
from jobs.demo_recovery import start_worker
from jobs.freshness import freshness_report
from jobs.produce import produce
from jobs.serve import ServeProcess
from pipelines.config import Config, dump_config, load_config
from pipelines.config_sections import KafkaConfig
from pipelines.event_files import EventFiles
from pipelines.simulation_files import write_simulation
from pipelines.simulator import SimulationConfig, simulate

matplotlib.use("agg")

__all__ = ["main"]

_WARM_UP = 0.25
# Clicks and conversions come on top of the impressions.
_EVENTS_PER_IMPRESSION = 1.1
# The first minute fills caches and tables.
_SETTLED_S = 60.0
_MIB = 2**20


class Watch(threading.Thread):
    """Looks at the resident memory (MiB) of some processes every second, until stopped."""

    def __init__(self, processes: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self.at: list[float] = []
        self.resident: dict[str, list[float]] = {name: [] for name in processes}
        self._ended = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(1.0):
            try:
                found = {name: _resident(one) for name, one in self._processes.items()}
            except psutil.NoSuchProcess:
                return
            self.at.append(time.monotonic() - began)
            for name, value in found.items():
                self.resident[name].append(value)

    def stop(self) -> None:
        """End and wait."""
        self._ended.set()
        self.join()


def _resident(process: psutil.Process) -> float:
    """MiB of a process and of those that it has started."""
    parts = [process, *process.children(recursive=True)]
    return float(sum(part.memory_info().rss for part in parts if part.is_running()) / _MIB)


def memory_lines(watch: Watch) -> list[str]:
    """What memory did after the first minute, a line a process."""
    at = np.array(watch.at)
    settled = at >= min(_SETTLED_S, at[-1] / 2)
    lines = []
    for name, values in watch.resident.items():
        later = np.array(values)[settled]
        slope = float(np.polyfit(at[settled], later, 1)[0]) * 60
        lines.append(
            f"{name}: {later[0]:,.0f} MiB after a minute, {later[-1]:,.0f} at the end, "
            f"at most {later.max():,.0f}; {slope:+.1f} MiB a minute"
        )
    return lines


def plot(watch: Watch, path: Path) -> None:
    """Resident memory over time."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, values in watch.resident.items():
        axes.plot(watch.at, values, label=name)
    axes.set(xlabel="seconds", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def measure(out: Path, rate: int, seconds: int) -> dict[str, Any]:
    """Run everything; returns ``freshness.json`` and prints what memory did."""
    impressions = round(rate * seconds / _EVENTS_PER_IMPRESSION / (1 - _WARM_UP))
    simulation = simulate(SimulationConfig(impressions=impressions, days=2.0))
    (out / "log").mkdir(parents=True)
    write_simulation(simulation, out / "log")
    files, config = EventFiles(out / "log"), load_config(None, ["stream.keep_releases=1000"])
    work = out / "training"
    work.mkdir()
    releases, trained = train_first(out / "log", config, work, _WARM_UP)
    releases.rename(out / "releases")
    with Broker(out / "kafka").start() as broker:
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap_servers)
        config = trained.first.settle(config).model_copy(update={"kafka": kafka})
        (out / "config.toml").write_text(dump_config(config), encoding="utf-8")
        warm = int(np.searchsorted(files.arrival_time, trained.warm_up_until))
        produce(files, config, stop=warm)
        return _live(out, config, files, warm, rate, seconds)


def _live(out: Path, config: Config, files: EventFiles, warm: int, rate: int, seconds: int) -> dict[str, Any]:
    with ServeProcess(out / "serve", out / "releases").start() as server:
        worker = start_worker(out, out / "releases", out / "worker", until_end=False, track=False)
        try:
            _wait_for_worker(out / "worker", worker.pid)
            watch = Watch({"worker": worker.pid, "endpoint": _endpoint_pid(out)})
            began = time.time()
            watch.start()
            report = produce(files, config, start=warm, stop=warm + rate * seconds, rate=rate)
            _wait_until_learned(out / "worker", config)
            watch.stop()
            worker.send_signal(signal.SIGTERM)
            worker.communicate(timeout=120)
        finally:
            if worker.poll() is None:
                worker.kill()
        time.sleep(2 * config.serve.reload_every / 1000)
    sent = sum(report.rows.values())
    print(f"{sent:,} events in {report.seconds:.0f} s, {sent / report.seconds:,.0f} a second")
    for line in memory_lines(watch):
        print(line)
    plot(watch, out / "memory.png")
    return freshness_report(out / "releases", server.loaded, since_ms=round(began * 1000))


def _endpoint_pid(out: Path) -> int:
    (record,) = (out / "serve").glob("serv*.json")
    return int(json.loads(record.read_text(encoding="utf-8"))["pid"])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--rate", type=int, default=2000, help="events a second")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/freshness"), help="a folder that is not there yet"
    )
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    given.out.mkdir(parents=True)
    report = measure(given.out, given.rate, given.seconds)
    for stage, figures in report["stages"].items():
        p50, p95, p99 = (figures[name] for name in ("p50_s", "p95_s", "p99_s"))
        print(f"{stage:<19} p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s, {figures['rows']:,} events")


if __name__ == "__main__":
    main()
