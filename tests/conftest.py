"""Real components that are started once for a whole test session."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from jobs.roots import PACKAGES

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import SparkSession

    from jobs.broker import Broker
    from tests.incident import Incident
    from tests.small_run import SmallRun

# How long an example takes depends on what else the machine does; `pytest-timeout` ends what hangs.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A running Kafka; use topic names of your own, since all tests share it."""
    from jobs.broker import Broker

    with Broker(tmp_path_factory.mktemp("broker")).start() as running:
        yield running


@pytest.fixture(autouse=True)
def log_levels() -> None:
    """A command that is run inside a test, or a fixture, sets the levels of our loggers: not for others."""
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """A real local Spark with its Kafka connector, shared by all tests."""
    from jobs.jars import resolve
    from pipelines.spark_session import spark_session, stop_spark

    jars = sorted(resolve("spark-kafka").glob("*.jar"))
    session = spark_session("ctrstream-tests", master="local[2]", jars=jars)
    yield session
    stop_spark(session)


@pytest.fixture
def shared_spark(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> SparkSession:
    """Commands use the session of the tests, and leave it running."""
    monkeypatch.setattr("pipelines.spark_session.stop_spark", lambda session: None)
    return spark


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A small simulated log, the models trained on its first quarter, and a backtest over the rest."""
    from tests.small_run import build_small_run

    return build_small_run(tmp_path_factory.mktemp("small_run"))


@pytest.fixture(scope="session")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The same with rows of their own for users, items and tags, too few for all."""
    from tests.small_run import DYNAMIC, build_small_run

    return build_small_run(tmp_path_factory.mktemp("dynamic_run"), *DYNAMIC)


@pytest.fixture(scope="session")
def incident(small_run: SmallRun, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Incident:
    """A log in Kafka in which nobody clicks for twelve hours."""
    from tests.incident import make_incident

    return make_incident(small_run, broker, tmp_path_factory.mktemp("incident"))


@pytest.fixture(scope="session")
def tripped(incident: Incident, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a worker whose breaker has opened, and that has read all: to be copied."""
    folder = tmp_path_factory.mktemp("tripped")
    incident.worker(folder).run()
    return folder
