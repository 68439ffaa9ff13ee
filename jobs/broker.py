"""A real single-node Apache Kafka (KRaft) for development and tests, without a container."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from jobs import jars
from jobs.broker_settings import HOST, LOG4J_PROPERTIES, new_cluster_id, server_properties
from jobs.child_process import Server, check_port, free_port, starting
from jobs.java import find_java
from jobs.options import writable_folder
from jobs.topics import answers, ensure_topics
from pipelines.errors import SetupError

__all__ = ["Broker", "ensure_topics"]

_NAME = "kafka"
_HEAP = "512m"
_PORT_PATIENCE_S = 10.0  # for the port of the last start, which a killed broker may still hold
_READY_TIMEOUT_S = 90.0  # about 3 s on an idle machine; a machine busy with tests takes several times that
_STOP_GRACE_S = 20.0  # a clean stop takes about two seconds


class Broker:
    """One Kafka broker over one data folder.

    Parameters
    ----------
    data_dir : Path
        Folder for its data, settings and log (``kafka.log``); created when missing.

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
        self._started: Server | None = None

    @property
    def log_file(self) -> Path:
        """Everything that Kafka prints."""
        return self.data_dir / f"{_NAME}.log"

    @property
    def bootstrap_servers(self) -> str:
        """Address for clients, ``host:port``, whether or not the broker is up.

        Raises
        ------
        SetupError
            If no broker was ever started on this folder.
        """
        port = self._last_port()
        if port is None:
            raise SetupError(f"no broker was started in {self.data_dir}.", hint="run `ctrstream broker up`")
        return f"{HOST}:{port}"

    def pid(self) -> int | None:
        """Leader of the broker's process group; None where the broker is down."""
        server = self._server()
        return None if server is None else server.record.pid

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
        with starting(self.data_dir, _NAME):
            pid = self.pid()
            if pid is not None:
                raise SetupError(
                    f"a broker (process {pid}) already serves {self.data_dir} at {self.bootstrap_servers}.",
                    hint=f"use it, or end it with `ctrstream broker down --data {self.data_dir}`",
                )
            port = self._choose_port(port)
            java = [str(find_java()), "-cp", f"{jars.resolve('kafka')}/*"]
            properties = self._configure(port)
            self._format(java, properties)
            log4j = f"-Dlog4j2.configurationFile={(self.data_dir / 'log4j2.properties').as_uri()}"
            server = Server.start(
                _NAME,
                [*java, f"-Xmx{_HEAP}", log4j, "kafka.Kafka", str(properties)],
                folder=self.data_dir,
                port=port,
                tied=not detach,
            )
        try:
            server.wait_ready(lambda: answers(f"{HOST}:{port}"), _READY_TIMEOUT_S)
        except KeyboardInterrupt:  # a detached broker would stay behind
            server.stop(_STOP_GRACE_S)
            raise
        self._started = server
        return self

    def stop(self) -> None:
        """End the broker cleanly (SIGTERM), by force after a grace period; nothing happens if it is down."""
        server = self._server()
        if server is not None:
            server.stop(_STOP_GRACE_S)
        self._started = None

    def kill(self) -> None:
        """End the broker as a crash would (SIGKILL); nothing happens if it is down."""
        server = self._server()
        if server is not None:
            os.killpg(server.record.pid, signal.SIGKILL)
            server.stop(_STOP_GRACE_S)
        self._started = None

    def __enter__(self) -> Broker:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _server(self) -> Server | None:
        """The running server, ours or one that another process started on this folder."""
        if self._started is not None and self._started.is_running():
            return self._started
        return Server.find(self.data_dir, _NAME)

    @property
    def _properties_path(self) -> Path:
        return self.data_dir / "server.properties"

    def _last_port(self) -> int | None:
        """The port in the settings of the last start: clients must find the broker again after a crash."""
        try:
            text = self._properties_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        match = re.search(r"^advertised\.listeners=.*:(\d+)$", text, flags=re.MULTILINE)
        return int(match.group(1)) if match else None

    def _choose_port(self, port: int | None) -> int:
        known = self._last_port() if port is None else port
        if not known:
            return free_port(HOST)
        check_port(known, HOST, _PORT_PATIENCE_S if port is None else 0.0)
        return known

    def _configure(self, port: int) -> Path:
        controller_port = free_port(HOST)
        while controller_port == port:
            controller_port = free_port(HOST)
        text = server_properties(
            port=port, controller_port=controller_port, log_dir=self.data_dir / "kafka-data"
        )
        staged = self._properties_path.with_suffix(".tmp")
        staged.write_text(text, encoding="utf-8")
        staged.replace(self._properties_path)
        (self.data_dir / "log4j2.properties").write_text(LOG4J_PROPERTIES, encoding="utf-8")
        return self._properties_path

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
