"""The parts of the Brier score and the field-level error: identities, closed forms, noise floors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import brier_score_loss

from monitoring.brier import brier_parts
from monitoring.field_error import field_calibration_error
from monitoring.reliability import equal_mass_bins
from pipelines.errors import DataError

ROW = st.tuples(
    st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.9, 1.0]), st.sampled_from([0.0, 0.5, 3.0])
)


@given(st.lists(ROW, min_size=1, max_size=40), st.integers(1, 6))
def test_the_parts_add_up_to_the_score_of_scikit_learn(
    rows: list[tuple[bool, float, float]], bins: int
) -> None:
    label, probability, weight = (np.array(column) for column in zip(*rows, strict=True))
    parts = brier_parts(label, probability, bins, weight)
    if weight.sum() == 0.0:
        assert parts is None
        return
    assert parts is not None
    between = parts.reliability - parts.resolution + parts.uncertainty
    total = between + parts.within_variance - parts.within_covariance
    assert total == pytest.approx(parts.brier, abs=1e-12)
    expected = brier_score_loss(label, probability, sample_weight=weight, pos_label=True)
    assert parts.brier == pytest.approx(expected, abs=1e-12)


def test_equal_predictions_in_each_bin_leave_the_three_terms_of_murphy() -> None:
    label = np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, 1])
    probability = np.repeat([0.2, 0.5], 5)
    parts = brier_parts(label, probability, 2)
    assert parts is not None and parts.bins == 2
    # Rates 0.4 (2 of 5) and 0.8 (4 of 5), base rate 0.6.
    assert parts.reliability == pytest.approx((0.2**2 + 0.3**2) / 2)
    assert parts.resolution == pytest.approx(0.04)
    assert parts.uncertainty == pytest.approx(0.24)
    assert parts.within_variance == pytest.approx(0.0) and parts.within_covariance == pytest.approx(0.0)


def test_reliability_of_a_calibrated_model_has_the_moments_of_its_null() -> None:
    rng = np.random.default_rng(2)
    probability, weight = rng.beta(2, 18, 2000), rng.uniform(0.5, 2.0, 2000)
    found = [brier_parts(rng.random(2000) < probability, probability, 10, weight) for _ in range(1500)]
    reliability = np.array([one.reliability for one in found if one is not None])
    z = np.array([one.reliability_z for one in found if one is not None])
    assert found[0] is not None
    # Ten squares of a normal: four standard errors are 4 √(2 / 10 / 1500) = 0.046.
    assert float(reliability.mean()) == pytest.approx(found[0].reliability_null, rel=0.05)
    assert float(z.std()) == pytest.approx(1.0, abs=0.15)
    assert float(np.mean(z > 4.0)) < 0.01


def test_within_terms_mend_what_too_few_bins_hide() -> None:
    rng = np.random.default_rng(3)
    probability = rng.beta(1, 4, 20_000)
    label = rng.random(20_000) < probability
    few, many = brier_parts(label, probability, 3), brier_parts(label, probability, 100)
    assert few is not None and many is not None
    assert many.resolution > 1.1 * few.resolution
    mended = [one.resolution - one.within_variance + one.within_covariance for one in (few, many)]
    assert mended[0] == pytest.approx(mended[1], rel=0.05)


def test_field_errors_are_those_of_their_definition() -> None:
    label, field = np.array([1, 0, 0, 1, 1, 0]), np.array(["a", "a", "b", "b", None, None], dtype=object)
    probability, weight = np.array([0.5, 0.1, 0.2, 0.3, 0.9, 0.4]), np.array([1.0, 1.0, 2.0, 1.0, 1.0, 3.0])
    found = field_calibration_error(label, probability, field, weight)
    assert found is not None and found.values == 3
    distance = np.array([1 - 0.6, 1 - 0.7, 2.1 - 1.0])
    assert found.ece == pytest.approx(distance.sum() / 9.0)
    relative = distance / np.array([1 + 0.02, 1 + 0.03, 1 + 0.04])
    assert found.rce == pytest.approx(float(np.array([2.0, 3.0, 4.0]) @ relative) / 9.0)


def test_floor_of_a_field_of_many_rows_is_the_mean_of_a_folded_normal() -> None:
    rng = np.random.default_rng(5)
    probability, field = rng.beta(2, 18, 40_000), rng.integers(0, 20, 40_000)
    found = field_calibration_error(rng.random(40_000) < probability, probability, field, draws=200)
    assert found is not None and found.ece_z is not None and abs(found.ece_z) < 4
    variance = np.bincount(field, probability * (1 - probability))
    expected = float(np.sqrt(2.0 * variance / math.pi).sum()) / 40_000
    # Each draw is a mean of 20: four standard errors are 4 * 0.756 / √(20 * 200).
    assert found.ece_null == pytest.approx(expected, rel=0.05)


def test_floor_of_values_with_few_positives_is_that_of_the_binomial() -> None:
    rows, rate = 200, 0.01
    field = np.repeat(np.arange(50), rows)
    found = field_calibration_error(np.zeros(50 * rows), np.full(50 * rows, rate), field, draws=200)
    assert found is not None
    count = np.arange(rows + 1)
    relative = np.abs(count - rows * rate) / (count + 0.01 * rows)
    expected = float(stats.binom.pmf(count, rows, rate) @ relative)
    assert found.rce_null == pytest.approx(expected, rel=0.03)
    # No click anywhere where two are expected of each: far beyond noise.
    assert found.rce == pytest.approx(1.0) and found.rce_z is not None and found.rce_z > 10


def test_a_fault_in_one_field_value_is_seen_and_no_rows_give_nothing() -> None:
    rng = np.random.default_rng(6)
    truth, field = rng.beta(2, 18, 40_000), rng.integers(0, 20, 40_000)
    label = rng.random(40_000) < np.where(field == 3, 0.5 * truth, truth)
    found = field_calibration_error(label, truth, field)
    assert found is not None and found.rce_z is not None and found.rce_z > 4
    assert field_calibration_error([], [], []) is None
    assert field_calibration_error([0], [0.5], [1], [0.0]) is None
    with pytest.raises(DataError, match="two draws"):
        field_calibration_error([0], [0.5], [1], draws=1)
    sure = field_calibration_error([1, 0], [1.0, 0.0], [1, 2])
    assert sure is not None and (sure.ece, sure.ece_null, sure.ece_z) == (0.0, 0.0, None)


def test_weighted_means_do_not_depend_on_the_unit_of_the_weights() -> None:
    rng = np.random.default_rng(7)
    probability, weight = rng.beta(2, 18, 500), rng.uniform(0.5, 2.0, 500)
    label = rng.random(500) < probability
    one, ten = brier_parts(label, probability, 5, weight), brier_parts(label, probability, 5, 10 * weight)
    assert one is not None and ten is not None
    assert vars(ten) == pytest.approx(vars(one))
    assert equal_mass_bins(probability, 5).max() + 1 == one.bins
