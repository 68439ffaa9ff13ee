"""Paired evidence against closed forms, scipy, and how often it is wrong by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import log_loss

from monitoring.paired import PairedSums, look_limit

SEED = 20_261_121


def some_rows(rows: int = 4000) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(SEED)
    truth = rng.beta(1, 12, rows)
    logit = np.log(truth / (1 - truth))
    first, second = (1 / (1 + np.exp(-(logit + rng.normal(0, 0.4, rows)))) for _ in range(2))
    return rng.random(rows) < truth, first, second


def summed(label: NDArray[np.bool_], first: NDArray[np.float64], second: NDArray[np.float64]) -> PairedSums:
    sums = PairedSums()
    sums.update(label, first, second)
    return sums


def test_without_an_allowance_it_is_the_paired_t_statistic_of_scipy() -> None:
    label, first, second = some_rows()
    losses = [-np.log(np.where(label, p, 1 - p)) for p in (first, second)]
    assert summed(label, first, second).worse_z() == pytest.approx(stats.ttest_rel(*losses).statistic)
    allowed = stats.ttest_rel(losses[0], 1.02 * losses[1]).statistic
    assert summed(label, first, second).worse_z(0.02) == pytest.approx(allowed)


def test_figures_are_those_of_scikit_learn() -> None:
    label, first, second = some_rows()
    figures = summed(label, first, second).value()
    assert figures["log_loss"] == pytest.approx(log_loss(label, first))
    assert figures["second_log_loss"] == pytest.approx(log_loss(label, second))
    assert figures["pcoc"] == pytest.approx(first.sum() / label.sum())


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    label, first, second = some_rows()
    parts = [summed(label[rows], first[rows], second[rows]) for rows in (slice(900), slice(900, None))]
    whole = summed(label, first, second)
    merged = PairedSums.from_state(parts[0].merge(parts[1]).state())
    assert (merged.rows, merged.positives) == (whole.rows, whole.positives)
    assert merged.worse_z(0.01) == pytest.approx(whole.worse_z(0.01))


def test_equal_predictors_and_too_few_rows_say_nothing() -> None:
    label, first, _ = some_rows()
    assert summed(label, first, first).worse_z() is None
    assert summed(label[:1], first[:1], first[:1]).worse_z() is None
    assert PairedSums().level_z(0.8, 1.25) == 0.0


def test_level_is_that_of_a_poisson_count() -> None:
    sums = PairedSums(rows=1000, positives=20, first_expected=50.0)
    assert sums.level_z(0.8, 1.25) == pytest.approx((40 - 20) / math.sqrt(40))
    sums = PairedSums(rows=1000, positives=100, first_expected=40.0)
    assert sums.level_z(0.8, 1.25) == pytest.approx((50 - 100) / math.sqrt(50))
    assert PairedSums(rows=1000, positives=40, first_expected=44.0).level_z(0.8, 1.25) == 0.0
    no_clicks = PairedSums(rows=1000, positives=0, first_expected=25.0)
    assert no_clicks.level_z(0.8, 1.25) == pytest.approx(math.sqrt(20))


# How often equal predictors are told apart --------------------------------------------------------------

TRIALS, ROWS, LOOKS = 20_000, 400, 40


def differences() -> NDArray[np.float64]:
    """Running sums of paired differences of loss whose mean is 0, standardised, (trials, looks)."""
    rng = np.random.default_rng(SEED)
    return np.asarray(np.cumsum(rng.normal(0.0, math.sqrt(ROWS / LOOKS), (TRIALS, LOOKS)), axis=1))


def binomial_band(rate: float) -> float:
    """Four standard errors of a rate over all trials."""
    return 4 * math.sqrt(rate * (1 - rate) / TRIALS)


@pytest.mark.parametrize("z", [1.5, 2.0, 2.5])
def test_looked_at_once_a_round_is_refused_as_often_as_z_says(z: float) -> None:
    at_the_end = differences()[:, -1] / math.sqrt(ROWS)
    expected = stats.norm.sf(z)
    assert (at_the_end > look_limit(z, 1.0)).mean() == pytest.approx(expected, abs=binomial_band(expected))


@pytest.mark.parametrize("z", [1.5, 2.0, 2.5])
def test_looked_at_forty_times_it_is_refused_at_most_twice_as_often(z: float) -> None:
    sums = differences()
    rows = np.arange(1, LOOKS + 1) * (ROWS // LOOKS)
    limits = np.array([look_limit(z, share) for share in rows / ROWS])
    rate = (sums / np.sqrt(rows) > limits).any(axis=1).mean()
    assert stats.norm.sf(z) < rate < 2 * stats.norm.sf(z) + binomial_band(2 * stats.norm.sf(z))
    # Broadie, Glasserman and Kou 1997: looks that are not continuous raise the limit by 0.5826 / √looks.
    expected = 2 * stats.norm.sf(z + 0.5826 / math.sqrt(LOOKS))
    assert rate == pytest.approx(expected, abs=binomial_band(expected))
    # With the limit of a single look, at every look, it would be many times as often.
    assert (sums / np.sqrt(rows) > z).any(axis=1).mean() > 3 * stats.norm.sf(z)


def test_two_models_that_are_equally_good_on_rare_clicks_are_refused_as_rarely_as_stated() -> None:
    # Losses of rare clicks are skewed: the same on real log losses, from labels that are drawn.
    rng, z, rows, trials = np.random.default_rng(SEED), 2.0, 4000, 2000
    truth = rng.beta(2, 30, rows)
    shift = rng.permuted(np.repeat([0.3, -0.3], rows // 2))
    logit = np.log(truth / (1 - truth))
    first, second = 1 / (1 + np.exp(-(logit + shift))), 1 / (1 + np.exp(-(logit - shift)))
    label = rng.random((trials, rows)) < truth
    loss = [-np.where(label, np.log(p), np.log1p(-p)) for p in (first, second)]
    difference = loss[0] - loss[1]
    # Rows come in an order of their own in each trial; the expectation over rows is made exactly 0.
    kl = [truth * np.log(p) + (1 - truth) * np.log1p(-p) for p in (first, second)]
    difference -= (kl[1] - kl[0]).mean()
    statistic = difference.mean(axis=1) / (difference.std(axis=1, ddof=1) / math.sqrt(rows))
    rate, expected = (statistic > z).mean(), stats.norm.sf(z)
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected / trials))


def test_a_level_that_is_exactly_at_the_limit_is_refused_as_rarely_as_stated() -> None:
    rng, z = np.random.default_rng(SEED), 2.0
    probability = rng.beta(2, 60, 5000)
    clicks = (rng.random((2000, 5000)) < probability / 1.25).sum(axis=1)
    statistics = [
        PairedSums(rows=5000, positives=int(n), first_expected=float(probability.sum())).level_z(0.8, 1.25)
        for n in clicks
    ]
    assert np.mean([value > z for value in statistics]) < stats.norm.sf(z) + 4 * math.sqrt(0.0228 / 2000)
