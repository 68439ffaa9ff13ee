"""A real single-node Apache Kafka (KRaft) for development and tests, without a container.

A data folder holds one broker: its logs, its ports, and the process that serves it. The process is
recognised by its id *and* its start time, so a process id that was given to another program after a crash is
never taken for the broker.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from jobs import broker_guard, jars
from jobs.broker_settings import (
    HOST,
    LOG4J_PROPERTIES,
    check_port_is_free,
    free_port,
    is_listening,
    new_cluster_id,
    server_properties,
)
from jobs.java import find_java
from jobs.options import writable_folder
from jobs.topics import answers, ensure_topics
from pipelines.errors import SetupError

__all__ = ["Broker", "BrokerRecord", "ensure_topics"]

_HEAP = "512m"
_READY_TIMEOUT_S = 90.0  # about 3 s on an idle machine; a machine busy with tests takes several times that
_STOP_GRACE_S = 20.0
_KILL_GRACE_S = 10.0
_POLL_S = 0.05
_START_TOLERANCE_S = 2.0  # start times derive from the boot time, which clock corrections move a little

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokerRecord:
    """Content of ``broker.json``: the ports, and the process that serves them, if any.

    ``started`` is the process's start time in seconds since the epoch, as psutil gives it.
    """

    port: int
    controller_port: int
    pid: int | None = None
    started: float | None = None

    @classmethod
    def read(cls, path: Path) -> BrokerRecord | None:
        """Read the record; None where there is none or it was cut short."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            logger.warning("ignoring %s: it is not a broker record", path)
            return None

    def write(self, path: Path) -> None:
        """Write the record atomically."""
        staged = path.with_suffix(".tmp")
        staged.write_text(json.dumps(asdict(self)), encoding="utf-8")
        staged.replace(path)

    def process(self) -> psutil.Process | None:
        """The live process that the record speaks of; None where it has gone or its id is another's now."""
        if self.pid is None or self.started is None:
            return None
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            is_same = abs(process.create_time() - self.started) < _START_TOLERANCE_S
        except psutil.NoSuchProcess:
            return None
        return process if is_same else None


class Broker:
    """One Kafka broker over one data folder.

    Parameters
    ----------
    data_dir : Path
        Folder for its logs and state; created when missing.

    Notes
    -----
    Started from a program, the broker lives at most as long as that program, however it ends. With
    ``detach=True`` it lives until ``stop``. ``kill`` followed by ``start`` serves the same data at the same
    address, as after a crash.

    Examples
    --------
    ::

        with Broker(Path("runs/broker")).start() as broker:
            consumer = KafkaConsumer(bootstrap_servers=broker.bootstrap_servers)
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.resolve()
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def log_file(self) -> Path:
        """Everything that Kafka prints."""
        return self.data_dir / "kafka.log"

    @property
    def bootstrap_servers(self) -> str:
        """Address for clients, ``host:port``.

        Raises
        ------
        SetupError
            If no broker was ever started on this folder.
        """
        record = self._record()
        if record is None:
            raise SetupError(f"no broker was started in {self.data_dir}.", hint="run `ctrstream broker up`")
        return f"{HOST}:{record.port}"

    def pid(self) -> int | None:
        """Process id of the running broker; None where it is down."""
        record = self._record()
        process = None if record is None else record.process()
        return None if process is None else process.pid

    def start(self, port: int | None = None, *, detach: bool = False) -> Broker:
        """Start Kafka and return once it has answered a metadata request.

        Parameters
        ----------
        port : int, optional
            Port for clients on the loopback address; 0 for a free one. By default the port that this
            data folder used last, else a free one.
        detach : bool
            Let the broker outlive this process.

        Raises
        ------
        SetupError
            If a broker already runs on the folder, the port is taken, the folder is not writable, Java or
            the jars are missing, or Kafka ends or stays silent while starting.
        """
        writable_folder(self.data_dir, option="--data")
        with self._exclusive():
            pid = self.pid()
            if pid is not None:
                raise SetupError(
                    f"a broker (process {pid}) already serves {self.data_dir} at {self.bootstrap_servers}.",
                    hint=f"use it, or end it with `ctrstream broker down --data {self.data_dir}`",
                )
            record = self._choose_ports(port)
            java, classpath = find_java(), f"{jars.resolve('kafka')}/*"
            properties = self._configure(record)
            self._format([str(java), "-cp", classpath], properties)
            self._launch([str(java), "-cp", classpath], properties, record, detach=detach)
        try:
            self._wait_until_ready(record.port)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """End the broker cleanly (SIGTERM), by force after a grace period; nothing happens if it is down."""
        self._end(signal.SIGTERM, _STOP_GRACE_S)

    def kill(self) -> None:
        """End the broker as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL, _KILL_GRACE_S)

    def __enter__(self) -> Broker:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _record(self) -> BrokerRecord | None:
        return BrokerRecord.read(self.data_dir / "broker.json")

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Let one process at a time start a broker here; the kernel drops the lock with its holder."""
        with (self.data_dir / "broker.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _choose_ports(self, port: int | None) -> BrokerRecord:
        last = self._record()
        if last is not None and last.pid is not None:
            logger.info("the broker of process %d has gone without a stop; recovering its data", last.pid)
        if port is None and last is not None:
            port = last.port
        if port:
            check_port_is_free(port)
        else:
            port = free_port()
        controller_port = free_port()
        while controller_port == port:
            controller_port = free_port()
        return BrokerRecord(port, controller_port)

    def _configure(self, record: BrokerRecord) -> Path:
        path = self.data_dir / "server.properties"
        text = server_properties(
            port=record.port, controller_port=record.controller_port, log_dir=self.data_dir / "kafka"
        )
        path.write_text(text, encoding="utf-8")
        (self.data_dir / "log4j2.properties").write_text(LOG4J_PROPERTIES, encoding="utf-8")
        return path

    def _format(self, java: list[str], properties: Path) -> None:
        """Prepare an empty data folder, once; the mark is made last, so an interrupted run is repeated."""
        mark = self.data_dir / "formatted"
        if mark.exists():
            return
        command = [*java, "kafka.tools.StorageTool", "format", "--ignore-formatted"]
        command += ["-t", new_cluster_id(), "-c", str(properties)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SetupError(
                f"Kafka could not prepare {self.data_dir}: {(done.stderr or done.stdout).strip()[-500:]}",
                hint="choose an empty folder with --data",
            )
        mark.touch()

    def _launch(self, java: list[str], properties: Path, record: BrokerRecord, *, detach: bool) -> None:
        log4j = f"-Dlog4j2.configurationFile={(self.data_dir / 'log4j2.properties').as_uri()}"
        command = [*java, f"-Xmx{_HEAP}", log4j, "kafka.Kafka", str(properties)]
        if not detach:
            guard = [sys.executable, "-P", broker_guard.__file__, str(os.getpid())]
            command = [*guard, *command]
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal must reach us, who then stop the broker cleanly.
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        started = psutil.Process(self._child.pid).create_time()
        replace(record, pid=self._child.pid, started=started).write(self.data_dir / "broker.json")

    def _wait_until_ready(self, port: int) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not (is_listening(port) and answers(f"{HOST}:{port}")):
            status = None if self._child is None else self._child.poll()
            if status is not None:
                raise SetupError(
                    f"Kafka ended with status {status} while starting. Its last words: {self._last_words()}",
                    hint=f"see {self.log_file}",
                )
            if time.monotonic() > deadline:
                raise SetupError(
                    f"expected Kafka to answer on port {port} within {_READY_TIMEOUT_S:.0f} s. It did not.",
                    hint=f"see {self.log_file}",
                )
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line or "Exception" in line]
        return (errors or lines or ["nothing"])[-1]

    def _end(self, how: signal.Signals, grace_s: float) -> None:
        record = self._record()
        if record is None:
            return
        process = record.process()
        if process is not None:
            process.send_signal(how)
            if not self._has_ended(process, grace_s):
                logger.warning("process %d did not end within %.0f s; killing it", process.pid, grace_s)
                process.kill()
                self._has_ended(process, _KILL_GRACE_S)
        if self._child is not None:
            self._child.wait(_KILL_GRACE_S)  # reap it
            self._child = None
        BrokerRecord(record.port, record.controller_port).write(self.data_dir / "broker.json")

    def _has_ended(self, process: psutil.Process, grace_s: float) -> bool:
        try:
            if self._child is not None:
                self._child.wait(grace_s)
            else:
                process.wait(grace_s)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            return False
        return True
