"""Options of the Spark jobs, and the session that they ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from jobs.options import writable_folder
from pipelines.storage import is_uri

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = [
    "LONG_RUNNING_BYTES",
    "LONG_RUNNING_ROWS",
    "are_files_many",
    "is_long_running",
    "lake_option",
    "location_option",
    "spark_for",
    "spark_options",
]

# From here on Java's optimising compiler pays for itself within the job.
LONG_RUNNING_ROWS = 2_000_000
LONG_RUNNING_BYTES = 256 * 2**20

Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


def spark_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--master`` and ``--spark-conf``; passes ``master`` and ``spark_conf``."""
    for option in (
        click.option(
            "--spark-conf",
            metavar="KEY=VALUE",
            multiple=True,
            help="A Spark setting, as in `--spark-conf spark.executor.memory=4g`. Repeatable.",
        ),
        click.option(
            "--master",
            default="local[*]",
            show_default=True,
            help="Where Spark runs: local[N], spark://HOST:PORT, yarn, k8s://... Under spark-submit: there.",
        ),
    ):
        function = option(function)
    return function


def location_option(
    name: str, help: str, *, required: bool = True, use: Literal["read", "write"] | None = None
) -> Callable[[Function], Function]:
    """Add an option for a folder on any file system; passes its location (``str``).

    Parameters
    ----------
    name : str
        As in ``--lake``.
    help : str
        Text for ``--help``.
    required : bool
        Whether the option must be given.
    use : "read" or "write", optional
        What to check before the command starts, of a folder of this machine: that it is there, or that it
        can be made and written to. What a URI names is found out when it is used.
    """

    def check(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        if value is None or ctx.resilient_parsing or is_uri(value):
            return value
        click.Path(exists=use == "read", file_okay=False).convert(value, parameter, ctx)
        if use == "write":
            writable_folder(Path(value), option=name)
        return value

    return click.option(
        name, metavar="DIR|URI", required=required, callback=check, help=f"{help} A path or a URI."
    )


def lake_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--lake DIR|URI``; passes ``lake`` (``str``)."""
    return location_option("--lake", "Folder of the lake.")(function)


def is_long_running(lake: str, master: str) -> bool:
    """Whether work of this process on a whole lake takes minutes, by the rows that its manifests tell.

    A lake elsewhere is not a small one; to look at it would take credentials that only Spark may have.
    """
    from pipelines.lake import lake_batches

    if not master.startswith("local"):
        return False
    return is_uri(lake) or sum(batch.total_rows for batch in lake_batches(lake)) > LONG_RUNNING_ROWS


def are_files_many(folder: str, master: str) -> bool:
    """Whether work of this process on all files of a folder takes minutes."""
    if not master.startswith("local"):
        return False
    return (
        is_uri(folder)
        or sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) > LONG_RUNNING_BYTES
    )


@contextmanager
def spark_for(
    name: str,
    master: str,
    spark_conf: tuple[str, ...],
    jars: str | None = None,
    *,
    long_running: bool = False,
) -> Iterator[SparkSession]:
    """Run Spark for a command.

    Parameters
    ----------
    name : str
        Of the command, for cluster managers to show.
    master, spark_conf
        As `spark_options` passes them.
    jars : str, optional
        Set of connector jars that the command needs, see `jobs.jars`.
    long_running : bool
        See `pipelines.spark_session.spark_session` and `is_long_running`.
    """
    from jobs.jars import resolve
    from jobs.java import find_java
    from pipelines.spark_session import is_submitted, parse_settings, spark_session, stop_spark

    settings = parse_settings(spark_conf)
    folder = None
    if is_submitted():
        logger.info("joining the Spark that spark-submit has configured")
    else:
        find_java()
        folder = None if jars is None else resolve(jars)
        logger.info("starting Spark (%s)", master)
    spark = spark_session(
        f"ctrstream {name}",
        master=master,
        settings=settings,
        jars=() if folder is None else sorted(folder.glob("*.jar")),
        long_running=long_running,
    )
    try:
        yield spark
    finally:
        stop_spark(spark)
