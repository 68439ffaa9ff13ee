"""What came of each impression and of each click, as known at a moment: the labels of a whole log at once.

The columnar form of `pipelines.attribution.rows` with policy ``relabel``, for whoever judges predictions
against a log rather than learns from a stream; a property test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION

__all__ = ["NO_OUTCOME", "Outcome", "latest_arrival", "outcomes_as_of"]

NO_OUTCOME = -1

Tables = tuple[pa.Table, pa.Table, pa.Table]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """The label windows of one task, one row a window, in the order in which their impressions were logged.

    Attributes
    ----------
    impression_id : pa.Array of string, (n,)
        Each once.
    opened : (n,) int64
        When the window opened: the impression (task click) or the credited click (task conversion). Event
        time, ms.
    known : (n,) int64
        When it was known that the window had opened. Arrival time, ms.
    closes : (n,) int64
        From when on the label is final. Arrival time, ms.
    label : (n,) int8
        1 if, of the outcomes known, the last in event time asserts.
    mature : (n,) bool
        Whether the window had closed.
    outcome_delay : (n,) int64
        ms from opening to the first positive outcome in event time; `NO_OUTCOME` where the label is 0.
    outcome_known : (n,) int64
        Arrival time of that outcome, ms; `NO_OUTCOME` where the label is 0.
    """

    impression_id: pa.Array
    opened: Ints
    known: Ints
    closes: Ints
    label: NDArray[np.int8]
    mature: Flags
    outcome_delay: Ints
    outcome_known: Ints

    def __len__(self) -> int:
        return len(self.opened)


@dataclass(frozen=True)
class _Events:
    """First deliveries of one kind that had arrived; ``window`` is the row of what they are credited to."""

    impression_id: pa.Array
    event_id: pa.Array
    event_time: Ints
    arrival_time: Ints
    asserts: Flags
    window: Ints

    def take(self, rows: Ints | Flags) -> _Events:
        places = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return _Events(
            self.impression_id.take(pa.array(places)),
            self.event_id.take(pa.array(places)),
            self.event_time[places],
            self.arrival_time[places],
            self.asserts[places],
            self.window[places],
        )


def latest_arrival(tables: Tables) -> int:
    """Arrival time of the last event of a log, ms; 0 if it has none."""
    times = [pc.max(table.column("arrival_time")).as_py() for table in tables if table.num_rows]
    return max((int(time) for time in times if time is not None), default=0)


def outcomes_as_of(tables: Tables, attribution: AttributionConfig, as_of: int) -> dict[Task, Outcome]:
    """Windows and labels of both tasks, as known at a moment.

    Parameters
    ----------
    tables : impressions, clicks, conversions
        In the event contract and validated (`pipelines.event_files`), in any order, with any duplicates.
    attribution : AttributionConfig
    as_of : int
        Arrival time, ms. Events that arrive later do not exist yet.

    Returns
    -------
    dict of task to Outcome
        ``click`` has a row for each impression, ``conversion`` one for each impression with a credited
        click. An impression that arrived after its own window had closed has none.

    Examples
    --------
    from pipelines.config_sections import AttributionConfig
    >>> ids = {"event_id": ["i", "j"], "impression_id": ["i", "j"]}
    >>> shown = pa.table(ids | {"event_time": [0, 0], "arrival_time": [0, 0]})
    >>> clicked = pa.table(
    ...     {"event_id": ["c"], "impression_id": ["j"], "event_time": [5_000], "arrival_time": [6_000]}
    ... )
    >>> found = outcomes_as_of((shown, clicked, clicked.slice(0, 0)), AttributionConfig(), as_of=10_000)
    >>> found["click"].label.tolist(), found["click"].outcome_delay.tolist(), len(found["conversion"])
    ([0, 1], [-1, 5000], 1)
    """
    impressions = _first_deliveries(tables[IMPRESSION], as_of)
    closes = impressions.event_time + (attribution.click_window + attribution.allowed_lateness)
    in_time = impressions.arrival_time <= closes
    impressions, closes = impressions.take(in_time), closes[in_time]
    clicks = _credited_clicks(tables[CLICK], impressions, closes, attribution, as_of)
    # A click and its impression may arrive in either order: the later of the two makes both known.
    known = np.maximum(clicks.arrival_time, impressions.arrival_time[clicks.window])
    shown = len(impressions.event_time)
    delay, said = np.full(shown, NO_OUTCOME, np.int64), np.full(shown, NO_OUTCOME, np.int64)
    delay[clicks.window] = clicks.event_time - impressions.event_time[clicks.window]
    said[clicks.window] = known
    return {
        "click": Outcome(
            impression_id=impressions.impression_id,
            opened=impressions.event_time,
            known=impressions.arrival_time,
            closes=closes,
            label=(said != NO_OUTCOME).astype(np.int8),
            mature=as_of > closes,
            outcome_delay=delay,
            outcome_known=said,
        ),
        "conversion": _conversion_windows(tables[CONVERSION], clicks, known, attribution, as_of),
    }


def _credited_clicks(
    table: pa.Table, impressions: _Events, closes: Ints, attribution: AttributionConfig, as_of: int
) -> _Events:
    """The first click to arrive of each impression, by row of the impression."""
    clicks = _first_deliveries(table, as_of, impressions.impression_id)
    if len(clicks.window) == 0:
        return clicks
    shown = impressions.event_time[clicks.window]
    waited = impressions.arrival_time[clicks.window] - clicks.arrival_time
    clicks = clicks.take(
        (clicks.event_time >= shown)
        & (clicks.event_time <= shown + attribution.click_window)
        & (clicks.arrival_time <= closes[clicks.window])
        & (waited <= attribution.click_window + attribution.allowed_lateness)
    )
    clicks = clicks.take(np.lexsort((clicks.arrival_time, clicks.window)))
    earliest = _is_first(clicks.window) | _is_first(clicks.arrival_time)
    # A run of one window and arrival time: of those, the least event id is the first.
    first = _is_first(clicks.window)
    tied = np.flatnonzero(first[:-1] & ~earliest[1:]) if len(first) else np.zeros(0, np.int64)
    chosen = np.flatnonzero(first)
    if len(tied):
        place = np.searchsorted(chosen, tied)
        chosen[place] = [_least_event_id(clicks, int(start), earliest) for start in tied]
    return clicks.take(chosen)


def _least_event_id(clicks: _Events, start: int, starts_run: Flags) -> int:
    stop = start + 1
    while stop < len(starts_run) and not starts_run[stop]:
        stop += 1
    return min(range(start, stop), key=lambda row: str(clicks.event_id[row]))


def _conversion_windows(
    table: pa.Table, clicks: _Events, known: Ints, attribution: AttributionConfig, as_of: int
) -> Outcome:
    closes = clicks.event_time + (attribution.attribution_window + attribution.allowed_lateness)
    outcomes = _first_deliveries(table, as_of, clicks.impression_id)
    opened = clicks.event_time[outcomes.window]
    waited = known[outcomes.window] - outcomes.arrival_time
    outcomes = outcomes.take(
        (outcomes.event_time >= opened)
        & (outcomes.event_time <= opened + attribution.attribution_window)
        & (outcomes.arrival_time <= closes[outcomes.window])
        & (waited <= attribution.click_window + attribution.allowed_lateness)
    )
    windows = len(clicks.event_time)
    # The last instant decides, and at one instant a retraction wins.
    last = np.full(windows, np.iinfo(np.int64).min)
    np.maximum.at(last, outcomes.window, outcomes.event_time)
    decides = outcomes.event_time == last[outcomes.window]
    label = np.zeros(windows, np.int8)
    label[outcomes.window[decides]] = 1
    label[outcomes.window[decides & ~outcomes.asserts]] = 0
    delay, said = np.full(windows, NO_OUTCOME, np.int64), np.full(windows, NO_OUTCOME, np.int64)
    counts = outcomes.asserts & (label[outcomes.window] == 1)
    told = outcomes.take(counts)
    told = told.take(np.lexsort((told.arrival_time, told.event_time, told.window)))
    told = told.take(_is_first(told.window))
    delay[told.window] = told.event_time - clicks.event_time[told.window]
    said[told.window] = np.maximum(told.arrival_time, known[told.window])
    return Outcome(clicks.impression_id, clicks.event_time, known, closes, label, as_of > closes, delay, said)


def _is_first(values: Ints) -> Flags:
    """Whether each value differs from the one before it."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def _first_deliveries(table: pa.Table, as_of: int, of: pa.Array | None = None) -> _Events:
    """Events without redeliveries, as far as arrived; with ``of``, those of the impressions in it."""
    n = table.num_rows
    event_time, arrival_time = _numbers(table, "event_time"), _numbers(table, "arrival_time")
    event_id, impression_id = _text(table, "event_id"), _text(table, "impression_id")
    encoded = event_id.dictionary_encode()
    rows: Ints = np.arange(n)
    if len(encoded.dictionary) < n:
        # Written last to first, so that the earliest arrival of each id stays.
        order = np.lexsort((-rows, arrival_time))[::-1]
        first = np.zeros(len(encoded.dictionary), np.int64)
        first[encoded.indices.to_numpy(zero_copy_only=False)[order]] = order
        rows = np.sort(first)
    window: Ints = np.arange(n)
    if of is not None:
        place = pc.index_in(impression_id, value_set=of)
        window = pc.fill_null(place, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    asserts = np.ones(n, np.bool_)
    if "op" in table.column_names and n:
        retracts = pc.fill_null(pc.equal(table.column("op"), "retract"), False)
        asserts = ~np.asarray(retracts.to_numpy(zero_copy_only=False), np.bool_)
    everything = _Events(impression_id, event_id, event_time, arrival_time, asserts, window)
    return everything.take(rows[(arrival_time[rows] <= as_of) & (window[rows] >= 0)])


def _numbers(table: pa.Table, name: str) -> Ints:
    return np.asarray(table.column(name).to_numpy(), np.int64)


def _text(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
