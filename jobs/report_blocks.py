"""What a report is made of: sections of text, tables and figures, every value already written out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

__all__ = [
    "DASH",
    "Block",
    "Cell",
    "Column",
    "Facts",
    "Figure",
    "FigureRow",
    "Missing",
    "Section",
    "TableBlock",
    "Tile",
    "count",
    "decimal",
    "moment",
    "percent",
    "scientific",
    "seconds",
    "signed",
    "status_cell",
]

Tone: TypeAlias = Literal["", "good", "watch", "bad", "unknown"]

# A figure that the rows cannot give.
DASH = "–"
_WORDS = {"ok": "good", "drifted": "bad"}


@dataclass(frozen=True)
class Cell:
    """One value. ``tone`` makes it a chip of that status; ``bar`` in [0, 1] draws a bar behind it."""

    text: str
    tone: Tone = ""
    detail: str = ""
    strong: bool = False
    is_code: bool = False
    bar: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Column:
    """Head of a column: numbers are right-aligned with figures of one width, a tight one is on one line."""

    title: str
    is_number: bool = False
    is_wide: bool = False
    is_tight: bool = False


@dataclass(frozen=True)
class TableBlock:
    """A table. ``note`` says what the units are and which way is better.

    A row of a single cell is the heading of a group: the rows up to the next one belong to it.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    # Rows from here on follow behind a fold.
    fold_from: int | None = None
    fold_title: str = ""
    # On a narrow screen each row becomes a card: for tables of words.
    is_stacked: bool = False
    kind: Literal["table"] = "table"

    def groups(self, start: int, stop: int) -> list[tuple[Cell | None, list[tuple[Cell, ...]]]]:
        """Rows ``[start, stop)`` by group: its heading, if any, and its rows."""
        found: list[tuple[Cell | None, list[tuple[Cell, ...]]]] = [(None, [])]
        for row in self.rows[start:stop]:
            if len(row) == 1:
                found.append((row[0], []))
            else:
                found[-1][1].append(row)
        return [group for group in found if group[0] is not None or group[1]]


@dataclass(frozen=True)
class Figure:
    """A plot as a data URI, with a text that says the same."""

    source: str
    alt: str
    title: str
    note: str
    width: int
    height: int


@dataclass(frozen=True)
class FigureRow:
    """Figures side by side where there is room."""

    figures: tuple[Figure, ...]
    kind: Literal["figures"] = "figures"


@dataclass(frozen=True)
class Facts:
    """Names and values; in one column where they are to be compared."""

    rows: tuple[tuple[str, Cell], ...]
    is_one_column: bool = False
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Missing:
    """Something that the run folder does not hold, and why or what would put it there.

    What stands between backticks in ``remedy`` is set as code.
    """

    what: str
    remedy: str
    state: str = "not recorded"
    kind: Literal["missing"] = "missing"


Block: TypeAlias = TableBlock | FigureRow | Facts | Missing


@dataclass(frozen=True)
class Tile:
    """One figure for the top of the page."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    ``anchor`` is its id, ``short`` its name in the table of contents; alarms are told at the top of the page.
    """

    anchor: str
    title: str
    lead: str = ""
    blocks: tuple[Block, ...] = ()
    short: str = ""
    alarms: tuple[str, ...] = ()


def status_cell(status: str) -> Cell:
    """A chip: good, watch, bad or unknown; the words of `monitoring.drift` keep their text.

    Examples
    --------
    >>> status_cell("drifted").tone, status_cell("drifted").text
    ('bad', 'drifted')
    """
    tone = _WORDS.get(status, status)
    return Cell(status, tone=tone if tone in ("good", "watch", "bad") else "unknown")  # type: ignore[arg-type]


def decimal(value: float | None, digits: int = 4) -> str:
    """A number with a fixed number of decimals; a dash for None.

    Examples
    --------
    >>> decimal(0.25810399, 5), decimal(None)
    ('0.25810', '–')
    """
    return DASH if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 5) -> str:
    """A difference, with its sign."""
    return DASH if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return DASH if value is None else f"{100.0 * value:.{digits}f} %".replace("-", "−")


def count(value: int | None) -> str:
    """A whole number, thousands set apart by a comma."""
    return DASH if value is None else f"{value:,}".replace("-", "−")


def scientific(value: float | None) -> str:
    """A small number of any size: 0, 2.1e-7, 0.03.

    Examples
    --------
    >>> scientific(2.06e-7), scientific(0.0), scientific(0.0312)
    ('2.1e-7', '0', '0.031')
    """
    if value is None:
        return DASH
    if value == 0.0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 else f"{mantissa}e{int(exponent)}"


def seconds(value: float | None) -> str:
    """A time span.

    Examples
    --------
    >>> seconds(0.0123), seconds(4.26), seconds(256)
    ('12 ms', '4.3 s', '4 min 16 s')
    """
    if value is None:
        return DASH
    if value < 1.0:
        return f"{value * 1000:.0f} ms"
    if value < 60.0:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def moment(time: int | None) -> str:
    """A time in ms since the epoch as text, UTC.

    Examples
    --------
    >>> moment(1_767_571_200_000)
    '2026-01-05 00:00 UTC'
    """
    if time is None:
        return DASH
    return datetime.fromtimestamp(time / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
