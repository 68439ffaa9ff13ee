"""What holds for every model of the delay, and how it is stored."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from pyspark import cloudpickle

from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_bins import DelayBins
from pipelines.delay_counts import DelayCounts
from pipelines.delay_groups import DelayGroups
from pipelines.delay_hazard import DelayHazard
from pipelines.delay_model import DelayModel, digest, from_files, to_files
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import DataError
from pipelines.hashing import hash_text

WINDOW = 2 * DAY_MS


def outcomes(seed: int = 0, n: int = 3_000) -> tuple[list[tuple[str, ...]], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    slow = rng.random(n) < 0.5
    delay = np.minimum(rng.exponential(np.where(slow, 12.0, 1.0)) * HOUR_MS, WINDOW)
    return [("slow",) if one else ("quick",) for one in slow], delay


def curve() -> DelayCurve:
    _, delay = outcomes()
    return DelayCurve.fit(delay, np.full(len(delay), float(WINDOW)))


def groups() -> DelayGroups:
    values, delay = outcomes()
    counts = DelayCounts.of(
        DelayGrid(WINDOW, 32), ("campaign_id",), values, delay, np.full(len(delay), float(WINDOW))
    )
    return DelayGroups.fit(counts, curve())


def hazard() -> DelayHazard:
    rng = np.random.default_rng(5)
    layers = ((rng.standard_normal((3, 31)).astype(np.float32), np.zeros(31, np.float32)),)
    bins = DelayBins(DelayGrid(WINDOW, 32), curve())
    embedding = rng.standard_normal((8, 2)).astype(np.float32)
    return DelayHazard(bins, (1,), (1,), (8,), embedding, layers, 0.5, 100.0, "digest")


MODELS: dict[str, Callable[[], DelayModel]] = {"curve": curve, "groups": groups, "hazard": hazard}
Inputs = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]


def inputs(model: DelayModel, n: int, seed: int = 1) -> Inputs:
    rng = np.random.default_rng(seed)
    names = np.array([hash_text(name) for name in ("slow", "quick", "new")], np.uint64).view(np.int64)
    key = rng.choice(names, (n, len(model.fields)))
    return rng.integers(1, 9, (n, 2)).astype(np.int32), np.zeros((n, 1), np.float32), key


def chosen(rows: Inputs, places: NDArray[np.int64]) -> Inputs:
    return rows[0][places], rows[1][places], rows[2][places]


@pytest.mark.parametrize("kind", MODELS)
def test_share_rises_from_nothing_to_all(kind: str) -> None:
    model = MODELS[kind]()
    elapsed = np.sort(np.random.default_rng(2).uniform(-HOUR_MS, 1.2 * WINDOW, 500))
    one = chosen(inputs(model, 1), np.zeros(500, np.int64))
    found = model.observed_share(elapsed, *one)
    assert found.shape == (500,) and found.dtype == np.float64
    assert np.all(np.diff(found) >= 0)
    assert np.all(found[elapsed < 0] == 0) and np.all(found[elapsed >= WINDOW] == 1)
    np.testing.assert_array_equal(model.survival(elapsed, *one), 1.0 - found)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wanted", [0.1, 0.5, 0.9])
def test_by_its_quantile_that_share_has_come(kind: str, wanted: float) -> None:
    model = MODELS[kind]()
    rows = inputs(model, 40)
    age = model.quantiles(wanted, *rows)
    np.testing.assert_allclose(model.observed_share(age, *rows), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_independent_and_none_is_no_error(kind: str) -> None:
    model = MODELS[kind]()
    elapsed, rows = np.linspace(0, WINDOW, 64), inputs(model, 64)
    whole = model.observed_share(elapsed, *rows)
    one_by_one = [
        model.observed_share(elapsed[i : i + 1], *chosen(rows, np.array([i])))[0] for i in range(64)
    ]
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-6)
    np.testing.assert_array_equal(whole, model.observed_share(elapsed, *rows))
    none = chosen(rows, np.zeros(0, np.int64))
    assert model.observed_share([], *none).shape == (0,)
    assert model.quantiles(0.5, *none).shape == (0,)


@pytest.mark.parametrize("kind", MODELS)
def test_files_and_transport_give_the_same_model(kind: str) -> None:
    model = MODELS[kind]()
    elapsed, rows = np.linspace(0, WINDOW, 64), inputs(model, 64)
    files = to_files(model)
    assert files == to_files(MODELS[kind]())
    sent = cloudpickle.dumps(model)  # type: ignore[no-untyped-call]
    for again in (from_files(files), cloudpickle.loads(sent)):
        np.testing.assert_array_equal(
            again.observed_share(elapsed, *rows), model.observed_share(elapsed, *rows)
        )
        assert again.fields == model.fields
        assert again.common.state() == model.common.state() == curve().state()
        assert digest(again) == digest(model)
        assert json.loads(json.dumps(again.state())) == again.state()


def test_digests_tell_models_apart() -> None:
    assert digest(curve()) != digest(groups())


def test_damaged_or_foreign_files_are_refused() -> None:
    files = to_files(groups())
    with pytest.raises(DataError, match="is not the one"):
        from_files(files | {"delay.safetensors": files["delay.safetensors"][:-1] + b"x"})
    with pytest.raises(DataError, match="is not the one"):
        from_files({"delay.json": files["delay.json"]})
    with pytest.raises(DataError, match=r"Without delay\.json"):
        from_files({})
    with pytest.raises(DataError, match="no delay model"):
        from_files({"delay.json": b"{"})
    other = json.dumps({"state": {"kind": "platt"}, "arrays_sha256": None}).encode()
    with pytest.raises(DataError, match="platt"):
        from_files({"delay.json": other})
