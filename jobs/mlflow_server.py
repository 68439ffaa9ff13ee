"""A real MLflow server for development: sqlite, one process, artefacts in a folder, loopback only.

``mlflow server`` would start a second Python process that imports MLflow only to watch the first: twice the
memory and the time to start. This starts the same ASGI application under uvicorn directly, with the settings
that ``mlflow server`` passes on to it (`_settings`). MLflow's version is pinned, and
`TrackingServer.wait_ready` checks that the settings were heeded.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import os
import sqlite3
import sys
from pathlib import Path

from jobs.child_process import Server, check_port, free_port, starting
from pipelines.errors import SetupError

__all__ = ["TrackingServer"]

HOST = "127.0.0.1"
NAME = "mlflow"
APPLICATION = "mlflow.server.fastapi_app:app"
# 7 s on an idle machine, of which 5 are imports; a cold disk or a busy machine takes several times that.
_READY_TIMEOUT_S = 120.0
_UP = "start one with `ctrstream tracking up`"
_PROBES = (("GET", "/health", None), ("POST", "/api/2.0/mlflow/experiments/search", '{"max_results": 1}'))


class TrackingServer:
    """One MLflow server over one data folder.

    Parameters
    ----------
    folder : Path
        Holds ``mlflow.db``, ``artifacts/``, the log and the state of the process; created when missing.

    Notes
    -----
    Started from a program, the server lives at most as long as that program, however it ends. With
    ``detach=True`` it lives until ``stop``. Started again, it listens where it did before, so that clients
    which wait for it find it.

    Examples
    --------
    ::

        with TrackingServer(Path("runs/mlflow")) as server:
            server.start()
            Tracking(server.uri, "ctrstream")
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._server: Server | None = None

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{NAME}.log"

    @property
    def uri(self) -> str:
        """Address of the server, ``http://host:port``.

        Raises
        ------
        SetupError
            If no server was ever started on this folder.
        """
        port = self._last_port()
        if port is None:
            raise SetupError(
                f"no MLflow server was started in {self.folder}.", hint="`ctrstream tracking up`"
            )
        return f"http://{HOST}:{port}"

    def pid(self) -> int | None:
        """Process id of the running server; None where it is down."""
        self._server = self._server or Server.find(self.folder, NAME)
        running = self._server is not None and self._server.is_running()
        return self._server.record.pid if running and self._server is not None else None

    def start(self, port: int | None = None, *, detach: bool = False, wait: bool = True) -> TrackingServer:
        """Start the server and return once it answers.

        Parameters
        ----------
        port : int, optional
            Port on the loopback address; 0 for a free one. By default the one that this folder used last,
            else a free one.
        detach : bool
            Let the server outlive this process.
        wait : bool
            False returns at once; call ``wait_ready`` before use.

        Raises
        ------
        SetupError
            If a server already runs on the folder, the port is taken, the folder is not writable, or the
            server ends or stays silent while starting.
        """
        with starting(self.folder, NAME):
            pid = self.pid()
            if pid is not None:
                raise SetupError(
                    f"an MLflow server (process {pid}) already serves {self.folder} at {self.uri}.",
                    hint=f"use it, or end it with `ctrstream tracking down --data {self.folder}`",
                )
            chosen = (self._last_port() if port is None else port) or free_port(HOST)
            check_port(chosen, HOST)
            self._prepare(chosen)
            command = [sys.executable, "-m", "uvicorn", APPLICATION, "--host", HOST, "--port", str(chosen)]
            self._server = Server.start(
                NAME,
                [*command, "--log-level", "warning"],
                folder=self.folder,
                port=chosen,
                environment=self._settings(),
                tied=not detach,
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout_s: float = _READY_TIMEOUT_S) -> None:
        """Wait until the server answers a query of its database.

        Raises
        ------
        SetupError
            If it ends or does not answer in time, or keeps its data elsewhere.
        """
        if self._server is None:
            raise SetupError(f"no MLflow server is running in {self.folder}.", hint=_UP)
        self._server.wait_ready(self.answers, timeout_s)
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
                self.stop()
                raise SetupError(
                    f"MLflow does not keep its data in {self.database}.",
                    hint="install the pinned version of mlflow (`make setup`)",
                )

    def answers(self) -> bool:
        """Whether the server answers a query of its database now."""
        # Not httpx or requests: no proxy of the environment may come between, and this is asked many times.
        connection = http.client.HTTPConnection(HOST, self._last_port(), timeout=10.0)
        try:
            for method, path, body in _PROBES:
                connection.request(method, path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
                if response.status != http.HTTPStatus.OK:
                    return False
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True

    def stop(self) -> None:
        """End the server cleanly, by force after a grace period; nothing happens if it is down."""
        if self.pid() is not None and self._server is not None:
            self._server.stop()
        self._server = None

    def __enter__(self) -> TrackingServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _last_port(self) -> int | None:
        try:
            return int((self.folder / "port").read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None

    def _prepare(self, port: int) -> None:
        """Make the database file, in WAL mode: a property of the file, so setting it once is enough."""
        try:
            (self.folder / "artifacts").mkdir(exist_ok=True)
            (self.folder / "port").write_text(f"{port}\n", encoding="ascii")
            with contextlib.closing(sqlite3.connect(self.database)) as database:
                database.execute("PRAGMA journal_mode=WAL")
        except (OSError, sqlite3.Error) as error:
            raise SetupError(
                f"cannot prepare {self.folder} for MLflow: {error}.", hint="choose another folder with --data"
            ) from error

    def _settings(self) -> dict[str, str]:
        # With a tracking address in its environment the server would ask itself.
        unwanted = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        return {
            **inherited,
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self.database}",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": (self.folder / "artifacts").as_uri(),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
            # Eight more processes and 2 GB, for evaluation jobs that nothing here submits.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }
