"""How fast a published log is read: a generated one in the layout of Criteo's attribution log.

::

    make bench-formats ARGS='--rows 1000000'

Runs ``ctrstream samples ingest --format criteo-attribution`` in a process of its own, start of Spark and
write of the lake included, and prints lines a second of wall-clock and of processor time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from pipelines.adapter_criteo import ATTRIBUTION_COLUMNS

__all__ = ["main", "write_log"]

_DAYS = 30
_BATCH = 1_000_000


def write_log(path: Path, rows: int, seed: int = 1) -> None:
    """Write a log of 30 days: 36 % of the impressions clicked, 5 % followed by a conversion."""
    rng = np.random.default_rng(seed)
    options = pc.WriteOptions(delimiter="\t", quoting_style="none", include_header=False)
    with path.open("wb") as file:
        file.write("\t".join(ATTRIBUTION_COLUMNS).encode() + b"\n")
        for begin in range(0, rows, _BATCH):
            n = min(_BATCH, rows - begin)
            second = np.sort(rng.integers(0, _DAYS * 86_400, n))
            bought = rng.random(n) < 0.05
            clicked = bought | (rng.random(n) < 0.33)
            columns = {
                "timestamp": second,
                "uid": rng.integers(0, 6_000_000, n),
                "campaign": rng.integers(0, 700, n) * 40_009,
                "conversion": bought.astype(np.int8),
                "conversion_timestamp": np.where(bought, second + rng.integers(0, 2_000_000, n), -1),
                "conversion_id": np.where(bought, rng.integers(0, 32_000_000, n), -1),
                "attribution": (bought & (rng.random(n) < 0.5)).astype(np.int8),
                "click": clicked.astype(np.int8),
                "click_pos": np.where(bought, 0, -1),
                "click_nb": np.where(bought, 1, -1),
                "cost": np.round(rng.random(n) * 1e-3, 6),
                "cpo": np.round(rng.random(n), 6),
                "time_since_last_click": np.where(rng.random(n) < 0.5, -1, rng.integers(0, 2_590_000, n)),
                **{f"cat{k}": rng.integers(0, 50 * 4**k, n) * 97 for k in range(1, 10)},
            }
            pc.write_csv(pa.table(columns).select(ATTRIBUTION_COLUMNS), file, options)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--master", default="local[2]")
    parser.add_argument("--spark-conf", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "log").mkdir()
        write_log(folder / "log" / "log.tsv", given.rows)
        size = (folder / "log" / "log.tsv").stat().st_size
        command = [sys.executable, "-m", "jobs.cli", "samples", "ingest", "--format", "criteo-attribution"]
        command += ["--lake", str(folder / "lake"), "--events", str(folder / "log"), "--master", given.master]
        for setting in given.spark_conf:
            command += ["--spark-conf", setting]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    report = json.loads(done.stdout)
    print(
        f"{given.rows} lines, {size / 1e6:.0f} MB -> {report['rows']}, {report['dead_letters']} dead letters"
    )
    print(f"{seconds:.1f} s, {cpu:.1f} s of processor time, {given.master}")
    print(f"{given.rows / seconds:,.0f} lines a second; {given.rows / cpu:,.0f} a second of processor time")


if __name__ == "__main__":
    main()
