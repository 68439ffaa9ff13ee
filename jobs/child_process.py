"""Servers of ours as processes: started in their own session, found again, and stopped without orphans.

A server has a folder with three files: ``NAME.json`` says which process it is, ``NAME.log`` holds its
output, ``NAME.lock`` keeps two starters apart. A process is known by its number and the time it was created,
because numbers are used again.

A server is *detached* (it outlives the command that started it: ``up``) or *tied* (it ends with its starter,
whatever ends that: see `jobs.tether`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipelines.errors import SetupError

__all__ = ["Server", "ServerRecord", "check_port", "free_port", "last_lines", "starting"]

log = logging.getLogger(__name__)

_TETHER = Path(__file__).with_name("tether.py")
_POLL_S = 0.05
# psutil derives the creation time from the boot time, which moves when the clock is set.
_CREATION_TOLERANCE_S = 2.0
# Above the well-known services, below the outgoing range of Linux (32768) and other systems (49152).
_SERVER_PORTS = range(20_000, 32_000)
_PORTS_TRIED = 50


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on at the moment.

    It lies below the range from which the system takes ports for outgoing connections, so that none of
    those holds it while a server is down that means to come back on it.
    """
    drawn = random.SystemRandom().sample(_SERVER_PORTS, _PORTS_TRIED)
    for port in drawn:
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise SetupError(
        f"found no free port on {host} among {_PORTS_TRIED} tried.", hint="choose a port with --port"
    )


def check_port(port: int, host: str = "127.0.0.1", patience_s: float = 0.0) -> None:
    """Check that a server can listen on a port.

    Parameters
    ----------
    port : int
    host : str
    patience_s : float
        How long to wait for it: a killed server's sockets may close a moment after it counts as dead.

    Raises
    ------
    SetupError
        If something listens there, or the address cannot be used.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _bind(port, host)
        except SetupError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _bind(port: int, host: str) -> None:
    with socket.socket() as probe:
        # As servers do: without it, a port whose last connections are closing would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(
                f"cannot listen on {host}:{port}: {error.strerror}.",
                hint="stop what listens there, or choose another port (0 takes a free one)",
            ) from error


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log file, for an error message."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-count:])


@contextlib.contextmanager
def starting(folder: Path, name: str) -> Iterator[None]:
    """Hold the start lock of a server, so that two starters at once make one server.

    Raises
    ------
    SetupError
        If the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{name}.lock").open("w")
    except OSError as error:
        raise SetupError(
            f"the folder {folder} is not writable: {error.strerror}.", hint="choose another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class ServerRecord:
    """What ``NAME.json`` says.

    Attributes
    ----------
    name : str
    pid : int
        Leader of the server's session.
    created : float
        When that process was created, seconds since the epoch.
    port : int
    details : dict
        What else is worth knowing, such as an address; JSON data.
    """

    name: str
    pid: int
    created: float
    port: int
    details: dict[str, Any] = field(default_factory=dict)


class Server:
    """A running server. Made by `start` or `find`."""

    def __init__(
        self, folder: Path, record: ServerRecord, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.folder = folder
        self.record = record
        self._process = process

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.record.name}.log"

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        folder: Path,
        port: int,
        environment: Mapping[str, str] | None = None,
        tied: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> Server:
        """Start a process in a session of its own, with its output appended to the log file.

        Parameters
        ----------
        name : str
            Names the files.
        command : sequence of str
        folder : Path
            Holds the files; also the process's working folder.
        port : int
            Where it will listen; recorded only.
        environment : mapping, optional
            The whole environment; default that of this process.
        tied : bool
            Whether the server ends with this process.
        details : mapping, optional
            JSON data to record.

        Raises
        ------
        SetupError
            If the program or the folder cannot be used.
        """
        folder = folder.absolute()
        tether = [sys.executable, "-I", "-S", str(_TETHER)] if tied else []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{name}.log").open("ab") as output:
                process = subprocess.Popen(
                    [*tether, *command],
                    cwd=folder,
                    env=None if environment is None else dict(environment),
                    stdin=subprocess.PIPE if tied else subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise SetupError(f"cannot start {name} ({command[0]}) in {folder}: {error.strerror}.") from error
        created = psutil.Process(process.pid).create_time()
        record = ServerRecord(name, process.pid, created, port, dict(details or {}))
        _write_json(folder / f"{name}.json", asdict(record))
        return cls(folder, record, process)

    @classmethod
    def find(cls, folder: Path, name: str) -> Server | None:
        """The running server of a folder; None where there is none.

        A record whose process is gone (killed, or the machine was restarted) is removed, and said.
        """
        path = folder / f"{name}.json"
        try:
            record = ServerRecord(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            log.warning("%s cannot be read; taken as left over.", path)
            path.unlink(missing_ok=True)
            return None
        server = cls(folder, record)
        if server.is_running():
            return server
        log.warning("%s (process %d) is no longer running; its record is removed.", name, record.pid)
        server._end_members(0.0)
        path.unlink(missing_ok=True)
        return None

    def is_running(self) -> bool:
        """Whether the leading process is alive."""
        if self._process is not None and self._process.poll() is not None:
            return False
        try:
            leader = psutil.Process(self.record.pid)
            return self._is_same(leader) and leader.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _is_same(self, leader: psutil.Process) -> bool:
        return bool(abs(leader.create_time() - self.record.created) < _CREATION_TOLERANCE_S)

    def wait_ready(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until the server answers.

        Raises
        ------
        SetupError
            If the process ends or does not answer in time; it is stopped, and the end of its log shown.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            ended = not self.is_running()
            if ended or time.monotonic() > deadline:
                what = "ended before it was ready" if ended else f"was not ready within {timeout_s:.0f} s"
                self.stop(grace_s=1.0)
                raise SetupError(
                    f"{self.record.name} {what}. The end of {self.log_path}:\n{last_lines(self.log_path)}"
                )
            time.sleep(_POLL_S)

    def stop(self, grace_s: float = 15.0) -> None:
        """Ask the server to end, insist after `grace_s` seconds, and remove its record.

        Stopping a server that has ended is no error. A log line says when it had to be killed.
        """
        if self.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(self.record.pid).terminate()
        self._end_members(grace_s)
        self._clear_up()

    def kill(self) -> None:
        """End the server as a crash would, and remove its record."""
        for process in self._members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._clear_up()

    def _clear_up(self) -> None:
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait()
        (self.folder / f"{self.record.name}.json").unlink(missing_ok=True)

    def _members(self) -> list[psutil.Process]:
        """Live processes of the server's session."""
        if self._process is not None:
            self._process.poll()  # reaps it
        with contextlib.suppress(psutil.NoSuchProcess):
            if not self._is_same(psutil.Process(self.record.pid)):
                return []  # the number was given to another process, so nothing of ours is left
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if (
                    os.getsid(process.pid) == self.record.pid
                    and process.create_time() >= self.record.created - _CREATION_TOLERANCE_S
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    members.append(process)
        return members

    def _end_members(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        while (members := self._members()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for process in members:
            log.warning("%s: process %d had to be killed.", self.record.name, process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
