"""How often each test of calibration rejects a calibrated model at 5 %: simulated; 4 % to 6 % is wanted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from monitoring.calibration_tests import (
    cox_score_test,
    kuiper_test,
    pcoc_z_test,
    spiegelhalter_test,
    step_overshoot,
)
from monitoring.null_distributions import brownian_range_tail
from monitoring.reliability import expected_calibration_error

TESTS = (pcoc_z_test, cox_score_test, kuiper_test, spiegelhalter_test)
# The standard error of a share of 5 % is then 0.28 %: from 5 % to the ends of 4-6 % it is 3.6 of it.
SIMULATIONS = 6000


def _world(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(8)
    if name == "20 positives":
        return rng.beta(2, 98, 1000), None
    if name == "100 positives, weighted":
        return rng.beta(2, 18, 1000), rng.uniform(0.5, 2.0, 1000)
    if name == "half positive":
        return rng.beta(4, 4, 400), None
    return rng.beta(0.3, 10, 2500), None


@pytest.mark.parametrize("name", ["20 positives", "100 positives, weighted", "half positive", "long tail"])
def test_every_test_rejects_a_calibrated_model_in_4_to_6_percent_at_5(name: str) -> None:
    probability, weight = _world(name)
    rng = np.random.default_rng(21)
    rejected = np.zeros(len(TESTS))
    for _ in range(SIMULATIONS):
        label = rng.random(len(probability)) < probability
        rejected += [(test(label, probability, weight).p_value or 0.0) < 0.05 for test in TESTS]
    share = rejected / SIMULATIONS
    assert (share > 0.04).all() and (share < 0.06).all(), dict(zip(TESTS, share, strict=True))


def test_kuiper_without_the_overshoot_of_its_steps_would_be_short_of_its_level_at_20_positives() -> None:
    probability, _ = _world("20 positives")
    rng = np.random.default_rng(22)
    order = np.sort(probability)
    walk = np.cumsum((rng.random((SIMULATIONS, len(order))) < order) - order, axis=1)
    spread = np.maximum(walk.max(axis=1), 0.0) - np.minimum(walk.min(axis=1), 0.0)
    scale = math.sqrt(float((order * (1 - order)).sum()))
    plain = np.mean([brownian_range_tail(one) < 0.05 for one in spread / scale])
    mended = (spread + step_overshoot(order, np.ones(len(order)))) / scale
    assert plain < 0.043 < np.mean([brownian_range_tail(one) < 0.05 for one in mended]) < 0.06


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.8])
def test_step_overshoot_is_how_far_walks_step_over_levels(rate: float) -> None:
    rng = np.random.default_rng(23)
    walk = np.cumsum((rng.random((2000, 3000)) < rate) - rate, axis=1)
    # Levels at all places between the values that a walk of such steps can take.
    level = rng.uniform(3.0, 4.0, 2000)
    over = []
    for side in (walk, -walk):
        passed = side > level[:, None]
        crossed = passed.any(axis=1)
        first = passed.argmax(axis=1)[crossed]
        over.append(float(np.mean(side[crossed, first] - level[crossed])))
    # Each mean has a standard error below 0.01.
    expected = step_overshoot(np.array([rate]), np.ones(1))
    assert sum(over) == pytest.approx(expected, abs=0.04)
    assert over[0] - over[1] == pytest.approx((1.0 - 2.0 * rate) / 3.0, abs=0.04)


def test_ece_above_its_null_by_1_645_deviations_is_as_rare_as_a_normal_tail_or_a_little_less_rare() -> None:
    probability, _ = _world("100 positives, weighted")
    rng = np.random.default_rng(24)
    z = []
    for _ in range(3000):
        error = expected_calibration_error(rng.random(1000) < probability, probability)
        z.append(error.z if error is not None and error.z is not None else 0.0)
    # A sum of 20 folded normals is skewed to the right: 5.5 % of such sums exceed it.
    assert 0.04 < float(np.mean(np.array(z) > 1.645)) < 0.07
