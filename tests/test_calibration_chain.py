"""The chain: composition, choice of method, learning in place, and state that can be trusted."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss

from calibration.chain import CalibrationChain
from calibration.isotonic import IsotonicCalibrator
from calibration.link import LOGIT_LIMIT, sigmoid
from calibration.online import OnlineConfig, OnlinePlatt
from calibration.platt import PlattCalibrator
from calibration.segments import SegmentConfig, SegmentCorrection
from calibration.selection import METHODS, fit_method, fold_sketches, select_method
from calibration.sketch import LogitSketch
from pipelines.errors import ConfigError, DataError, StaleStateError


def rows(count: int, seed: int, truth: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(-2.5, 1.5, count)
    true_logit = {
        "calibrated": logit,
        "line": 0.6 * logit - 0.9,
        "curve": -0.5 - np.logaddexp(0.0, -(logit + 1.0)) + 0.15 * logit,
    }[truth]
    return logit, (rng.random(count) < sigmoid(true_logit)).astype(float)


def full_chain(
    seed: int = 0, count: int = 20_000
) -> tuple[CalibrationChain, np.ndarray, np.ndarray, np.ndarray]:
    logit, label = rows(count, seed, "curve")
    keys = np.random.default_rng(seed).integers(-(2**62), 2**62, 30)[np.arange(count) % 30].reshape(-1, 1)
    keys = np.concatenate([keys, keys % 7], axis=1)
    chain = CalibrationChain.fit(
        logit,
        label,
        method="isotonic",
        negative_sampling_rate=0.37,
        online=OnlineConfig(),
        segments=SegmentConfig(("campaign_id", "site")),
        segment_keys=keys,
    )
    return chain, logit, label, keys


def test_transform_is_the_composition_of_its_parts() -> None:
    chain, logit, label, keys = full_chain()
    chain.update(logit[:5000], label[:5000], None, keys[:5000])
    assert isinstance(chain.base, IsotonicCalibrator)
    assert chain.online is not None
    assert chain.online.centre is not None
    assert chain.segments is not None
    by_hand = logit + np.log(0.37)
    by_hand = chain.base.transform_logit(by_hand)
    centre, line = chain.online.centre, chain.online
    by_hand = by_hand + line.intercept + (line.slope - 1) * np.clip(by_hand - centre, -8, 8)
    shift = np.zeros(len(logit))
    for column, name in enumerate(("campaign_id", "site")):
        table = chain.segments.segments(name)
        for key, log_odds in zip(table["key"], table["shift"], strict=True):
            shift[keys[:, column] == key] += log_odds
    expected = by_hand + shift
    assert chain.transform_logit(logit, keys) == pytest.approx(expected, abs=1e-12)
    assert chain.transform(logit, keys) == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-12)


def test_update_teaches_the_line_its_input_and_segments_what_was_predicted_before() -> None:
    chain, logit, label, keys = full_chain()
    assert chain.online is not None
    assert chain.segments is not None
    now = slice(0, 256)
    online = OnlinePlatt.from_state(chain.online.state())
    segments = SegmentCorrection.from_state(chain.segments.state())
    based = chain.base.transform_logit(logit[now] + np.log(0.37))
    segments.update(keys[now], online.transform(based), label[now])
    online.update(based, label[now])
    base = chain.base.state()
    chain.update(logit[now], label[now], segment_keys=keys[now])
    assert chain.online.state() == online.state()
    assert chain.segments.state() == segments.state()
    assert chain.base.state() == base


def test_a_chain_of_nothing_is_the_identity() -> None:
    logit = np.linspace(-20, 20, 101)
    chain = CalibrationChain()
    assert (chain.transform(logit) == sigmoid(logit)).all()
    chain.update(logit, np.ones(101))
    assert (chain.transform(logit) == sigmoid(logit)).all()


@pytest.mark.parametrize(
    ("truth", "method"), [("calibrated", "none"), ("line", "platt"), ("curve", "isotonic")]
)
def test_auto_finds_the_method_that_made_the_labels(truth: str, method: str) -> None:
    chosen = [CalibrationChain.fit(*rows(60_000, seed, truth)).method for seed in range(5)]
    assert chosen == [method] * 5


def test_few_rows_do_not_pay_for_isotonic() -> None:
    chosen = {CalibrationChain.fit(*rows(400, seed, "curve")).method for seed in range(5)}
    assert chosen <= {"none", "platt"}


def test_the_choice_is_the_simplest_within_one_paired_standard_error() -> None:
    logit, label = rows(5_000, 3, "line")
    folds = fold_sketches(logit, label)
    selection = select_method(folds)
    # By rows instead of bins, and with numpy's own standard error.
    total = sum(folds, LogitSketch())
    losses = {}
    for method in METHODS:
        parts = []
        for fold in folds:
            z, n, c, _ = fold.bins()
            p = fit_method(method, total - fold).transform(z)
            parts.append(np.repeat(-np.log(p), c.astype(int)))
            parts.append(np.repeat(-np.log1p(-p), (n - c).astype(int)))
        losses[method] = np.concatenate(parts)
    best = min(losses, key=lambda method: losses[method].mean())
    for method in METHODS:
        difference = losses[method] - losses[best]
        assert selection.log_loss[method] == pytest.approx(losses[method].mean(), abs=1e-9)
        error = difference.std() / np.sqrt(5_000)
        assert selection.standard_error[method] == pytest.approx(error, abs=1e-9)
    qualified = [m for m in METHODS if losses[m].mean() - losses[best].mean() <= selection.standard_error[m]]
    assert selection.method == qualified[0]


def test_folds_depend_on_the_row_number_only_and_are_even() -> None:
    logit, label = rows(50_000, 0, "line")
    folds, again = fold_sketches(logit, label), fold_sketches(logit, label)
    assert folds == again
    assert [fold.rows for fold in folds] == pytest.approx([10_000] * 5, rel=0.05)
    whole = LogitSketch()
    whole.update(logit, label)
    assert sum(folds, LogitSketch()) == whole
    other = fold_sketches(logit[::-1] * 0.5, label)
    assert [fold.rows for fold in other] == [fold.rows for fold in folds]


def test_rows_sorted_by_label_are_dealt_evenly() -> None:
    label = np.repeat([0.0, 1.0], 5_000)
    for fold in fold_sketches(np.zeros(10_000), label):
        assert fold.positives / fold.rows == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_named_method_is_taken_at_its_word(method: str) -> None:
    logit, label = rows(20_000, 1, "curve")
    chain = CalibrationChain.fit(logit, label, method=method)
    assert chain.method == method
    sketch = LogitSketch()
    sketch.update(logit, label)
    assert chain.base.state() == fit_method(method, sketch).state()


def test_an_unknown_method_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ConfigError, match=r"beta.*auto.*isotonic"):
        CalibrationChain.fit([0.0], [1], method="beta")


def test_calibration_lowers_log_loss_on_rows_it_never_saw() -> None:
    for truth in ("line", "curve"):
        chain = CalibrationChain.fit(*rows(50_000, 1, truth))
        logit, label = rows(50_000, 2, truth)
        assert log_loss(label, chain.transform(logit)) < log_loss(label, sigmoid(logit)) - 0.01


def test_down_sampled_training_is_undone_before_anything_is_fitted() -> None:
    logit, label = rows(50_000, 4, "calibrated")
    chain = CalibrationChain.fit(logit - np.log(0.1), label, negative_sampling_rate=0.1)
    assert chain.method == "none"
    assert chain.transform(logit - np.log(0.1)) == pytest.approx(sigmoid(logit), rel=1e-12)


def test_fitting_sketches_is_fitting_their_rows() -> None:
    logit, label = rows(20_000, 5, "line")
    from_rows = CalibrationChain.fit(logit, label)
    from_sketches = CalibrationChain.fit_sketches(fold_sketches(logit, label))
    assert from_sketches.digest() == from_rows.digest()


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_still_gives_a_chain(label: int) -> None:
    logit = np.linspace(-3, -1, 100)
    chain = CalibrationChain.fit(logit, np.full(100, label), online=OnlineConfig())
    p = chain.transform(logit)
    assert ((p > 0) & (p < 1)).all()
    assert (np.diff(p) > 0).all()


def test_no_rows_fit_nothing_unless_nothing_is_asked_for() -> None:
    with pytest.raises(DataError, match="no rows"):
        CalibrationChain.fit([], [])
    chain = CalibrationChain.fit([], [], method="none", online=OnlineConfig())
    assert chain.transform([0.0])[0] == 0.5


def test_the_online_line_starts_from_the_identity() -> None:
    logit, label = rows(20_000, 6, "curve")
    fixed = CalibrationChain.fit(logit, label)
    online = CalibrationChain.fit(logit, label, online=OnlineConfig())
    assert (fixed.transform(logit) == online.transform(logit)).all()


def test_segment_keys_are_needed_with_segments_and_ignored_without() -> None:
    chain, logit, label, keys = full_chain()
    before = chain.digest()
    with pytest.raises(DataError, match="segment keys"):
        chain.transform(logit)
    with pytest.raises(DataError, match="segment keys"):
        chain.update(logit, label)
    with pytest.raises(DataError, match="segment keys"):
        chain.update(logit, label, segment_keys=keys[:, :1])
    assert chain.digest() == before
    plain = CalibrationChain(PlattCalibrator(0.1, 0.9))
    assert (plain.transform(logit, keys) == plain.transform(logit)).all()
    with pytest.raises(ConfigError, match="segment"):
        CalibrationChain.fit(logit, label, segment_keys=keys)


def test_a_refused_update_teaches_no_part_anything() -> None:
    chain, logit, label, keys = full_chain()
    before = chain.digest()
    bad_label, bad_weight, bad_logit = label.copy(), np.ones(len(label)), logit.copy()
    bad_label[-1], bad_weight[-1], bad_logit[-1] = 3.0, -1.0, np.nan
    for z, y, w in ((bad_logit, label, None), (logit, bad_label, None), (logit, label, bad_weight)):
        with pytest.raises(DataError):
            chain.update(z, y, w, keys)
    assert chain.digest() == before


def test_json_round_trip_is_bit_exact_and_goes_on_bit_exact() -> None:
    chain, logit, label, keys = full_chain()
    restored = CalibrationChain.from_json(chain.to_json())
    for start in range(0, 5_120, 256):
        now = slice(start, start + 256)
        assert (restored.transform(logit[now], keys[now]) == chain.transform(logit[now], keys[now])).all()
        for each in (chain, restored):
            each.update(logit[now], label[now], None, keys[now])
        restored = CalibrationChain.from_json(restored.to_json())
    chain.refit()
    restored.refit()
    assert restored.to_json() == chain.to_json()
    assert restored.digest() == chain.digest()


def test_digest_is_the_sha256_of_the_canonical_json() -> None:
    chain, *_ = full_chain()
    text = json.dumps(chain.state(), sort_keys=True, separators=(",", ":"))
    assert chain.digest() == hashlib.sha256(text.encode()).hexdigest()
    assert chain.to_json() == text


def test_digest_changes_with_every_part_that_learns() -> None:
    chain, logit, label, keys = full_chain()
    seen = {chain.digest()}
    chain.update(logit[:10], label[:10], None, keys[:10])
    seen.add(chain.digest())
    assert chain.segments is not None
    chain.segments.strength[0] = np.nextafter(chain.segments.strength[0], np.inf)
    seen.add(chain.digest())
    assert len(seen) == 3


def test_a_copy_is_frozen_while_the_original_learns_on() -> None:
    chain, logit, label, keys = full_chain()
    release = chain.copy()
    digest = release.digest()
    chain.update(logit, label, None, keys)
    assert release.digest() == digest != chain.digest()


def test_two_runs_over_the_same_rows_are_the_same_to_the_bit() -> None:
    first, *_ = full_chain()
    second, logit, label, keys = full_chain()
    for chain in (first, second):
        for start in range(0, 2_560, 256):
            now = slice(start, start + 256)
            chain.update(logit[now], label[now], None, keys[now])
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version":2}', "not json", '{"version":1,"kind":"calibration_chain"}'],
)
def test_text_that_is_no_chain_is_refused(text: str) -> None:
    with pytest.raises(StaleStateError):
        CalibrationChain.from_json(text)


@pytest.mark.parametrize(
    "damage",
    [{"version": 1}, {"base": {"kind": "beta"}}, {"base": None}, {"online": {"kind": "platt"}}, {"extra": 1}],
)
def test_state_with_a_damaged_part_is_refused(damage: dict[str, Any]) -> None:
    chain, *_ = full_chain()
    with pytest.raises(StaleStateError):
        CalibrationChain.from_state({**chain.state(), **damage})


def test_extreme_logits_pass_through_every_part() -> None:
    chain, _, _, keys = full_chain()
    z = chain.transform_logit([-np.inf, -1e300, 1e300, np.inf], keys[:4])
    assert (np.abs(z) <= LOGIT_LIMIT).all()
    p = chain.transform([-np.inf, np.inf], keys[:2])
    assert ((p > 0) & (p < 1)).all()


def test_online_and_segments_together_follow_a_jump_in_one_segment() -> None:
    rng = np.random.default_rng(9)
    chain = CalibrationChain(
        online=OnlinePlatt(), segments=SegmentCorrection(SegmentConfig(("site",), half_life=50_000.0))
    )
    said, truth, jumped = [], [], []
    for step in range(1_200):
        logit, key = rng.normal(-2.5, 1.0, 256), rng.integers(0, 4, 256)
        true_logit = logit + np.where((key == 3) & (step > 400), 0.8, 0.0)
        if step >= 1_000:
            said.append(chain.transform(logit, key[:, None]))
            truth.append(sigmoid(true_logit))
            jumped.append(key == 3)
        chain.update(logit, rng.random(256) < sigmoid(true_logit), None, key[:, None])
    p, q, is_jumped = (np.concatenate(parts) for parts in (said, truth, jumped))
    for part in (is_jumped, ~is_jumped):
        assert p[part].sum() / q[part].sum() == pytest.approx(1.0, abs=0.05)
