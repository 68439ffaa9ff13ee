"""Parts of the Brier score and field errors of binned rows: within their bounds of those of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.link import sigmoid
from calibration.sketch import LogitSketch
from monitoring.binned import binned_quality
from monitoring.binned_parts import binned_brier_parts, binned_field_error
from monitoring.binned_rows import BinnedRows
from monitoring.bounded import Bounded
from monitoring.field_error import field_calibration_error
from pipelines.errors import DataError

Floats = np.ndarray


def world(seed: int, rows: int = 30_000) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    z = rng.normal(-2.5, 1.2, rows)
    return z, rng.random(rows) < sigmoid(0.8 * z)


def parts_of_rows(z: Floats, y: Floats, w: Floats, sketch: LogitSketch, groups: int) -> dict[str, float]:
    """Straight from the definitions, in the groups that the bins make."""
    bins = BinnedRows(sketch.binned())
    edges = bins.low_logit[bins.groups(groups)][1:]
    place, p, total = np.searchsorted(edges, z, side="right"), sigmoid(z), w.sum()
    found = dict.fromkeys(("reliability", "resolution", "within_variance", "within_covariance"), 0.0)
    base = (w @ y) / total
    for group in np.unique(place):
        mine = place == group
        mass = w[mine].sum()
        mean, rate = (w[mine] @ p[mine]) / mass, (w[mine] @ y[mine]) / mass
        found["reliability"] += mass * (mean - rate) ** 2 / total
        found["resolution"] += mass * (rate - base) ** 2 / total
        found["within_variance"] += w[mine] @ (p[mine] - mean) ** 2 / total
        found["within_covariance"] += 2 * (w[mine] * (y[mine] - rate)) @ (p[mine] - mean) / total
    return found


def within(found: Bounded, exact: float) -> bool:
    return found.low - 1e-15 <= exact <= found.high + 1e-15


@given(
    seed=st.integers(0, 10_000), rows=st.integers(1, 400), groups=st.integers(1, 30), weighted=st.booleans()
)
def test_parts_of_the_brier_score_lie_within_their_bounds(
    seed: int, rows: int, groups: int, weighted: bool
) -> None:
    z, y = world(seed, rows)
    w = np.random.default_rng(seed + 1).integers(1, 5, rows).astype(float) if weighted else np.ones(rows)
    sketch = LogitSketch.of(z, y, w)
    found = binned_brier_parts(sketch.binned(), groups)
    assert found is not None
    expected = parts_of_rows(z, y.astype(float), w, sketch, groups)
    assert found.resolution == pytest.approx(expected["resolution"], abs=1e-12)
    for name in ("reliability", "within_variance", "within_covariance"):
        assert within(getattr(found, name), expected[name])


def test_parts_add_up_to_the_brier_score() -> None:
    z, y = world(1)
    bins = LogitSketch.of(z, y).binned()
    parts, quality = binned_brier_parts(bins), binned_quality(bins)
    assert parts is not None and quality.brier is not None
    total = parts.reliability.value - parts.resolution + parts.uncertainty
    total += parts.within_variance.value - parts.within_covariance.value
    assert total == pytest.approx(quality.brier.value, abs=1e-9)
    assert parts.reliability.error < 1e-9
    assert parts.within_covariance.error < 0.005 * quality.brier.value
    assert parts.reliability_z is not None and parts.reliability_z > 5


def test_field_errors_are_those_of_the_rows_and_so_are_their_floors() -> None:
    z, _ = world(2, 60_000)
    rng = np.random.default_rng(5)
    campaign = rng.zipf(1.4, len(z)) % 200
    effect = rng.normal(0.0, 0.3, 200)[campaign]
    for shift, is_off in ((0.0, False), (effect, True)):
        y = rng.random(len(z)) < sigmoid(z + shift)
        values = [LogitSketch.of(z[campaign == k], y[campaign == k]).binned() for k in np.unique(campaign)]
        found, exact = binned_field_error(values, draws=200), field_calibration_error(y, sigmoid(z), campaign)
        assert found is not None and exact is not None
        assert abs(found.error.ece - exact.ece) <= found.ece_error + 1e-15 < 1e-8
        assert abs(found.error.rce - exact.rce) <= found.rce_error + 1e-15 < 1e-6
        assert found.error.values == exact.values
        assert found.error.rce_null == pytest.approx(exact.rce_null, rel=0.03)
        assert found.error.ece_null == pytest.approx(exact.ece_null, rel=0.03)
        assert found.error.ece_z is not None
        assert (found.error.ece_z > 4) is is_off


def test_floors_of_weighted_rows_are_those_of_the_rows() -> None:
    z, _ = world(3, 40_000)
    rng = np.random.default_rng(6)
    campaign, w = rng.integers(0, 60, len(z)), rng.choice([1.0, 10.0], len(z))
    y = rng.random(len(z)) < sigmoid(z)
    values = [
        LogitSketch.of(z[mine], y[mine], w[mine]).binned() for mine in (campaign == k for k in range(60))
    ]
    found, exact = binned_field_error(values, draws=200), field_calibration_error(y, sigmoid(z), campaign, w)
    assert found is not None and exact is not None
    assert found.error.rce_null == pytest.approx(exact.rce_null, rel=0.05)


def test_without_rows_there_is_nothing_and_one_draw_is_too_few() -> None:
    assert binned_brier_parts(LogitSketch().binned()) is None
    assert binned_field_error([LogitSketch().binned()]) is None
    with pytest.raises(DataError, match="two draws"):
        binned_field_error([], draws=1)
