"""The rule: which rows exist, with which label, from the events known at a moment.

`rows` is pure, small and free of any engine; it is written to be read. The stream joiner
(`pipelines.joiner`) and the Spark job (`pipelines.sample_join`) are two fast implementations of it, and
tests hold all three against each other.

Words: an impression opens a *click* window, its credited click opens a *conversion* window. A window
opened at ``t`` with width ``w`` closes at ``t + w + allowed_lateness`` of the arrival clock. What arrives
by then counts, if it *happened* within ``[t, t + w]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION

__all__ = ["Event", "Row", "rows"]


class Event(NamedTuple):
    """One event; times in ms. ``op`` is used by conversions only."""

    kind: int
    event_id: str
    impression_id: str
    event_time: int
    arrival_time: int
    op: str = "assert"


class Row(NamedTuple):
    """One example.

    ``event_time`` is when its window opened, ``known_at`` when it could first be said, ``elapsed`` the age
    of its window then; all in ms.
    """

    impression_id: str
    task: str
    kind: str
    label: int
    event_time: int
    known_at: int
    elapsed: int
    mature: bool


@dataclass(frozen=True)
class _Window:
    """A label window: opened at ``opened`` (event time), known since ``known`` (arrival time)."""

    impression_id: str
    task: Task
    opened: int
    known: int
    width: int
    closes: int
    # (known at, event time, is a positive) of each accepted outcome, in order of arrival
    outcomes: tuple[tuple[int, int, bool], ...]

    def label(self, at: int) -> int:
        """Label from what is known by ``at``."""
        return _label([outcome for outcome in self.outcomes if outcome[0] <= at])


def _label(outcomes: Sequence[tuple[int, int, bool]]) -> int:
    """1 if, of the outcomes, the last in event time asserts; of several at one instant a retraction wins."""
    last = max((event_time for _, event_time, _ in outcomes), default=None)
    return int(last is not None and all(positive for _, time, positive in outcomes if time == last))


def rows(
    events: Iterable[Event], as_of: int, attribution: AttributionConfig, policy: str = "relabel"
) -> list[Row]:
    """All rows that can be said by ``as_of``, in order of ``known_at``.

    Parameters
    ----------
    events : iterable of Event
        In any order, with any duplicates.
    as_of : int
        Arrival time, ms. Events that arrive later do not exist yet.
    attribution : AttributionConfig
    policy : {"wait", "vanilla", "esdfm", "fnw", "fnc", "relabel"}
        ``relabel`` gives one row a window, with the label known at ``as_of``; the others give every row
        that a stream has emitted by then (see the design of each in ``docs/labels.md``).

    Examples
    --------
    >>> log = [Event(0, "i", "i", 0, 0), Event(1, "c", "i", 5_000, 6_000)]
    >>> said = rows(log, 60_000, AttributionConfig(), "fnw")
    >>> [(row.task, row.kind, row.label, row.known_at) for row in said]
    [('click', 'first', 0, 0), ('click', 'delayed_positive', 1, 6000), ('conversion', 'first', 0, 6000)]
    """
    emitted: list[Row] = []
    for window in _windows(events, as_of, attribution):
        if policy == "relabel":
            mature = as_of > window.closes
            elapsed = min(as_of - window.opened, window.width)
            emitted.append(_row(window, "first", window.label(as_of), as_of, elapsed, mature))
        else:
            emitted.extend(row for row in _stream_rows(window, attribution, policy) if row.known_at <= as_of)
    return sorted(emitted, key=lambda row: (row.known_at, row.task, row.kind != "first", row.impression_id))


def _stream_rows(window: _Window, attribution: AttributionConfig, policy: str) -> Iterator[Row]:
    # What is decided by a timer is said one tick after it, so that all that arrived by then is in.
    closed = max(window.closes, window.known)
    if policy == "wait":
        yield _row(window, "first", window.label(closed), closed + 1, window.width, True)
        return
    if policy in ("vanilla", "esdfm"):
        due = max(window.opened + attribution.observation(window.task), window.known)
        label = window.label(due)
        yield _row(window, "first", label, due + 1, due - window.opened, False)
        if label:
            return
    else:
        due = window.known - 1
        yield _row(window, "first", 0, window.known, window.known - window.opened, False)
    for n, (known, _, _) in enumerate(window.outcomes):
        if known > due and _label(window.outcomes[: n + 1]):
            yield _row(window, "delayed_positive", 1, known, known - window.opened, False)
            return


def _row(window: _Window, kind: str, label: int, known_at: int, elapsed: int, mature: bool) -> Row:
    return Row(window.impression_id, window.task, kind, label, window.opened, known_at, elapsed, mature)


def _windows(events: Iterable[Event], as_of: int, attribution: AttributionConfig) -> Iterator[_Window]:
    known = sorted(
        {
            (event.kind, event.event_id): event for event in sorted(events, key=_arrival, reverse=True)
        }.values(),
        key=_arrival,
    )
    known = [event for event in known if event.arrival_time <= as_of]
    for impression in known:
        if impression.kind != IMPRESSION:
            continue
        closes = impression.event_time + attribution.click_window + attribution.allowed_lateness
        if impression.arrival_time > closes:
            continue
        own = [event for event in known if event.impression_id == impression.impression_id]
        patience = attribution.click_window + attribution.allowed_lateness
        clicks = [
            (max(click.arrival_time, impression.arrival_time), click)
            for click in own
            if click.kind == CLICK
            and impression.event_time <= click.event_time <= impression.event_time + attribution.click_window
            and click.arrival_time <= closes
            and impression.arrival_time - click.arrival_time <= patience
        ]
        first = clicks[:1]
        yield _Window(
            impression.impression_id,
            "click",
            impression.event_time,
            impression.arrival_time,
            attribution.click_window,
            closes,
            tuple((known_at, click.event_time, True) for known_at, click in first),
        )
        for known_at, click in first:
            yield _conversion_window(click, known_at, own, attribution)


def _conversion_window(
    click: Event, click_known: int, own: list[Event], attribution: AttributionConfig
) -> _Window:
    closes = click.event_time + attribution.attribution_window + attribution.allowed_lateness
    patience = attribution.click_window + attribution.allowed_lateness
    outcomes = tuple(
        (max(event.arrival_time, click_known), event.event_time, event.op != "retract")
        for event in own
        if event.kind == CONVERSION
        and click.event_time <= event.event_time <= click.event_time + attribution.attribution_window
        and event.arrival_time <= closes
        and click_known - event.arrival_time <= patience
    )
    return _Window(
        click.impression_id,
        "conversion",
        click.event_time,
        click_known,
        attribution.attribution_window,
        closes,
        outcomes,
    )


def _arrival(event: Event) -> tuple[int, int, str]:
    return event.arrival_time, event.kind, event.event_id
