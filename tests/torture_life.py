"""Logs in Kafka, and lives of worker processes over them."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

from jobs.checkpoint import CheckpointStore
from jobs.produce import produce
from pipelines.codec import encode_packed
from pipelines.config import Config
from pipelines.events import TOPICS
from pipelines.kafka_client import make_producer
from tests.small_run import SmallRun
from tests.torture_outcome import Outcome
from tests.torture_worker import Fault, run
from tests.workers import with_topics

__all__ = ["POISON", "RANDOM", "Life", "Log", "make_log", "poison", "settings"]

RANDOM = "random instant"
# Nobody listens there.
NO_MLFLOW = "http://127.0.0.1:9"
_TIMEOUT_S = 120.0
_POLL_S = 0.002
# What a worker would import by and by; torch imports the last but one when a student learns first.
_PRELOADED = [
    "tests.torture_worker",
    "models.gbdt",
    "lightgbm",
    "kafka",
    "torch.fx.experimental.symbolic_shapes",
    "pyarrow.dataset",
]

POISON: tuple[bytes | None, ...] = (
    None,
    b"",
    b"\x00\xff\xfe",
    b"{",
    b"[" * 100_000,
    b"[]",
    b"null",
    b'{"event_id": 1e999, "impression_id": {}, "event_time": "soon"}',
    b'{"event_id": "x", "impression_id": "x", "event_time": 99999999999999999999}',
    b'"' + b"x" * 900_000 + b'"',
)


def settings(config: Config, publish_every: int) -> Config:
    """The config with another time between commits (ms), and what is old removed soon."""
    update = {"publish_every": publish_every, "keep_releases": 2, "keep_checkpoints": 2, "deltas": 2}
    return config.model_copy(update={"stream": config.stream.model_copy(update=update)})


@dataclass(frozen=True)
class Log:
    """A log in Kafka, and what an uninterrupted worker makes of it."""

    small_run: SmallRun
    config: Config
    reference: Outcome


class Life:
    """Worker processes over one folder, one after the other or at once.

    Parameters
    ----------
    folder : Path
        Made ready here.
    sends : bool
        Whether the workers try to send to MLflow; else they leave it in the outbox.
    """

    def __init__(self, small_run: SmallRun, config: Config, folder: Path, *, sends: bool = False) -> None:
        self.folder, self.config, self._sends = folder, config, sends
        small_run.first_releases(folder / "releases")
        self.store = CheckpointStore(folder / "state")

    def start(self, fault: Fault | None = None, config: Config | None = None) -> ForkServerProcess:
        """A worker process."""
        # A server that has imported torch once forks the workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        process = context.Process(target=run, args=(self.folder, config or self.config, fault, self._sends))
        process.start()
        return process

    def end(self, process: ForkServerProcess) -> int:
        """Exit code of a process that comes to its end by itself."""
        process.join(_TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"a worker did not end within {_TIMEOUT_S:.0f} s:\n{self.said()}")
        return process.exitcode

    def kill_after(self, process: ForkServerProcess, ms: int) -> int:
        """SIGKILL after so long; an odd number counts from the first commit, an even one from the start."""
        before = self.store.head()
        while ms % 2 and process.is_alive() and self.store.head() == before:
            time.sleep(_POLL_S)
        process.join(ms / 1000)
        process.kill()
        return self.end(process)

    def meets(self, fault: Fault, config: Config) -> int:
        """Exit code of a worker that a fault happens to, or that has come to the end before it could."""
        if fault.where == RANDOM:
            return self.kill_after(self.start(None, config), fault.call)
        return self.end(self.start(fault, config))

    def finish(self) -> Outcome:
        """Let a last worker come to the end, and read what there is."""
        code = self.end(self.start())
        assert code == 0, f"a worker ended with exit code {code}:\n{self.said()}"
        return Outcome.of(self.folder)

    def committed(self) -> dict[str, Any] | None:
        """Manifest of the newest commit."""
        head = self.store.head()
        return None if head is None else self.store.manifest(head)

    def wait_for_commit(self, worker: int, process: ForkServerProcess) -> bool:
        """Until the worker that took the lease as the first, second, ... has committed; False if it ended."""
        deadline = time.monotonic() + _TIMEOUT_S
        while process.is_alive() and time.monotonic() < deadline:
            head = self.store.head()
            if head is not None and int(head.rsplit("-", 1)[1]) >= worker:
                return True
            time.sleep(_POLL_S)
        return False

    def corrupt(self, file: str) -> None:
        """Change one bit of a file of the newest checkpoint."""
        head = self.store.head()
        assert head is not None
        path = self.store.folder / head / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def said(self, end: int = 4000) -> str:
        """End of the log of all processes, so many characters; 0 for all of it."""
        return (self.folder / "worker.log").read_text(errors="replace")[-end:]


def make_log(
    small_run: SmallRun,
    bootstrap_servers: str,
    prefix: str,
    folder: Path,
    form: Literal["json", "packed"] = "json",
    fill: Callable[[Config], None] | None = None,
    stop: int | None = None,
) -> Log:
    """Send the log of a small run to topics of its own, or ``fill`` them, and read it undisturbed.

    Parameters
    ----------
    small_run : SmallRun
    bootstrap_servers, prefix : str
        The broker, and what the names of the topics begin with.
    folder : Path
        For the undisturbed worker.
    form : {"json", "packed"}
    fill : callable, optional
        Given the config, sends what is to be read.
    stop : int, optional
        Only the rows before this one.
    """
    tracking = small_run.config.tracking.model_copy(update={"uri": NO_MLFLOW})
    config = with_topics(small_run.config, bootstrap_servers, prefix).model_copy(
        update={"tracking": tracking}
    )
    if fill is None:
        produce(small_run.files, config, form=form, stop=stop)
    else:
        fill(config)
    reference = Life(small_run, settings(config, 200), folder).finish()
    assert reference.unaccounted == 0 and reference.strays == [] and reference.told["is champion"]
    assert len(set(map(_position, reference.letters))) == len(reference.letters) > 0
    return Log(small_run, config, reference)


def _position(line: str) -> tuple[Any, ...]:
    letter = json.loads(line)
    return tuple(letter[name] for name in ("source", "partition", "offset", "row"))


def poison(small_run: SmallRun, config: Config) -> int:
    """Send messages to every topic that nobody can read; how many."""
    pack = encode_packed(0, next(iter(small_run.files.blocks(0, 64, 64))).tables[0])
    broken = (*POISON, pack[: len(pack) // 2], pack[:-100] + b"\xff" * 100, pack[:8])
    producer = make_producer(config.kafka)
    for topic in TOPICS:
        for number, value in enumerate(broken):
            # The key lets a message without a value through: a tombstone.
            name = str(getattr(config.kafka.topics, topic))
            producer.send(name, value, b"poison", partition=number % 2)
    producer.close()
    return len(TOPICS) * len(broken)
