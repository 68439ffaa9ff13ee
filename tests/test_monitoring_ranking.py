"""AUC and GAUC against scikit-learn and brute force, for all rows, by hour and by maturity."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from monitoring import ranking
from monitoring.quality import quality
from monitoring.quality_table import quality_table
from monitoring.rank_histogram import RankHistogram
from monitoring.ranking import auc, gauc
from pipelines.duration import HOUR_MS
from pipelines.errors import DataError


def _brute_force_gauc(
    label: np.ndarray, probability: np.ndarray, user: np.ndarray, weight: np.ndarray
) -> tuple[float | None, float, int]:
    """User by user with scikit-learn; users with one class left out."""
    total = mass = 0.0
    users = 0
    for one in set(user.tolist()) - {None}:
        rows = user == one
        if len(set(label[rows & (weight > 0)].tolist())) < 2:
            continue
        here = weight[rows].sum()
        total += here * roc_auc_score(label[rows], probability[rows], sample_weight=weight[rows])
        mass += here
        users += 1
    return (total / mass if mass else None), float(mass / weight.sum()), users


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 3)), min_size=2, max_size=40).filter(
        lambda rows: len({row[0] for row in rows}) == 2
    )
)
def test_auc_is_that_of_scikit_learn_with_ties_and_weights(rows: list[tuple[bool, int, int]]) -> None:
    label, place, weight = (np.array(column) for column in zip(*rows, strict=True))
    assert auc(label, place / 5) == pytest.approx(roc_auc_score(label, place), abs=1e-12)
    expected = roc_auc_score(label, place, sample_weight=weight)
    assert auc(label, place / 5, weight) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("keys", ["int", "str", "object"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gauc_is_the_impression_weighted_mean_of_the_users_own_aucs(keys: str, weighted: bool) -> None:
    rng = np.random.default_rng(8)
    n = 3000
    probability = np.round(rng.beta(1, 6, size=n), 2)
    label = rng.random(n) < probability
    user = rng.zipf(1.6, size=n) % 400
    weight = rng.uniform(0.5, 2.0, size=n) if weighted else np.ones(n)
    key: np.ndarray = user
    if keys != "int":
        key = np.array([f"u{one}" for one in user])
    if keys == "object":
        key = key.astype(object)
        key[::50] = None
    value, share, users = _brute_force_gauc(label, probability, key, weight)
    found = gauc(label, probability, key, weight if weighted else None)
    assert found.value == pytest.approx(value, rel=1e-10)
    assert found.row_share == pytest.approx(share, rel=1e-10)
    assert found.users == users


def test_gauc_of_users_with_one_class_each_is_unknown_and_covers_nothing() -> None:
    assert gauc([1, 1, 0], [0.1, 0.2, 0.3], ["a", "a", "b"]) == ranking.Gauc(None, 0.0, 0)
    assert gauc([1, 0], [0.1, 0.2], np.array([None, None], dtype=object)) == ranking.Gauc(None, 0.0, 0)


def test_groups_too_many_to_pack_in_an_integer_give_the_same_figures() -> None:
    rng = np.random.default_rng(2)
    label, rank, group = rng.random(500) < 0.3, rng.integers(0, 50, 500), rng.integers(0, 20, 500)
    plain = ranking.auc_by_group(label, rank, 50, group, 20)
    far = ranking.auc_by_group(label, rank, 50, group * 2**55, 2**60)
    assert (far.group // 2**55).tolist() == plain.group.tolist()
    np.testing.assert_array_equal(far.auc, plain.auc)
    np.testing.assert_array_equal(far.mass, plain.mass)


def test_binned_auc_is_within_its_own_error_of_the_exact_one_and_merges_exactly() -> None:
    rng = np.random.default_rng(5)
    probability = rng.beta(1, 30, size=20_000)
    label = rng.random(20_000) < probability
    parts = []
    for rows in np.array_split(np.arange(20_000), 7):
        part = RankHistogram()
        part.update(label[rows], probability[rows])
        parts.append(part)
    whole = RankHistogram()
    whole.update(label, probability)
    merged = RankHistogram()
    for part in reversed(parts):
        merged = part.merge(merged)
    assert merged.state() == whole.state()
    value, error, exact = whole.value(), whole.error(), auc(label, probability)
    assert value is not None and error is not None and exact is not None
    assert abs(value - exact) <= error < 1e-3
    again = RankHistogram.from_state(json.loads(json.dumps(whole.state())))
    assert again.value() == value


def test_binned_auc_of_one_class_is_unknown_and_other_bins_are_refused() -> None:
    histogram = RankHistogram()
    histogram.update([0, 0], [0.0, 1.0])
    assert histogram.value() is None and histogram.error() is None
    with pytest.raises(DataError, match="4096"):
        RankHistogram.from_state({**histogram.state(), "bins": 16})


def _table_rows() -> dict[str, Any]:
    rng = np.random.default_rng(9)
    n = 4000
    probability = np.round(rng.beta(1, 8, size=n), 3)
    return {
        "label": rng.random(n) < probability,
        "student": probability,
        "teacher": np.clip(probability * rng.uniform(0.5, 1.5, n), 0, 1),
        "event_time": 1_700_000_000_000 + rng.integers(0, 30 * HOUR_MS, size=n),
        "mature": rng.random(n) < 0.7,
        "user": np.array([f"u{one}" for one in rng.integers(0, 150, size=n)], dtype=object),
        "weight": rng.uniform(0.5, 2.0, size=n),
    }


@pytest.mark.parametrize("weighted", [False, True])
def test_every_cell_of_the_table_is_the_quality_of_its_rows(weighted: bool) -> None:
    rows = _table_rows()
    label, weight = rows["label"], rows["weight"] if weighted else None
    rows["user"][::40] = None
    predictors = {"student": rows["student"], "teacher": rows["teacher"]}
    table = quality_table(predictors, label, rows["event_time"], rows["mature"], rows["user"], weight)
    hour = rows["event_time"] // HOUR_MS * HOUR_MS
    assert list(table["by_hour"]) == [str(one) for one in np.unique(hour)]
    cells = [(table["totals"], np.ones(label.shape[0], dtype=bool))]
    cells += [(figures, hour == int(start)) for start, figures in table["by_hour"].items()]
    cells += [(table["by_maturity"]["mature"], rows["mature"])]
    cells += [(table["by_maturity"]["provisional"], ~rows["mature"])]
    for found, mask in cells:
        for name, probability in predictors.items():
            here = None if weight is None else weight[mask]
            expected = quality(label[mask], probability[mask], rows["user"][mask], here)
            assert list(found[name]) == list(expected)
            for figure, value in expected.items():
                known = found[name][figure]
                assert known is None if value is None else known == pytest.approx(value, rel=1e-9)
    assert json.loads(json.dumps(table)) == table


def test_table_without_users_or_without_provisional_rows_says_so() -> None:
    table = quality_table({"student": [0.2, 0.7]}, [0, 1], [0, 1], [True, True])
    assert table["totals"]["student"]["gauc"] is None
    assert table["by_maturity"]["provisional"]["student"]["rows"] == 0
    assert table["by_maturity"]["provisional"]["student"]["log_loss"] is None


def test_table_of_no_rows_has_its_shape_and_no_hours() -> None:
    table = quality_table({"student": []}, [], [], [], [])
    assert table["by_hour"] == {}
    assert table["totals"]["student"]["rows"] == 0
    assert list(table["by_maturity"]) == ["mature", "provisional"]


def test_hours_before_the_epoch_are_floored_not_truncated() -> None:
    table = quality_table({"student": [0.2]}, [0], [-1], [True])
    assert list(table["by_hour"]) == [str(-HOUR_MS)]


def test_maturity_must_be_boolean() -> None:
    with pytest.raises(DataError, match="booleans"):
        quality_table({"student": [0.2]}, [0], [0], [1])
