"""What was served, one JSON object an impression, so that it can be scored again offline.

Requests only append to a list; a thread writes it out. A full disk loses log lines, which are counted, and
no answers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from jobs.options import writable_folder
from jobs.release import Release, Scored
from pipelines.features import Encoded

__all__ = ["DIGEST_DIGITS", "ServedLog"]

log = logging.getLogger(__name__)

DIGEST_DIGITS = 16  # enough to tell releases apart; all 64 would be a tenth of the line
_FLUSH_S = 0.1
# About a gigabyte of lines: what a disk that hangs may cost in memory.
_MOST_LINES = 1_000_000


class ServedLog:
    """A JSONL file that is written in the background.

    Each line holds ``request_id``, ``release``, ``digest`` (the first 16 digits), ``served_at_ms`` (wall
    clock), ``impression`` (as received), ``buckets``, ``numbers`` and, with dynamic fields, ``ids`` (as
    encoded), ``logit`` and ``probability`` (by task).

    Parameters
    ----------
    path : Path
        Appended to; its folder is created when missing.

    Attributes
    ----------
    lost : int
        Lines that could not be written.

    Raises
    ------
    SetupError
        If the folder is not writable.
    """

    def __init__(self, path: Path) -> None:
        writable_folder(path.parent, option="--log")
        self.path = path
        self.lost = 0
        self._lines: list[bytes] = []
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._file = path.open("ab", buffering=0)
        self._end_torn_line()
        self._thread = threading.Thread(target=self._write_out, name="served-log", daemon=True)
        self._thread.start()

    def append(
        self,
        request_id: str,
        release: Release,
        served_at: int,
        impressions: Sequence[Mapping[str, Any]],
        encoded: Encoded,
        scored: Mapping[Any, Scored],
    ) -> None:
        """Add the rows of one answer; does not wait for the disk."""
        lines = [
            orjson.dumps(
                {
                    "request_id": request_id,
                    "release": release.name,
                    "digest": release.digest()[:DIGEST_DIGITS],
                    "served_at_ms": served_at,
                    "impression": impression,
                    "buckets": encoded.buckets[row],
                    "numbers": encoded.numbers[row],
                    **({"ids": encoded.ids[row]} if encoded.ids.shape[1] else {}),
                    "logit": {task: float(values.logit[row]) for task, values in scored.items()},
                    "probability": {task: float(values.probability[row]) for task, values in scored.items()},
                },
                option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE,
            )
            for row, impression in enumerate(impressions)
        ]
        with self._mutex:
            if len(self._lines) + len(lines) > _MOST_LINES:
                self.lost += len(lines)
            else:
                self._lines += lines

    def flush(self) -> None:
        """Write out what was appended so far."""
        with self._mutex:
            lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            data = memoryview(b"".join(lines))
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            self.lost += len(lines)
            log.error("%d lines of %s are lost: %s.", len(lines), self.path, error.strerror)

    def close(self) -> None:
        """Write out the rest and close the file."""
        self._stop.set()
        self._thread.join()
        self.flush()
        self._file.close()

    def _write_out(self) -> None:
        while not self._stop.wait(_FLUSH_S):
            self.flush()

    def _end_torn_line(self) -> None:
        # Left by a server that was killed in mid-write; a line of its own does no harm.
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - 1, 0))
            if size and file.read() != b"\n":
                self._file.write(b"\n")
