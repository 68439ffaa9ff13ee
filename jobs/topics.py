"""Topics of a Kafka cluster, ours or any other: does it answer, and does it have the topics we need."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from typing import Any

from pipelines.errors import SetupError, TransientError

_CONNECT_TIMEOUT_MS = 20_000
_PROBE_TIMEOUT_MS = 5_000
_CREATED_TIMEOUT_S = 10.0


@contextmanager
def _admin(bootstrap_servers: str, options: Mapping[str, Any], timeout_ms: int) -> Iterator[Any]:
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        client = KafkaAdminClient(
            bootstrap_servers=bootstrap_servers, **{"bootstrap_timeout_ms": timeout_ms, **options}
        )
    except KafkaError as error:
        raise TransientError(
            f"no Kafka broker answers at {bootstrap_servers}: {error}.",
            hint="start one with `ctrstream broker up`, or name another with --bootstrap-servers",
        ) from error
    try:
        yield client
    finally:
        client.close()


def _accepts_connections(address: str) -> bool:
    host, _, port = address.strip().rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_MS / 1000).close()
    except (OSError, ValueError):
        return False
    return True


def answers(bootstrap_servers: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a broker answers a metadata request and is ready for clients.

    Parameters
    ----------
    bootstrap_servers : str
        ``host:port``, several separated by commas.
    options : mapping, optional
        Further options for kafka-python (TLS, SASL).
    """
    from kafka.errors import KafkaError

    if not any(_accepts_connections(address) for address in bootstrap_servers.split(",")):
        return False  # kafka-python would go on trying until its own limit
    try:
        with _admin(bootstrap_servers, options or {}, _PROBE_TIMEOUT_MS) as admin:
            brokers = admin.describe_cluster()["brokers"]
    except (TransientError, KafkaError):
        return False
    # A KRaft broker is fenced until the controller has seen that it is up to date.
    return any(not broker.get("is_fenced", False) for broker in brokers)


def ensure_topics(
    bootstrap_servers: str, partitions: Mapping[str, int], options: Mapping[str, Any] | None = None
) -> None:
    """Create the topics that do not exist, and return once every partition has a leader.

    Parameters
    ----------
    bootstrap_servers : str
        ``host:port``, several separated by commas.
    partitions : mapping of str to int
        Number of partitions by name of topic.
    options : mapping, optional
        Further options for kafka-python (TLS, SASL).

    Raises
    ------
    TransientError
        If no broker answers.
    SetupError
        If a topic exists with another number of partitions: the topics are joined partition by partition,
        so they must agree.
    """
    from kafka.errors import TopicAlreadyExistsError

    with _admin(bootstrap_servers, options or {}, _CONNECT_TIMEOUT_MS) as admin:
        missing = sorted(set(partitions) - set(admin.list_topics()))
        if missing:
            # Another process may create them first; the number of partitions is checked below.
            with suppress(TopicAlreadyExistsError):
                admin.create_topics({name: {"num_partitions": partitions[name]} for name in missing})
        admin.wait_for_topics(sorted(partitions))
        for name, found in _partition_counts(admin, partitions, set(missing)).items():
            if found != partitions[name]:
                raise SetupError(
                    f"expected topic {name} with {partitions[name]} partitions. It has {found}.",
                    hint=f"set kafka.partitions={found}, or use other topic names",
                )


def _partition_counts(admin: Any, wanted: Mapping[str, int], created: Set[str]) -> dict[str, int]:
    """Partitions of each topic; one just made is waited for: brokers hear of its partitions one by one."""
    deadline = time.monotonic() + _CREATED_TIMEOUT_S
    while True:
        topics = admin.describe_topics(sorted(wanted))
        counts = {str(topic["name"]): len(topic["partitions"]) for topic in topics}
        if all(counts[name] == wanted[name] for name in created) or time.monotonic() > deadline:
            return counts
        time.sleep(0.05)
