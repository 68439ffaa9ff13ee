"""Kafka clients made from the configuration; the one place, with `kafka_source`, that imports kafka-python."""

from __future__ import annotations

import logging
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError

from pipelines.config import KafkaConfig, resolve_secret
from pipelines.errors import ConfigError, TransientError

__all__ = ["client_options", "make_consumer", "make_producer"]

# Its INFO lines repeat every connection and its configuration.
logging.getLogger("kafka").setLevel(logging.WARNING)


def client_options(config: KafkaConfig) -> dict[str, Any]:
    """What every client gets: the address and the pass-through options, secrets read from the environment."""
    return {
        "bootstrap_servers": config.bootstrap_servers,
        **{name: resolve_secret(value) for name, value in config.options.items()},
    }


def make_consumer(config: KafkaConfig, group: str | None = None) -> KafkaConsumer:
    """A consumer for `assign`: reads committed records, commits nothing by itself, never skips silently.

    Raises
    ------
    TransientError
        If no broker answers within ``kafka.connect_timeout``.
    ConfigError
        If an option is unknown to kafka-python.
    """
    return _connected(
        KafkaConsumer,
        config,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed",
        max_partition_fetch_bytes=8 << 20,
        fetch_max_bytes=64 << 20,
        max_poll_records=20_000,
    )


def make_producer(config: KafkaConfig, **settings: Any) -> KafkaProducer:
    """A producer that waits for all in-sync replicas; errors as `make_consumer`."""
    return _connected(KafkaProducer, config, acks="all", linger_ms=20, batch_size=1 << 18, **settings)


def _connected(client: type[Any], config: KafkaConfig, **settings: Any) -> Any:
    try:
        return client(bootstrap_timeout_ms=config.connect_timeout, **{**settings, **client_options(config)})
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"kafka-python does not take the options given: {error}.",
            hint="see [kafka.options] in the config",
        ) from error
    except KafkaError as error:
        raise TransientError(
            f"no Kafka broker answers at {config.bootstrap_servers} "
            f"within {config.connect_timeout / 1000:g} s ({type(error).__name__}).",
            hint="start one with `ctrstream broker up`, or name another with --bootstrap-servers",
        ) from error
