"""The development broker, against a real Kafka: life cycle, crashes, topics."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from jobs.broker import Broker
from jobs.topics import answers, ensure_topics
from pipelines.errors import SetupError, TransientError


def wait_until(condition: Callable[[], bool], patience_s: float = 60.0) -> bool:
    """Wait for something that another process does; a generous limit only keeps a failure from hanging."""
    deadline = time.monotonic() + patience_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def ctrstream(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def produce(bootstrap_servers: str, topic: str, values: list[bytes]) -> None:
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=bootstrap_servers, acks="all")
    futures = [producer.send(topic, value) for value in values]
    for future in futures:
        future.get(timeout=60)
    producer.close()


def consume(bootstrap_servers: str, topic: str, count: int) -> list[bytes]:
    from kafka import KafkaConsumer

    consumer = KafkaConsumer(
        topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest", consumer_timeout_ms=30_000
    )
    values: list[bytes] = []
    for message in consumer:
        values.append(message.value)
        if len(values) == count:
            break
    consumer.close()
    return values


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker that a test may stop and kill."""
    with Broker(tmp_path / "broker").start() as running:
        yield running


def test_up_status_and_down_by_command(tmp_path: Path) -> None:
    data = ["--data", str(tmp_path / "broker")]
    assert ctrstream("broker", "status", *data).returncode == 1
    try:
        up = ctrstream("broker", "up", *data)
        assert up.returncode == 0, up.stderr
        address = up.stdout.strip()
        assert answers(address), "the broker must outlive the command that started it"

        status = ctrstream("broker", "status", *data)
        assert (status.returncode, status.stdout.strip()) == (0, address)
        again = ctrstream("broker", "up", *data)
        assert (again.returncode, again.stdout.strip()) == (0, address)
        elsewhere = ctrstream("broker", "up", *data, "--port", "1")
        assert elsewhere.returncode == 1
        assert address in elsewhere.stderr

        pid = Broker(tmp_path / "broker").pid()
        assert pid is not None
        assert os.getpgid(pid) == pid, "a process group of its own"
    finally:
        down = ctrstream("broker", "down", *data)
    assert down.returncode == 0, down.stderr
    assert not answers(address)
    assert wait_until(lambda: not psutil.pid_exists(pid)), "the process is gone"
    assert ctrstream("broker", "status", *data).returncode == 1
    assert ctrstream("broker", "down", *data).returncode == 0


def test_port_in_use_is_named_with_a_remedy(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = ctrstream("broker", "up", "--data", str(tmp_path / "broker"), "--port", str(port))
    assert result.returncode == 1
    assert f":{port}" in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr


def test_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="file/broker is not writable") as raised:
        Broker(tmp_path / "file" / "broker").start()
    assert "--data" in str(raised.value)


def test_process_id_of_another_program_is_not_taken_for_the_broker(tmp_path: Path) -> None:
    # This very process has the recorded id, but it started at another time.
    record = {"name": "kafka", "pid": os.getpid(), "created": psutil.Process().create_time() - 60, "port": 1}
    (tmp_path / "kafka.json").write_text(json.dumps(record))
    broker = Broker(tmp_path)
    assert broker.pid() is None
    broker.stop()
    broker.kill()  # would end the test run if it were


def test_record_of_a_process_that_has_gone_does_not_hinder_a_start(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "kafka.json").write_text(
        json.dumps({"name": "kafka", "pid": gone.pid, "created": time.time(), "port": 1})
    )
    with Broker(tmp_path).start() as broker:
        assert answers(broker.bootstrap_servers)


def test_data_and_address_survive_a_stop_and_a_crash(own_broker: Broker) -> None:
    address = own_broker.bootstrap_servers
    values = [b"%d" % number for number in range(100)]
    ensure_topics(address, {"kept": 1})
    produce(address, "kept", values)

    own_broker.stop()
    assert own_broker.pid() is None
    own_broker.start()
    assert own_broker.bootstrap_servers == address
    assert consume(address, "kept", 100) == values

    own_broker.kill()
    assert own_broker.pid() is None
    own_broker.start()
    assert own_broker.bootstrap_servers == address
    assert consume(address, "kept", 100) == values


def test_second_broker_on_the_same_folder_is_refused(broker: Broker) -> None:
    with pytest.raises(SetupError, match="already serves"):
        Broker(broker.data_dir).start()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_broker_ends_when_the_program_that_started_it_dies(tmp_path: Path, how: signal.Signals) -> None:
    program = (
        "import sys, time; from pathlib import Path; from jobs.broker import Broker\n"
        "broker = Broker(Path(sys.argv[1])).start(); print(broker.pid(), flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "broker")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    kafka = psutil.Process(int(parent.stdout.readline()))
    family = [kafka, *kafka.children(recursive=True)]
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not any(process.is_running() for process in family)), "no orphan is left"


def test_topics_are_created_once_and_must_agree_in_partitions(broker: Broker) -> None:
    address = broker.bootstrap_servers
    ensure_topics(address, {"topics_a": 3, "topics_b": 3})
    ensure_topics(address, {"topics_a": 3, "topics_b": 3})
    with pytest.raises(SetupError, match="expected topic topics_b with 2 partitions"):
        ensure_topics(address, {"topics_b": 2})


def test_missing_broker_is_a_transient_error_that_says_what_to_do() -> None:
    with pytest.raises(TransientError, match=r"no Kafka broker answers at 127\.0\.0\.1:1") as raised:
        ensure_topics("127.0.0.1:1", {"clicks": 1}, {"bootstrap_timeout_ms": 200})
    assert "ctrstream broker up" in str(raised.value)
    assert not answers("127.0.0.1:1", {"bootstrap_timeout_ms": 200})


def test_message_with_an_old_or_future_event_time_is_kept(broker: Broker) -> None:
    from kafka import KafkaConsumer, KafkaProducer

    ensure_topics(broker.bootstrap_servers, {"times": 1})
    times = [0, 4_102_444_800_000]  # 1970 and 2100, ms since the epoch, UTC
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, acks="all")
    for event_time in times:
        producer.send("times", b"x", timestamp_ms=event_time).get(timeout=60)
    producer.close()
    consumer = KafkaConsumer(
        "times",
        bootstrap_servers=broker.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=30_000,
    )
    assert [next(consumer).timestamp, next(consumer).timestamp] == times
    consumer.close()
