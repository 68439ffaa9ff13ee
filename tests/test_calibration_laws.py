"""Laws of all calibrators, on rows that hypothesis makes up, and an answer to every odd input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from calibration.base import Calibrator
from calibration.link import sigmoid
from calibration.online import OnlineConfig, OnlinePlatt
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from pipelines.errors import DataError
from tests.calibrators import FITS, FIXED, KINDS, SKETCHED, STRICT, click_log

Row = tuple[float, float, int]

# Logits a hundredth apart: whether calibrated ones differ is then no question of the last bit.
LOGITS = st.integers(-900, 900).map(lambda whole: whole / 100)
ROWS: st.SearchStrategy[list[Row]] = st.lists(
    st.tuples(LOGITS, st.sampled_from([0.0, 0.0, 0.25, 1.0]), st.integers(1, 3)), min_size=1, max_size=40
)
GRID = np.linspace(-40.0, 40.0, 2_001)
# Each law is asked of ten kinds.
FEW = settings(max_examples=30)


def columns(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logit, label, weight = np.array(rows, dtype=float).reshape(-1, 3).T
    return logit, label, weight


def parameters(calibrator: Calibrator) -> dict[str, Any]:
    state = calibrator.state()
    return {name: value for name, value in state.items() if name != "sketch"}


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(rows=ROWS)
def test_the_map_never_falls_and_rises_strictly_where_that_is_promised(kind: str, rows: list[Row]) -> None:
    fitted = FITS[kind](*columns(rows))
    said = fitted.transform_logit(GRID)
    assert np.isfinite(said).all()
    assert (np.diff(said) >= 0.0).all()
    if kind in STRICT:
        inside = fitted.transform_logit(np.linspace(-34.0, 34.0, 2_001))
        assert (np.diff(inside) > 0.0).all()
    p = fitted.transform(GRID)
    assert ((p > 0.0) & (p < 1.0)).all()


@pytest.mark.parametrize("kind", STRICT)
@FEW
@given(rows=ROWS)
def test_auc_is_the_same_before_and_after(kind: str, rows: list[Row]) -> None:
    logit, label, weight = columns(rows)
    hard = (label > 0.5).astype(float)
    if not 0 < hard.sum() < len(hard):
        hard[0] = 1.0 - hard[0]
    if len(hard) > 1:
        said = FITS[kind](logit, label, weight).transform_logit(logit)
        assert roc_auc_score(hard, said) == roc_auc_score(hard, logit)


@pytest.mark.parametrize("kind", SKETCHED)
@FEW
@given(first=ROWS, second=ROWS, third=ROWS)
def test_merging_fits_is_fitting_all_rows_to_the_bit(
    kind: str, first: list[Row], second: list[Row], third: list[Row]
) -> None:
    fit = FITS[kind]
    a, b, c = (fit(*columns(rows)) for rows in (first, second, third))
    whole = fit(*columns([*first, *second, *third]))
    assert a.merge(b).merge(c).digest() == a.merge(b.merge(c)).digest() == whole.digest()
    assert a.merge(b).digest() == b.merge(a).digest()


@pytest.mark.parametrize("kind", [kind for kind in SKETCHED if kind != "decayed"])
@FEW
@given(first=ROWS, second=ROWS)
def test_updating_a_fit_is_fitting_all_rows_to_the_bit(
    kind: str, first: list[Row], second: list[Row]
) -> None:
    fit = FITS[kind]
    fitted, by_sketch = fit(*columns(first)), fit(*columns(first))
    fitted.update(*columns(second))
    by_sketch.update_sketch(LogitSketch.of(*columns(second)))
    assert fitted.digest() == by_sketch.digest() == fit(*columns([*first, *second])).digest()


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(rows=ROWS, seed=st.integers(0, 1_000))
def test_the_order_of_rows_plays_no_role(kind: str, rows: list[Row], seed: int) -> None:
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    assert FITS[kind](*columns(shuffled)).digest() == FITS[kind](*columns(rows)).digest()


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(rows=ROWS)
def test_a_weight_is_the_row_that_many_times(kind: str, rows: list[Row]) -> None:
    # Not to the bit: of a row of weight 2 the sketch rounds twice the probability, of two rows each, to
    # 2**-32. In a bin of small probabilities that moves its logit, and so a knot, by at most 2**-32 / p.
    logit, label, weight = columns(rows)
    repeats = weight.astype(int)
    weighted = FITS[kind](logit, label, weight).transform_logit(GRID)
    repeated = FITS[kind](*(np.repeat(column, repeats) for column in (logit, label))).transform_logit(GRID)
    assert repeated == pytest.approx(weighted, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(rows=ROWS)
def test_a_row_of_weight_nothing_is_not_there(kind: str, rows: list[Row]) -> None:
    logit, label, weight = columns(rows)
    absent = np.append(logit, 3.3), np.append(label, 1.0), np.append(weight, 0.0)
    assert FITS[kind](*absent).digest() == FITS[kind](logit, label, weight).digest()


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(rows=ROWS, more=ROWS)
def test_state_through_json_goes_on_to_the_bit(kind: str, rows: list[Row], more: list[Row]) -> None:
    fitted = FITS[kind](*columns(rows))
    text = json.dumps(fitted.state(), allow_nan=False)
    restored = type(fitted).from_state(json.loads(text))
    assert json.dumps(restored.state()) == text
    assert (restored.transform_logit(GRID) == fitted.transform_logit(GRID)).all()
    for each in (fitted, restored):
        each.update(*columns(more))
    assert restored.digest() == fitted.digest()


# -- a second fit to what the first one says ---------------------------------------------------------

# What is left to do, in logits, root mean square over the rows of 20 000 positives. Lines: the smoothing of
# targets once more. Beta: the best map of the family need not stay the best on its own output. Isotonic: each
# block is shrunk again, to a line of its own. Plain isotonic: blocks are joined by lines, and the second fit
# cuts these anew. Histogram: the rates are smoothed again. Kalman: the belief starts from its prior again.
IDEMPOTENT_WITHIN = {
    "none": 0.0,
    "temperature": 1e-3,
    "platt": 1e-3,
    "beta": 0.02,
    "isotonic": 0.03,
    "plain_isotonic": 0.03,
    "histogram": 0.02,
    "decayed": 0.03,
    "kalman": 0.02,
}


@pytest.mark.parametrize("kind", IDEMPOTENT_WITHIN)
@pytest.mark.parametrize("seed", [0, 1])
def test_fitted_to_what_it_says_it_is_nearly_the_identity(kind: str, seed: int) -> None:
    logit, label = click_log(100_000, seed)
    once = FITS[kind](logit, label).transform_logit(logit)
    twice = KINDS[kind].fit(once, label).transform_logit(once)
    assert float(np.sqrt(np.mean((twice - once) ** 2))) <= IDEMPOTENT_WITHIN[kind]


# -- filters: beliefs instead of sketches -------------------------------------------------------------


@FEW
@given(first=ROWS, second=ROWS)
def test_merging_filters_is_commutative_to_the_bit(first: list[Row], second: list[Row]) -> None:
    a, b = (FITS["kalman"](*columns(rows)) for rows in (first, second))
    merged = a.merge(b)
    assert merged.digest() == b.merge(a).digest()
    assert isinstance(merged, OnlinePlatt)
    assert merged.intercept_variance * merged.slope_variance > merged.covariance**2


def test_merged_filters_are_close_to_one_that_heard_all_rows() -> None:
    # Not to the bit, as with sketches: a belief is a Gaussian at the peak of a likelihood that is none.
    logit, label = click_log()
    half = slice(0, 10_000), slice(10_000, 20_000)
    still = OnlineConfig(intercept_noise=0.0, slope_noise=0.0)
    a, b = (OnlinePlatt.fit(logit[h], label[h], config=still, centre=-2.0) for h in half)
    whole = OnlinePlatt.fit(logit, label, config=still, centre=-2.0)
    merged = a.merge(b)
    assert merged.intercept == pytest.approx(whole.intercept, abs=0.2 * whole.intercept_variance**0.5)
    assert merged.slope == pytest.approx(whole.slope, abs=0.2 * whole.slope_variance**0.5)
    assert merged.intercept_variance == pytest.approx(whole.intercept_variance, rel=0.02)
    assert merged.effective_rows == whole.effective_rows == 20_000


# -- odd input ----------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
MAP, NO_ROWS = "a map", "no rows"
# Input, and what is to come of it: a map, or an error of these words. Fixed calibrators need no rows.
ODD: dict[str, tuple[Sequence[float], Sequence[float], list[float] | None, str]] = {
    "no positives": ([-1.0, 0.0, 1.0, 2.0], [0, 0, 0, 0], None, MAP),
    "no negatives": ([-1.0, 0.0, 1.0, 2.0], [1, 1, 1, 1], None, MAP),
    "one row": ([0.3], [1], None, MAP),
    "three rows": ([5.0, -4.0, 1.0], [1, 0, 0], None, MAP),
    "three soft rows": ([5.0, -4.0, 1.0], [0.5, 0.5, 0.5], None, MAP),
    "one logit": ([-2.0] * 50, [1] * 5 + [0] * 45, None, MAP),
    "one logit of zero": ([0.0] * 50, [1] * 5 + [0] * 45, None, MAP),
    "separable": ([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1], None, MAP),
    "backwards": ([-2.0, -1.0, 1.0, 2.0] * 20, [1, 1, 0, 0] * 20, None, MAP),
    "a million either way": ([-1e6, 1e6, 0.0, 1e6], [0, 1, 0, 0], None, MAP),
    "all a million": ([1e6] * 5, [0, 1, 0, 0, 0], None, MAP),
    "infinite": ([-INF, INF, 0.0], [0, 1, 0], None, MAP),
    "the largest weight": ([0.0, 1.0], [0, 1], [2.0**20, 1.0], MAP),
    "a tiny weight": ([0.0, 1.0], [0, 1], [1e-6, 1.0], MAP),
    "some weights of zero": ([0.0, 1.0, 2.0], [0, 1, 0], [0.0, 1.0, 1.0], MAP),
    "all weights zero": ([0.0, 1.0], [0, 1], [0.0, 0.0], NO_ROWS),
    "no rows": ([], [], None, NO_ROWS),
    "a weight of 1e12": ([0.0, 1.0], [0, 1], [1.0, 1e12], "weight must be at least 0 and at most 1048576"),
    "a weight below zero": ([0.0, 1.0], [0, 1], [1.0, -1.0], "weight must be at least 0"),
    "a weight of NaN": ([0.0, 1.0], [0, 1], [1.0, NAN], "weight must be at least 0"),
    "a logit of NaN": (
        [0.0, NAN],
        [0, 1],
        None,
        "logit must not be NaN; got 1 NaN among 2 rows, first at row 1",
    ),
    "a label of NaN": ([0.0, 1.0], [0, NAN], None, "label must be in"),
    "a label of 2": ([0.0, 1.0], [0, 2], None, "label must be in"),
    "a label too few": ([0.0, 1.0], [0], None, "got 1 labels for 2 rows"),
    "a weight too many": ([0.0], [0], [1.0, 1.0], "got 2 weights for 1 rows"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ODD)
def test_odd_input_gives_a_map_or_one_clear_error(odd: str, kind: str) -> None:
    logit, label, weight, outcome = ODD[odd]
    if outcome == NO_ROWS and kind in FIXED:
        outcome = MAP
    if outcome != MAP:
        with pytest.raises(DataError, match=outcome):
            FITS[kind](logit, label, weight)
        return
    fitted = FITS[kind](logit, label, weight)
    said, p = fitted.transform_logit(GRID), fitted.transform(GRID)
    assert np.isfinite(said).all()
    assert (np.diff(said) >= 0.0).all()
    assert ((p > 0.0) & (p < 1.0)).all()
    if kind in STRICT:
        assert (np.diff(fitted.transform_logit(np.linspace(-34.0, 34.0, 2_001))) > 0.0).all()
    assert type(fitted).from_state(json.loads(json.dumps(fitted.state()))).digest() == fitted.digest()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", [odd for odd, (*_, outcome) in ODD.items() if outcome not in (MAP, NO_ROWS)])
def test_refused_rows_teach_nothing(odd: str, kind: str) -> None:
    fitted = FITS[kind](*click_log(1_000))
    before = fitted.digest()
    with pytest.raises(DataError):
        fitted.update(*ODD[odd][:3])
    assert fitted.digest() == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_no_rows_changes_nothing(kind: str) -> None:
    fitted = FITS[kind](*click_log(1_000))
    before = fitted.digest()
    fitted.update([], [])
    fitted.update([0.0], [1], [0.0])
    fitted.update_sketch(LogitSketch())
    assert fitted.digest() == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FIXED])
def test_one_class_moves_the_level_and_not_beyond_what_rows_can_tell(kind: str) -> None:
    # A thousand rows without a click are no proof of a rate below one in some thousands.
    logit = np.random.default_rng(0).normal(-2.0, 1.0, 1_000)
    said = FITS[kind](logit, np.zeros(1_000)).transform(logit)
    if kind != "temperature":
        assert said.mean() < 0.5 * sigmoid(logit).mean()
    assert said.mean() > 1e-4


def test_a_sketch_calibrator_holds_the_sketch_it_was_fitted_to() -> None:
    sketch = LogitSketch.of(*click_log(1_000))
    fitted = KINDS["isotonic"].fit_sketch(sketch)
    assert isinstance(fitted, SketchCalibrator)
    assert fitted.sketch == sketch
    sketch.update([0.0], [1])
    assert fitted.sketch != sketch
