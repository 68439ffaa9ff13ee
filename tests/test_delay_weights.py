"""Weights for labels that are not final lead to the true probability, in expectation and by simulation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.losses import cure_derivatives
from pipelines.delay_weights import relabel_weights
from pipelines.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Form = Literal["expected", "importance", "inverse"]
FORMS: tuple[Form, ...] = ("expected", "importance", "inverse")

P = st.floats(0.001, 0.95)
SHARE = st.floats(0.05, 1.0)


def expected_gradient(form: Form, p: float, share: float, f: float, q: float) -> float:
    """Over the label seen: derivative in the logit of q of the weighted log loss, the weights made with f."""
    total = 0.0
    for label, chance in ((1.0, p * share), (0.0, 1.0 - p * share)):
        (positive,), (negative,) = relabel_weights(form, [label], [share], [f])
        total += chance * float(negative * q - positive * (1.0 - q))
    return total


@pytest.mark.parametrize("form", FORMS)
@given(p=P, share=SHARE, q=P)
@settings(max_examples=60)
def test_with_the_true_probability_in_the_weights_the_loss_is_that_of_final_labels(
    form: Form, p: float, share: float, q: float
) -> None:
    assert expected_gradient(form, p, share, p, q) == pytest.approx(q - p, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
@given(p=P, share=SHARE, q=P)
@settings(max_examples=60)
def test_the_truth_is_the_only_stationary_point_of_a_model_that_makes_its_own_weights(
    form: Form, p: float, share: float, q: float
) -> None:
    gradient = expected_gradient(form, p, share, q, q)
    assert gradient == pytest.approx(0.0, abs=1e-9) or np.sign(gradient) == np.sign(q - p)
    closed = {
        "expected": share * (1 - q) * (q - p) / (1 - q * share),
        "importance": (1 - q) * (q - p) / (1 - q * share),
        "inverse": q - p,
    }
    assert gradient == pytest.approx(closed[form], abs=1e-9)


@given(label=st.integers(0, 1), share=st.floats(0.05, 0.999), logit=st.floats(-6, 3))
def test_expected_and_importance_have_the_derivative_of_the_cure_likelihood(
    label: int, share: float, logit: float
) -> None:
    f = 1 / (1 + np.exp(-logit))
    cure = cure_derivatives(np.array([logit]), np.array([float(label)]), np.array([share]))[0][0]
    factors: dict[Form, float] = {"expected": 1.0, "importance": 1.0 / share}
    for form, factor in factors.items():
        (positive,), (negative,) = relabel_weights(form, [label], [share], [f])
        assert negative * f - positive * (1 - f) == pytest.approx(factor * cure, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_positives_alone_at_the_inverse_share_would_end_where_the_documentation_says(share: float) -> None:
    p = 0.2
    positives, negatives = p * share / share, 1 - p * share
    wrong = positives / (positives + negatives)
    assert wrong == pytest.approx(p / (1 + p - p * share))
    assert (wrong == pytest.approx(p)) == (share == 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_simulated_windows_of_all_ages_give_the_true_rates(form: Form) -> None:
    # Two segments with their own rate and delay; ages from just opened to closed. Newton on each rate.
    rng = np.random.default_rng(1)
    n = 300_000
    slow = rng.random(n) < 0.5
    truth, mean = np.where(slow, 0.1, 0.3), np.where(slow, 2.0, 0.3)
    age = rng.uniform(0, 3, n)
    seen = (rng.random(n) < truth) & (rng.exponential(mean) <= age)
    share = 1 - np.exp(-age / mean)
    for part, p in ((slow, 0.1), (~slow, 0.3)):
        q = float(seen[part].mean())
        naive = q
        for _ in range(200):
            positive, negative = relabel_weights(form, seen[part], share[part], np.full(part.sum(), q))
            step = positive.sum() / (positive.sum() + negative.sum())
            if abs(step - q) < 1e-9:
                break
            q = float(step)
        assert q == pytest.approx(p, rel=0.03)
        assert naive < 0.95 * p


def test_the_likelihoods_own_weights_vary_least() -> None:
    rng = np.random.default_rng(2)
    p, share = 0.1, rng.uniform(0.05, 1.0, 2_000)
    spread = {}
    for form in FORMS:
        found = []
        for _ in range(200):
            seen = rng.random(2_000) < p * share
            positive, negative = relabel_weights(form, seen, share, np.full(2_000, p))
            # One step from the truth, in units of its own curvature.
            gradient = np.sum(negative * p - positive * (1 - p))
            slope = np.sum(share * (1 - p) / (1 - p * share)) if form == "expected" else (
                np.sum((1 - p) / (1 - p * share)) if form == "importance" else 2_000
            )  # fmt: skip
            found.append(gradient / slope)
        spread[form] = np.std(found)
    assert spread["expected"] < spread["importance"] < spread["inverse"] * 1.05


@pytest.mark.parametrize("form", ["importance", "inverse"])
def test_rows_too_young_to_tell_count_neither_way(form: Form) -> None:
    positive, negative = relabel_weights(form, [1, 0, 1], [0.01, 0.01, 0.0], [0.2] * 3, least_share=0.05)
    assert positive.tolist() == negative.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_mature_rows_keep_their_labels(form: Form) -> None:
    positive, negative = relabel_weights(form, [1, 0], [1.0, 1.0], [0.3, 0.9])
    assert positive.tolist() == [1.0, 0.0]
    assert negative.tolist() == [0.0, 1.0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected, importance, inverse"):
        relabel_weights("other", [1], [1.0], [0.5])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs the model's probability"):
        relabel_weights("expected", [1], [1.0])
    with pytest.raises(DataError, match="labels of 0 or 1"):
        relabel_weights("inverse", [0.5], [1.0])
    with pytest.raises(DataError, match="shares in"):
        relabel_weights("inverse", [1], [1.1])
    with pytest.raises(DataError, match=r"probabilities in \[0, 1\)"):
        relabel_weights("expected", [1], [1.0], [1.0])
    with pytest.raises(DataError, match="observed share 0"):
        relabel_weights("inverse", [0, 1], [1.0, 0.0], least_share=0.0)
    with pytest.raises(DataError, match="least share"):
        relabel_weights("inverse", [0], [1.0], least_share=2.0)
