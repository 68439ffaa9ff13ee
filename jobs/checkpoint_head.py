"""The head of a worker's checkpoints: one row in SQLite, moved by whoever holds the lease."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from pipelines.errors import SetupError, StaleStateError

__all__ = ["Head"]


class Head:
    """Which checkpoint counts, and whose turn it is to say so.

    Parameters
    ----------
    root : Path
        The worker's state folder; the database is ``head.sqlite`` in it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._database = root / "head.sqlite"

    def take_lease(self) -> tuple[int, str | None]:
        """Raise the epoch: any worker that held the lease before is fenced. Epoch and head.

        Raises
        ------
        StaleStateError
            If the database is damaged.
        OSError, sqlite3.OperationalError
            If it cannot be written.
        """
        try:
            with closing(self._connect()) as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS head (id INTEGER PRIMARY KEY CHECK (id = 1), "
                    "epoch INTEGER NOT NULL, name TEXT)"
                )
                database.execute("BEGIN IMMEDIATE")
                database.execute("INSERT OR IGNORE INTO head VALUES (1, 0, NULL)")
                database.execute("UPDATE head SET epoch = epoch + 1 WHERE id = 1")
                epoch, name = database.execute("SELECT epoch, name FROM head").fetchone()
                database.execute("COMMIT")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        return int(epoch), name

    def name(self) -> str | None:
        """The newest committed checkpoint; None if there is none.

        Raises
        ------
        SetupError, StaleStateError
            If the database cannot be read, or is damaged.
        """
        if not self._database.exists():
            return None
        try:
            with closing(self._connect()) as database:
                # A worker that is just starting has made the file and not yet the table.
                table = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'head'").fetchone()
                row = table and database.execute("SELECT name FROM head WHERE id = 1").fetchone()
        except sqlite3.OperationalError as error:
            raise SetupError(f"cannot read {self._database}: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        return None if row is None else row[0]

    def move(self, name: str, epoch: int) -> bool:
        """Compare and swap; False, and nothing is changed, if the lease is another worker's."""
        with closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            moved = database.execute(
                "UPDATE head SET name = ? WHERE id = 1 AND epoch = ?", (name, epoch)
            ).rowcount
            database.execute("COMMIT")
        return moved == 1

    def is_fenced(self, epoch: int) -> bool:
        """Whether another worker has taken the lease since ``epoch``."""
        try:
            with closing(self._connect()) as database:
                row = database.execute("SELECT epoch FROM head WHERE id = 1").fetchone()
        except sqlite3.Error:
            return False
        return row is not None and row[0] != epoch

    def fenced(self, epoch: int) -> StaleStateError:
        """The error of a worker that another has fenced."""
        return StaleStateError(
            f"another worker has taken over the state in {self._root} (this one held epoch {epoch}).",
            hint="only one worker may learn from one state folder; this one has stopped",
        )

    def _damaged(self, error: sqlite3.DatabaseError) -> StaleStateError:
        return StaleStateError(
            f"{self._database} is damaged: {error}.", hint="restore the state folder from a backup"
        )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._database, timeout=30, isolation_level=None)
