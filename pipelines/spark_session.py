"""Starting Spark: one place for the settings without which event time, Arrow and our packages go wrong.

Either this process starts Spark (a laptop, or the client of a cluster), or ``spark-submit`` has started this
process and has settled master, memory and jars; docs/cluster.md tells when to use which.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError, DataError, SetupError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["is_submitted", "parse_settings", "spark_session", "stop_spark", "worker_errors"]

PACKAGES = ("pipelines", "models", "calibration", "monitoring", "jobs")
_HOST = "127.0.0.1"
_STOP_GRACE_S = 30.0
_WORKER_ERROR = re.compile(
    r"^(?:\w+\.)*errors\.DataError: (?P<message>.+?)(?:\nhint: (?P<hint>[^\n]*))?\n(?:\s|$)",
    re.MULTILINE | re.DOTALL,
)

_COMMON = {
    # Hours and dates of the lake, and every time in SQL, are UTC, wherever the machine stands.
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # Encoding is vectorised: fewer, larger batches. 10,000 rows of features are a few MB.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "10000",
    "spark.sql.parquet.compression.codec": "zstd",
    # Data becomes visible by our own commit, so that Spark's marker would only be in the way.
    "spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
    # For the same reason tasks may move their files into place at once, one rename a file instead of two.
    "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
}
_LOCAL = {
    "spark.driver.host": _HOST,
    "spark.driver.bindAddress": _HOST,
    "spark.ui.enabled": "false",
    # A shuffle of a laptop-sized window into Spark's default of 200 parts costs more than the work itself.
    "spark.sql.shuffle.partitions": str(2 * (os.cpu_count() or 1)),
    "spark.default.parallelism": str(os.cpu_count() or 1),
    "spark.sql.adaptive.coalescePartitions.parallelismFirst": "true",
    "spark.shuffle.compress": "true",
}
# A short job is over before the optimising compiler pays: without it, ingest and build of 250,000 events take
# a quarter less processor time. Of 10 million rows it takes more than it saves.
_SHORT_JIT = "-XX:TieredStopAtLevel=1"
# A job waits for its last row, not for its slowest moment.
_GARBAGE = "-XX:+UseParallelGC"
_SHORT_MEMORY_MB = 1_024
_MOST_MEMORY_MB = 6_144
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Set by spark-submit for the Python that it starts.
_SUBMITTED = "PYSPARK_GATEWAY_PORT"
# What a failed task prints on the executor is in the exception that the driver raises, too.
_LOGGING = """\
status = error
rootLogger.level = error
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{yyyy-MM-dd'T'HH:mm:ss.SSS'Z'}{UTC} %p %c{1}: %m%n
# Spark takes Python for a shell and announces this level unless it is the root's.
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
logger.executor.name = org.apache.spark.executor.Executor
logger.executor.level = off
logger.tasks.name = org.apache.spark.scheduler.TaskSetManager
logger.tasks.level = off
logger.streaming.name = org.apache.spark.sql.execution.streaming.MicroBatchExecution
logger.streaming.level = off
logger.write.name = org.apache.spark.sql.execution.datasources
logger.write.level = off
"""


def spark_session(
    app: str,
    *,
    master: str = "local[*]",
    settings: Mapping[str, str] | None = None,
    jars: Sequence[Path] = (),
    long_running: bool = False,
) -> SparkSession:
    """Start Spark, or return the session that this process already has.

    On a cluster our packages travel as a zip file; in local mode they are importable already. Executors run
    the Python that ``PYSPARK_PYTHON`` or ``spark.pyspark.python`` names, by default this one.

    Parameters
    ----------
    app : str
        Name shown by cluster managers.
    master : str
        ``local[*]``, ``spark://HOST:PORT``, ``yarn``, ``k8s://...``. Under ``spark-submit`` its own master
        is used.
    settings : mapping of str to str
        Spark settings that win over ours.
    jars : sequence of Path
        Connector jars for driver and executors. Under ``spark-submit`` they are those of its ``--jars``.
    long_running : bool
        Local mode: whether there is work for minutes, so that Java's optimising compiler and more memory
        (half of the machine, 6 GB at most) pay.

    Raises
    ------
    SetupError
        If Java is missing or too old, or the cluster does not answer.
    """
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    given = settings or {}
    builder = SparkSession.builder.appName(app)
    if is_submitted():
        submitted = _submitted_settings()
        master = submitted.get("spark.master", master)
        chosen = {key: value for key, value in _COMMON.items() if key not in submitted}
        chosen.update(given)
    else:
        builder = builder.master(master)
        chosen = _settings(_is_local(master), given, jars, long_running)
        _choose_python(_is_local(master), given)
    for key, value in chosen.items():
        builder = builder.config(key, value)
    try:
        session = builder.getOrCreate()
    except (PySparkException, OSError) as error:
        raise SetupError(
            f"Spark did not start with master {master}: {_first_line(error)}",
            hint="Spark needs Java 17 or newer (JAVA_HOME, or java on the path); its own words are above",
        ) from error
    if not _is_local(master):
        session.sparkContext.addPyFile(str(_zipped_packages()))
    return session


def is_submitted() -> bool:
    """Whether ``spark-submit`` has started this process."""
    return _SUBMITTED in os.environ


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn a `DataError` that one of our functions raised in a Spark worker into a `DataError` here.

    Spark wraps it in a traceback of both languages; the user is told what we said, and no more.
    """
    from pyspark.errors import PySparkException

    try:
        yield
    except PySparkException as error:
        found = _WORKER_ERROR.search(str(error))
        if found is None:
            raise
        raise DataError(found["message"].strip(), hint=found["hint"]) from error


def stop_spark(session: SparkSession) -> None:
    """Stop Spark and end its Java process, which `SparkSession.stop` leaves behind with its heap."""
    from pyspark import SparkContext

    session.stop()
    gateway = SparkContext._gateway
    if gateway is None or is_submitted():
        return
    process = getattr(gateway, "proc", None)
    gateway.shutdown()
    SparkContext._gateway = SparkContext._jvm = None
    if process is not None:
        # The process ends when its standard input does.
        process.stdin.close()
        process.wait(timeout=_STOP_GRACE_S)


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``key=value`` pairs of ``--spark-conf``.

    Raises
    ------
    ConfigError
        If a pair has no ``=`` or its key does not start with ``spark.``.

    Examples
    --------
    >>> parse_settings(["spark.executor.memory=4g"])
    {'spark.executor.memory': '4g'}
    """
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.startswith("spark."):
            raise ConfigError(f"expected --spark-conf spark.some.key=value. Received: {pair!r}.")
        settings[key] = value
    return settings


def _is_local(master: str) -> bool:
    return master.startswith("local")


def _choose_python(is_local: bool, given: Mapping[str, str]) -> None:
    """Say which Python the workers run; a cluster's nodes may have it elsewhere."""
    if is_local:
        os.environ["PYSPARK_PYTHON"] = sys.executable
        os.environ.setdefault("SPARK_LOCAL_IP", _HOST)
    elif "spark.pyspark.python" in given:
        os.environ["PYSPARK_PYTHON"] = given["spark.pyspark.python"]
    else:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable


def _submitted_settings() -> dict[str, str]:
    """What ``spark-submit`` was told, by options, ``--conf`` and spark-defaults.conf."""
    from pyspark import SparkConf, SparkContext

    SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())


def _settings(
    is_local: bool, given: Mapping[str, str], jars: Sequence[Path], long_running: bool
) -> dict[str, str]:
    settings = {**_COMMON, **(_LOCAL if is_local else {})}
    options = f"-Duser.timezone=UTC -Dlog4j2.configurationFile={_log_settings()}"
    if is_local:
        # The bar is for people: it would fill the log of a scheduler.
        settings["spark.ui.showConsoleProgress"] = "true" if sys.stderr.isatty() else "false"
        settings["spark.executorEnv.PYTHONPATH"] = str(_root())
        settings["spark.local.dir"] = _scratch()
        settings["spark.driver.memory"] = f"{_local_memory_mb(long_running)}m"
        options = f"{_GARBAGE} {options}" if long_running else f"{_GARBAGE} {_SHORT_JIT} {options}"
    settings.update(given)
    if jars:
        own = [settings["spark.jars"]] if settings.get("spark.jars") else []
        settings["spark.jars"] = ",".join([*own, *map(str, jars)])
    key = "spark.driver.extraJavaOptions"
    settings[key] = f"{options} {settings[key]}" if key in settings else options
    return settings


def _local_memory_mb(long_running: bool) -> int:
    """Heap of a local Spark, MiB: the workers' Python needs the other half."""
    if not long_running:
        return _SHORT_MEMORY_MB
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file():
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
        total = total if limit == "max" else min(total, int(limit))
    return max(_SHORT_MEMORY_MB, min(total // 2**21, _MOST_MEMORY_MB))


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def _scratch() -> str:
    """A folder for this process, gone when it ends: Spark leaves its own behind when it is killed."""
    folder = tempfile.mkdtemp(prefix="ctrstream-spark-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _log_settings() -> str:
    path = Path(_scratch()) / "log4j2.properties"
    path.write_text(_LOGGING, encoding="utf-8")
    return path.as_uri()


def _zipped_packages() -> Path:
    path = Path(_scratch()) / "ctrstream.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in PACKAGES:
            for module in sorted((_root() / package).rglob("*.py")):
                archive.write(module, module.relative_to(_root()))
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
