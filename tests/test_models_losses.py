"""Delayed-feedback losses: their stationary points and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

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
    head_gradients,
    head_weights,
    policy_gradient,
    policy_weights,
)
from pipelines.config_sections import Policy
from pipelines.errors import ConfigError

# A click converts within the attribution window with P, after the observation window with P_DELAYED.
P, P_DELAYED = 0.228, 0.09
Array = NDArray[np.float64]


# Kinds of rows: the first of a window, a delayed positive, a confirmation.
FIRST, POSITIVE, CONFIRM = "first", "positive", "confirm"
IN_TIME, LATE = P - P_DELAYED, P_DELAYED
WITHOUT_AUX = ["wait", "vanilla", "fnw", "fnc"]
WITH_AUX = ["esdfm", "defer", "defuse", "relabel"]


def emitted(policy: str) -> list[tuple[str, float, float]]:
    """(kind, label, rows for each click) that the stream shows, from the table of stream rules."""
    after_waiting = [(FIRST, 1.0, IN_TIME), (FIRST, 0.0, 1.0 - IN_TIME)]
    delayed = [(POSITIVE, 1.0, LATE)]
    return {
        "wait": [(FIRST, 1.0, P), (FIRST, 0.0, 1.0 - P)],
        "vanilla": after_waiting + delayed,
        "fnw": [(FIRST, 0.0, 1.0), (POSITIVE, 1.0, P)],
        "fnc": [(FIRST, 0.0, 1.0), (POSITIVE, 1.0, P)],
        "esdfm": after_waiting + delayed,
        "defuse": after_waiting + delayed,
        "bidefuse": after_waiting + delayed,
        "defer": [*after_waiting, (CONFIRM, 1.0, IN_TIME), *delayed, (CONFIRM, 0.0, 1.0 - P)],
        # Once young, once when the window has closed; the second time nothing is still to come.
        "relabel": after_waiting,
    }[policy]


def expected_gradient(policy: str, logit: float, late_share: float = LATE / P) -> float:
    probability = sigmoid(np.array([logit]))
    return sum(
        float(rows * policy_gradient(policy, np.array([label]), probability, late_share, kind == FIRST)[0])
        for kind, label, rows in emitted(policy)
    )


def optimum(policy: str, late_share: float = LATE / P) -> float:
    return at_rest(lambda logit: expected_gradient(policy, logit, late_share))


def at_rest(gradient: Callable[[float], float]) -> float:
    """The probability at which a gradient by the logit vanishes."""
    return float(sigmoid(np.array([brentq(gradient, -8.0, 6.0)]))[0])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("vanilla", P / (1.0 + P_DELAYED)), *((policy, P) for policy in ("wait", "fnw", "fnc", *WITH_AUX))],
)
def test_policy_loss_is_stationary_where_it_should_be(policy: str, expected: float) -> None:
    assert optimum(policy) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("policy", [*WITHOUT_AUX, *WITH_AUX])
def test_gradient_descent_moves_towards_the_optimum_from_both_sides(policy: str) -> None:
    assert expected_gradient(policy, -6.0) < 0.0 < expected_gradient(policy, 3.0)


def test_a_wrong_share_of_late_outcomes_moves_the_optimum_of_defer_by_half_the_error() -> None:
    # p + (f_dp - p_dp) / 2 with f_dp = f s.
    share = 1.2 * LATE / P
    found = optimum("defer", share)
    assert found == pytest.approx(P + (found * share - LATE) / 2, rel=0.01)


def test_defer_with_the_operators_bound_otherwise_misses() -> None:
    # p / p - p_dp / 2 instead of p / (p - p_dp / 2): positives are never lifted.
    def gradient(logit: float) -> float:
        f = 1.0 / (1.0 + np.exp(-logit))
        late = f * LATE / P
        positive, negative = 1.0 - late / 2, (1.0 - f) / (1.0 - f + late / 2)
        return float((2 - 2 * P + LATE) * negative * f - (2 * P - LATE) * positive * (1.0 - f))

    assert abs(at_rest(gradient) / P - 1) > 0.1
    assert policy_weights("defer", np.ones(1), np.full(1, 0.3), 0.4)[0][0] == pytest.approx(
        0.3 / (0.3 - 0.06)
    )


def test_defuse_with_all_positives_told_apart_by_nothing_misses() -> None:
    # A delayed positive counts 1, one in time 1 + d: with one weight for both the late ones count twice.
    def gradient(logit: float) -> float:
        f = sigmoid(np.array([logit]))
        return float(
            sum(
                rows * policy_gradient("defuse", np.array([label]), f, LATE / P, True)[0]
                for _, label, rows in emitted("defuse")
            )
        )

    assert at_rest(gradient) / P - 1 > 0.02
    in_time, late = policy_weights("defuse", np.ones(2), np.full(2, 0.3), 0.5, np.array([True, False]))[0]
    assert (in_time, late) == (pytest.approx(1.15), 1.0)


def test_first_rows_shown_at_the_click_instead_of_after_waiting_would_not_do_for_esdfm() -> None:
    # The stream of fnw with the weights of a stream that waits.
    def gradient(logit: float) -> float:
        f = sigmoid(np.array([logit]))
        return float(
            sum(
                rows * policy_gradient("esdfm", np.array([label]), f, LATE / P)[0]
                for _, label, rows in emitted("fnw")
            )
        )

    assert abs(at_rest(gradient) / P - 1) > 0.05


def two_heads_at_rest(credit: float = 1.0) -> tuple[float, float]:
    """Where both gradients of Bi-DEFUSE vanish: probability and late share, by descent with a fixed step."""
    logit, late_logit = np.zeros(1), np.zeros(1)
    shown = [(FIRST, credit, IN_TIME), (FIRST, 0.0, 1.0 - IN_TIME), (POSITIVE, 1.0, credit * LATE)]
    for _ in range(20_000):
        by_logit, by_late = np.zeros(1), np.zeros(1)
        for kind, label, rows in shown:
            first, second = head_gradients(
                np.array([label]), sigmoid(logit), sigmoid(late_logit), kind == FIRST
            )
            by_logit, by_late = by_logit + rows * first, by_late + rows * second
        logit, late_logit = logit - 2.0 * by_logit, late_logit - 2.0 * by_late
    return float(sigmoid(logit)[0]), float(sigmoid(late_logit)[0])


def test_both_heads_of_bidefuse_come_to_rest_at_the_truth() -> None:
    probability, late_share = two_heads_at_rest()
    assert probability == pytest.approx(P, rel=0.01)
    assert probability * late_share == pytest.approx(P_DELAYED, rel=0.01)


def test_bidefuse_learns_the_expected_credit() -> None:
    probability, _ = two_heads_at_rest(credit=0.5)
    assert probability == pytest.approx(0.5 * P, rel=0.01)


@pytest.mark.parametrize("kind", [True, False])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_head_gradients_are_those_of_the_weighted_losses_with_constant_weights(
    kind: bool, label: float
) -> None:
    z, u, step, one = 0.4, -0.7, 1e-6, np.array([label])
    p, s = sigmoid(np.array([z])), sigmoid(np.array([u]))
    (in_pos, in_neg), (out_pos, out_neg) = head_weights(one, p * s, kind)

    def loss(z: float, u: float) -> float:
        p, s = sigmoid(np.array([z])), sigmoid(np.array([u]))
        inside, outside = p * (1 - s), p * s
        total = in_pos * np.log(inside) + in_neg * np.log(1 - inside)
        return -float((total + out_pos * np.log(outside) + out_neg * np.log(1 - outside))[0])

    by_logit, by_late = head_gradients(one, p, s, kind)
    assert by_logit[0] == pytest.approx((loss(z + step, u) - loss(z - step, u)) / (2 * step), rel=1e-6)
    assert by_late[0] == pytest.approx((loss(z, u + step) - loss(z, u - step)) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("policy", [*WITHOUT_AUX, "esdfm", "defer", "defuse"])
def test_part_credit_is_learned_as_its_share_of_a_positive(policy: str) -> None:
    # Every outcome has credit c. As a label of a first or confirming row it is soft; a delayed positive has
    # it as its weight, and defer's last negative stands for the rest of the window.
    credit = 0.4
    rest = [(CONFIRM, 0.0, (1.0 - credit) * LATE)] if policy == "defer" else []

    def gradient(logit: float) -> float:
        f = sigmoid(np.array([logit]))
        total = 0.0
        for kind, label, rows in emitted(policy) + rest:
            soft, share = (
                (label, credit) if kind == POSITIVE or policy in ("fnw", "fnc") else (credit * label, 1)
            )
            first = kind == FIRST
            total += (rows if label == 0 else rows * share) * policy_gradient(
                policy, np.array([soft]), f, LATE / P, first
            )[0]
        return float(total)

    expected = credit * P / (1 + credit * LATE) if policy == "vanilla" else credit * P
    assert at_rest(gradient) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_the_weights_of_relabelled_rows_have_the_gradient_of_the_cure_model(
    share: float, label: float
) -> None:
    logit = np.linspace(-4.0, 4.0, 9)
    labels = np.full(9, label)
    expected = cure_derivatives(logit, labels, np.full(9, share))[0]
    np.testing.assert_allclose(
        policy_gradient("relabel", labels, sigmoid(logit), np.full(9, 1.0 - share)), expected, atol=1e-12
    )


def test_relabelled_rows_without_the_cure_model_would_miss() -> None:
    assert optimum("relabel", 0.0) == pytest.approx(IN_TIME, rel=0.01)


@pytest.mark.parametrize("policy", [*WITHOUT_AUX, *WITH_AUX])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_policy_gradient_is_that_of_the_weighted_loss_with_constant_weights(
    policy: str, label: float
) -> None:
    logit, step, one = 0.7, 1e-6, np.array([label])
    positive, negative = policy_weights(policy, one, sigmoid(np.array([logit])), 0.4)

    def loss(z: float) -> float:
        return float(positive[0] * np.logaddexp(0, -z) + negative[0] * np.logaddexp(0, z))

    numeric = (loss(logit + step) - loss(logit - step)) / (2 * step)
    assert policy_gradient(policy, one, sigmoid(np.array([logit])), 0.4)[0] == pytest.approx(
        numeric, rel=1e-6
    )


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


@pytest.mark.parametrize("policy", get_args(Policy))
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
    with pytest.raises(ConfigError, match="guess"):
        policy_weights("guess", np.zeros(1), np.zeros(1))


def test_weights_are_finite_where_a_probability_is_one_to_the_last_bit() -> None:
    one, none = np.ones(1), np.zeros(1)
    for policy in (*WITHOUT_AUX, *WITH_AUX):
        assert np.isfinite(policy_gradient(policy, none, one, 0.0)).all(), policy
    assert np.isfinite(head_gradients(none, one, none, True)).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("label", [0.0, 0.4, 1.0])
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
