"""Stream and loss together: what each policy learns from a long stream of one kind of click is the truth."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from models.base import sigmoid
from models.losses import head_gradients, policy_gradient
from pipelines.config_sections import AttributionConfig, Policy
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.events import CLICK, CONVERSION
from pipelines.hashing import hash_text
from pipelines.joined import Arrivals, Examples, Outcomes
from pipelines.joiner import CONVERSION_TASK, Joiner
from pipelines.label_news import FIRST

P, CREDIT = 0.25, 0.8
# Mean of the exponential delay, and the observation window: a third of the outcomes come in it.
DELAY, OBSERVED, WIDTH = 6 * HOUR_MS, int(2.5 * HOUR_MS), 2 * DAY_MS
RULE = AttributionConfig(attribution_window=WIDTH, observation_window=OBSERVED)
CLICKS, DAYS = 40_000, 20


def share_seen(elapsed: NDArray[np.int64]) -> NDArray[np.float64]:
    """F: of the outcomes in the window those that come within an age."""
    return np.asarray((1.0 - np.exp(-elapsed / DELAY)) / (1.0 - np.exp(-WIDTH / DELAY)))


class Learner:
    """One logit, and for bidefuse a second one, moved by the mean gradient of each batch."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.logit, self.late_logit = np.zeros(1), np.zeros(1)
        self.seen = 0

    def learn(self, rows: Examples) -> None:
        if len(rows) == 0:
            return
        n = len(rows)
        late = np.full(n, 1.0 - share_seen(np.array([OBSERVED]))[0])
        if self.policy == "relabel":
            late = np.clip(1.0 - share_seen(rows.elapsed), 0.0, 1.0)
        first, probability = rows.kind == FIRST, np.repeat(sigmoid(self.logit), n)
        # A window's rows come days apart: steps this small average over all of them.
        rate = 10.0 / 8_000
        if self.policy == "bidefuse":
            share = np.repeat(sigmoid(self.late_logit), n)
            gradient, by_late = head_gradients(rows.label, probability, share, first)
            self.late_logit = self.late_logit - rate * float(rows.weight @ by_late)
        else:
            gradient = policy_gradient(self.policy, rows.label, probability, late, first)
        self.logit = self.logit - rate * float(rows.weight @ gradient)


def stream(seed: int) -> tuple[Arrivals, Outcomes, Outcomes]:
    """Clicks at an even rate, each with an outcome of part credit with probability P."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, DAYS * DAY_MS, CLICKS))
    names = [f"i{n}" for n in range(CLICKS)]
    delay = rng.exponential(DELAY, CLICKS).astype(np.int64)
    # P is the chance of an outcome in the window.
    converts = np.flatnonzero(rng.random(CLICKS) < P / (1.0 - np.exp(-WIDTH / DELAY)))

    def outcomes(rows: NDArray[np.int64], at: NDArray[np.int64], kind: int, credit: float) -> Outcomes:
        order = np.argsort(at, kind="stable")
        rows, at = rows[order], at[order]
        hashes = np.array([hash_text(f"{kind}.{row}") for row in rows.tolist()], np.uint64)
        none = np.zeros((len(rows), 3), np.int64)
        ids = [names[row] for row in rows.tolist()]
        return Outcomes(ids, at, at, hashes, np.zeros(len(rows), np.int8), np.full(len(rows), credit), none)

    everyone = np.arange(CLICKS)
    bought = outcomes(converts, time[converts] + delay[converts], CONVERSION, CREDIT)
    return Arrivals(names, time, time, {}), outcomes(everyone, time, CLICK, 1.0), bought


def half_hour(arrival: NDArray[np.int64], clock: int) -> tuple[int, int]:
    """First and last of what arrived in the half hour up to a moment."""
    first, last = np.searchsorted(arrival, [clock - 30 * MINUTE_MS, clock], side="right")
    return int(first), int(last)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_each_policy_learns_the_true_probability_from_its_own_rows(policy: str) -> None:
    arrivals, clicks, conversions = stream(seed=3)
    joiner, learner = Joiner(RULE, policy), Learner(policy)
    found = []
    for clock in range(30 * MINUTE_MS, DAYS * DAY_MS, 30 * MINUTE_MS):
        joined = joiner.process(
            arrivals.slice(*half_hour(arrivals.arrival_time, clock)),
            clicks.slice(*half_hour(clicks.arrival_time, clock)),
            conversions.slice(*half_hour(conversions.arrival_time, clock)),
            clock,
        )
        learner.learn(joined.examples[CONVERSION_TASK])
        joiner.release(joined)
        if clock > (DAYS / 2) * DAY_MS:
            found.append(float(sigmoid(learner.logit)[0]))
    late = P * float(1.0 - share_seen(np.array([OBSERVED]))[0])
    expected = CREDIT * P / (1.0 + CREDIT * late) if policy == "vanilla" else CREDIT * P
    assert np.mean(found) == pytest.approx(expected, rel=0.05)
