"""Where rows go that cannot be used: a file, and a topic for the owners of the data."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import orjson

from pipelines.errors import SetupError
from pipelines.events import DeadLetter
from pipelines.joined import NegativeDelay

__all__ = ["DeadLetterFile", "letter_key", "letter_value", "negative_delay_letter", "publish"]

Position = tuple[str, int, int, int]


class DeadLetterFile:
    """Dead letters, one JSON object a line; each position is written once.

    After a crash the same letters come again, as the rows since the last commit are read again; those that
    are in the file are passed over. A line that a crash cut short is removed. A worker that has been fenced,
    and does not know it yet, may write beside the one that took over: each looks first at what the other has
    added.

    Parameters
    ----------
    path : Path
        Created with the first letter.

    Raises
    ------
    SetupError
        If the file cannot be read or written, or holds something else.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "dead_letters.jsonl"
    >>> letter = DeadLetter("clicks", 0, 7, 0, "expected JSON.", "{")
    >>> DeadLetterFile(path).append([letter]), DeadLetterFile(path).append([letter])
    (1, 0)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: set[Position] = set()
        self._end = 0  # so far the file has been read
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._written)

    def unwritten(self, letters: Iterable[DeadLetter]) -> list[DeadLetter]:
        """Those letters that the file does not hold, each position once."""
        new: dict[Position, DeadLetter] = {}
        for letter in letters:
            position = _position(letter)
            if position not in self._written:
                new.setdefault(position, letter)
        return list(new.values())

    def append(self, letters: Iterable[DeadLetter]) -> int:
        """Add letters and make them durable; returns how many were new."""
        letters = self.unwritten(letters)
        if not letters:
            return 0
        try:
            with self.path.open("ab+") as file:
                self._catch_up(file)
                new = self.unwritten(letters)
                file.write(b"".join(letter_value(letter) + b"\n" for letter in new))
                file.flush()
                os.fsync(file.fileno())
                self._end = file.tell()
        except OSError as error:
            raise SetupError(f"cannot write dead letters to {self.path}: {error.strerror}.") from error
        self._written |= {_position(letter) for letter in new}
        return len(new)

    def _read(self) -> None:
        try:
            with self.path.open("rb+") as file:
                self._catch_up(file)
        except OSError as error:
            raise SetupError(f"cannot read the dead letters in {self.path}: {error.strerror}.") from error

    def _catch_up(self, file: IO[bytes]) -> None:
        """Read what was added since the last look; the file is ours until it is closed."""
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(self._end)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(self._end + whole)
        try:
            found = {_position(DeadLetter(**orjson.loads(line))) for line in content[:whole].splitlines()}
        except (ValueError, TypeError) as error:
            raise SetupError(
                f"{self.path} holds something other than dead letters: {error}.", hint="move it away"
            ) from error
        self._written |= found
        self._end += whole
        file.seek(self._end)


def letter_key(letter: DeadLetter) -> bytes:
    """Key of a letter in a topic: its position, so that repetitions are told by their key."""
    return f"{letter.source}:{letter.partition}:{letter.offset}:{letter.row}".encode()


def letter_value(letter: DeadLetter) -> bytes:
    """A letter as JSON."""
    return orjson.dumps(asdict(letter))


def negative_delay_letter(found: NegativeDelay, partitions: Sequence[tuple[str, int]]) -> DeadLetter:
    """The letter of an outcome that happened before what it belongs to; ``partitions`` names positions."""
    topic, partition = partitions[found.position[0]]
    return DeadLetter(
        topic,
        partition,
        found.position[1],
        found.position[2],
        f"expected an event_time of at least {found.opened}, when what it belongs to happened. "
        f"Received {found.event_time}.",
        json.dumps(asdict(found), sort_keys=True),
    )


def publish(producer: Any, topic: str, letters: Sequence[DeadLetter], timeout_s: float) -> None:
    """Send letters and wait until the broker has acknowledged all of them.

    Parameters
    ----------
    producer : kafka.KafkaProducer
        With ``acks="all"`` (`pipelines.kafka_client.make_producer`).
    topic : str
    letters : sequence of DeadLetter
    timeout_s : float

    Raises
    ------
    kafka.errors.KafkaError
        If one is not acknowledged in time.
    """
    sent = [producer.send(topic, key=letter_key(letter), value=letter_value(letter)) for letter in letters]
    producer.flush(timeout=timeout_s)
    for future in sent:
        future.get(timeout=timeout_s)


def _position(letter: DeadLetter) -> Position:
    return letter.source, letter.partition, letter.offset, letter.row
