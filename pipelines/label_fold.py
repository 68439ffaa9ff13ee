"""How an outcome changes a label: the transition of the rule, many labels at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ASSERT", "LONG_AGO", "RESTATE", "RETRACT", "Change", "apply_outcomes", "rounds"]

# Places in `pipelines.events.OPERATIONS`.
ASSERT, RETRACT, RESTATE = 0, 1, 2
# Event time of the last outcome that had a say, where there was none.
LONG_AGO = int(np.iinfo(np.int64).min)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Change(NamedTuple):
    """Labels after one more outcome each, (n,): credit, event time of the last say, and what changed."""

    credit: Floats
    time: Ints
    changes: NDArray[np.bool_]
    rises: NDArray[np.bool_]


def apply_outcomes(
    credit: Floats, time: Ints, event_time: Ints, op: NDArray[np.int8], own_credit: Floats
) -> Change:
    """`pipelines.attribution.apply_outcome` for n labels, an outcome each.

    Parameters
    ----------
    credit, time : ndarray, (n,)
        The labels: credit, and event time (ms) of the last outcome that had a say.
    event_time, op, own_credit : ndarray, (n,)
        The outcomes; ``op`` is ASSERT, RETRACT or RESTATE.

    Examples
    --------
    >>> one, five = np.array([1.0]), np.array([5])
    >>> change = apply_outcomes(one, five, five, np.array([RETRACT], np.int8), one)
    >>> change.credit.tolist(), change.changes.tolist(), change.rises.tolist()
    ([0.0], [True], [False])
    """
    newer, same = event_time > time, event_time == time
    has_say = newer | (same & ((op == RETRACT) | ((op == RESTATE) & (credit > 0))))
    told = np.where((op == ASSERT) & (credit > 0), credit, np.where(op == RETRACT, 0.0, own_credit))
    told = np.where(has_say, told, credit)
    return Change(told, np.where(has_say, event_time, time), told != credit, (credit == 0) & (told > 0))


def rounds(slot: Ints) -> Iterator[Ints]:
    """Rows in rounds that name no slot twice; each slot's rows keep their order.

    Examples
    --------
    >>> [rows.tolist() for rows in rounds(np.array([5, 3, 5]))]
    [[0, 1], [2]]
    """
    if len(slot) == 0:
        return
    order = np.argsort(slot, kind="stable")
    is_first = np.append(True, np.diff(slot[order]) != 0)
    if is_first.all():
        yield np.arange(len(slot))
        return
    place = np.arange(len(slot))
    turn = place - np.maximum.accumulate(np.where(is_first, place, 0))
    for each in range(int(turn.max()) + 1):
        yield np.sort(order[turn == each])
