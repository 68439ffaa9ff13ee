"""`make torture`: the worker is killed at every named point and at random instants; nothing comes of it.

Every life of a worker begins in an empty folder and goes through faults until the end of the log. What it
leaves is compared with what an uninterrupted worker leaves: state digest, predictions, dead letters,
accounting, the last release and what MLflow comes to know.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from jobs.broker import Broker
from jobs.produce import produce
from pipelines.config import Config
from tests.small_run import SmallRun, build_small_run
from tests.torture_life import RANDOM, Life, Log, make_log, poison, settings
from tests.torture_outcome import Outcome
from tests.torture_points import FULL_DISKS, KILLS, OFTEN, ONCE
from tests.torture_worker import TOLD, Fault

__all__ = [
    "Tortured",
    "beside_each_other",
    "faults",
    "torture",
    "with_a_corrupt_checkpoint",
    "without_its_broker",
]

_FIRST = Fault("head moved", 1)
_SLOW = Fault("slow steps", 60)
# Wall time between two commits, ms: after each step, after a few, after many.
_PUBLISH_EVERY = (1, 1, 20, 80)
# A place that the rest of the log does not reach is tried again in a new life, with all commits there can be.
_MOST_TRIES = 4
_FORMS = ("json", "packed", "poisoned")


@dataclass
class Tortured:
    """What happened to the workers of one seed.

    Attributes
    ----------
    met : Counter
        How often each fault has happened.
    lives, equal : int
        How often the log was read to its end, and how often that was the uninterrupted worker's end.
    inside : int
        Kills after which the cursor pointed into a packed message.
    rows, unaccounted : int
        Of all lives.
    wrong : list of str
        What differed at the end of a life, and exits that no fault explains.
    """

    met: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    equal: int = 0
    inside: int = 0
    rows: int = 0
    unaccounted: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How often a worker got SIGKILL."""
        return sum(count for where, count in self.met.items() if where in KILLS or where == RANDOM)

    def end(self, outcome: Outcome, reference: Outcome) -> None:
        """Take note of how a life ended."""
        differences = outcome.differences(reference)
        self.lives += 1
        self.equal += not differences
        self.rows += outcome.rows
        self.unaccounted += outcome.unaccounted
        self.wrong += [f"life {self.lives}: {name} differs" for name in differences]

    def add(self, other: Tortured) -> None:
        """Take over what another one has seen."""
        self.met += other.met
        for name in ("lives", "equal", "inside", "rows", "unaccounted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wrong += other.wrong


def faults(rng: np.random.Generator, names: Sequence[str], random_instants: int) -> list[Fault]:
    """Faults in random order, each at a call or after a time of its own."""
    drawn = [Fault(name, int(rng.integers(0, _calls(name)))) for name in names]
    drawn += [Fault(RANDOM, int(rng.integers(1, 900))) for _ in range(random_instants)]
    shuffled = [drawn[index] for index in rng.permutation(len(drawn))]
    # After that one there is nothing left to do in a life.
    return sorted(shuffled, key=lambda fault: fault.where == "before the worker leaves")


def _calls(name: str) -> int:
    """How many calls to choose from: places that a commit passes several times have more of them."""
    return 1 if name in ONCE else 40 if name in OFTEN else 3


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
    found, left = Tortured(), list(planned)
    tries = Counter[Fault]()
    while left:
        life = Life(log.small_run, settings(log.config, 1), folder / f"life-{found.lives}")
        # Where nothing was committed yet there is nothing to restore.
        for fault in (_FIRST, *left):
            every = int(rng.choice(_PUBLISH_EVERY))
            config = settings(log.config, 1 if tries[fault] else every)
            code = life.meets(fault, config)
            if code == 0:
                tries[fault] += 1
                if fault.where == RANDOM:  # on a faster machine it has to come sooner
                    left[left.index(fault)] = fault.sooner()
                break
            if code != (TOLD if fault.where in FULL_DISKS else -signal.SIGKILL):
                found.wrong.append(f"{fault}: exit code {code}: {life.said()[-600:]}")
            found.met[fault.where] += 1
            manifest = life.committed()
            found.inside += manifest is not None and any(place[3] for place in manifest["cursor"])
            if fault in left:
                left.remove(fault)
        found.end(life.finish(), log.reference)
        for fault in [one for one in left if tries[one] >= _MOST_TRIES]:
            found.wrong.append(f"{fault} was never reached")
            left.remove(fault)
    return found


# Faults around the worker ---------------------------------------------------------------------------------


def without_its_broker(log: Log, folder: Path, rng: np.random.Generator, broker: Broker) -> Tortured:
    """Kill the broker under a worker and start it again."""
    found, life = Tortured(), Life(log.small_run, settings(log.config, 1), folder)
    process = life.start(_SLOW)
    has_begun = life.wait_for_commit(1, process)
    time.sleep(float(rng.uniform(0, 0.3)))
    is_alive = process.is_alive()
    broker.kill()
    time.sleep(float(rng.uniform(0, 1)))
    broker.start()
    code = life.end(process)
    found.met["broker killed"] += 1
    if not (has_begun and is_alive and code == 0):
        found.wrong.append(f"broker killed: alive {is_alive}, exit code {code}: {life.said()[-600:]}")
    found.end(life.finish(), log.reference)
    return found


def with_a_corrupt_checkpoint(log: Log, folder: Path, files: Sequence[str]) -> Tortured:
    """Kill a worker and change a bit of a file of its newest checkpoint, once for each file.

    Of every other time the next worker is killed when it has just gone back.
    """
    found, life = Tortured(), Life(log.small_run, settings(log.config, 1), folder)
    for number, file in enumerate(files):
        planned = [Fault("offsets committed", 4), Fault("head moved", 0)][: 1 + number % 2]
        for fault in planned:
            code = life.meets(fault, life.config)
            if code != -signal.SIGKILL:
                found.wrong.append(f"{file} corrupt: exit code {code}: {life.said()[-600:]}")
            found.met[fault.where] += 1
            if fault is planned[0]:
                life.corrupt(file)
                found.met[f"{file} corrupt"] += 1
    found.end(life.finish(), log.reference)
    if life.said(0).count("going back to the checkpoint before it") < len(files):
        found.wrong.append(f"a corrupt checkpoint was not noticed: {life.said()[-600:]}")
    return found


def beside_each_other(log: Log, folder: Path, workers: int) -> Tortured:
    """Start a worker beside the one that runs, and so on: each fences the one before it."""
    found, life = Tortured(), Life(log.small_run, settings(log.config, 1), folder)
    running = [life.start(_SLOW)]
    for number in range(1, workers):
        if not life.wait_for_commit(number, running[-1]):
            found.wrong.append(f"a worker ended too soon: {life.said()[-600:]}")
        running.append(life.start(_SLOW))
    codes = [life.end(process) for process in running]
    found.met["another worker started"] += workers - 1
    if codes != [TOLD] * (workers - 1) + [0]:
        found.wrong.append(f"workers ended with {codes}: {life.said()[-600:]}")
    found.end(life.finish(), log.reference)
    return found


# Command -------------------------------------------------------------------------------------------------


def _log(form: str, small_run: SmallRun, bootstrap_servers: str, folder: Path) -> Log:
    def with_poison(config: Config) -> None:
        middle = (small_run.warm_rows + small_run.files.rows) // 2
        produce(small_run.files, config, stop=middle)
        poison(small_run, config)
        produce(small_run.files, config, start=middle)

    fill = with_poison if form == "poisoned" else None
    return make_log(
        small_run,
        bootstrap_servers,
        f"torture-{form}",
        folder,
        form="packed" if form == "packed" else "json",
        fill=fill,
    )


def _one_seed(
    log: Log, folder: Path, seed: int, broker: Broker, random_instants: int, broker_kills: int
) -> Tortured:
    rng = np.random.default_rng(seed)
    found = torture(log, folder / "kills", rng, faults(rng, list(KILLS), random_instants))
    found.add(torture(log, folder / "full", rng, faults(rng, list(FULL_DISKS), 0)))
    files = rng.permutation(["shard-00000.safetensors", "state.json", "MANIFEST.json"]).tolist()
    found.add(with_a_corrupt_checkpoint(log, folder / "corrupt", files))
    found.add(beside_each_other(log, folder / "beside", 3))
    for number in range(broker_kills):
        found.add(without_its_broker(log, folder / f"broker-{number}", rng, broker))
    return found


def _print_summary(total: Tortured, seeds: int) -> None:
    click.echo(f"\n{'times':>6}  what happened")
    for where in (*KILLS, RANDOM):
        if total.met[where]:
            click.echo(f"{total.met[where]:>6}  killed: {where}")
    for where, count in total.met.items():
        if where not in KILLS and where != RANDOM:
            click.echo(f"{count:>6}  {where}")
    click.echo(
        f"\n{total.kills} kills and {total.met.total() - total.kills} other faults over {seeds} seeds, "
        f"{total.inside} of them inside a packed message.\n"
        f"{total.equal} of {total.lives} ends are the uninterrupted worker's: state digest, predictions, "
        "dead letters, accounting, release, MLflow.\n"
        f"{total.rows:,} rows accounted for, {total.unaccounted} unaccounted."
    )


@click.command()
@click.option("--seeds", default=10, show_default=True, help="How many runs, each with instants of its own.")
@click.option("--seed", "first_seed", default=1, show_default=True, help="Seed of the first run.")
@click.option(
    "--random", "random_instants", default=6, show_default=True, help="Kills at random instants a run."
)
@click.option("--broker-kills", default=1, show_default=True, help="Times a run that the broker is killed.")
def command(seeds: int, first_seed: int, random_instants: int, broker_kills: int) -> None:
    """Kill the worker again and again, and compare what it leaves with an uninterrupted one."""
    total = Tortured()
    with tempfile.TemporaryDirectory(prefix="ctrstream-torture-") as name:
        folder = Path(name)
        click.echo("simulating a log, training the first models, starting a broker", err=True)
        (folder / "small_run").mkdir()
        small_run = build_small_run(folder / "small_run")
        with Broker(folder / "broker").start() as broker:
            logs = {form: _log(form, small_run, broker.bootstrap_servers, folder / form) for form in _FORMS}
            click.echo(
                f"{'seed':>6} {'messages':<9} {'kills':>5} {'other faults':>12} {'ends':>4} {'equal':>5} "
                f"{'rows':>9} {'unaccounted':>11} {'seconds':>7}"
            )
            for seed in range(first_seed, first_seed + seeds):
                form, began = _FORMS[seed % len(_FORMS)], time.monotonic()
                found = _one_seed(
                    logs[form], folder / f"seed-{seed}", seed, broker, random_instants, broker_kills
                )
                found.wrong = [f"seed {seed}: {what}" for what in found.wrong]
                total.add(found)
                click.echo(
                    f"{seed:>6} {form:<9} {found.kills:>5} {found.met.total() - found.kills:>12} "
                    f"{found.lives:>4} {found.equal:>5} {found.rows:>9,} {found.unaccounted:>11} "
                    f"{time.monotonic() - began:>7.0f}"
                )
    _print_summary(total, seeds)
    click.echo("\n".join(total.wrong))
    sys.exit(1 if total.wrong or total.unaccounted or total.equal < total.lives else 0)


if __name__ == "__main__":
    command()
