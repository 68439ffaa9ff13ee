"""Log lines as JSON: one object a line, for what collects logs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

__all__ = ["JsonFormatter"]


class JsonFormatter(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``message``; ``figures`` and ``exception`` where there are any.

    Examples
    --------
    >>> told = {"name": "jobs.worker", "levelname": "INFO", "created": 1.5, "msg": "hi"}
    >>> record = logging.makeLogRecord(told)
    >>> print(JsonFormatter().format(record))
    {"time": "1970-01-01T00:00:01.500Z", "level": "INFO", "logger": "jobs.worker", "message": "hi"}
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, object] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        figures = getattr(record, "figures", None)
        if figures is not None:
            told["figures"] = figures
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)
