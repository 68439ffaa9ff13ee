"""Quality figures against scikit-learn, closed forms and known truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from monitoring.base_rate import running_base_rate, running_base_rate_log_loss
from monitoring.quality import (
    QualitySums,
    entropy,
    log_loss,
    paired_log_loss,
    pcoc_interval,
    quality,
)
from monitoring.truth import truth_quality
from pipelines.errors import DataError


def _rows(n: int = 5000, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probability = rng.beta(1, 15, size=n)
    return (rng.random(n) < probability).astype(np.int64), probability, rng.uniform(0.1, 4.0, size=n)


def test_log_loss_and_brier_are_those_of_scikit_learn_with_and_without_weights() -> None:
    label, probability, weight = _rows()
    sums = QualitySums()
    sums.update(label, probability, weight)
    figures = sums.value()
    assert log_loss(label, probability) == pytest.approx(sklearn_log_loss(label, probability), rel=1e-12)
    expected = sklearn_log_loss(label, probability, sample_weight=weight)
    assert figures["log_loss"] == pytest.approx(expected, rel=1e-12)
    assert log_loss(label, probability, weight) == pytest.approx(expected, rel=1e-12)
    expected = brier_score_loss(label, probability, sample_weight=weight)
    assert figures["brier"] == pytest.approx(expected, rel=1e-12)


def test_probabilities_of_0_and_1_cost_what_scikit_learn_says() -> None:
    label, probability = [1, 0, 1, 0], [0.0, 1.0, 1.0, 0.0]
    assert log_loss(label, probability) == pytest.approx(sklearn_log_loss(label, probability), rel=1e-12)


def test_the_base_rate_predictor_has_normalized_entropy_one_and_no_information_gain() -> None:
    label, _, _ = _rows()
    sums = QualitySums()
    sums.update(label, np.full(label.shape[0], label.mean()))
    figures = sums.value()
    assert figures["ne"] == pytest.approx(1.0, rel=1e-12)
    assert figures["rig"] == pytest.approx(0.0, abs=1e-12)
    assert figures["pcoc"] == pytest.approx(1.0, rel=1e-12)


def test_entropy_is_that_of_a_coin() -> None:
    assert entropy(0.5) == pytest.approx(math.log(2))
    assert entropy(0.0) == entropy(1.0) == 0.0


@pytest.mark.parametrize("label", [[0, 0, 0], [1, 1, 1]])
def test_one_class_has_no_ne_and_no_auc(label: list[int]) -> None:
    figures = quality(label, [0.1, 0.2, 0.3], ["a", "a", "b"])
    assert figures["ne"] is None and figures["auc"] is None and figures["gauc"] is None
    assert figures["log_loss"] is not None
    assert (figures["pcoc"] is None) == (label[0] == 0)


def test_no_rows_give_counts_of_zero_and_nothing_else() -> None:
    figures = quality([], [], [])
    assert figures == {
        "rows": 0,
        "positives": 0,
        "log_loss": None,
        "ne": None,
        "auc": None,
        "gauc": None,
        "pcoc": None,
    }
    assert QualitySums().value()["brier"] is None


def test_quality_gives_exactly_the_keys_of_metrics_json_as_plain_numbers() -> None:
    label, probability, weight = _rows(200)
    figures = quality(label, probability, np.arange(200) % 7, weight)
    assert list(figures) == ["rows", "positives", "log_loss", "ne", "auc", "gauc", "pcoc"]
    assert json.loads(json.dumps(figures)) == figures


def test_integer_weights_are_repeated_rows_except_for_the_counts_and_the_spread() -> None:
    label, probability, _ = _rows(400)
    times = np.random.default_rng(3).integers(0, 4, size=400)
    user = np.arange(400) % 9
    weighted = quality(label, probability, user, times)
    repeated = quality(np.repeat(label, times), np.repeat(probability, times), np.repeat(user, times))
    for name in ("log_loss", "ne", "auc", "gauc", "pcoc"):
        assert weighted[name] == pytest.approx(repeated[name], rel=1e-10), name
    assert weighted["rows"] == 400


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.booleans(), st.integers(0, 64), st.integers(0, 8)), max_size=40),
    cut=st.integers(0, 40),
    other=st.integers(0, 40),
)
def test_sums_of_parts_merge_to_the_sums_of_the_whole(
    rows: list[tuple[bool, int, int]], cut: int, other: int
) -> None:
    label = np.array([row[0] for row in rows], dtype=bool)
    probability = np.array([row[1] / 64 for row in rows], dtype=float)
    weight = np.array([row[2] for row in rows], dtype=float)

    def part(low: int, high: int) -> QualitySums:
        sums = QualitySums()
        sums.update(label[low:high], probability[low:high], weight[low:high])
        return sums

    low, high = sorted((cut, other))
    first, second, third = part(0, low), part(low, high), part(high, len(rows))
    whole = part(0, len(rows)).state()
    assert first.merge(second).merge(third).state() == pytest.approx(whole)
    assert third.merge(first.merge(second)).state() == pytest.approx(whole)


def test_state_survives_json_exactly() -> None:
    label, probability, weight = _rows()
    sums = QualitySums()
    sums.update(label, probability, weight)
    assert QualitySums.from_state(json.loads(json.dumps(sums.state()))) == sums


def test_pcoc_interval_covers_one_in_95_of_100_calibrated_samples() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        probability = rng.beta(2, 30, size=3000)
        sums = QualitySums()
        sums.update(rng.random(3000) < probability, probability)
        figures = sums.value()
        low, high = figures["pcoc_low"], figures["pcoc_high"]
        assert low is not None and high is not None
        assert pcoc_interval(figures["pcoc"], sums.positives, sums.rows) == pytest.approx((low, high))
        covered += low <= 1.0 <= high
    # 4 standard errors of a share of 0.95 in 400 samples are 0.044.
    assert covered / 400 == pytest.approx(0.955, abs=0.044)


def test_pcoc_z_is_standard_normal_for_a_calibrated_model_and_negative_when_it_over_predicts() -> None:
    rng = np.random.default_rng(12)
    found = []
    for _ in range(400):
        probability = rng.beta(2, 30, size=2000)
        sums = QualitySums()
        sums.update(rng.random(2000) < probability, probability)
        found.append(sums.value()["pcoc_z"])
    z = np.array(found, dtype=float)
    assert abs(z.mean()) < 4 / math.sqrt(400)
    assert z.std() == pytest.approx(1.0, abs=0.15)
    sums.update(np.zeros(2000), np.full(2000, 0.05))
    assert (sums.value()["pcoc_z"] or 0.0) < -4


def test_paired_difference_is_the_difference_of_the_means_with_a_much_smaller_error() -> None:
    label, probability, _ = _rows(20_000)
    other = np.clip(probability * 1.2, 0, 1)
    outcome = paired_log_loss(label, probability, other)
    expected = sklearn_log_loss(label, probability) - sklearn_log_loss(label, other)
    assert outcome.mean == pytest.approx(expected, rel=1e-9)
    loss = -np.log(np.where(label == 1, probability, 1 - probability))
    assert outcome.standard_error is not None
    assert outcome.standard_error < 0.2 * loss.std() / math.sqrt(20_000)


def test_regret_is_the_expected_log_loss_above_the_truth() -> None:
    rng = np.random.default_rng(4)
    truth = rng.beta(1, 10, size=1000)
    predicted = np.clip(truth * rng.uniform(0.5, 2.0, size=1000), 0, 0.99)
    figures = truth_quality(truth, predicted)
    # The expected log loss of label ~ truth, written as two certain outcomes weighted by their probability.
    twice = np.concatenate((np.ones(1000), np.zeros(1000)))
    mass = np.concatenate((truth, 1 - truth))
    expected = sklearn_log_loss(twice, np.tile(predicted, 2), sample_weight=mass)
    oracle = sklearn_log_loss(twice, np.tile(truth, 2), sample_weight=mass)
    assert figures["oracle_log_loss"] == pytest.approx(oracle, rel=1e-9)
    assert figures["regret"] == pytest.approx(expected - oracle, rel=1e-6)
    assert figures["true_pcoc"] == pytest.approx(predicted.sum() / truth.sum())
    assert truth_quality(truth, truth)["regret"] == pytest.approx(0.0, abs=1e-15)


def test_running_base_rate_is_the_loop_that_predicts_before_it_learns() -> None:
    label, _, weight = _rows(500)
    positive = rows = loss = total = 0.0
    for y, w in zip(label, weight, strict=True):
        rate = (0.5 + positive) / (1.0 + rows)
        loss -= w * math.log(rate if y else 1 - rate)
        positive, rows, total = positive + w * y, rows + w, total + w
    assert running_base_rate_log_loss(label, weight=weight) == pytest.approx(loss / total, rel=1e-12)


def test_running_base_rate_regret_is_within_the_krichevsky_trofimov_bound() -> None:
    for label in (np.zeros(1000), np.ones(1000), np.arange(1000) % 10 == 0, np.arange(1000) > 900):
        total = 1000 * (running_base_rate_log_loss(label) or 0.0)
        best = 1000 * entropy(float(np.mean(label)))
        assert best <= total <= best + 0.5 * math.log(1000) + math.log(2)


def test_running_base_rate_learns_a_label_only_after_it_is_known() -> None:
    label = [1, 0, 1, 0]
    event_time, known_at = [0, 10, 20, 30], [25, 20, 35, 60]
    rate = running_base_rate(label, event_time=event_time, known_at=known_at)
    # At 20 the label known at 20 is not yet used; at 30 the labels known at 20 and 25 are.
    assert rate.tolist() == [0.5, 0.5, 0.5, 1.5 / 3.0]
    order = [3, 1, 0, 2]
    shuffled = running_base_rate(
        np.array(label)[order], event_time=np.array(event_time)[order], known_at=np.array(known_at)[order]
    )
    assert shuffled.tolist() == rate[order].tolist()


def test_running_base_rate_starts_from_the_warm_up() -> None:
    rate = running_base_rate([0, 0], prior_positives=10.5, prior_negatives=89.5)
    assert rate.tolist() == [10.5 / 100, 10.5 / 101]
    assert running_base_rate_log_loss([]) is None


@pytest.mark.parametrize(
    ("label", "probability", "weight", "said"),
    [
        ([0, 2], [0.1, 0.2], None, "labels 0 or 1"),
        ([0, 1], [0.1, 1.2], None, "in \\[0, 1\\]"),
        ([0, 1], [0.1, np.nan], None, "in \\[0, 1\\]"),
        ([0, 1], [0.1], None, "2 rows"),
        ([0, 1], [0.1, 0.2], [1.0, -1.0], "weights >= 0"),
        ([[0, 1]], [0.1, 0.2], None, "shape"),
    ],
)
def test_impossible_rows_are_refused_with_what_was_expected(
    label: list[int], probability: list[float], weight: list[float] | None, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        quality(label, probability, weight=weight)


def test_one_time_without_the_other_and_an_empty_prior_are_refused() -> None:
    with pytest.raises(DataError, match="together"):
        running_base_rate([0], event_time=[1])
    with pytest.raises(DataError, match="prior"):
        running_base_rate([0], prior_positives=0.0)
    with pytest.raises(DataError, match="int64 milliseconds"):
        running_base_rate([0], event_time=[1.5], known_at=[2.5])
