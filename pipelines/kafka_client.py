"""Clients of a Kafka cluster, configured once: what is read is committed data, and nothing is skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import (
    AuthorizationError,
    KafkaConfigurationError,
    KafkaError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)

from pipelines.config import resolve_secret
from pipelines.config_sections import KafkaConfig
from pipelines.duration import format_duration
from pipelines.errors import ConfigError, CtrstreamError, SetupError, TransientError

__all__ = ["broker_error", "client_options", "make_admin", "make_consumer", "make_producer"]

# These decide about correctness, so no option may change them.
_CONSUMER = {
    "enable_auto_commit": False,
    "auto_offset_reset": "none",
    "isolation_level": "read_committed",
    "allow_auto_create_topics": False,
}
_PRODUCER = {"acks": "all", "enable_idempotence": True}
# A broker that comes back is found within a second.
_RECONNECT = {"reconnect_backoff_max_ms": 1_000}
# While a broker is away these write several lines a second; the one line that matters is ours.
_NOISY = ("kafka.net", "kafka.cluster", "kafka.consumer.fetcher", "kafka.producer.sender")


def make_consumer(config: KafkaConfig, **settings: Any) -> Any:
    """A ``kafka.KafkaConsumer`` of committed messages that never commits or skips by itself.

    Parameters
    ----------
    config : KafkaConfig
    **settings
        Further settings of kafka-python.

    Raises
    ------
    TransientError
        If no broker answers within ``config.connect_timeout``.
    SetupError
        If the broker refuses the credentials.
    ConfigError
        If an option is unknown, or one of those that decide about correctness.
    """
    return _connect(KafkaConsumer, config, {**settings, **_CONSUMER})


def make_producer(config: KafkaConfig, **settings: Any) -> Any:
    """A ``kafka.KafkaProducer`` that waits for all replicas; raises like `make_consumer`."""
    return _connect(KafkaProducer, config, {**settings, **_PRODUCER})


def make_admin(config: KafkaConfig) -> Any:
    """A ``kafka.admin.KafkaAdminClient``; raises like `make_consumer`."""
    return _connect(KafkaAdminClient, config, {})


def client_options(config: KafkaConfig) -> dict[str, Any]:
    """``config.options`` with the secrets put in.

    Raises
    ------
    ConfigError
        If an option is unknown to kafka-python, or is one that ctrstream sets itself.
    """
    known: set[str] = set().union(
        *(client.DEFAULT_CONFIG for client in (KafkaConsumer, KafkaProducer, KafkaAdminClient))
    )
    for name in config.options:
        if name not in known:
            raise ConfigError(f"kafka.options.{name} is no option of kafka-python.")
        if name in {*_CONSUMER, *_PRODUCER, "bootstrap_servers", "group_id", "transactional_id"}:
            raise ConfigError(
                f"kafka.options.{name} cannot be set: correctness hangs on it.",
                hint="remove it from the configuration",
            )
    return {name: resolve_secret(value) for name, value in config.options.items()}


def broker_error(config: KafkaConfig, error: KafkaError) -> CtrstreamError:
    """What to tell the user about an error of kafka-python; credentials are not in it."""
    if isinstance(error, AuthorizationError | SaslAuthenticationFailedError | UnsupportedSaslMechanismError):
        return SetupError(
            f"the Kafka broker at {config.bootstrap_servers} refuses us: {type(error).__name__}.",
            hint="check the security options under [kafka.options] and the rights of that user",
        )
    return TransientError(
        f"the Kafka broker at {config.bootstrap_servers} fails: {type(error).__name__}: {error}."
    )


def _connect(client: Callable[..., Any], config: KafkaConfig, settings: dict[str, Any]) -> Any:
    _quieten()
    known = client.DEFAULT_CONFIG  # type: ignore[attr-defined]
    options = {name: value for name, value in client_options(config).items() if name in known}
    merged = {
        "bootstrap_servers": [address.strip() for address in config.bootstrap_servers.split(",")],
        "bootstrap_timeout_ms": config.connect_timeout,
        **_RECONNECT,
        **options,
        **settings,
    }
    try:
        return client(**merged)
    except KafkaConfigurationError as error:
        raise ConfigError(f"kafka-python refuses the options under [kafka.options]: {error}.") from error
    except (AuthorizationError, SaslAuthenticationFailedError, UnsupportedSaslMechanismError) as error:
        raise broker_error(config, error) from error
    except (KafkaError, OSError, ValueError) as error:
        raise TransientError(
            f"no Kafka broker answers at {config.bootstrap_servers} "
            f"after {format_duration(config.connect_timeout)} ({type(error).__name__}).",
            hint="start one with `ctrstream broker up`, or name another with --bootstrap-servers",
        ) from error


def _quieten() -> None:
    """Hide the chatter about lost connections, unless the log level asks for everything."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
