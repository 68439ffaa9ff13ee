"""What the worker has to tell MLflow, kept on disk until MLflow has it.

The worker only appends lines to ``outbox.jsonl``. A child process sends them in order and remembers how far
it came in ``outbox.offset``: MLflow may be slow or away, and the four seconds and 190 MB that importing its
client takes are not the worker's. A record is sent at least once; `jobs.tracking` makes repeats harmless.
What MLflow refuses goes to ``rejected.jsonl`` and does not hold up the rest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.child_process import Server
from pipelines.errors import CtrstreamError, SetupError, StaleStateError, TransientError

if TYPE_CHECKING:
    from jobs.tracking import Metric, Run, Tracking

__all__ = ["Drain", "OutboxRun", "TrackingOutbox"]

log = logging.getLogger(__name__)

_NAME = "drain"
_POLL_S = 0.2
_LONGEST_BACK_OFF_S = 15.0
# A record that fails this often while the server answers other queries is at fault itself.
_MOST_FAILURES = 8
_RESTART_AFTER_S = 30.0


class TrackingOutbox:
    """The writing side. Nothing here waits for MLflow, except ``close``.

    Parameters
    ----------
    folder : Path
        Belongs to this outbox; created when missing. A new outbox on the folder of one that was killed goes
        on with what that one left.
    uri, experiment, registered_model : str
        See `jobs.tracking.Tracking`. With an empty ``uri`` nothing is recorded.
    patience_s : float
        How long to wait for another process that writes to that folder and is about to end.

    Raises
    ------
    StaleStateError
        If another process writes to that folder.
    SetupError
        If the folder is not writable.

    Examples
    --------
    ::

        with TrackingOutbox(out / "tracking", config.tracking.uri, "ctrstream") as outbox:
            run = outbox.run("worker", {"job": "stream"})
            run.log_metrics([("quality/ne", 0.81, 12, 1_700_000_000_000)])
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        registered_model: str = "ctrstream",
        *,
        patience_s: float = 0.0,
    ) -> None:
        self.folder = folder.absolute()
        self.uri = uri
        self._target = (uri, experiment, registered_model)
        self._mutex = threading.Lock()
        self._drain: Server | None = None
        self._next_start = 0.0
        if not uri:
            return
        try:
            (self.folder / "spool").mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "writer.lock").open("w")
        except OSError as error:
            raise SetupError(
                f"the folder {self.folder} is not writable: {error.strerror}.", hint="choose another folder"
            ) from error
        deadline = time.monotonic() + patience_s
        while not self._is_ours():
            if time.monotonic() >= deadline:
                self._lock.close()
                raise StaleStateError(f"another process writes to the outbox {self.folder}.")
            time.sleep(_POLL_S)
        self._compact()
        self._file = os.open(self._records, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._end_torn_line()
        self._keep_draining()

    def _is_ours(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @property
    def _records(self) -> Path:
        return self.folder / "outbox.jsonl"

    def run(self, name: str, tags: Mapping[str, str] | None = None, key: str | None = None) -> OutboxRun:
        """The run of a key; see `jobs.tracking.Tracking.run`."""
        run = OutboxRun(self, name if key is None else key)
        self.append({"op": "run", "run": run.key, "name": name, "tags": dict(tags or {})})
        return run

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; it survives this process, though not the machine.

        Raises
        ------
        SetupError
            If the disk does not take it.
        """
        if not self.uri:
            return
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._mutex:
            try:
                written = os.write(self._file, line)
                if written < len(line):  # the last of the space; the next outbox ends the torn line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise SetupError(
                    f"cannot write to the outbox {self.folder}: {error.strerror}.",
                    hint="make room and start again",
                ) from error
            self._keep_draining()

    def pending(self) -> int:
        """Records that MLflow does not have yet."""
        if not self.uri or not self._records.exists():
            return 0
        with self._records.open("rb") as file:
            file.seek(_read_offset(self.folder))
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))

    def close(self, timeout_s: float = 30.0) -> int:
        """Wait until all is sent, at most `timeout_s` seconds, and end the sending process.

        Closing twice is no error.

        Returns
        -------
        int
            Records still pending; the next outbox on this folder sends them.
        """
        if not self.uri or self._file < 0:
            return self.pending()
        deadline = time.monotonic() + timeout_s
        while (pending := self.pending()) and time.monotonic() < deadline:
            self._keep_draining()
            time.sleep(_POLL_S / 4)
        if self._drain is not None:
            self._drain.stop(grace_s=2.0)
        os.close(self._file)
        self._file = -1
        self._lock.close()
        if pending:
            log.warning("%d records for MLflow at %s wait in %s.", pending, self.uri, self.folder)
        return pending

    def __enter__(self) -> TrackingOutbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compact(self) -> None:
        """Begin a new file where all of the old one was sent."""
        with _lock_of_drain(self.folder) as is_ours:
            if is_ours and self._records.exists() and not self.pending():
                # In this order: between the two steps all is sent once more, not lost.
                _write_offset(self.folder, 0)
                os.truncate(self._records, 0)

    def _end_torn_line(self) -> None:
        # Of a machine that stopped in mid-write. As a line of its own it is rejected, and said.
        with self._records.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if size and file.read() != b"\n":
                os.write(self._file, b"\n")

    def _keep_draining(self) -> None:
        """Start the sending process; start it again if it died, but not over and over."""
        if (self._drain is not None and self._drain.is_running()) or time.monotonic() < self._next_start:
            return
        if self._drain is not None:
            log.warning(
                "the process that sends to MLflow ended (see %s); starting it again.", self._drain.log_path
            )
        self._next_start = time.monotonic() + _RESTART_AFTER_S
        command = [sys.executable, "-m", "jobs.tracking_outbox", str(self.folder), *self._target]
        self._drain = Server.start(_NAME, command, folder=self.folder, port=0, tied=True)


class OutboxRun:
    """A run as the worker sees it: the methods of `jobs.tracking.Run`, none of which waits.

    Attributes
    ----------
    key : str
    """

    def __init__(self, outbox: TrackingOutbox, key: str) -> None:
        self._outbox = outbox
        self.key = key

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """See `jobs.tracking.Run.log_metrics`."""
        points = [(key, float(value), int(step), int(timestamp)) for key, value, step, timestamp in rows]
        self._append("metrics", rows=points)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `jobs.tracking.Run.log_params`."""
        from jobs.tracking import flatten

        self._append("params", params={key: str(value) for key, value in flatten(params).items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `jobs.tracking.Run.set_tags`."""
        self._append("tags", tags=dict(tags))

    def note(self, markdown: str) -> None:
        """See `jobs.tracking.Run.note`."""
        self._append("note", markdown=markdown)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See `jobs.tracking.Run.log_artifact`; the file is copied at once and may change afterwards."""
        if self._outbox.uri:
            copy = self._spool(path.name)
            shutil.copyfile(path, copy)
            self._append("artifact", path=str(copy), folder=folder)

    def log_figure(self, png: bytes, name: str) -> None:
        """See `jobs.tracking.Run.log_figure`."""
        if self._outbox.uri:
            copy = self._spool(f"{name}.png")
            copy.write_bytes(png)
            self._append("artifact", path=str(copy), folder="figures")

    def log_image(self, png: bytes, key: str, step: int, timestamp: int) -> None:
        """See `jobs.tracking.Run.log_image`."""
        if self._outbox.uri:
            copy = self._spool("image.png")
            copy.write_bytes(png)
            self._append("image", path=str(copy), key=key, step=step, timestamp=timestamp)

    def register(self, release: Path, aliases: Sequence[str] = ()) -> None:
        """See `jobs.tracking.Run.register`; the release may be collected afterwards."""
        if self._outbox.uri:
            copy = self._spool(release.name)
            shutil.copytree(release, copy, copy_function=_link)
            self._append("register", path=str(copy), aliases=list(aliases))

    def finish(self, status: str = "FINISHED") -> None:
        """See `jobs.tracking.Run.finish`."""
        self._append("finish", status=status)

    def _append(self, op: str, **arguments: Any) -> None:
        self._outbox.append({"op": op, "run": self.key, **arguments})

    def _spool(self, name: str) -> Path:
        folder = self._outbox.folder / "spool" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder / name


def _link(source: str, target: str) -> None:
    """A second name for a file that is never changed; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _send_image(run: Run, record: Mapping[str, Any]) -> None:
    png = Path(record["path"]).read_bytes()
    run.log_image(png, record["key"], record["step"], record["timestamp"])


_SEND: dict[str, Callable[[Run, Mapping[str, Any]], object]] = {
    "metrics": lambda run, record: run.log_metrics([tuple(row) for row in record["rows"]]),
    "params": lambda run, record: run.log_params(record["params"]),
    "tags": lambda run, record: run.set_tags(record["tags"]),
    "note": lambda run, record: run.note(record["markdown"]),
    "artifact": lambda run, record: run.log_artifact(Path(record["path"]), record["folder"]),
    "image": _send_image,
    "register": lambda run, record: run.register(Path(record["path"]), record["aliases"]),
    "finish": lambda run, record: run.finish(record["status"]),
}


class Drain:
    """The sending side: one process, records in order.

    Parameters
    ----------
    folder : Path
        An outbox's folder.
    tracking : Tracking
    """

    def __init__(self, folder: Path, tracking: Tracking) -> None:
        self.folder = folder
        self._tracking = tracking
        self._runs: dict[str, Run] = {}
        self._failures = 0

    def send_pending(self) -> int:
        """Send every whole record that is there; return how many.

        Raises
        ------
        TransientError
            If the server is away; what was sent until then is remembered.
        """
        offset, sent = _read_offset(self.folder), 0
        try:
            file = (self.folder / "outbox.jsonl").open("rb")
        except FileNotFoundError:
            return 0
        with file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the writer is not done with it
                self._send_or_reject(line)
                offset += len(line)
                _write_offset(self.folder, offset)
                sent += 1
        return sent

    def forever(self) -> None:
        """Send what comes, backing off while the server is away."""
        back_off = _POLL_S
        while True:
            try:
                self.send_pending()
                back_off = _POLL_S
            except TransientError as error:
                back_off = min(2.0 * back_off, _LONGEST_BACK_OFF_S)
                log.warning("%s Trying again in %.1f s.", error.message, back_off)
            time.sleep(back_off)

    def _send_or_reject(self, line: bytes) -> None:
        record: dict[str, Any] = {}
        try:
            record = json.loads(line)
            self._send(record)
        except TransientError as error:
            self._failures += self._tracking.is_up()
            if self._failures < _MOST_FAILURES:
                raise
            self._reject(line, error)
        except (CtrstreamError, ValueError, KeyError, TypeError, OSError) as error:
            self._reject(line, error)
        self._failures = 0
        if "path" in record:
            shutil.rmtree(Path(record["path"]).parent, ignore_errors=True)

    def _send(self, record: Mapping[str, Any]) -> None:
        key = record["run"]
        if record["op"] == "run":
            self._runs[key] = self._tracking.run(record["name"], record["tags"], key)
            return
        if key not in self._runs:  # its record was sent by a process before this one
            self._runs[key] = self._tracking.run(key)
        _SEND[record["op"]](self._runs[key], record)

    def _reject(self, line: bytes, error: Exception) -> None:
        log.error("left out: %s: %.200s", error, line.decode(errors="replace"))
        entry = {"reason": str(error), "record": line.decode(errors="replace")}
        with (self.folder / "rejected.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@contextlib.contextmanager
def _lock_of_drain(folder: Path) -> Iterator[bool]:
    """Whether no process sends from this folder; none can begin to while this is held."""
    with (folder / "drain.hold").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _read_offset(folder: Path) -> int:
    try:
        return int((folder / "outbox.offset").read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


def _write_offset(folder: Path, offset: int) -> None:
    temporary = folder / ".outbox.offset"
    temporary.write_text(f"{offset}\n", encoding="ascii")
    os.replace(temporary, folder / "outbox.offset")


def main(folder: str, uri: str, experiment: str, registered_model: str) -> None:
    """Body of the sending process: wait for the one before it to end, then send."""
    from jobs.tracking import Tracking

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with (Path(folder) / "drain.hold").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Drain(Path(folder), Tracking(uri, experiment, registered_model)).forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
