"""Whether a reader stands still while there is more to read, or falls behind."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LagWatch", "StallWatch"]


@dataclass
class StallWatch:
    """Alarm on a position that does not advance while the lag is there and does not shrink.

    Parameters
    ----------
    after_s : float
        Seconds without an advance that are a stall.

    Examples
    --------
    >>> watch = StallWatch(after_s=30)
    >>> [watch.look(now, position=7, lag=lag) for now, lag in ((0, 5), (29, 6), (31, 7))]
    [False, False, True]
    >>> watch.look(32, position=8, lag=7)
    False
    """

    after_s: float
    _since: float | None = None
    _position: int = -1
    _lag: int = 0

    def look(self, now: float, *, position: int, lag: int) -> bool:
        """Whether reading has stalled.

        Parameters
        ----------
        now : float
            Seconds of any clock that does not go back.
        position : int
            Rows read so far.
        lag : int
            What is left to read.
        """
        if self._since is None or position != self._position or lag < self._lag or lag == 0:
            self._since, self._position, self._lag = now, position, lag
            return False
        return now - self._since >= self.after_s


@dataclass
class LagWatch:
    """Alarm on a lag that is above a bound and does not sink: a reader that catches up is left in peace.

    Parameters
    ----------
    bound : int
        No alarm up to this lag; 0 turns the alarm off.
    after_s : float
        Seconds without a new low that are an alarm.

    Examples
    --------
    >>> watch = LagWatch(bound=100, after_s=30)
    >>> [watch.look(now, lag) for now, lag in ((0, 500), (20, 400), (40, 410), (50, 450), (60, 390))]
    [False, False, False, True, False]
    """

    bound: int
    after_s: float
    _since: float | None = None
    _low: int = 0

    def look(self, now: float, lag: int) -> bool:
        """Whether the reader falls behind.

        Parameters
        ----------
        now : float
            Seconds of any clock that does not go back.
        lag : int
            What is left to read.
        """
        if self.bound == 0 or lag <= self.bound:
            self._since = None
            return False
        if self._since is None or lag < self._low:
            self._since, self._low = now, lag
            return False
        return now - self._since >= self.after_s
