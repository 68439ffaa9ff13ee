"""The logit sketch: exact sums, exact merging, and metrics that agree with the rows."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from calibration.link import logit_of, sigmoid
from calibration.sketch import LogitSketch
from calibration.sketch_layout import BINS, CELLS, SUMS, cells_of, probability_of, taylor
from pipelines.errors import DataError, StaleStateError

ROW = st.tuples(
    st.floats(-60, 60) | st.sampled_from([-np.inf, np.inf, -16.0, 16.0, 0.0]),
    st.sampled_from([0.0, 1.0, 0.25]),
    st.floats(0, 2**20),
)
ROWS = st.lists(ROW, max_size=30)
Rows = list[tuple[float, float, float]]


def sketch_of(rows: Rows) -> LogitSketch:
    sketch = LogitSketch()
    if rows:
        sketch.update(*(np.array(column) for column in zip(*rows, strict=True)))
    return sketch


def click_log(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(-3.0, 1.5, rows)
    return logit, (rng.random(rows) < sigmoid(0.8 * logit - 0.3)).astype(float)


@settings(max_examples=100)
@given(ROWS, ROWS, ROWS)
def test_merging_is_associative_and_commutative_to_the_bit(a: Rows, b: Rows, c: Rows) -> None:
    x, y, z = sketch_of(a), sketch_of(b), sketch_of(c)
    assert (x + y) + z == x + (y + z)
    assert x + y == y + x
    assert (x + y) - y == x


@settings(max_examples=100)
@given(ROWS, st.randoms(use_true_random=False))
def test_sums_depend_neither_on_the_order_nor_on_the_batching_of_rows(rows: Rows, random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one_by_one = LogitSketch()
    for row in shuffled:
        one_by_one.update(*([value] for value in row))
    assert one_by_one == sketch_of(rows)


@settings(max_examples=50)
@given(ROWS)
def test_state_goes_through_json_to_the_bit(rows: Rows) -> None:
    sketch = sketch_of(rows)
    assert LogitSketch.from_state(json.loads(json.dumps(sketch.state()))) == sketch


def test_a_row_of_whole_weight_is_the_row_that_many_times() -> None:
    logit, label = click_log(500)
    weight = np.random.default_rng(1).integers(1, 5, 500)
    weighted, repeated = LogitSketch(), LogitSketch()
    weighted.update(logit, label, weight)
    repeated.update(np.repeat(logit, weight), np.repeat(label, weight))
    assert weighted.rows == repeated.rows == weight.sum()
    assert weighted.positives == repeated.positives
    # Rounded once instead of `weight` times.
    assert weighted.expected == pytest.approx(repeated.expected, abs=500 * 5 * 2.0**-32)


def test_expected_is_the_sum_of_the_probabilities_the_model_gave_outside_the_bins_too() -> None:
    logit = np.array([-30.0, -2.0, 0.5, 30.0])
    sketch = LogitSketch()
    sketch.update(logit, np.zeros(4))
    assert sketch.expected == pytest.approx((1.0 / (1.0 + np.exp(-logit))).sum(), abs=1e-9)


def test_tables_are_the_correctly_rounded_derivatives_of_the_sigmoid() -> None:
    tables = taylor()
    for cell in [*range(0, CELLS, 97), CELLS // 2, CELLS - 1]:
        with localcontext(prec=60):
            p = 1 / (1 + (-(Decimal(2 * cell + 1 - CELLS) / 256)).exp())
            first = p * (1 - p)
            exact = (p, first, first * (1 - 2 * p) / 2, first * (1 - 6 * p * (1 - p)) / 6)
        assert [table[cell] for table in tables] == [float(value) for value in exact]


def test_the_probability_that_is_counted_is_the_sigmoid() -> None:
    logit = np.random.default_rng(9).uniform(-34, 34, 200_000)
    logit[:3] = -34.0, 34.0, 0.0
    cell, offset = cells_of(logit)
    assert (cell >= 0).all()
    assert (cell < CELLS).all()
    assert np.abs(offset).max() <= 1 / 256
    assert np.abs(probability_of(cell, offset) - scipy.special.expit(logit)).max() < 3e-12


def test_a_row_of_weight_zero_is_not_there() -> None:
    sketch = LogitSketch.of([0.0, 1.0, 2.0], [1, 0, 1], [0.0, 2.0, 0.0])
    assert sketch == LogitSketch.of([1.0], [0], [2.0])


def test_sums_of_squares_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(11)
    logit, label, weight = rng.normal(-2, 2, 5_000), rng.integers(0, 2, 5_000), rng.uniform(0.1, 9, 5_000)
    sketch = LogitSketch.of(logit, label, weight)
    bins = sketch.binned()
    assert bins.squares.sum() == pytest.approx((weight**2).sum(), rel=1e-7)
    assert bins.positive_squares.sum() == pytest.approx((weight**2)[label == 1].sum(), rel=1e-7)
    assert sketch.effective_rows == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), rel=1e-7)
    # Two thirds of a row: a weight, and so its square.
    sketch.decay(2 / 3)
    assert sketch.binned().squares.sum() == pytest.approx(4 / 9 * (weight**2).sum(), rel=1e-3)
    assert sketch.effective_rows == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), rel=1e-3)


def test_many_rows_take_little_memory_beside_them() -> None:
    logit, label = np.zeros(2_000_000), np.zeros(2_000_000)
    sketch = LogitSketch()
    sketch.update(logit[:10], label[:10])
    tracemalloc.start()
    sketch.update(logit, label)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_errors_count_rows_over_chunks() -> None:
    logit, label = np.zeros(200_000), np.zeros(200_000)
    logit[150_000], label[199_999] = np.nan, 2.0
    sketch = LogitSketch()
    with pytest.raises(DataError, match="at row 150000"):
        sketch.update(logit, label)
    with pytest.raises(DataError, match="at row 199999"):
        sketch.update(np.zeros(200_000), label)
    with pytest.raises(DataError, match="got 3 labels for 200000 rows"):
        sketch.update(logit, [0, 0, 1])
    assert sketch == LogitSketch()


def test_metrics_agree_with_the_rows() -> None:
    logit, label = click_log(50_000)
    probability = 1.0 / (1.0 + np.exp(-logit))
    rate = label.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    sketch = LogitSketch()
    sketch.update(logit, label)
    assert sketch.log_loss() == pytest.approx(sklearn_log_loss(label, probability), abs=2e-6)
    assert sketch.ne() == pytest.approx(sklearn_log_loss(label, probability) / entropy, abs=2e-5)
    assert sketch.pcoc() == pytest.approx(probability.sum() / label.sum(), rel=1e-9)
    assert sketch.auc() == pytest.approx(roc_auc_score(label, logit), abs=1e-4)


def test_auc_is_exact_when_no_two_rows_share_a_bin() -> None:
    logit = np.linspace(-8.0, 8.0, 200)
    label = (np.arange(200) % 3 == 0).astype(float)
    weight = 1.0 + np.arange(200) % 2
    sketch = LogitSketch()
    sketch.update(logit, label, weight)
    assert sketch.auc() == pytest.approx(roc_auc_score(label, logit, sample_weight=weight), abs=1e-12)


def test_ece_is_the_brute_force_sum_over_equal_groups() -> None:
    # 400 rows in 400 bins, four groups of one hundred.
    logit = np.linspace(-8.0, 8.0, 400)
    label = (np.random.default_rng(3).random(400) < 0.3).astype(float)
    sketch = LogitSketch()
    sketch.update(logit, label)
    groups = np.split(sigmoid(logit) - label, 4)
    assert sketch.ece(4) == pytest.approx(sum(abs(g.sum()) for g in groups) / 400, abs=1e-8)


def test_reliability_groups_hold_every_row_in_nearly_equal_parts() -> None:
    logit, label = click_log(50_000)
    sketch = LogitSketch()
    sketch.update(logit, label)
    table = sketch.reliability(20)
    assert len(table.rows) == 20
    assert table.rows.sum() == 50_000
    assert table.positives.sum() == label.sum()
    assert np.abs(table.rows / 2500 - 1).max() < 0.1
    assert (np.diff(table.predicted_rate) > 0).all()
    assert (table.lowest_logit[1:] >= table.highest_logit[:-1]).all()
    assert ((table.observed_rate >= 0) & (table.observed_rate <= 1)).all()


def test_undefined_metrics_are_nan_not_an_error() -> None:
    empty, one_class = LogitSketch(), LogitSketch()
    one_class.update([0.0, 1.0], [0, 0])
    for value in (empty.log_loss(), empty.ne(), empty.pcoc(), empty.auc(), empty.ece()):
        assert np.isnan(value)
    for value in (one_class.ne(), one_class.pcoc(), one_class.auc()):
        assert np.isnan(value)
    assert one_class.log_loss() > 0
    assert len(empty.reliability().rows) == 0


def test_bin_logits_increase_strictly_and_lie_in_their_bins() -> None:
    logit = np.random.default_rng(4).uniform(-20, 20, 200_000)
    sketch = LogitSketch()
    sketch.update(logit, np.zeros(len(logit)))
    held, rows, _, expected = sketch.bins()
    assert len(held) == BINS
    assert (np.diff(held) > 0).all()
    edges = -16.0 + np.arange(1, BINS) / 128.0
    assert (held[:-1] < edges).all()
    assert (held[1:] >= edges).all()
    inner = slice(1000, -1000)
    assert held[inner] == pytest.approx(logit_of(expected / rows)[inner], abs=1e-12)


@given(st.integers(0, 2**62), st.floats(0, 1))
def test_decay_is_floor_of_the_exact_product(units: int, factor: float) -> None:
    sketch = LogitSketch.from_state(
        {**LogitSketch().state(), "bins": [7], **{name: [units] for name in SUMS}}
    )
    sketch.decay(factor)
    # Python's integers have no bounds, so this is the definition itself.
    scaled = round(factor * 2**30)
    once = units * scaled // 2**30
    held, sums = sketch.units()
    assert held.tolist() == ([7] if once else [])
    assert sums[:, :1].ravel().tolist() == ([once] * 3 + [once * scaled // 2**30] * 2 if once else [])


def test_decay_reaches_zero_and_keeps_positives_within_rows() -> None:
    sketch = sketch_of([(0.3, 1.0, 3.7), (0.3, 0.0, 0.1)])
    for _ in range(100):
        sketch.decay(0.7)
        assert sketch.positives <= sketch.rows
    assert sketch == LogitSketch()


def test_subtracting_rows_that_were_never_added_is_refused() -> None:
    sketch = sketch_of([(0.0, 1.0, 1.0)])
    with pytest.raises(DataError, match="not contained"):
        sketch - sketch_of([(1.0, 1.0, 1.0)])


def test_a_full_sketch_refuses_more_instead_of_wrapping_round() -> None:
    sketch = LogitSketch()
    with pytest.raises(DataError, match="full"):
        for _ in range(10):
            sketch.update(np.full(30, 16.0), np.ones(30), np.full(30, 2.0**20))
    assert sketch.expected > 0
    held = sketch.copy()
    with pytest.raises(DataError, match="full"):
        for _ in range(3):
            sketch.merge(sketch)
            held = sketch.copy()
    assert sketch == held


def test_a_refused_update_adds_nothing() -> None:
    sketch = LogitSketch()
    with pytest.raises(DataError):
        sketch.update([0.0, np.nan], [0, 1])
    assert sketch == LogitSketch()


@pytest.mark.parametrize(
    "damage",
    [
        {"layout": [2048, -16, 128, 24, 32]},
        {"bins": [5, 5]},
        {"bins": [3, 9999]},
        {"rows": [1]},
        {"rows": [1, -1]},
        {"rows": [1, 2.5]},
        {"kind": "platt"},
        {"surprise": 1},
    ],
)
def test_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    state = sketch_of([(0.0, 1.0, 1.0), (1.0, 0.0, 1.0)]).state()
    with pytest.raises(StaleStateError):
        LogitSketch.from_state({**state, **damage})


def test_partitions_merge_to_the_same_sketch_in_any_order() -> None:
    logit, label = click_log(20_000)
    parts = []
    for chunk in np.array_split(np.arange(20_000), 4):
        part = LogitSketch()
        part.update(logit[chunk], label[chunk])
        parts.append(part)
    merged = {json.dumps(sum(order, LogitSketch()).state()) for order in itertools.permutations(parts)}
    assert len(merged) == 1
