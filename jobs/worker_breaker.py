"""What stands between what is read and what is learned: good steps go through, others wait in the hold.

Three modes::

    learning ── a bound is broken ──► holding ── resume ──► draining ── hold is empty ──► learning
                                         └────── discard ───────┴─────────────────────────┘

Held rows count as read and as pending, dead letters among them as dead letters. Steps are held as they were
cut, so a worker that has resumed is, when the hold is empty, where it would be had it never stopped. While it
drains nothing is judged; then the window begins anew.

All of it belongs to the learning thread. A commit is given a `BreakerCut`, which never changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.breaker_request import forget_request, read_request
from jobs.checkpoint import CheckpointStore
from jobs.hold import HeldSegment, Hold
from jobs.online import OnlineLoop
from jobs.prepared import PreparedBlock, StepEvents
from monitoring.breaker import ArrivedRows, Breaker
from pipelines.config_sections import BreakerConfig
from pipelines.events import KINDS, EventBlock
from pipelines.joiner import Joiner

__all__ = ["BreakerCut", "Mode", "WorkerBreaker"]

log = logging.getLogger(__name__)

Mode = Literal["learning", "holding", "draining"]
Partitions = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class BreakerCut:
    """The breaker at a batch boundary.

    Attributes
    ----------
    state : dict
        What follows from the log and the commands: part of what is compared.
    segments : tuple of HeldSegment
    drained : int
        Steps of the first segment that have been learned.
    request : str or None
        The newest command that has been carried out.
    """

    state: dict[str, Any]
    segments: tuple[HeldSegment, ...]
    drained: int
    request: str | None

    def write(self, folder: Path) -> dict[str, Any]:
        """Make the held rows durable in ``folder``; returns what a checkpoint is to say of them.

        It depends on when commits were due, and so is no part of what is compared.
        """
        for segment in self.segments:
            segment.write(folder)
        return {
            "segments": [segment.told() for segment in self.segments],
            "drained": self.drained,
            "request": self.request,
        }


class WorkerBreaker:
    """Circuit breaker and hold of one worker.

    Parameters
    ----------
    config : BreakerConfig
    state : Path
        The worker's folder; held rows go to ``hold`` in it.
    epoch : int
        Of the worker's lease: part of the names of segments.

    Attributes
    ----------
    mode : str
    moves : int
        Steps held and commands obeyed so far. With the loop's step number it tells two commits apart.
    trips : int
    """

    def __init__(self, config: BreakerConfig, state: Path, epoch: int) -> None:
        self.config, self._state_folder, self._epoch = config, state, epoch
        self.bounds = Breaker(config)
        self.hold = Hold(state / "hold")
        self.mode: Mode = "learning"
        self.moves = self.trips = 0
        self.last_trip: dict[str, Any] | None = None
        self.discarded: list[dict[str, Any]] = []
        self._rows = dict.fromkeys(KINDS, 0)  # held, dead letters apart
        self._dead = dict.fromkeys(KINDS, 0)
        self._drained = 0  # steps of the first segment that have been learned
        self._ranges: dict[str, list[list[int]]] = {}  # first and last [offset, row in message]
        self._request: str | None = None
        self._has_said_full = False

    @property
    def held_rows(self) -> int:
        """Rows that wait, dead letters among them included."""
        return sum(self._rows.values()) + sum(self._dead.values())

    @property
    def is_full(self) -> bool:
        """Whether no more may be read before a command; said once."""
        is_full = self.mode == "holding" and self.held_rows >= self.config.hold_rows
        if is_full and not self._has_said_full:
            log.error("the hold is full rows=%d: reading waits for `ctrstream breaker`", self.held_rows)
        self._has_said_full = is_full
        return is_full

    def admits(self, events: StepEvents, loop: OnlineLoop) -> bool:
        """Whether a step is to be learned; if not it is to be held."""
        if self.mode != "learning":
            return False
        if not self.config.enabled:
            return True
        trip = self.bounds.observe(self._arrived(events, loop.joiner), events.clock)
        if trip is None:
            return True
        self.mode = "holding"
        self.trips += 1
        self.last_trip = {**asdict(trip), "reasons": list(trip.reasons)}
        log.error(
            "breaker tripped clock=%d %s: rows are held, nothing is learned until `ctrstream breaker`",
            trip.clock,
            "; ".join(trip.reasons),
        )
        return False

    def take(self, events: StepEvents, loop: OnlineLoop, partitions: Partitions) -> None:
        """Hold a step: its rows count as read and as pending."""
        dead = _dead_letters(events)
        _count(loop, events.read, dead, +1)
        for kind, rows in events.read.items():
            self._rows[KINDS[kind]] += rows - dead[kind]
            self._dead[KINDS[kind]] += dead[kind]
        self._note_ranges(events, partitions)
        self.moves += 1
        if self.hold.add(events.raw()):
            # Many rows between two commits: they are not to wait in memory.
            self._seal(partitions)
            self.hold.segments[-1].write(self.hold.folder)

    def cut(self, partitions: Partitions) -> BreakerCut:
        """As it is, for a commit."""
        self._seal(partitions)
        return BreakerCut(self.state(), tuple(self.hold.segments), self._drained, self._request)

    def obey(self, loop: OnlineLoop) -> None:
        """Carry out what `ctrstream breaker` has asked for since the last look."""
        request = read_request(self._state_folder)
        if request is None or request.id == self._request:
            return
        self._request = request.id
        self.moves += 1
        if request.command == "resume" and self.mode == "holding":
            log.info("breaker: resumed, learning %d held rows", self.held_rows)
            self.mode = "draining"
        elif request.command == "discard" and self.mode != "learning":
            self._discard(loop)
        else:
            log.warning("breaker: %s is passed over, the breaker is %s", request.command, self.mode)

    def drain(
        self, loop: OnlineLoop, prepare: Callable[[EventBlock], PreparedBlock], partitions: Partitions
    ) -> Iterator[StepEvents]:
        """The held steps in order; each is taken off the hold as it is handed out, to be learned at once."""
        if self.mode != "draining":
            return
        self._seal(partitions)
        while self.hold.segments:
            held = self.hold.read(self.hold.segments[0], partitions)
            starts = [0, *held.ends[:-1]]
            first = starts[self._drained]
            prepared = prepare(held.block.slice(first, len(held.block)))
            for start, end in list(zip(starts, held.ends, strict=True))[self._drained :]:
                events = prepared.step(start - first, end - first)
                self._hand_out(events, loop, len(starts), partitions)
                yield events
        if self.mode == "draining":
            self._go_on()

    def committed(self, cut: BreakerCut, store: CheckpointStore) -> None:
        """After the commit of a cut, and while none is in flight: clear what it has settled.

        That is the request that it holds the outcome of, and held rows that no checkpoint needs any more.
        """
        if cut.request is not None:
            forget_request(self._state_folder, cut.request)
        if self.hold.folder.exists() and any(self.hold.folder.iterdir()):
            kept = [store.manifest(name)["volatile"]["breaker"] for name in store.names()]
            self.hold.keep_only({segment["name"] for each in kept for segment in each["segments"]})

    def state(self) -> dict[str, Any]:
        """JSON state that follows from the log and the commands, copied."""
        return {
            "mode": self.mode,
            "moves": self.moves,
            "trips": self.trips,
            "rows": dict(self._rows),
            "dead": dict(self._dead),
            "ranges": {name: list(ends) for name, ends in self._ranges.items()},
            "last_trip": self.last_trip,
            "discarded": list(self.discarded),
            "window": self.bounds.state(),
        }

    def load_state(self, state: Mapping[str, Any], volatile: Mapping[str, Any]) -> None:
        """Continue from a `state` and what `BreakerCut.write` told with it."""
        self.mode, self.moves, self.trips = state["mode"], state["moves"], state["trips"]
        self._rows, self._dead = dict(state["rows"]), dict(state["dead"])
        self._ranges = {name: list(ends) for name, ends in state["ranges"].items()}
        self.last_trip, self.discarded = state["last_trip"], list(state["discarded"])
        self.bounds.load_state(state["window"])
        self.hold.load_state(volatile["segments"])
        self._drained, self._request = volatile["drained"], volatile["request"]
        if self.mode != "learning":
            log.warning("breaker is open mode=%s held_rows=%d", self.mode, self.held_rows)

    def _arrived(self, events: StepEvents, joiner: Joiner) -> ArrivedRows:
        clicks, conversions = events.clicks, events.conversions
        # Of one step the impressions come first: see `Joiner.process`.
        own = set(events.arrivals.impression_id)
        known = [
            joiner.knows(outcomes.impression_id)
            | np.fromiter((name in own for name in outcomes.impression_id), np.bool_, len(outcomes))
            for outcomes in (clicks, conversions)
        ]
        return ArrivedRows(
            events.arrivals.arrival_time,
            clicks.arrival_time,
            conversions.arrival_time,
            known[0],
            known[1],
            events.nulls,
        )

    def _note_ranges(self, events: StepEvents, partitions: Partitions) -> None:
        source = events.source
        for index in np.unique(source.partition).tolist():
            places = np.flatnonzero(source.partition == index)[[0, -1]]
            first, last = zip(source.offset[places].tolist(), source.row[places].tolist(), strict=True)
            name = "{}:{}".format(*partitions[index])
            self._ranges[name] = [self._ranges[name][0] if name in self._ranges else [*first], [*last]]

    def _seal(self, partitions: Partitions) -> None:
        self.hold.seal(f"{self.moves:012d}-{self._epoch:06d}.arrow", partitions)

    def _hand_out(self, events: StepEvents, loop: OnlineLoop, steps: int, partitions: Partitions) -> None:
        """Take a step off the hold; the loop counts its rows once more when it learns them."""
        dead = _dead_letters(events)
        _count(loop, events.read, dead, -1)
        for kind, rows in events.read.items():
            self._rows[KINDS[kind]] -= rows - dead[kind]
            self._dead[KINDS[kind]] -= dead[kind]
        for index in np.unique(events.source.partition).tolist():
            last = np.flatnonzero(events.source.partition == index)[-1]
            # What is left begins behind it.
            place = [int(events.source.offset[last]), int(events.source.row[last]) + 1]
            name = "{}:{}".format(*partitions[index])
            self._ranges[name] = [place, self._ranges[name][1]]
        self._drained += 1
        if self._drained == steps:
            self.hold.segments.pop(0)
            self._drained = 0
        if not self.hold.segments:
            self._go_on()

    def _discard(self, loop: OnlineLoop) -> None:
        for kind, rows in self._rows.items():
            loop.accounting.move(kind, "pending", "expired", rows)
        entry = {
            "rows": dict(self._rows),
            "dead_letters": dict(self._dead),
            "offsets": dict(self._ranges),
            "tripped_at": None if self.last_trip is None else self.last_trip["clock"],
        }
        log.warning("breaker: discarded %d held rows %s", self.held_rows, self._ranges)
        self.discarded.append(entry)
        self.hold.clear()
        # What was wrong is not to be compared with: what came before it still is.
        self._go_on(keep_baseline=True)

    def _go_on(self, *, keep_baseline: bool = False) -> None:
        """Learn again, with nothing held and a window that begins anew."""
        self.mode, self._drained, self._ranges = "learning", 0, {}
        self._rows, self._dead = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        self.bounds.restart(keep_baseline=keep_baseline)


def _dead_letters(events: StepEvents) -> list[int]:
    good = [len(events.arrivals), len(events.clicks), len(events.conversions)]
    return [events.read.get(kind, 0) - rows for kind, rows in enumerate(good)]


def _count(loop: OnlineLoop, read: Mapping[int, int], dead: Sequence[int], sign: int) -> None:
    """Count the rows of a held step as read (or, with a sign of -1, no longer)."""
    change = loop.accounting.add if sign > 0 else loop.accounting.remove
    for kind, rows in read.items():
        loop.read[KINDS[kind]] += sign * rows
        change(KINDS[kind], "pending", rows - dead[kind])
        change(KINDS[kind], "dead_lettered", dead[kind])
