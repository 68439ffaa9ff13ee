"""Delayed-feedback losses: their stationary points and derivatives."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq

from models.base import sigmoid
from models.losses import (
    cure_base_rate,
    cure_derivatives,
    cure_loss,
    cure_posterior,
    distillation_gradient,
    policy_gradient,
    policy_weights,
)
from pipelines.errors import ConfigError

# A click converts within the attribution window with P, after the observation window with P_DELAYED.
P, P_DELAYED = 0.228, 0.09
Array = NDArray[np.float64]


def emitted(policy: str) -> list[tuple[float, float]]:
    """(label, rows for each click) that the stream shows, from the table of stream rules."""
    return {
        "wait": [(1.0, P), (0.0, 1.0 - P)],
        "vanilla": [(1.0, P - P_DELAYED), (0.0, 1.0 - P + P_DELAYED), (1.0, P_DELAYED)],
        "fnw": [(0.0, 1.0), (1.0, P)],
        "fnc": [(0.0, 1.0), (1.0, P)],
    }[policy]


def expected_gradient(policy: str, logit: float) -> float:
    probability = sigmoid(np.array([logit]))
    return sum(
        float(share * policy_gradient(policy, np.array([label]), probability)[0])
        for label, share in emitted(policy)
    )


@pytest.mark.parametrize(
    ("policy", "optimum"), [("wait", P), ("vanilla", P / (1.0 + P_DELAYED)), ("fnw", P), ("fnc", P)]
)
def test_policy_loss_is_stationary_where_it_should_be(policy: str, optimum: float) -> None:
    root = brentq(lambda logit: expected_gradient(policy, logit), -8.0, 4.0)
    assert sigmoid(np.array([root]))[0] == pytest.approx(optimum, rel=0.01)


@pytest.mark.parametrize("policy", ["wait", "vanilla", "fnw", "fnc"])
def test_gradient_descent_moves_towards_the_optimum_from_both_sides(policy: str) -> None:
    assert expected_gradient(policy, -6.0) < 0.0 < expected_gradient(policy, 3.0)


@pytest.mark.parametrize("policy", ["wait", "vanilla", "fnw", "fnc"])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_policy_gradient_is_that_of_the_weighted_loss_with_constant_weights(
    policy: str, label: float
) -> None:
    logit, step, one = 0.7, 1e-6, np.array([label])
    positive, negative = policy_weights(policy, one, sigmoid(np.array([logit])))

    def loss(z: float) -> float:
        return float(positive[0] * np.logaddexp(0, -z) + negative[0] * np.logaddexp(0, z))

    numeric = (loss(logit + step) - loss(logit - step)) / (2 * step)
    assert policy_gradient(policy, one, sigmoid(np.array([logit])))[0] == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_fnc_gradient_is_cross_entropy_of_q_after_the_substitution(label: float) -> None:
    def loss(z: float) -> float:
        p = 1.0 / (1.0 + np.exp(-z))
        q = p / (1.0 + p)
        return float(-label * np.log(q) - (1.0 - label) * np.log(1.0 - q))

    for logit in (-3.0, 0.0, 2.0):
        numeric = (loss(logit + 1e-6) - loss(logit - 1e-6)) / 2e-6
        closed = policy_gradient("fnc", np.array([label]), sigmoid(np.array([logit])))[0]
        assert closed == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("policy", ["wait", "vanilla", "esdfm", "fnw", "fnc"])
def test_distillation_is_at_rest_at_the_probability_of_the_teacher(policy: str) -> None:
    probability = np.array([0.2, 0.3, 0.4])
    gradient = distillation_gradient(policy, probability, np.full(3, 0.3))
    assert gradient[0] < 0.0 < gradient[2]
    assert gradient[1] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("late_share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("truth", [0.02, 0.228, 0.6])
def test_esdfm_is_at_rest_at_the_true_probability_whatever_share_comes_late(
    truth: float, late_share: float
) -> None:
    # Of one window: a first row, positive if the outcome came in time, and a second one if it came late.
    in_time, late = truth * (1.0 - late_share), truth * late_share
    predicted = np.linspace(0.001, 0.999, 9_981)
    positive = policy_gradient("esdfm", np.ones(len(predicted)), predicted, late_share)
    negative = policy_gradient("esdfm", np.zeros(len(predicted)), predicted, late_share)
    expected = (in_time + late) * positive + (1.0 - in_time) * negative
    rest = predicted[int(np.argmin(np.abs(expected)))]
    assert rest == pytest.approx(truth, rel=0.01)
    assert (expected[predicted < 0.9 * truth] < 0).all()


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="defer"):
        policy_weights("defer", np.zeros(1), np.zeros(1))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_cure_derivatives_agree_with_finite_differences(share: float, label: float) -> None:
    logit = np.linspace(-4.0, 4.0, 17)
    labels, shares, step = np.full(17, label), np.full(17, share), 1e-4

    def loss(z: Array) -> Array:
        return cure_loss(z, labels, shares)

    gradient, hessian = cure_derivatives(logit, labels, shares)
    np.testing.assert_allclose(gradient, (loss(logit + step) - loss(logit - step)) / (2 * step), atol=1e-8)
    second = (loss(logit + step) - 2 * loss(logit) + loss(logit - step)) / step**2
    np.testing.assert_allclose(hessian, second, atol=1e-6)


def test_cure_loss_is_the_likelihood_of_a_label_seen_so_far() -> None:
    p, share = 0.3, 0.4
    logit = np.full(2, np.log(p / (1 - p)))
    loss = cure_loss(logit, np.array([1.0, 0.0]), np.full(2, share))
    np.testing.assert_allclose(loss, [-np.log(p), -np.log(1 - p * share)], rtol=1e-12)
    assert cure_posterior(logit, np.full(2, share))[0] == pytest.approx(p * (1 - share) / (1 - p * share))


def test_cure_loss_is_the_log_loss_of_mature_rows_even_for_extreme_logits() -> None:
    logit = np.array([-800.0, -1.0, 800.0])
    np.testing.assert_allclose(cure_loss(logit, np.zeros(3), np.ones(3)), np.logaddexp(0.0, logit))
    np.testing.assert_allclose(cure_loss(logit, np.ones(3), np.ones(3)), np.logaddexp(0.0, -logit))


def test_majorised_curvature_is_positive_and_never_below_the_true_one() -> None:
    logit, share = np.meshgrid(np.linspace(-6.0, 6.0, 61), np.linspace(0.0, 1.0, 21))
    label = np.zeros(logit.size)
    exact = cure_derivatives(logit.ravel(), label, share.ravel())
    bound = cure_derivatives(logit.ravel(), label, share.ravel(), majorised=True)
    np.testing.assert_array_equal(exact[0], bound[0])
    assert (exact[1] < 0.0).any()
    assert (bound[1] > 0.0).all()
    assert (bound[1] >= exact[1]).all()


def test_cure_loss_of_half_observed_labels_is_stationary_at_the_true_probability() -> None:
    # Elapsed times spread evenly: the share seen runs from 0 to 1.
    share = (np.arange(1000) + 0.5) / 1000
    seen = P * share

    def gradient(z: float) -> float:
        logit = np.full(1000, z)
        positive = cure_derivatives(logit, np.ones(1000), share)[0]
        negative = cure_derivatives(logit, np.zeros(1000), share)[0]
        return float(np.sum(seen * positive + (1.0 - seen) * negative))

    assert sigmoid(np.array([brentq(gradient, -6.0, 3.0)]))[0] == pytest.approx(P, rel=0.01)
    assert cure_base_rate(seen, share, np.ones(1000)) == pytest.approx(P, rel=1e-9)
