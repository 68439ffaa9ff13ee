"""The header by which a message that is no event tells when it became known."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.merge import UNKNOWN_TIME

__all__ = ["ARRIVAL_HEADER", "told_arrival"]

# ms since the epoch as decimal text.
ARRIVAL_HEADER = "ctrstream.arrival_time"


def told_arrival(values: Iterable[bytes | None]) -> int:
    """The time that the first readable value of the header tells; UNKNOWN_TIME without one.

    Examples
    --------
    >>> told_arrival([None, b"soon", b"1767571200000"]), told_arrival([])
    (1767571200000, -1)
    """
    for value in values:
        if value is not None and value.isdigit() and len(value) < 16:
            return int(value)
    return UNKNOWN_TIME
