"""Where a reader of Kafka goes on: for each partition the next row, and how far time had come."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StaleStateError
from pipelines.merge import UNKNOWN_TIME

__all__ = ["Cursor", "Place", "RowPositions", "TopicPartition"]

# Topic name and partition number.
TopicPartition = tuple[str, int]


class RowPositions(Protocol):
    """Where rows come from, in order of arrival: an `EventBlock`, or a part of one."""

    @property
    def partition(self) -> NDArray[np.int32]: ...
    @property
    def offset(self) -> NDArray[np.int64]: ...
    @property
    def row(self) -> NDArray[np.int32]: ...
    @property
    def arrival_time(self) -> NDArray[np.int64]: ...


class Place(NamedTuple):
    """The next row of one partition.

    Attributes
    ----------
    offset : int
        Offset of its message.
    row : int
        Its place in that message, if it is a packed one.
    clock : int
        Greatest arrival time among the rows before it, ms; -1 where there are none.
    """

    offset: int
    row: int = 0
    clock: int = UNKNOWN_TIME


class Cursor(dict[TopicPartition, Place]):
    """The next row to apply of each partition, in the order in which a source counts them.

    Examples
    --------
    >>> cursor = Cursor({("clicks", 0): Place(17, 3, 1767571200000)})
    >>> cursor.to_state()
    [['clicks', 0, 17, 3, 1767571200000]]
    >>> Cursor.from_state(cursor.to_state()) == cursor
    True
    """

    def to_state(self) -> list[list[str | int]]:
        """Plain values for JSON. Their order is kept, for rows of the state name partitions by number."""
        return [[topic, partition, *place] for (topic, partition), place in self.items()]

    @classmethod
    def from_state(cls, state: object) -> Self:
        """Read what `to_state` has written.

        Raises
        ------
        StaleStateError
            If the state is something else.
        """
        cursor = cls()
        try:
            for topic, partition, offset, row, clock in state:  # type: ignore[attr-defined]
                cursor[str(topic), int(partition)] = Place(int(offset), int(row), int(clock))
        except (TypeError, ValueError) as error:
            raise StaleStateError(
                "expected a cursor as a list of topic, partition, offset, row, clock. "
                f"Received: {str(state)[:200]}."
            ) from error
        return cursor
