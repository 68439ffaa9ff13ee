"""`make torture`: the worker is killed at every named point and at random instants; nothing comes of it.

Every life of a worker begins in an empty folder and goes through faults until the end of the log. What it
leaves is compared with what an uninterrupted worker leaves: state digest, predictions, dead letters,
accounting and the last release.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import pyarrow as pa

from jobs.broker import Broker
from jobs.checkpoint import CheckpointStore, state_digest
from jobs.predictions import PredictionLog
from jobs.produce import produce
from jobs.release import pointed, read_verified
from jobs.release_manifest import Manifest
from monitoring.accounting import Accounting
from pipelines.config import Config
from pipelines.config_sections import KafkaConfig, TopicsConfig
from pipelines.events import TOPICS
from tests.small_run import SmallRun, build_small_run
from tests.torture_worker import FULL_DISKS, KILLS, TOLD, Fault, run

__all__ = ["RANDOM", "Life", "Log", "Outcome", "Tortured", "faults", "make_log", "settings", "torture"]

RANDOM = "random instant"
_FIRST = Fault("head moved", 1)
_TIMEOUT_S = 120.0
_POLL_S = 0.002
# Wall time between two commits, ms: after each step, after a few, after many.
_PUBLISH_EVERY = (1, 1, 20, 80)
# A place that the rest of the log does not reach is tried again in a new life.
_MOST_TRIES = 4


# What a worker leaves ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a worker has left at the end of a log; nothing in it depends on when it was killed.

    Attributes
    ----------
    digest : str
        State digest: weights, slots, joiner, replay, calibrators, metrics, cursor.
    predictions : str
        sha256 over all predictions.
    letters : list of str
        Lines of the file of dead letters, sorted.
    accounted : dict
        Rows by kind and class.
    difference : dict
        Rows read less rows accounted for, by kind.
    release : dict
        What the newest release is, but for the epoch.
    strays : list of str
        Half-written files, and whole ones that no commit names.
    """

    digest: str
    predictions: str
    letters: list[str]
    accounted: dict[str, dict[str, int]]
    difference: dict[str, int]
    release: dict[str, Any]
    strays: list[str]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """Read it from ``state`` and ``releases`` in a folder; every file is verified."""
        found = CheckpointStore(folder / "state").load()
        assert found is not None, f"no checkpoint in {folder}"
        assert state_digest(found.arrays, found.plain) == found.manifest["digest"]
        accounting = Accounting.from_state(found.plain["accounting"])
        predictions = PredictionLog(folder / "state" / "predictions")
        letters = (folder / "state" / "dead_letters.jsonl").read_bytes()
        assert letters.endswith(b"\n")
        return cls(
            digest=found.manifest["digest"],
            predictions=_digest(predictions.read(found.manifest["outputs"])),
            letters=sorted(letters.decode().splitlines()),
            accounted=accounting.value(),
            difference=accounting.check(found.plain["read"]),
            release=_release(folder / "releases", found.manifest["digest"]),
            strays=_strays(folder / "state", set(found.manifest["outputs"])),
        )

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same."""
        return [one.name for one in fields(self) if getattr(self, one.name) != getattr(other, one.name)]


def _digest(table: pa.Table) -> str:
    """sha256 over the predictions in an order of their own, without the release that was newest then."""
    table = table.drop_columns(["release"]).set_column(1, "task", table["task"].cast(pa.string()))
    table = table.sort_by(
        [("task", "ascending"), ("arrived_at", "ascending"), ("impression_id", "ascending")]
    )
    total = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        values = column.to_pylist() if column.type == pa.string() else column.to_numpy().tobytes().hex()
        total.update(f"{name}|{json.dumps(values)}|".encode())
    return total.hexdigest()


def _release(root: Path, digest: str) -> dict[str, Any]:
    newest = pointed(root, "CURRENT")
    assert newest is not None, f"no release in {root}"
    manifest = Manifest.read(root / newest)
    read_verified(root / newest, manifest)
    assert manifest.extra["state_digest"] == digest, f"{newest} was not cut from the last commit"
    return manifest.model_dump(
        mode="json", exclude={"name", "epoch", "parent", "digest", "extra", "code_version"}
    )


def _strays(state: Path, outputs: set[str]) -> list[str]:
    segments = {path.name for path in (state / "predictions").iterdir()}
    half = {path.name for path in (state / "checkpoints").glob(".tmp-*")}
    return sorted((segments ^ outputs) | half)


# A log, and lives of workers over it ----------------------------------------------------------------------


def settings(config: Config, publish_every: int, keep_releases: int = 2) -> Config:
    """The config with another time between commits (ms)."""
    update = {"publish_every": publish_every, "keep_releases": keep_releases}
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
    """

    def __init__(self, small_run: SmallRun, config: Config, folder: Path) -> None:
        self.folder, self.config = folder, config
        small_run.first_releases(folder / "releases")
        self.store = CheckpointStore(folder / "state")

    def start(self, fault: Fault | None = None, config: Config | None = None) -> ForkServerProcess:
        """A worker process."""
        # A server that has imported torch once forks the workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.torture_worker", "models.gbdt", "lightgbm", "kafka"])
        process = context.Process(target=run, args=(self.folder, config or self.config, fault))
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

    def said(self) -> str:
        """End of the log of all processes."""
        return (self.folder / "worker.log").read_text(errors="replace")[-4000:]


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
    topics = {name: f"{prefix}-{name}" for name in (*TOPICS, "dead_letters")}
    kafka = KafkaConfig(bootstrap_servers=bootstrap_servers, topics=TopicsConfig(**topics), partitions=2)
    config = small_run.config.model_copy(update={"kafka": kafka})
    if fill is None:
        produce(small_run.files, config, form=form, stop=stop)
    else:
        fill(config)
    reference = Life(small_run, settings(config, 200), folder).finish()
    assert set(reference.difference.values()) == {0} and reference.strays == []
    assert len(set(map(_position, reference.letters))) == len(reference.letters) > 0
    return Log(small_run, config, reference)


def _position(line: str) -> tuple[Any, ...]:
    letter = json.loads(line)
    return tuple(letter[name] for name in ("source", "partition", "offset", "row"))


# Torture -------------------------------------------------------------------------------------------------


@dataclass
class Tortured:
    """What happened to the workers of one seed.

    Attributes
    ----------
    met : Counter
        How often each fault has happened.
    lives : int
        How often the log was read to its end.
    inside : int
        Kills after which the cursor pointed into a packed message.
    wrong : list of str
        What differed at the end of a life, and exits that no fault explains.
    """

    met: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    inside: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        return self.met.total()


def faults(rng: np.random.Generator, names: Sequence[str], random_instants: int) -> list[Fault]:
    """Faults in random order, each at a call or after a time of its own."""
    drawn = [Fault(name, int(rng.integers(0, _calls(name)))) for name in names]
    drawn += [Fault(RANDOM, int(rng.integers(1, 900))) for _ in range(random_instants)]
    shuffled = [drawn[index] for index in rng.permutation(len(drawn))]
    # After that one there is nothing left to do in a life.
    return sorted(shuffled, key=lambda fault: fault.where == "before the worker leaves")


def _calls(name: str) -> int:
    """How many calls to choose from: places that a commit passes several times have more of them."""
    once = ("lease taken", "state restored", "before running.json", "before the worker leaves")
    if name in once or name.startswith("running.json"):
        return 1
    return 40 if name in ("before any write is on disk", "any write is on disk", "disk full") else 4


def torture(log: Log, folder: Path, rng: np.random.Generator, planned: Sequence[Fault]) -> Tortured:
    """Let every fault happen to a worker, in as many lives as that takes.

    Parameters
    ----------
    log : Log
    folder : Path
        Each life gets a folder in it.
    rng : Generator
        Draws the time between commits.
    planned : sequence of Fault
    """
    found, began, left = Tortured(), time.monotonic(), list(planned)
    tries = Counter[Fault]()
    while left:
        life = Life(log.small_run, settings(log.config, 1), folder / f"life-{found.lives}")
        # Where nothing was committed yet there is nothing to restore.
        for fault in (_FIRST, *left):
            config = settings(log.config, int(rng.choice(_PUBLISH_EVERY)))
            code = life.meets(fault, config)
            if code == 0:
                tries[fault] += 1
                break
            if code != (TOLD if fault.where in FULL_DISKS else -signal.SIGKILL):
                found.wrong.append(f"{fault}: exit code {code}: {life.said()[-600:]}")
            found.met[fault.where] += 1
            manifest = life.committed()
            found.inside += manifest is not None and any(place[3] for place in manifest["cursor"])
            if fault in left:
                left.remove(fault)
        outcome = life.finish()
        found.lives += 1
        found.wrong += [f"life {found.lives}: {name}" for name in outcome.differences(log.reference)]
        for fault in [one for one in left if tries[one] >= _MOST_TRIES]:
            found.wrong.append(f"{fault} was never reached")
            left.remove(fault)
    found.seconds = time.monotonic() - began
    return found


def without_its_broker(log: Log, folder: Path, rng: np.random.Generator, broker: Broker) -> list[str]:
    """Kill the broker under a worker, start it again, and say what differs at the end."""
    life = Life(log.small_run, settings(log.config, 1), folder)
    process, before = life.start(), life.store.head()
    while process.is_alive() and life.store.head() == before:
        time.sleep(_POLL_S)
    time.sleep(float(rng.uniform(0, 0.5)))
    is_alive = process.is_alive()
    broker.kill()
    time.sleep(float(rng.uniform(0, 1)))
    broker.start()
    code = life.end(process)
    wrong = [] if is_alive and code == 0 else [f"broker killed: alive {is_alive}, exit code {code}"]
    return wrong + [f"broker killed: {name}" for name in life.finish().differences(log.reference)]


# Command -------------------------------------------------------------------------------------------------


@click.command()
@click.option("--seeds", default=10, show_default=True, help="How many runs, each with instants of its own.")
@click.option("--seed", "first_seed", default=1, show_default=True, help="Seed of the first run.")
@click.option(
    "--random", "random_instants", default=4, show_default=True, help="Kills at random instants a run."
)
@click.option("--broker-kills", default=1, show_default=True, help="Times a run that the broker is killed.")
def command(seeds: int, first_seed: int, random_instants: int, broker_kills: int) -> None:
    """Kill the worker again and again, and compare what it leaves with an uninterrupted one."""
    total, wrong = Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="ctrstream-torture-") as name:
        folder = Path(name)
        click.echo("simulating a log, training the first models, starting a broker", err=True)
        (folder / "small_run").mkdir()
        small_run = build_small_run(folder / "small_run")
        with Broker(folder / "broker").start() as broker:
            logs = [
                make_log(small_run, broker.bootstrap_servers, f"torture-{form}", folder / form, form)
                for form in ("json", "packed")
            ]
            click.echo(
                f"{'seed':>6} {'messages':<8} {'kills':>5} {'at random':>9} {'inside':>6} {'lives':>5} "
                f"{'broker kills':>12} {'seconds':>7}  same as uninterrupted"
            )
            for seed in range(first_seed, first_seed + seeds):
                form, log = ("json", "packed")[seed % 2], logs[seed % 2]
                rng = np.random.default_rng(seed)
                own = folder / f"seed-{seed}"
                found = torture(log, own, rng, faults(rng, list(KILLS), random_instants))
                for number in range(broker_kills):
                    found.wrong += without_its_broker(log, own / f"broker-{number}", rng, broker)
                total += found.met
                wrong += [f"seed {seed}: {what}" for what in found.wrong]
                click.echo(
                    f"{seed:>6} {form:<8} {found.faults:>5} {found.met[RANDOM]:>9} {found.inside:>6} "
                    f"{found.lives:>5} {broker_kills:>12} {found.seconds:>7.0f}  "
                    f"{'NO' if found.wrong else 'yes'}"
                )
    click.echo(f"\n{total.total()} kills over {seeds} seeds:")
    for where, count in sorted(total.items()):
        click.echo(f"  {count:>4}  {where}")
    click.echo("\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    command()
