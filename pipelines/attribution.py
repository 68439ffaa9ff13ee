"""The rule: which rows exist, with which label, from the events known at a moment.

`labels_as_of` gives the labels of a log as known at a moment, `rows` what a stream has said by then. Both
are pure, small and free of any engine; they are written to be read. The stream joiner (`pipelines.joiner`),
the columnar labels (`pipelines.outcomes`) and the Spark job (`pipelines.sample_join`) are fast
implementations, and tests hold all of them against this one.

Words: an impression opens a *click* window, its credited click opens a *conversion* window. With a
view-through window the impression opens a *view_through* window too. A window opened at ``t`` with width
``w`` closes at ``t + w + allowed_lateness`` of the arrival clock. What arrives by then counts, if it
*happened* within ``[t, t + w]``. All times are ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

from pipelines.config_sections import AttributionConfig, Policy, Task
from pipelines.duration import DAY_MS
from pipelines.errors import ConfigError
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.hashing import hash_text

__all__ = ["Event", "Label", "Outcome", "Row", "apply_outcome", "labels_as_of", "rows"]


class Event(NamedTuple):
    """One event; ``op`` and ``credit`` are used by conversions only."""

    kind: int
    event_id: str
    impression_id: str
    event_time: int
    arrival_time: int
    op: str = "assert"
    credit: float = 1.0


class Row(NamedTuple):
    """One example.

    ``label`` is the credit of the window's outcome, in [0, 1]; ``label_version`` says how often it has
    changed by what was known, ``outcome_known_at`` when it last rose from 0 (None: it is 0). ``event_time``
    is when the window opened, ``known_at`` when the row could first be said, ``elapsed`` the window's age
    then, at most its width.
    """

    impression_id: str
    task: str
    kind: str
    label: float
    weight: float
    label_version: int
    event_time: int
    known_at: int
    elapsed: int
    mature: bool
    outcome_known_at: int | None = None


class Outcome(NamedTuple):
    """What may change a window's label, and since when it is known."""

    known: int
    event_time: int
    op: str = "assert"
    credit: float = 1.0


class Label(NamedTuple):
    """A label: its credit, and the event time of the last outcome that had a say.

    ``happened`` and ``known`` tell of the outcome that last raised the credit from 0.
    """

    credit: float = 0.0
    time: float = float("-inf")
    version: int = 0
    happened: int | None = None
    known: int | None = None


def apply_outcome(label: Label, outcome: Outcome) -> Label:
    """The label after one more outcome.

    The first assertion wins. A retraction counts only if it did not happen before what it takes back,
    whatever the order of arrival; at one instant a retraction wins. A restatement sets the credit anew.

    Examples
    --------
    >>> sold = apply_outcome(Label(), Outcome(known=9, event_time=5, credit=0.5))
    >>> back = apply_outcome(sold, Outcome(known=7, event_time=6, op="retract"))
    >>> [(label.credit, label.version) for label in (sold, back)]
    [(0.5, 1), (0.0, 2)]
    """
    newer, same = outcome.event_time > label.time, outcome.event_time == label.time
    if outcome.op == "assert":
        has_say, credit = newer, label.credit or outcome.credit
    elif outcome.op == "retract":
        has_say, credit = newer or same, 0.0
    else:
        has_say, credit = newer or (same and label.credit > 0), outcome.credit
    if not has_say:
        return label
    version = label.version + (credit != label.credit)
    if credit == 0:
        return Label(credit, outcome.event_time, version)
    if label.credit == 0:
        return Label(credit, outcome.event_time, version, outcome.event_time, outcome.known)
    return Label(credit, outcome.event_time, version, label.happened, label.known)


# The label after each piece of news, and since when it is known.
History = Sequence[tuple[int, Label]]


@dataclass(frozen=True)
class _Window:
    """A label window: opened at ``opened`` (event time), known since ``known`` (arrival time)."""

    impression_id: str
    task: Task
    opened: int
    known: int
    width: int
    closes: int
    history: History

    @property
    def closed(self) -> int:
        """From when on nothing can change it."""
        return max(self.closes, self.known)

    def label(self, at: int) -> Label:
        """Label by what was known at a moment."""
        return next((label for known, label in reversed(self.history) if known <= at), Label())


# Labels as of a moment ---------------------------------------------------------------------------------


def labels_as_of(events: Iterable[Event], as_of: int, attribution: AttributionConfig) -> list[Row]:
    """One row for each window, with the label known at a moment, in order of ``known_at``.

    A mature row, one whose window has closed, does not depend on the moment.

    Parameters
    ----------
    events : iterable of Event
        In any order, with any duplicates.
    as_of : int
        Arrival time. Events that arrive later do not exist yet.
    attribution : AttributionConfig

    Examples
    --------
    >>> log = [Event(0, "i", "i", 0, 0), Event(1, "c", "i", 5_000, 6_000)]
    >>> [(row.task, row.label, row.mature) for row in labels_as_of(log, 60_000, AttributionConfig())]
    [('click', 1.0, False), ('conversion', 0.0, False)]
    """
    found = []
    for window in _windows(events, as_of, attribution):
        is_mature = as_of > window.closes
        found.append(_mature(window, "first") if is_mature else _row(window, "first", as_of, as_of))
    return sorted(found, key=_said_order)


# What a stream says ------------------------------------------------------------------------------------


def rows(
    events: Iterable[Event],
    as_of: int,
    attribution: AttributionConfig,
    policy: str,
    *,
    confirm_window: int | None = None,
) -> list[Row]:
    """All rows that a stream has said by ``as_of``, in order of ``known_at``.

    A row once said is not taken back, and it says nothing that was not known at its ``known_at``.

    Parameters
    ----------
    events : iterable of Event
        In any order, with any duplicates.
    as_of : int
        Arrival time.
    attribution : AttributionConfig
    policy : str
        One of `pipelines.config_sections.Policy`; ``docs/labels.md`` says what each is for.
    confirm_window : int, optional
        Policy ``defer``: how long after its opening a window is said once more, as it turned out by then;
        without it, when the window has closed.

    Raises
    ------
    ConfigError
        If the policy is unknown.

    Examples
    --------
    >>> log = [Event(0, "i", "i", 0, 0), Event(1, "c", "i", 5_000, 6_000)]
    >>> said = rows(log, 60_000, AttributionConfig(), "fnw")
    >>> [(row.task, row.kind, row.label, row.known_at) for row in said]
    [('click', 'first', 0.0, 0), ('click', 'delayed_positive', 1.0, 6000), ('conversion', 'first', 0.0, 6000)]
    """
    if policy not in get_args(Policy):
        raise ConfigError(f"expected a policy among {', '.join(get_args(Policy))}. Received: {policy!r}.")
    said: list[Row] = []
    for window in _windows(events, as_of, attribution):
        if policy == "wait":
            own: Iterable[Row] = [_mature(window, "first")]
        elif policy in ("fnw", "fnc"):
            own = _at_once(window)
        elif policy == "relabel":
            own = _daily(window)
        elif policy == "defer":
            last = window.closed
            if confirm_window is not None:
                last = min(last, window.opened + confirm_window)
            own = _deferred(window, _first_due(window, attribution), last)
        else:  # vanilla, esdfm, defuse, bidefuse
            own = _after_waiting(window, _first_due(window, attribution))
        said += (row for row in own if row.known_at <= as_of)
    return sorted(said, key=_said_order)


def _first_due(window: _Window, attribution: AttributionConfig) -> int:
    return max(window.opened + attribution.observation(window.task), window.known)


def _at_once(window: _Window) -> Iterator[Row]:
    """A negative as soon as the window is known; a positive when there is one."""
    yield _row(window, "first", window.known - 1, window.known)
    yield from _delayed_positive(window, after=window.known - 1, until=window.closed)


def _after_waiting(window: _Window, due: int) -> Iterator[Row]:
    """The label after the observation window; a positive that comes later."""
    yield _row(window, "first", due, due + 1)
    if window.label(due).credit == 0:
        yield from _delayed_positive(window, after=due, until=window.closed)


def _deferred(window: _Window, due: int, last: int) -> Iterator[Row]:
    """As after waiting, and every window once more as it turned out by ``last``."""
    last = max(last, due)
    yield _row(window, "first", due, due + 1)
    if window.label(due).credit > 0:
        yield _row(window, "confirm", due, due + 1)
        return
    late = list(_delayed_positive(window, after=due, until=last))
    yield from late
    share = 1.0 - sum(row.weight for row in late)
    if share > 0:
        yield _row(window, "confirm", last, last + 1)._replace(label=0.0, weight=share, outcome_known_at=None)


def _daily(window: _Window) -> Iterator[Row]:
    """The label so far, at each midnight (UTC) of the arrival clock until the window has closed."""
    midnight = (window.known // DAY_MS + 1) * DAY_MS
    kind = "first"
    while midnight <= window.closed:
        yield _row(window, kind, midnight - 1, midnight)
        midnight, kind = midnight + DAY_MS, "confirm"
    yield _mature(window, kind)._replace(known_at=midnight)


def _delayed_positive(window: _Window, after: int, until: int) -> Iterator[Row]:
    # Credit c makes the window c of a converting and 1 - c of another one; the latter's row has been said.
    for known, label in window.history:
        if after < known <= until and label.credit > 0:
            row = _row(window, "delayed_positive", known, known)
            yield row._replace(
                label=1.0,
                weight=label.credit,
                label_version=label.version,
                outcome_known_at=label.known,
            )
            return


def _row(window: _Window, kind: str, at: int, known_at: int) -> Row:
    """The window as it was known ``at`` a moment, said at ``known_at``.

    What a timer decides is said one tick after it, so that all that arrived by then is in.
    """
    label = window.label(at)
    return Row(
        window.impression_id,
        window.task,
        kind,
        label.credit,
        1.0,
        label.version,
        window.opened,
        known_at,
        min(max(at, window.known) - window.opened, window.width),
        known_at > window.closed,
        label.known,
    )


def _mature(window: _Window, kind: str) -> Row:
    """The window as it turned out; ``closed`` is beyond its end, so ``elapsed`` is its width."""
    return _row(window, kind, window.closed, window.closed + 1)


def _said_order(row: Row) -> tuple[int, str, int, str]:
    return row.known_at, row.task, ("first", "delayed_positive", "confirm").index(row.kind), row.impression_id


# Windows and what belongs to them ----------------------------------------------------------------------


def _windows(events: Iterable[Event], as_of: int, attribution: AttributionConfig) -> Iterator[_Window]:
    known = _first_copies(events, as_of)
    for impression in known:
        if impression.kind != IMPRESSION:
            continue
        closes = impression.event_time + attribution.click_window + attribution.allowed_lateness
        if impression.arrival_time > closes:
            continue
        own = [event for event in known if event.impression_id == impression.impression_id]
        name, seen = impression.impression_id, (impression.event_time, impression.arrival_time)
        # The click that arrives first is credited.
        clicks = _outcomes("click", own, *seen, attribution)[:1]
        yield _window("click", name, *seen, attribution, _history(clicks))
        for click in clicks:
            clicked = click.event_time, click.known
            outcomes = _outcomes("conversion", own, *clicked, attribution)
            yield _window("conversion", name, *clicked, attribution, _history(outcomes))
        if attribution.view_through_window is not None:
            outcomes = _outcomes("view_through", own, *seen, attribution)
            yield _window("view_through", name, *seen, attribution, _history_beside(clicks, outcomes))


def _window(
    task: Task, name: str, opened: int, known: int, attribution: AttributionConfig, history: History
) -> _Window:
    width = attribution.width(task)
    return _Window(name, task, opened, known, width, opened + width + attribution.allowed_lateness, history)


def _first_copies(events: Iterable[Event], as_of: int) -> list[Event]:
    """What had arrived, in order; of the copies of an event the one that arrived first."""
    arrived = sorted(
        (event for event in events if event.arrival_time <= as_of),
        key=lambda event: (event.arrival_time, hash_text(event.event_id)),
    )
    copies: dict[tuple[int, str], Event] = {}
    for event in arrived:
        copies.setdefault((event.kind, event.event_id), event)
    return list(copies.values())


def _outcomes(
    task: Task, own: Sequence[Event], opened: int, known: int, attribution: AttributionConfig
) -> list[Outcome]:
    """Of an impression's events those that a window accepts, in order of arrival."""
    width, lateness = attribution.width(task), attribution.allowed_lateness
    # How long an event waits for what it belongs to.
    patience = attribution.click_window + lateness
    return [
        Outcome(max(event.arrival_time, known), event.event_time, event.op, event.credit)
        for event in own
        if event.kind == (CLICK if task == "click" else CONVERSION)
        and opened <= event.event_time <= opened + width
        and event.arrival_time <= opened + width + lateness
        and known - event.arrival_time <= patience
    ]


def _history(outcomes: Iterable[Outcome]) -> History:
    label, history = Label(), []
    for outcome in outcomes:
        label = apply_outcome(label, outcome)
        history.append((outcome.known, label))
    return history


def _history_beside(clicks: Sequence[Outcome], outcomes: Sequence[Outcome]) -> History:
    """As `_history`, but what happened at or after a click belongs to it, once the click is known."""
    news = [(click.known, click, True) for click in clicks]
    news += [(outcome.known, outcome, False) for outcome in outcomes]
    news.sort(key=lambda item: item[0])
    history = []
    for count, (known, _, _) in enumerate(news, start=1):
        claimed_from = min((item.event_time for _, item, is_click in news[:count] if is_click), default=None)
        own = [
            item
            for _, item, is_click in news[:count]
            if not is_click and (claimed_from is None or item.event_time < claimed_from)
        ]
        history.append((known, _history(own)[-1][1] if own else Label()))
    return history
