"""What came of each impression and of each click, as known at a moment: the labels of a whole log at once.

The columnar form of `pipelines.attribution.labels_as_of`, for whoever judges predictions against a log
rather than learns from a stream; a property test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import Task
from pipelines.config_sections import AttributionConfig
from pipelines.events import CLICK, CONVERSION, IMPRESSION, OPERATIONS
from pipelines.hashing import hash_column
from pipelines.label_fold import LONG_AGO, apply_outcomes, rounds

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
        When the window opened: the impression (tasks click and view_through) or the credited click (task
        conversion). Event time, ms.
    known : (n,) int64
        When it was known that the window had opened. Arrival time, ms.
    closes : (n,) int64
        From when on the label is final. Arrival time, ms.
    label : (n,) float64
        The credit of its outcome, in [0, 1].
    label_version : (n,) int32
        How often the label has changed.
    mature : (n,) bool
        Whether the window had closed.
    outcome_delay : (n,) int64
        ms from opening to the outcome that raised the label from 0; `NO_OUTCOME` where the label is 0.
    outcome_known : (n,) int64
        Since when that outcome and its window are known, ms; `NO_OUTCOME` where the label is 0.
    """

    impression_id: pa.Array
    opened: Ints
    known: Ints
    closes: Ints
    label: NDArray[np.float64]
    label_version: NDArray[np.int32]
    mature: Flags
    outcome_delay: Ints
    outcome_known: Ints

    def __len__(self) -> int:
        return len(self.opened)


@dataclass(frozen=True)
class _Events:
    """First deliveries of one kind that had arrived, in order of arrival; ``window`` is the row of what they
    are credited to, ``op`` a place in OPERATIONS.
    """

    impression_id: pa.Array
    event_time: Ints
    arrival_time: Ints
    op: NDArray[np.int8]
    credit: NDArray[np.float64]
    window: Ints

    def __len__(self) -> int:
        return len(self.event_time)

    def take(self, rows: Ints | Flags) -> _Events:
        places = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return _Events(
            self.impression_id.take(pa.array(places)),
            self.event_time[places],
            self.arrival_time[places],
            self.op[places],
            self.credit[places],
            self.window[places],
        )


@dataclass(frozen=True)
class _Windows:
    """Label windows before their outcomes are known."""

    impression_id: pa.Array
    opened: Ints
    known: Ints
    width: int
    closes: Ints
    patience: int

    @classmethod
    def of(cls, events: _Events, known: Ints, width: int, attribution: AttributionConfig) -> _Windows:
        lateness = attribution.allowed_lateness
        closes = events.event_time + (width + lateness)
        patience = attribution.click_window + lateness
        return cls(events.impression_id, events.event_time, known, width, closes, patience)

    def __len__(self) -> int:
        return len(self.opened)

    def accepted(self, outcomes: _Events) -> _Events:
        """The outcomes that happened in their window and arrived neither too late nor too early."""
        opened = self.opened[outcomes.window]
        return outcomes.take(
            (outcomes.event_time >= opened)
            & (outcomes.event_time <= opened + self.width)
            & (outcomes.arrival_time <= self.closes[outcomes.window])
            & (self.known[outcomes.window] - outcomes.arrival_time <= self.patience)
        )

    def known_of(self, outcomes: _Events) -> Ints:
        """Since when outcomes and their windows are known, ms."""
        return np.maximum(outcomes.arrival_time, self.known[outcomes.window])


def latest_arrival(tables: Tables) -> int:
    """Arrival time of the last event of a log, ms; 0 if it has none."""
    times = [pc.max(table.column("arrival_time")).as_py() for table in tables if table.num_rows]
    return max((int(time) for time in times if time is not None), default=0)


def outcomes_as_of(tables: Tables, attribution: AttributionConfig, as_of: int) -> dict[Task, Outcome]:
    """Windows and labels of all tasks, as known at a moment.

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
        click, ``view_through``, where it has a window, one for each impression. An impression that arrived
        after its own window had closed has none.

    Examples
    --------
    >>> ids = {"event_id": ["i", "j"], "impression_id": ["i", "j"]}
    >>> shown = pa.table(ids | {"event_time": [0, 0], "arrival_time": [0, 0]})
    >>> clicked = pa.table(
    ...     {"event_id": ["c"], "impression_id": ["j"], "event_time": [5_000], "arrival_time": [6_000]}
    ... )
    >>> found = outcomes_as_of((shown, clicked, clicked.slice(0, 0)), AttributionConfig(), as_of=10_000)
    >>> found["click"].label.tolist(), found["click"].outcome_delay.tolist(), len(found["conversion"])
    ([0.0, 1.0], [-1, 5000], 1)
    """
    impressions = _first_deliveries(tables[IMPRESSION], as_of)
    # In the order in which they were logged.
    impressions = impressions.take(np.argsort(impressions.window, kind="stable"))
    closes = impressions.event_time + (attribution.click_window + attribution.allowed_lateness)
    impressions = impressions.take(impressions.arrival_time <= closes)
    shown = _Windows.of(impressions, impressions.arrival_time, attribution.click_window, attribution)
    clicks = shown.accepted(_first_deliveries(tables[CLICK], as_of, impressions.impression_id))
    # The first click to arrive, by row of its impression.
    clicks = clicks.take(np.unique(clicks.window, return_index=True)[1].astype(np.int64))
    known = shown.known_of(clicks)
    clicked = _Windows.of(clicks, known, attribution.attribution_window, attribution)
    conversions = clicked.accepted(_first_deliveries(tables[CONVERSION], as_of, clicks.impression_id))
    found: dict[Task, Outcome] = {
        "click": _labelled(shown, clicks, as_of),
        "conversion": _labelled(clicked, conversions, as_of),
    }
    if attribution.view_through_window is not None:
        seen = _Windows.of(
            impressions, impressions.arrival_time, attribution.view_through_window, attribution
        )
        others = seen.accepted(_first_deliveries(tables[CONVERSION], as_of, impressions.impression_id))
        found["view_through"] = _labelled(seen, others.take(~_claimed(seen, others, clicks, known)), as_of)
    return found


def _claimed(seen: _Windows, conversions: _Events, clicks: _Events, known: Ints) -> Flags:
    """Conversions at or after a click that was known before their view-through window had closed."""
    never = np.iinfo(np.int64).max
    click_time, click_known = np.full(len(seen), never), np.full(len(seen), never)
    click_time[clicks.window], click_known[clicks.window] = clicks.event_time, known
    is_known = click_known <= np.maximum(seen.closes, seen.known)
    return np.asarray(
        is_known[conversions.window] & (conversions.event_time >= click_time[conversions.window]), np.bool_
    )


def _labelled(windows: _Windows, outcomes: _Events, as_of: int) -> Outcome:
    """The labels of windows by their accepted outcomes, each of which is applied in order of arrival."""
    n = len(windows)
    credit, time = np.zeros(n), np.full(n, LONG_AGO)
    version = np.zeros(n, np.int32)
    delay, said = np.full(n, NO_OUTCOME, np.int64), np.full(n, NO_OUTCOME, np.int64)
    known = windows.known_of(outcomes)
    for rows in rounds(outcomes.window):
        window = outcomes.window[rows]
        change = apply_outcomes(
            credit[window], time[window], outcomes.event_time[rows], outcomes.op[rows], outcomes.credit[rows]
        )
        credit[window], time[window] = change.credit, change.time
        version[window] += change.changes
        raised = rows[change.rises]
        delay[outcomes.window[raised]] = outcomes.event_time[raised] - windows.opened[outcomes.window[raised]]
        said[outcomes.window[raised]] = known[raised]
    positive = credit > 0
    return Outcome(
        impression_id=windows.impression_id,
        opened=windows.opened,
        known=windows.known,
        closes=windows.closes,
        label=credit,
        label_version=version,
        mature=as_of > windows.closes,
        outcome_delay=np.where(positive, delay, NO_OUTCOME),
        outcome_known=np.where(positive, said, NO_OUTCOME),
    )


def _first_deliveries(table: pa.Table, as_of: int, of: pa.Array | None = None) -> _Events:
    """Events without redeliveries, as far as arrived, in order of arrival and then of the hash of their id.

    With ``of`` those of the impressions in it, ``window`` being their place there; else the table's rows.
    """
    arrival_time, impression_id = _numbers(table, "arrival_time"), _text(table, "impression_id")
    window: Ints = np.arange(table.num_rows)
    if of is not None:
        place = pc.index_in(impression_id, value_set=of)
        window = pc.fill_null(place, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    rows = np.flatnonzero((arrival_time <= as_of) & (window >= 0))
    rows = rows[np.argsort(arrival_time[rows], kind="stable")]
    event_id = _text(table, "event_id").take(pa.array(rows))
    encoded = event_id.dictionary_encode()
    if len(encoded.dictionary) < len(rows):
        first = np.unique(encoded.indices.to_numpy(zero_copy_only=False), return_index=True)[1]
        rows, event_id = rows[np.sort(first)], event_id.take(pa.array(np.sort(first)))
    if of is not None and len(rows):
        rows = rows[np.lexsort((hash_column(event_id), arrival_time[rows]))]
    op, credit = np.zeros(table.num_rows, np.int8), np.ones(table.num_rows)
    if "op" in table.column_names and table.num_rows:
        named = pc.index_in(table.column("op"), value_set=pa.array(OPERATIONS))
        op = pc.fill_null(named, 0).to_numpy().astype(np.int8)
    if "credit" in table.column_names and table.num_rows:
        credit = pc.fill_null(table.column("credit"), 1.0).to_numpy()
    everything = _Events(impression_id, _numbers(table, "event_time"), arrival_time, op, credit, window)
    return everything.take(rows)


def _numbers(table: pa.Table, name: str) -> Ints:
    return np.asarray(table.column(name).to_numpy(), np.int64)


def _text(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
