"""What every calibrator promises, whatever it is."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from calibration.base import Calibrator
from calibration.chain import CalibrationChain
from calibration.link import LOGIT_LIMIT, logit_of, sigmoid
from calibration.online import OnlineConfig, OnlinePlatt
from pipelines.errors import DataError, StaleStateError
from tests.calibrators import FITS, KINDS, SKETCHED, STRICT, click_log

AnyCalibrator = Calibrator | CalibrationChain


def learned(kind: str) -> AnyCalibrator:
    if kind != "chain":
        return FITS[kind](*click_log())
    chain = CalibrationChain.fit(
        *click_log(), method="isotonic", negative_sampling_rate=0.3, online=OnlineConfig()
    )
    chain.update(*click_log())
    return chain


@pytest.fixture(params=[*KINDS, "chain"])
def calibrator(request: pytest.FixtureRequest) -> AnyCalibrator:
    return learned(request.param)


@pytest.fixture(params=[*STRICT, "chain"])
def strict(request: pytest.FixtureRequest) -> AnyCalibrator:
    return learned(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_calibrator_that_says_its_kind(kind: str) -> None:
    fitted = FITS[kind](*click_log())
    assert isinstance(fitted, Calibrator)
    assert fitted.kind == fitted.state()["kind"] == kind


def test_transform_is_the_sigmoid_of_transform_logit(calibrator: AnyCalibrator) -> None:
    logit = np.linspace(-40, 40, 2001)
    assert (calibrator.transform(logit) == sigmoid(calibrator.transform_logit(logit))).all()


def test_it_is_strictly_increasing(strict: AnyCalibrator) -> None:
    # Spacing 1e-6: far below any difference that matters, far above float64's at logits of 30.
    for start in (-30.0, -9.0, -2.0, 0.0, 3.0, 25.0):
        grid = start + 1e-6 * np.arange(10_000)
        assert (np.diff(strict.transform_logit(grid)) > 0).all()
    assert (np.diff(strict.transform_logit(np.linspace(-30, 30, 100_001))) > 0).all()


def test_no_rank_is_lost(strict: AnyCalibrator) -> None:
    logit, label = click_log()
    assert roc_auc_score(label, strict.transform(logit)) == roc_auc_score(label, logit)


def test_probabilities_are_never_zero_nor_one(calibrator: AnyCalibrator) -> None:
    p = calibrator.transform([-np.inf, -1e308, -35.0, 35.0, 1e308, np.inf])
    assert ((p > 0) & (p < 1)).all()
    assert np.isfinite(np.log(p)).all()
    assert np.isfinite(np.log1p(-p)).all()
    assert (np.diff(p) >= 0).all()


def test_no_two_rows_are_turned_round(calibrator: AnyCalibrator) -> None:
    assert (np.diff(calibrator.transform_logit(np.linspace(-40, 40, 100_001))) >= 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STRICT])
def test_those_that_promise_less_do_lose_ranks(kind: str) -> None:
    # Or the comparison in the reports would say nothing.
    logit, label = click_log()
    said = FITS[kind](logit, label).transform(logit)
    assert len(np.unique(said)) < len(logit) / 2
    assert roc_auc_score(label, said) != roc_auc_score(label, logit)


def test_infinities_count_as_the_limit(calibrator: AnyCalibrator) -> None:
    limit = calibrator.transform_logit([-LOGIT_LIMIT, LOGIT_LIMIT])
    assert (calibrator.transform_logit([-np.inf, np.inf]) == limit).all()


def test_one_row_alone_gets_what_it_gets_among_many(calibrator: AnyCalibrator) -> None:
    # Serving scores one row, a batch job a million: not one bit may differ.
    logit = np.random.default_rng(1).normal(-2, 4, 500)
    together = calibrator.transform(logit)
    alone = np.array([calibrator.transform(logit[i : i + 1])[0] for i in range(500)])
    assert (alone == together).all()
    assert (calibrator.transform(logit[::-1]) == together[::-1]).all()
    assert (calibrator.transform(np.repeat(logit, 3)[::3]) == together).all()


def test_transforming_changes_neither_the_calibrator_nor_its_input(calibrator: AnyCalibrator) -> None:
    logit = np.array([-np.inf, -50.0, 0.0, 50.0])
    before, state = logit.copy(), json.dumps(calibrator.state())
    calibrator.transform(logit)
    calibrator.transform_logit(logit)
    assert (logit == before).all()
    assert json.dumps(calibrator.state()) == state


def test_state_goes_through_json_and_back_to_the_bit(calibrator: AnyCalibrator) -> None:
    text = json.dumps(calibrator.state(), allow_nan=False)
    restored = type(calibrator).from_state(json.loads(text))
    logit = np.random.default_rng(2).normal(-2, 5, 5_000)
    assert json.dumps(restored.state()) == text
    assert (restored.transform_logit(logit) == calibrator.transform_logit(logit)).all()


def test_a_foreign_or_incomplete_state_is_refused(calibrator: AnyCalibrator) -> None:
    state = calibrator.state()
    for broken in ({}, {**state, "kind": "other"}, {**state, "surprise": 1}, {"kind": state["kind"]}):
        with pytest.raises(StaleStateError):
            type(calibrator).from_state(broken)


def test_a_state_of_another_version_is_refused_with_both_versions(calibrator: AnyCalibrator) -> None:
    state = calibrator.state()
    unversioned = {name: value for name, value in state.items() if name != "version"}
    for broken, found in (({**state, "version": 1}, "1"), (unversioned, "None")):
        with pytest.raises(StaleStateError, match=rf"version 2; got {found}"):
            type(calibrator).from_state(broken)


def test_equal_digests_mean_equal_states(calibrator: AnyCalibrator) -> None:
    again = type(calibrator).from_state(calibrator.state())
    assert again.digest() == calibrator.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_it_says_the_same_to_the_bit(kind: str) -> None:
    fitted = FITS[kind](*click_log())
    logit = np.linspace(-40, 40, 10_001)
    frozen = fitted.frozen()
    assert (frozen.transform_logit(logit) == fitted.transform_logit(logit)).all()
    assert len(json.dumps(frozen.state())) < 100_000
    restored = type(fitted).from_state(json.loads(json.dumps(frozen.state())))
    assert (restored.transform_logit(logit) == fitted.transform_logit(logit)).all()


@pytest.mark.parametrize("kind", SKETCHED)
def test_frozen_it_learns_no_more_and_says_so(kind: str) -> None:
    fitted = FITS[kind](*click_log())
    frozen = fitted.frozen()
    before = frozen.digest()
    for learn in (
        lambda: frozen.update(*click_log()),
        lambda: frozen.merge(fitted),
        lambda: fitted.merge(frozen),
    ):
        with pytest.raises(DataError, match=f"{kind}.*frozen"):
            learn()
    assert frozen.digest() == before


def test_calibrators_of_two_kinds_are_not_merged() -> None:
    platt, isotonic = FITS["platt"](*click_log()), FITS["isotonic"](*click_log())
    with pytest.raises(DataError, match=r"'platt'.*'isotonic'"):
        platt.merge(isotonic)
    with pytest.raises(DataError, match="differ"):
        FITS["sampling"](*click_log()).merge(KINDS["sampling"].fit(*click_log()))
    with pytest.raises(DataError, match="half-lives"):
        KINDS["decayed"].fit([0.0], [1]).merge(KINDS["decayed"].fit([0.0], [1], half_life=10.0))  # type: ignore[call-arg]
    with pytest.raises(DataError, match="centre"):
        OnlinePlatt.fit([0.0], [1], centre=0.0).merge(OnlinePlatt.fit([0.0], [1], centre=1.0))


def test_no_rows_in_no_rows_out(calibrator: AnyCalibrator) -> None:
    assert calibrator.transform([]).shape == (0,)


@pytest.mark.parametrize(
    ("logit", "message"),
    [
        ([0.0, float("nan")], "NaN.*row 1"),
        ([[0.0]], "shape"),
        (0.0, "shape"),
        (["much"], "numbers"),
        ([None], "NaN|numbers"),
    ],
)
def test_bad_logits_are_an_error_that_says_where(
    calibrator: AnyCalibrator, logit: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        calibrator.transform(logit)  # type: ignore[arg-type]


def test_smaller_floats_and_integers_are_taken_as_they_are(calibrator: AnyCalibrator) -> None:
    exact = np.array([-2.0, 0.0, 1.0])
    for kind in (np.float32, np.float16, np.int64):
        assert (calibrator.transform(exact.astype(kind)) == calibrator.transform(exact)).all()


@pytest.mark.parametrize(
    ("label", "weight", "message"),
    [
        ([0, 2], None, "label.*2.0 at row 1"),
        ([0, -1], None, "label"),
        ([0, float("nan")], None, "label"),
        ([0], None, "1 labels for 2 rows"),
        ([0, 1], [1.0], "1 weights for 2 rows"),
        ([0, 1], [1.0, 1e12], "weight.*1000000000000.0 at row 1"),
        ([0, 1], [1.0, -1.0], "weight"),
        ([0, 1], [1.0, float("nan")], "weight"),
        ([0, 1], [1.0, float("inf")], "weight"),
    ],
)
def test_bad_labels_and_weights_are_refused_wherever_rows_are_learned_from(
    label: list[float], weight: list[float] | None, message: str
) -> None:
    learners: tuple[Callable[..., object], ...] = (
        *FITS.values(),
        *(FITS[kind]([0.0], [1]).update for kind in KINDS),
        CalibrationChain.fit,
        OnlinePlatt().update,
        CalibrationChain(online=OnlinePlatt()).update,
    )
    for learn in learners:
        with pytest.raises(DataError, match=message):
            learn([0.0, 1.0], label, weight)


def test_logit_of_undoes_sigmoid() -> None:
    logit = np.linspace(-30, 12, 500)
    assert logit_of(sigmoid(logit)) == pytest.approx(logit, abs=1e-9)
    assert logit_of([0.0, 1.0]).tolist() == [-LOGIT_LIMIT, LOGIT_LIMIT]
