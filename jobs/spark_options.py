"""Options of the Spark jobs, and the session that they ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["lake_option", "spark_for", "spark_options"]

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
            help="Where Spark runs: local[N], spark://HOST:PORT, yarn, k8s://...",
        ),
    ):
        function = option(function)
    return function


def lake_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--lake DIR``; passes ``lake`` (``Path``)."""
    return click.option(
        "--lake", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the lake."
    )(function)


@contextmanager
def spark_for(
    name: str, master: str, spark_conf: tuple[str, ...], jars: str | None = None
) -> Iterator[SparkSession]:
    from jobs.jars import resolve
    from jobs.java import find_java
    from pipelines.spark_session import parse_settings, spark_session, stop_spark

    settings = parse_settings(spark_conf)
    find_java()
    folder = None if jars is None else resolve(jars)
    logger.info("starting Spark (%s)", master)
    spark = spark_session(
        f"ctrstream samples {name}",
        master=master,
        settings=settings,
        jars=() if folder is None else sorted(folder.glob("*.jar")),
    )
    try:
        yield spark
    finally:
        stop_spark(spark)
