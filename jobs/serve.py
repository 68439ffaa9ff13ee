"""``ctrstream serve``: score requests over HTTP with the current release."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.child_process import Server, free_port
from jobs.options import config_options
from pipelines.errors import SetupError

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["ServeProcess", "command", "listen"]

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_NAME = "serve"
_READY_TIMEOUT_S = 90.0  # 3 s on an idle machine, nearly all of it imports
_GRACE_S = 10


@click.command()
@config_options
@click.option(
    "--releases",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of releases; CURRENT in it names the one to serve.",
)
@click.option("--host", help="Address to listen on, instead of the configured one.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port, instead of the configured one; 0: a free one."
)
@click.option(
    "--log",
    "log_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("runs/serve/served.jsonl"),
    show_default=True,
    help="Where served impressions are logged; loaded.jsonl beside it says which release was loaded when.",
)
def command(config: Config, root: Path, host: str | None, port: int | None, log_path: Path) -> None:
    """Score requests over HTTP with the current release.

    POST /score, GET /healthz, /release, /metrics; /docs describes them. A new release is taken up within
    serve.reload_every. Ends cleanly on SIGTERM.
    """
    # Requests are small and scored one after another: threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import uvicorn

    from jobs.release_watch import ReleaseWatch
    from jobs.scoring_app import create_app
    from jobs.served_log import ServedLog

    listening = listen(host or config.serve.host, config.serve.port if port is None else port)
    served = ServedLog(log_path)
    watch = ReleaseWatch(root, record=log_path.with_name("loaded.jsonl"))
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(watch, served, config.serve.reload_every),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    address, bound = listening.getsockname()[:2]
    click.echo(f"http://{address}:{bound}")
    server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; made before the slow imports, so that a port in use is known at once.

    Raises
    ------
    SetupError
        If the address cannot be used.
    """
    hint = "stop what listens there, or choose another port with --port (0 takes a free one)"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # The protocol must be named: asyncio turns Nagle's algorithm off only where it is, and with it on
        # every answer waits 40 ms for the client's acknowledgement.
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SetupError(f"cannot listen on {host}:{port}: {error.strerror}.", hint=hint) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Two servers could bind one port under SO_REUSEADDR as long as neither listens.
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise SetupError(f"cannot listen on {host}:{port}: {error.strerror}.", hint=hint) from error
    return bound


class ServeProcess:
    """The endpoint as a process of its own, which ends with this one.

    Parameters
    ----------
    folder : Path
        Holds ``served.jsonl``, ``loaded.jsonl``, the process's output and its state.
    releases : Path
        Folder of releases.

    Examples
    --------
    ::

        with ServeProcess(out / "serve", out / "releases").start() as server:
            httpx.post(f"{server.url}/score", json={"impressions": [...]})
        check_consistency(server.served, out / "releases")
    """

    def __init__(self, folder: Path, releases: Path) -> None:
        self.folder = folder.absolute()
        self.releases = releases.absolute()
        self._server: Server | None = None

    @property
    def served(self) -> Path:
        """Log of the served impressions."""
        return self.folder / "served.jsonl"

    @property
    def loaded(self) -> Path:
        """Log of the releases that came into service."""
        return self.folder / "loaded.jsonl"

    @property
    def url(self) -> str:
        """Address, ``http://host:port``.

        Raises
        ------
        SetupError
            If the process was not started.
        """
        return f"http://{HOST}:{self._running().record.port}"

    def start(self, *, port: int = 0, reload_every: str = "500ms", wait: bool = True) -> ServeProcess:
        """Start the process and return once it answers.

        Parameters
        ----------
        port : int
            0 takes a free one.
        reload_every : str
            A duration: how often CURRENT is looked at.
        wait : bool
            False returns at once; call ``wait_ready`` before use.

        Raises
        ------
        SetupError
            If the process ends or does not answer in time; its last words are shown.
        """
        chosen = port or free_port(HOST)
        command = [sys.executable, "-m", "jobs.cli", "serve", "--releases", str(self.releases)]
        command += ["--host", HOST, "--port", str(chosen), "--log", str(self.served)]
        command += ["--set", f"serve.reload_every={reload_every}"]
        self._server = Server.start(_NAME, command, folder=self.folder, port=chosen, tied=True)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout_s: float = _READY_TIMEOUT_S) -> None:
        """Wait until the endpoint answers."""
        self._running().wait_ready(self._answers, timeout_s)

    def stop(self) -> None:
        """End the process cleanly: what was served is in the log afterwards."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def kill(self) -> None:
        """End the process as a crash would."""
        if self._server is not None:
            self._server.kill()
            self._server = None

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _running(self) -> Server:
        if self._server is None:
            raise SetupError("the scoring endpoint was not started.", hint="call start() first")
        return self._server

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._running().record.port, timeout=5.0)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
