"""A real Spark standalone cluster of three processes, started from the jars inside pyspark."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pyspark

from jobs.child_process import Server, free_port

HOST = "127.0.0.1"
_SPARK_HOME = Path(pyspark.__file__).parent
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class SparkCluster:
    """A running cluster.

    Attributes
    ----------
    master : str
        ``spark://HOST:PORT``.
    page : str
        Address of the master's page.
    folder : Path
        For logs.
    """

    master: str
    page: str
    folder: Path

    def state(self) -> dict[str, Any]:
        """What the master knows of workers and applications."""
        with urllib.request.urlopen(f"{self.page}/json/", timeout=10) as answer:
            state: dict[str, Any] = json.load(answer)
        return state

    def alive_workers(self) -> int:
        """Workers that have registered; none while the master does not answer, or not yet with its state.

        The master's page is up before what it serves is: until then it answers, but with no JSON.
        """
        try:
            return int(self.state()["aliveworkers"])
        except (OSError, HTTPException, json.JSONDecodeError):
            return 0

    def settings(self, events: Path) -> dict[str, str]:
        """Settings of an application: small, quick to start, with an event log."""
        events.mkdir()
        return {
            "spark.driver.host": HOST,
            "spark.executor.memory": "700m",
            "spark.executor.cores": "1",
            "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1",
            "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
            "spark.sql.shuffle.partitions": "2",
            # Both executors are there before the first task, or one of them might do all the work.
            "spark.scheduler.minRegisteredResourcesRatio": "1.0",
            "spark.eventLog.enabled": "true",
            "spark.eventLog.compress": "false",
            "spark.eventLog.dir": events.as_uri(),
            "spark.ui.enabled": "false",
        }


@contextmanager
def spark_cluster(folder: Path, workers: int = 2) -> Iterator[SparkCluster]:
    """A master and workers of one core each; all end with this process, whatever ends that."""
    port, page = free_port(HOST), free_port(HOST)
    cluster = SparkCluster(f"spark://{HOST}:{port}", f"http://{HOST}:{page}", folder)
    with ExitStack() as running:
        master = _daemon(folder, "master", port, "--port", str(port), "--webui-port", str(page))
        running.enter_context(master)
        for number in range(workers):
            name, place = f"worker-{number}", free_port(HOST)
            arguments = ["--cores", "1", "--memory", "1g", "--port", str(place), "--webui-port", "0"]
            work = ["--work-dir", str(folder / name)]
            running.enter_context(_daemon(folder, name, place, *arguments, *work, cluster.master))
        master.wait_ready(lambda: cluster.alive_workers() == workers, _TIMEOUT_S)
        yield cluster


def _daemon(folder: Path, name: str, port: int, *arguments: str) -> Server:
    kind = name.partition("-")[0]
    command = [
        str(_SPARK_HOME / "bin" / "spark-class"),
        f"org.apache.spark.deploy.{kind}.{kind.capitalize()}",
        *("--host", HOST),
        *arguments,
    ]
    environment = {
        **os.environ,
        "SPARK_HOME": str(_SPARK_HOME),
        "SPARK_LOCAL_IP": HOST,
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": "-XX:TieredStopAtLevel=1",
        "PYSPARK_PYTHON": sys.executable,
    }
    return Server.start(name, command, folder=folder, port=port, environment=environment, tied=True)


def tasks_by_worker(events: Path) -> dict[str, int]:
    """Successful tasks by address of the worker that ran them, from an application's event log."""
    worker: dict[str, str] = {}
    tasks: dict[str, int] = {}
    for path in sorted(events.rglob("events_*")) or sorted(events.rglob("app-*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["Event"] == "SparkListenerExecutorAdded":
                address = event["Executor Info"]["Log Urls"]["stdout"].partition("/logPage")[0]
                worker[event["Executor ID"]] = address
                tasks.setdefault(address, 0)
            elif event["Event"] == "SparkListenerTaskEnd" and event["Task End Reason"]["Reason"] == "Success":
                tasks[worker[event["Task Info"]["Executor ID"]]] += 1
    return tasks
