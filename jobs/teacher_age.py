"""When a teacher has grown too old to learn from."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["TeacherAge"]

log = logging.getLogger(__name__)


class TeacherAge:
    """Says of rows whether they are distilled: those up to ``max_age`` younger than what the teacher knows.

    Rows are judged by their event time alone, so a loop that was restored goes on as it would have. That
    the first row was too young is logged once.

    Parameters
    ----------
    max_age : int or "off"
        ms.
    taught_until : int or None
        Event time of the newest event that the teacher has learned, ms; None: it never grows too old.

    Examples
    --------
    >>> TeacherAge(10, taught_until=100).teaches(np.array([50, 110])).tolist()
    [True, True]
    """

    def __init__(self, max_age: int | Literal["off"], taught_until: int | None = None) -> None:
        self.last = None if taught_until is None or max_age == "off" else taught_until + max_age
        self._is_told = False

    def teaches(self, event_time: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows are distilled, shape (n,); ``event_time`` in ms."""
        if self.last is None:
            return np.ones(len(event_time), np.bool_)
        known = event_time <= self.last
        if not self._is_told and not known.all():
            self._is_told = True
            log.warning(
                "the teacher is older than distillation.max_age: rows of events after %d ms are learned from "
                "their labels alone; train a new one",
                self.last,
            )
        return known
