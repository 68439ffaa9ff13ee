"""Durations as people write them: ``90s``, ``30m``, ``24h``, ``7d``."""

from __future__ import annotations

import re

__all__ = ["DAY_MS", "HOUR_MS", "MINUTE_MS", "format_duration", "parse_duration"]

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

_UNIT_MS = {"ms": 1, "s": SECOND_MS, "m": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*")


def parse_duration(text: str) -> int:
    """Milliseconds in a duration such as ``30m`` or ``1.5h``.

    Raises
    ------
    ValueError
        If the text is not a number followed by one of ms, s, m, h, d.

    Examples
    --------
    >>> parse_duration("30m")
    1800000
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(
            f"expected a duration such as 30m, 24h or 7d (units ms, s, m, h, d). Received: {text!r}"
        )
    return round(float(match[1]) * _UNIT_MS[match[2]])


def format_duration(milliseconds: int) -> str:
    """The shortest exact way to write a duration.

    Examples
    --------
    >>> format_duration(86_400_000), format_duration(5_400_000)
    ('1d', '90m')
    """
    for unit in ("d", "h", "m", "s"):
        if milliseconds % _UNIT_MS[unit] == 0 and milliseconds >= _UNIT_MS[unit]:
            return f"{milliseconds // _UNIT_MS[unit]}{unit}"
    return f"{milliseconds}ms"
