"""What goes wrong with late labels elsewhere, one plain log at a time, and does not go wrong here."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.attribution import Event, labels_as_of, rows
from pipelines.config_sections import AttributionConfig
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from tests.label_logs import POLICIES, Rule, Said, begins_of, run

OBSERVED, WIDTH, LATENESS = 15, 100, 20
SHOWN, CLICKED = Event(IMPRESSION, "i", "i", 0, 0), Event(CLICK, "c", "i", 5, 5)


def sold(name: str, time: int, arrival: int | None = None, op: str = "assert", credit: float = 1.0) -> Event:
    return Event(CONVERSION, name, "i", time, time if arrival is None else arrival, op, credit)


def said(rule: Rule, *outcomes: Event, task: str = "conversion", as_of: int = 1_000) -> list[Said]:
    """What joiner and rule say of one task of a clicked impression."""
    events = [SHOWN, CLICKED, *outcomes]
    found = [row for row in run(rule, events, [1, 2, 3], as_of).said if row.task == task]
    expected = rows(events, as_of, rule.attribution, rule.policy, confirm_window=rule.confirm_window)
    assert sorted(found) == sorted(row for row in begins_of(expected) if row.task == task)
    return found


def label(*outcomes: Event, as_of: int = 1_000) -> tuple[float, int]:
    """Label and version of the conversion window, as known at a moment."""
    log = [SHOWN, CLICKED, *outcomes]
    (row,) = [row for row in labels_as_of(log, as_of, Rule().attribution) if row.task == "conversion"]
    return row.label, row.label_version


# What is known when -----------------------------------------------------------------------------------


def test_label_as_of_a_moment_is_made_of_events_known_by_then() -> None:
    late = sold("v", 10, arrival=25)
    assert label(late, as_of=24) == (0.0, 0)
    assert label(late, as_of=25) == (1.0, 1)


@pytest.mark.parametrize("policy", ["vanilla", "esdfm", "defer", "defuse", "bidefuse"])
def test_first_row_after_waiting_is_stamped_with_the_end_of_the_wait_not_with_the_click(policy: str) -> None:
    first = said(Rule(policy), sold("v", 10))[0]
    assert (first.kind, first.label, first.event_time) == ("first", 1.0, CLICKED.event_time)
    # One tick late, so that whatever arrives at the very end of the wait is in.
    assert first.known_at == CLICKED.event_time + OBSERVED + 1
    assert first.elapsed == OBSERVED


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "relabel"])
def test_delayed_positive_is_said_once_in_its_window_and_only_after_a_negative(policy: str) -> None:
    waits, once = policy not in ("wait", "fnw", "fnc"), policy not in ("wait",)
    early = [row.kind for row in said(Rule(policy), sold("v", 10))]
    late = [row.kind for row in said(Rule(policy), sold("v", 50), sold("w", 60))]
    assert early.count("delayed_positive") == (not waits and once)
    assert late.count("delayed_positive") == once
    beyond = said(Rule(policy), sold("v", CLICKED.event_time + WIDTH + 1))
    assert all(row.label == 0 for row in beyond)


def test_conversion_that_happened_in_the_window_counts_up_to_the_allowed_lateness() -> None:
    closes = CLICKED.event_time + WIDTH + LATENESS
    assert label(sold("v", 50, arrival=closes)) == (1.0, 1)
    assert label(sold("v", 50, arrival=closes + 1)) == (0.0, 0)


def test_conversion_before_its_impression_is_joined_when_the_impression_arrives() -> None:
    # A stream-stream outer join with a watermark as wide as the window would lose it or say both.
    events = [SHOWN._replace(arrival_time=40), CLICKED._replace(arrival_time=30), sold("v", 8, arrival=20)]
    found = [row for row in run(Rule("wait"), events, [1, 2], 1_000).said if row.task == "conversion"]
    assert [(row.label, row.kind) for row in found] == [(1.0, "first")]


# Copies, order and corrections -------------------------------------------------------------------------


def test_copy_of_a_conversion_is_known_as_one_for_the_whole_window() -> None:
    # Delivered twice, FNW would predict (1 + r) p.
    found = run(Rule("fnw"), [SHOWN, CLICKED, sold("v", 10), sold("v", 10, arrival=120)], [3], 1_000)
    assert [row.kind for row in found.said if row.task == "conversion"] == ["first", "delayed_positive"]
    assert found.totals[CONVERSION, "duplicate"] == 1


def test_copy_of_a_restatement_does_not_undo_a_later_one() -> None:
    first, second = sold("r1", 20, 21, "restate", 0.5), sold("r2", 20, 22, "restate", 0.25)
    log = [SHOWN, CLICKED, sold("v", 10), first, second, first._replace(arrival_time=30)]
    (row,) = [row for row in run(Rule("wait"), log, [1, 3, 5], 1_000).said if row.task == "conversion"]
    assert (row.label, row.label_version) == (0.25, 3)


@pytest.mark.parametrize("arrivals", [(10, 20), (20, 10)])
def test_retraction_counts_whatever_the_order_of_arrival_if_it_happened_no_earlier(
    arrivals: tuple[int, int],
) -> None:
    first, second = arrivals
    assert label(sold("v", 10, first), sold("r", 10, second, "retract"))[0] == 0.0
    assert label(sold("v", 10, first), sold("r", 9, second, "retract"))[0] == 1.0


def test_label_version_says_how_often_the_label_has_changed() -> None:
    history = [sold("v", 10, credit=0.5), sold("w", 12), sold("r", 20, op="restate", credit=0.8)]
    history += [sold("x", 30, op="retract"), sold("y", 40, credit=0.3)]
    assert [label(*history, as_of=at) for at in (9, 10, 12, 20, 30, 40)] == [
        (0.0, 0),
        (0.5, 1),
        (0.5, 1),
        (0.8, 2),
        (0.0, 3),
        (0.3, 4),
    ]


def test_retraction_after_a_row_said_it_is_counted_and_left_to_the_confirm_row() -> None:
    outcomes = [sold("v", 30), sold("r", 40, op="retract")]
    found = run(Rule("defer", confirm=50), [SHOWN, CLICKED, *outcomes], [1], 1_000)
    assert found.totals[CONVERSION, "trained"] == 1
    assert found.totals[CONVERSION, "superseded"] == 1
    assert all(row.weight > 0 for row in found.said)


# Part credit -------------------------------------------------------------------------------------------


def test_part_credit_is_a_soft_label_in_time_and_a_weighted_positive_when_late() -> None:
    in_time, late = sold("v", 10, credit=0.4), sold("v", 30, credit=0.4)
    assert [(row.label, row.weight) for row in said(Rule("esdfm"), in_time)] == [(0.4, 1.0)]
    assert [(row.label, row.weight) for row in said(Rule("esdfm"), late)] == [(0.0, 1.0), (1.0, 0.4)]
    assert [(row.label, row.weight) for row in said(Rule("fnw"), late)] == [(0.0, 1.0), (1.0, 0.4)]


@pytest.mark.parametrize(
    ("outcome", "confirmed"),
    [
        (sold("v", 10, credit=0.4), [("confirm", 0.4, 1.0)]),
        (sold("v", 30, credit=0.4), [("delayed_positive", 1.0, 0.4), ("confirm", 0.0, 0.6)]),
        (sold("v", 30), [("delayed_positive", 1.0, 1.0)]),
        (sold("v", 90), [("confirm", 0.0, 1.0)]),
    ],
)
def test_defer_says_every_window_twice_and_nothing_after_its_confirm_window(
    outcome: Event, confirmed: list[tuple[str, float, float]]
) -> None:
    found = said(Rule("defer", confirm=50), outcome)
    assert [(row.kind, row.label, row.weight) for row in found[1:]] == confirmed
    assert sum(row.weight for row in found) == pytest.approx(2.0)


# Midnight ----------------------------------------------------------------------------------------------


def test_relabelling_says_a_window_each_midnight_and_a_last_time_when_it_has_closed() -> None:
    attribution = AttributionConfig(attribution_window=2 * DAY_MS)
    opened = DAY_MS - HOUR_MS
    events = [
        Event(IMPRESSION, "i", "i", opened, opened),
        Event(CLICK, "c", "i", opened, opened),
        Event(CONVERSION, "v", "i", opened + DAY_MS, opened + DAY_MS + 2 * HOUR_MS),
    ]
    found = [row for row in rows(events, 9 * DAY_MS, attribution, "relabel") if row.task == "conversion"]
    assert [(row.kind, row.label, row.known_at // DAY_MS, row.mature) for row in found] == [
        ("first", 0.0, 1, False),
        ("confirm", 0.0, 2, False),
        ("confirm", 1.0, 3, True),
    ]
    assert [row.elapsed for row in found] == [HOUR_MS - 1, DAY_MS + HOUR_MS - 1, 2 * DAY_MS]
    assert 2 * DAY_MS + 5 * MINUTE_MS + opened < found[-1].known_at


# Windows beside clicks ---------------------------------------------------------------------------------


def test_view_through_counts_what_no_known_click_claims() -> None:
    rule = Rule("fnw", view_through=60)
    view = [SHOWN, sold("v", 10, arrival=12)]
    click = Event(CLICK, "c", "i", 8, 30)

    def of_view(events: list[Event], as_of: int) -> list[float]:
        known = labels_as_of(events, as_of, rule.attribution)
        return [row.label for row in known if row.task == "view_through"]

    assert of_view(view, 20) == [1.0]
    # The click happened before, and is known later: from then on the conversion is its own.
    assert of_view([*view, click], 29) == [1.0]
    assert of_view([*view, click], 30) == [0.0]
    later = click._replace(event_time=11, arrival_time=30)
    assert of_view([*view, later], 30) == [1.0]


def test_view_through_positive_once_said_is_not_taken_back_when_a_click_claims_it() -> None:
    rule = Rule("fnw", view_through=60)
    events = [SHOWN, sold("v", 10, arrival=12), Event(CLICK, "c", "i", 8, 30)]
    found = run(rule, events, [1, 2], 1_000)
    kinds = [(row.task, row.kind) for row in found.said if row.task != "click"]
    assert kinds == [
        ("view_through", "first"),
        ("view_through", "delayed_positive"),
        ("conversion", "first"),
        ("conversion", "delayed_positive"),
    ]
    assert found.totals[CONVERSION, "trained"] == 1


# Proportions -------------------------------------------------------------------------------------------


def test_lost_and_repeated_conversions_move_what_fnw_learns_in_proportion() -> None:
    # FNW with a share e of conversions lost predicts (1 - e) p; told twice it would predict (1 + r) p.
    rng, p, lost, again = np.random.default_rng(3), 0.3, 0.2, 0.5
    events = []
    for n in range(2_000):
        name = f"i{n}"
        events += [Event(IMPRESSION, name, name, 0, 0), Event(CLICK, f"c{n}", name, 1, 1)]
        if rng.random() < p and rng.random() >= lost:
            bought = Event(CONVERSION, f"v{n}", name, 50, 50)
            events += [bought, bought._replace(arrival_time=90)] if rng.random() < again else [bought]
    found = [row for row in run(Rule("fnw"), events, [500, 1_000], 1_000).said if row.task == "conversion"]
    positives = sum(row.label for row in found)
    negatives = len(found) - positives
    assert negatives == 2_000
    assert positives / negatives == pytest.approx((1 - lost) * p, abs=0.03)
