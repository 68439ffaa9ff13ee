"""The statistics behind the checks agree with other libraries, closed forms and brute force."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import poisson
from sklearn.metrics import roc_auc_score

from pipelines.check_auc import Classes, fitted_auc, ordered_auc, quantile_codes, rarity_auc, soft_auc
from pipelines.check_events import coverage
from pipelines.check_ids import IdHashes
from pipelines.check_lake import thin_periods
from pipelines.errors import ConfigError

ids = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 8), max_size=60)


def filled(values: list[int], part_rows: int) -> IdHashes:
    found = IdHashes(len(values), part_rows)
    for start in range(0, len(values), 7):
        found.add(np.array(values[start : start + 7], np.uint64))
    return found


@settings(max_examples=60)
@given(values=ids, part_rows=st.sampled_from([3, 10, 1_000]))
def test_repeated_ids_are_counted_whether_on_disk_or_not(values: list[int], part_rows: int) -> None:
    with filled(values, part_rows) as found:
        assert found.repeated() == len(values) - len(set(values))
        assert found.rows == len(values)


@settings(max_examples=60)
@given(left=ids, right=ids, part_rows=st.sampled_from([4, 1_000]))
def test_shared_ids_are_counted_by_row_of_the_other_set(
    left: list[int], right: list[int], part_rows: int
) -> None:
    rows = max(len(left), len(right))
    with IdHashes(rows, part_rows) as one, IdHashes(rows, part_rows) as other:
        one.add(np.array(left, np.uint64))
        other.add(np.array(right, np.uint64))
        assert one.shared_with(other) == sum(value in set(left) for value in right)


def test_sets_cut_otherwise_are_not_compared() -> None:
    with IdHashes(1) as small, IdHashes(100, 10) as large, pytest.raises(ConfigError, match="parts"):
        small.shared_with(large)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(4, 60), distinct=st.integers(1, 9))
def test_auc_is_that_of_scikit_learn_and_a_soft_label_is_a_row_cut_in_two(
    seed: int, n: int, distinct: int
) -> None:
    noise = np.random.default_rng(seed)
    value = noise.integers(0, distinct, n).astype(np.float64)
    label, weight = noise.random(n), noise.uniform(0.1, 3.0, n)
    expected = roc_auc_score(
        np.repeat([1, 0], n),
        np.tile(value, 2),
        sample_weight=np.concatenate([weight * label, weight * (1 - label)]),
    )
    assert soft_auc(value, weight * label, weight * (1 - label)) == pytest.approx(expected, abs=1e-12)


def test_auc_without_one_of_the_classes_is_none() -> None:
    nothing = np.zeros(3)
    classes = Classes(nothing, np.ones(3), np.array([True, False, True]))
    assert soft_auc(np.arange(3.0), nothing, np.ones(3)) is None
    assert ordered_auc(np.arange(3.0), classes) is None
    assert fitted_auc(np.arange(3), classes) is None


def halves(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < 0.5


def test_rare_values_do_not_know_a_label_that_is_noise() -> None:
    # 20,000 users with two rows each. By its own rows' rate, every user would seem to know the label.
    noise = np.random.default_rng(2)
    user, label = np.repeat(np.arange(20_000), 2), (noise.random(40_000) < 0.1).astype(np.float64)
    rate = (np.bincount(user, label) / 2)[user]
    assert roc_auc_score(label, rate) > 0.95
    classes = Classes(label, 1 - label, halves(40_000))
    found = fitted_auc(user, classes)
    assert found == pytest.approx(0.5, abs=0.03)


def test_fitted_auc_of_known_rates_is_the_auc_of_the_rates() -> None:
    noise = np.random.default_rng(3)
    rates = np.array([0.05, 0.9, 0.3, 0.6])
    code = noise.integers(0, 4, 30_000)
    label = (noise.random(30_000) < rates[code]).astype(np.float64)
    expected = roc_auc_score(label, rates[code])
    found = fitted_auc(code, Classes(label, 1 - label, halves(30_000)))
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_number_is_judged_up_or_down_and_by_its_quantiles() -> None:
    noise = np.random.default_rng(4)
    value = noise.normal(size=20_000)
    middle = (np.abs(value) < 0.5).astype(np.float64)
    classes = Classes(middle, 1 - middle, halves(20_000))
    assert ordered_auc(-value, classes) == pytest.approx(ordered_auc(value, classes) or 0, abs=1e-12)
    # The order says nothing of a label that lies in the middle; the bins say nearly all.
    assert (ordered_auc(value, classes) or 0) < 0.52
    assert (fitted_auc(quantile_codes(value, 32), classes) or 0) > 0.98


def test_quantile_codes_fill_their_bins_evenly() -> None:
    code = quantile_codes(np.random.default_rng(5).random(3_200), 32)
    counts = Counter(code.tolist())
    assert set(counts) == set(range(32))
    assert max(counts.values()) - min(counts.values()) <= 2
    assert quantile_codes(np.zeros(9), 4).tolist() == [0] * 9


def test_the_hour_of_day_betrays_rows_said_in_another_hour() -> None:
    # Fresh rows of an hour all have its number. Of those said later a third happened in the same hour, so
    # that a pair is told apart in two cases of three, and at random in the third: 1 - 1 / 3 / 2.
    noise = np.random.default_rng(6)
    fresh = noise.integers(0, 24, 30_000)
    said = noise.integers(0, 24, 6_000)
    happened = np.where(np.arange(6_000) % 3 == 0, said, (said - noise.integers(1, 24, 6_000)) % 24)
    code, stratum = np.concatenate([fresh, happened]), np.concatenate([fresh, said])
    later = np.repeat([0.0, 1.0], [30_000, 6_000])
    classes = Classes(later, 1 - later, halves(36_000))
    assert rarity_auc(code, stratum, classes) == pytest.approx(1 - 1 / 6, abs=0.01)
    # A column that has nothing to do with time says nothing, however many values it has.
    for values in (3, 5_000):
        blind = noise.integers(0, values, 36_000)
        assert rarity_auc(blind, stratum, classes) == pytest.approx(0.5, abs=0.02)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=72),
    per_cycle=st.sampled_from([1, 24]),
    ratio=st.floats(0.0, 0.9),
)
def test_a_thin_period_is_no_chance_event_and_lies_below_the_ratio(
    counts: list[int], per_cycle: int, ratio: float
) -> None:
    found = dict(thin_periods(np.array(counts, np.int64), per_cycle, ratio))
    for place, rows in enumerate(counts):
        others = [n for k, n in enumerate(counts) if k != place and (k - place) % per_cycle == 0 and n > 0]
        usual = float(np.median(others)) if others else 0.0
        if place in found:
            assert found[place] == usual
            assert rows < ratio * usual
            assert poisson.cdf(rows, usual) <= 1e-4
        elif rows < ratio * usual:
            # The bound is within a factor of the exact chance: what it lets pass is not far from it.
            assert poisson.cdf(rows, usual) > 1e-4 / (4 + 2 * np.sqrt(usual))


def test_a_lost_day_is_seen_hour_by_hour_and_a_quiet_night_is_not() -> None:
    by_hour = np.where(np.arange(24) < 6, 2, 1_000)
    counts = np.tile(by_hour, 7)
    counts[3 * 24 : 4 * 24] = 0
    counts[5 * 24 + 12] = 150
    found = [place for place, _ in thin_periods(counts, 24, 0.2)]
    assert found == [*range(3 * 24 + 6, 4 * 24), 5 * 24 + 12]


def test_coverage_counts_what_found_its_window_among_what_could() -> None:
    classes = {
        "credited": 60,
        "superseded": 5,
        "retraction": 3,
        "view_through": 2,
        "late": 4,
        "out_of_window": 6,
        "orphan": 15,
        "unclicked": 5,
        "before_window": 40,
        "duplicate": 10,
        "read": 150,
    }
    assert coverage(classes) == pytest.approx(70 / 100)
    assert coverage({"before_window": 3, "read": 3}) is None
