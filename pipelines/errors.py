"""What can go wrong, split by who must act.

::

    CtrstreamError            exit code 1
    ├── ConfigError           exit code 2   the operator: bad usage or configuration
    ├── DataError             exit code 3   the producer of the data: bad or missing input
    ├── SetupError            exit code 1   the machine: Java, a port, a folder, a missing package
    ├── StaleStateError       exit code 1   fenced by another worker, or state that cannot be continued
    └── TransientError        exit code 1   a peer is away for now; ``retriable`` is True

Every message says what was expected, what was received and, in ``hint``, what to do.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "CtrstreamError",
    "DataError",
    "SetupError",
    "StaleStateError",
    "TransientError",
]


class CtrstreamError(Exception):
    """Root of all errors that a user is shown as one message, without a traceback.

    Parameters
    ----------
    message : str
        What was expected and what was received.
    hint : str, optional
        What to do about it.

    Examples
    --------
    >>> print(DataError("no events in ./log.", hint="expected impressions*.parquet"))
    no events in ./log.
    hint: expected impressions*.parquet
    """

    exit_code = 1
    retriable = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(CtrstreamError):
    """Bad usage or configuration: the operator must act."""

    exit_code = 2


class DataError(CtrstreamError):
    """Input data that cannot be used: the producer of the data must act."""

    exit_code = 3


class SetupError(CtrstreamError):
    """The machine lacks something: Java, a free port, a writable folder, a package."""


class StaleStateError(CtrstreamError):
    """State that must not be continued: fenced by another worker, corrupt, or behind the broker."""


class TransientError(CtrstreamError):
    """A peer is away for now; trying again can help."""

    retriable = True
