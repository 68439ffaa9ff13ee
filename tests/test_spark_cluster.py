"""The sample jobs run unchanged on a cluster of several processes and give what they give on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyspark
import pytest

from jobs.samples_build import build
from jobs.samples_ingest import ingest
from pipelines.config import Config, Task
from pipelines.events import KINDS
from pipelines.lake import lake_batches
from pipelines.simulation_config import SimulationConfig
from pipelines.simulation_files import write_simulation
from pipelines.simulator import simulate
from pipelines.snapshot import read_rows
from tests.spark_cluster import HOST, SparkCluster, spark_cluster, tasks_by_worker

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DAY_MS = 86_400_000
SIMULATION = SimulationConfig(impressions=2_000, days=0.25)
AS_OF = SIMULATION.start + DAY_MS // 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    with spark_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def run(cluster: SparkCluster, launcher: list[str], *arguments: str) -> str:
    environment = {**os.environ, "SPARK_LOCAL_IP": HOST, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


def conf(settings: dict[str, str], option: str) -> list[str]:
    return [text for key, value in settings.items() for text in (option, f"{key}={value}")]


@pytest.mark.timeout(600)  # eight JVMs start: about a minute on two free cores, several on busy ones
def test_ingest_and_build_on_a_cluster_equal_those_on_one_machine(
    spark: SparkSession, cluster: SparkCluster, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    write_simulation(simulate(SIMULATION), log)
    ingest(spark, tmp_path / "lake", Config(), events=log)
    expected = build(spark, tmp_path / "lake", tmp_path / "snapshots", AS_OF, DAY_MS // 4, Config())

    shared = f"file://{tmp_path}/shared"
    ctrstream = [sys.executable, "-m", "jobs.cli"]
    on_cluster = ["--master", cluster.master, *conf(cluster.settings(tmp_path / "ingest"), "--spark-conf")]
    run(
        cluster, ctrstream, "samples", "ingest", "--lake", f"{shared}/lake", "--events", f"file://{log}",
        *on_cluster,
    )  # fmt: skip
    (local,), (remote,) = lake_batches(tmp_path / "lake"), lake_batches(f"{shared}/lake")
    assert remote.model_copy(update={"attempt": local.attempt}) == local
    assert all(local.rows[kind] > 0 for kind in KINDS)

    # The other way to a cluster: spark-submit settles master and settings, and runs our entry file.
    entry = run(cluster, ctrstream, "spark-entry").strip()
    submit = [str(Path(pyspark.__file__).parent / "bin" / "spark-submit"), "--master", cluster.master]
    submit += [*conf(cluster.settings(tmp_path / "build"), "--conf"), entry]
    printed = run(
        cluster, submit, "samples", "build", "--lake", f"{shared}/lake", "--out", f"{shared}/snapshots",
        "--window", "6h", "--as-of", "2026-01-05T06:00:00Z",
    )  # fmt: skip
    built = printed.strip().splitlines()[-1]
    assert built == f"{shared}/snapshots/{Path(expected).name}"
    least: dict[Task, int] = {"click": 1_900, "conversion": 100}
    for task, rows in least.items():
        here, there = (read_rows(place, task).sort_by("sample_id") for place in (expected, built))
        assert here.equals(there)
        assert len(here) > rows
    for name in ("ingest", "build"):
        tasks = tasks_by_worker(tmp_path / name)
        assert len(tasks) == 2
        assert min(tasks.values()) > 0
