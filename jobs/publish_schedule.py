"""When a commit is a candidate for a release: by event time, by rows learned, or always."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.config_sections import PublishConfig

__all__ = ["PublishSchedule"]


@dataclass
class PublishSchedule:
    """Marks on the clock of the stream and in the rows learned; a release is due once one has been passed.

    Marks of event time are whole multiples of ``every_event_time``, so they do not move with a restart.

    Examples
    --------
    >>> schedule = PublishSchedule(PublishConfig(every_event_time="1h"), clock=3_600_000, learned=0)
    >>> schedule.is_due(7_199_999, 10), schedule.is_due(7_200_000, 10)
    (False, True)
    >>> schedule.published(7_250_000, 10)
    >>> schedule.is_due(10_799_999, 20)
    False
    """

    config: PublishConfig
    clock: int
    learned: int

    def is_due(self, clock: int, learned: int) -> bool:
        """``clock`` in ms, ``learned`` events so far."""
        time, rows = self.config.every_event_time, self.config.every_rows
        if time is None and rows is None:
            return True
        by_time = time is not None and clock // time > self.clock // time
        return by_time or (rows is not None and learned - self.learned >= rows)

    def published(self, clock: int, learned: int) -> None:
        """Wait for the next mark."""
        self.clock, self.learned = clock, learned

    def state(self) -> dict[str, Any]:
        """JSON data."""
        return {"clock": self.clock, "learned": self.learned}
