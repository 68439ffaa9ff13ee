"""A backtest that learns view-through conversions beside clicks, from a log with part credit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss

from jobs.backtest import Backtest, run_backtest
from jobs.evaluation import Evaluation, evaluate
from jobs.online import OnlineLoop
from jobs.online_state import load_loop_state, loop_state
from pipelines.config import Config, load_config
from pipelines.errors import ConfigError
from pipelines.event_files import EventFiles
from pipelines.hashing import hash_column
from pipelines.outcomes import latest_arrival, outcomes_as_of
from pipelines.simulation_files import write_simulation
from pipelines.simulator import simulate
from tests.small_run import SETTINGS, SIMULATION

OPTIONS = (
    *SETTINGS,
    "attribution.view_through_window=24h",
    'labels.tasks=["click", "view_through"]',
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backtest, EventFiles, Config]:
    """The small log without the clicks of two impressions in three, some conversions with half credit."""
    folder = tmp_path_factory.mktemp("view_through")
    log = simulate(SIMULATION)
    is_lost = hash_column(log.clicks["impression_id"]) % 3 != 0
    credit = np.where(hash_column(log.conversions["event_id"]) % 3 == 0, 0.5, 1.0)
    log = replace(
        log,
        clicks=log.clicks.filter(pa.array(~is_lost)),
        conversions=log.conversions.append_column("credit", pa.array(credit)),
    )
    write_simulation(log, folder / "events", "jsonl")
    config, files, out = load_config(None, OPTIONS), EventFiles(folder / "events"), folder / "out"
    out.mkdir()
    return run_backtest(config, files, out), files, config


@pytest.fixture(scope="module")
def judged(run: tuple[Backtest, EventFiles, Config]) -> Evaluation:
    backtest, files, config = run
    return evaluate(backtest.predictions, files.tables, config.attribution)


def test_both_tasks_are_learned_and_every_row_is_accounted_for(
    run: tuple[Backtest, EventFiles, Config],
) -> None:
    loop = run[0].loop
    assert loop.tasks == ("click", "view_through")
    assert set(loop.accounting.check(loop.read).values()) == {0}
    assert loop.accounting.count("conversion", "trained") > 10
    figures = loop.progressive.totals("view_through", "student").value()
    assert figures["positives"] and figures["log_loss"] is not None


def test_the_loop_restored_goes_on_to_the_same_bits(run: tuple[Backtest, EventFiles, Config]) -> None:
    backtest, _, config = run
    arrays, plain = loop_state(backtest.loop)
    restored, first = OnlineLoop(config), backtest.first
    first.begin(restored)
    load_loop_state(restored, arrays, json.loads(json.dumps(plain)))
    again, plain_again = loop_state(restored)
    assert plain_again == plain
    assert all(np.array_equal(array, again[name], equal_nan=True) for name, array in arrays.items())


def test_an_outcome_of_part_credit_is_judged_as_that_part_of_a_positive(
    run: tuple[Backtest, EventFiles, Config], judged: Evaluation
) -> None:
    backtest, files, config = run
    outcome = outcomes_as_of(files.tables, config.attribution, latest_arrival(files.tables))["view_through"]
    label = dict(zip(outcome.impression_id.to_pylist(), outcome.label.tolist(), strict=True))
    rows = [row for row in backtest.predictions.to_pylist() if row["task"] == "view_through"]
    rows = [row for row in rows if row["impression_id"] in label]
    soft = np.array([label[row["impression_id"]] for row in rows])
    assert ((soft > 0) & (soft < 1)).any()
    probability = np.array([row["probability"] for row in rows])
    expected = log_loss(
        np.repeat([1, 0], len(rows)), np.tile(probability, 2), sample_weight=np.concatenate([soft, 1 - soft])
    )
    figures = judged.metrics["view_through"]["totals"]["student"]
    assert figures["log_loss"] == pytest.approx(expected, rel=1e-9)
    assert figures["pcoc"] == pytest.approx(probability.sum() / soft.sum(), rel=1e-9)


def test_view_through_without_its_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="view_through_window must be set"):
        load_config(None, ['labels.tasks=["click", "view_through"]'])
