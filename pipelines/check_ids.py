"""Ids seen once or more often, and ids in two sets, for more rows than memory holds.

Ids go by their 64-bit hashes. Among a billion rows two share one by chance with probability 3 %, among ten
million with 3e-6.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import ConfigError

__all__ = ["IdHashes"]

# Hashes of one part: 64 MiB in memory, and as much again while they are sorted.
_PART_ROWS = 1 << 23
_LARGEST_BITS = 10


class IdHashes(AbstractContextManager["IdHashes"]):
    """Hashes of ids, in files by their upper bits where there are many; each part fits in memory.

    Parameters
    ----------
    rows : int
        How many are to come, about.
    part_rows : int
        How many are held in memory at a time.

    Examples
    --------
    >>> with IdHashes(rows=4) as ids:
    ...     ids.add(np.array([7, 7, 9, 7], np.uint64))
    ...     ids.repeated()
    2
    """

    def __init__(self, rows: int, part_rows: int = _PART_ROWS) -> None:
        parts = -(-max(rows, 1) // part_rows)
        self.bits = min((parts - 1).bit_length(), _LARGEST_BITS)
        self.rows = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ctrstream-ids-") if self.bits else None
        self._held: list[NDArray[np.uint64]] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Take in the hashes of more rows."""
        self.rows += len(hashes)
        if self._folder is None:
            self._held.append(hashes.copy())
            return
        part = (hashes >> np.uint64(64 - self.bits)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=1 << self.bits))
        start = 0
        for number, end in enumerate(ends.tolist()):
            if end > start:
                with _file(self._folder.name, number).open("ab") as stream:
                    hashes[order[start:end]].tofile(stream)
            start = end

    def repeated(self) -> int:
        """Rows whose id another row before them has."""
        return sum(len(own) - len(np.unique(own)) for own in map(self._part, range(1 << self.bits)))

    def shared_with(self, other: Self) -> int:
        """Rows of ``other`` whose id is among these.

        Raises
        ------
        ConfigError
            If the two were not made for the same number of rows.
        """
        if self.bits != other.bits:
            raise ConfigError(f"expected ids in {1 << self.bits} parts. Received: {1 << other.bits}.")
        count = 0
        for number in range(1 << self.bits):
            own, others = np.unique(self._part(number)), other._part(number)
            place = np.searchsorted(own, others)
            inside = place < len(own)
            count += int(np.count_nonzero(own[place[inside]] == others[inside]))
        return count

    def _part(self, number: int) -> NDArray[np.uint64]:
        if self._folder is None:
            return np.concatenate([np.zeros(0, np.uint64), *self._held])
        file = _file(self._folder.name, number)
        return np.fromfile(file, np.uint64) if file.exists() else np.zeros(0, np.uint64)


def _file(folder: str, number: int) -> Path:
    return Path(folder) / f"{number:04d}"
