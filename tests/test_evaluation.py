"""Recorded predictions, judged by what came of them: labels, sums, base rates, truth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn.metrics import log_loss, roc_auc_score

from jobs.cli import cli
from jobs.evaluation import evaluate
from jobs.evaluation_figures import JudgedRows, timeline
from pipelines.attribution import Event, labels_as_of
from pipelines.config_sections import AttributionConfig
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import DataError
from pipelines.events import CLICK, CONVERSION, IMPRESSION
from pipelines.outcomes import Tables, latest_arrival
from pipelines.simulation_files import write_simulation
from tests.run_folder import SimulatedRun, simulated_run

WINDOWS = AttributionConfig(
    click_window=40, attribution_window=100, observation_window=15, allowed_lateness=20
)


def tables_of(log: list[Event]) -> Tables:
    tables = []
    for kind in (IMPRESSION, CLICK, CONVERSION):
        own = [event for event in log if event.kind == kind]
        columns: dict[str, Any] = {
            name: pa.array([getattr(event, name) for event in own], type_)
            for name, type_ in (
                ("event_id", pa.string()),
                ("impression_id", pa.string()),
                ("event_time", pa.int64()),
                ("arrival_time", pa.int64()),
                ("op", pa.string()),
            )
        }
        if kind == IMPRESSION:
            columns["user_id"] = pa.array([f"user of {event.event_id}" for event in own], pa.string())
        tables.append(pa.table(columns))
    return tables[0], tables[1], tables[2]


def predicted(ids: list[str], task: str, probability: list[float], at: list[int], **more: Any) -> pa.Table:
    p = np.asarray(probability, np.float64)
    columns = {
        "impression_id": pa.array(ids, pa.string()),
        "task": pa.array([task] * len(ids), pa.string()),
        "predicted_at": pa.array(at, pa.int64()),
        "logit": np.log(p / (1 - p)) + 1.0,
        "probability": p,
        "release": pa.array(["r"] * len(ids), pa.string()),
    }
    return pa.table({**columns, **more})


# Three impressions: i is clicked and converts, j is clicked in time but never converts, k is never clicked.
LOG = [
    Event(IMPRESSION, "i", "i", 0, 0),
    Event(CLICK, "c1", "i", 10, 12),
    Event(CONVERSION, "v1", "i", 50, 55),
    Event(IMPRESSION, "j", "j", 20, 20),
    Event(CLICK, "c2", "j", 30, 31),
    Event(IMPRESSION, "k", "k", 40, 40),
]


def test_figures_are_those_of_the_labels_that_the_attribution_rule_gives() -> None:
    predictions = predicted(["i", "j", "k"], "click", [0.7, 0.4, 0.2], [0, 20, 40])
    figures = evaluate(predictions, tables_of(LOG), WINDOWS, as_of=500).metrics["click"]["totals"]["student"]
    assert figures["rows"] == 3
    assert figures["positives"] == 2
    assert figures["log_loss"] == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(0.8)) / 3)
    assert figures["pcoc"] == pytest.approx(1.3 / 2)
    assert figures["auc"] == 1.0


def test_the_uncalibrated_student_is_the_sigmoid_of_its_logit() -> None:
    predictions = predicted(["i"], "click", [0.5], [0])
    figures = evaluate(predictions, tables_of(LOG), WINDOWS, as_of=500).metrics["click"]["totals"]
    assert figures["student_uncalibrated"]["pcoc"] == pytest.approx(1 / (1 + math.exp(-1.0)))


def test_a_conversion_prediction_of_an_impression_without_a_credited_click_is_not_judged() -> None:
    predictions = predicted(["i", "j", "k"], "conversion", [0.7, 0.4, 0.2], [0, 20, 40])
    found = evaluate(predictions, tables_of(LOG), WINDOWS, as_of=500).metrics["conversion"]
    assert found["rows"] == {"recorded": 3, "repeated": 0, "judged": 2, "not_clicked": 1, "not_in_log": 0}
    assert found["totals"]["student"]["log_loss"] == pytest.approx(-(math.log(0.7) + math.log(0.6)) / 2)


def test_labels_are_those_known_at_as_of() -> None:
    predictions = predicted(["i", "j", "k"], "click", [0.7, 0.4, 0.2], [0, 20, 40])
    positives = {
        as_of: evaluate(predictions, tables_of(LOG), WINDOWS, as_of=as_of).metrics["click"]["totals"][
            "student"
        ]["positives"]
        for as_of in (11, 12, 40)
    }
    assert positives == {11: 0, 12: 1, 40: 2}


def test_without_as_of_everything_that_arrived_is_known() -> None:
    predictions = predicted(["i", "j"], "conversion", [0.5, 0.5], [0, 20])
    metrics = evaluate(predictions, tables_of(LOG), WINDOWS).metrics
    assert metrics["as_of"] == 55 == latest_arrival(tables_of(LOG))
    assert metrics["conversion"]["totals"]["student"]["positives"] == 1


def test_rows_of_open_windows_are_provisional_and_not_judged_while_others_have_closed() -> None:
    predictions = predicted(["i", "j", "k"], "click", [0.7, 0.4, 0.2], [0, 20, 40])
    # The windows close at 60, 80 and 100.
    found = evaluate(predictions, tables_of(LOG), WINDOWS, as_of=81).metrics["click"]
    assert found["judged_on"] == "mature"
    assert found["by_maturity"]["mature"]["student"]["rows"] == 2
    assert found["by_maturity"]["provisional"]["student"]["rows"] == 1
    assert found["base_rate"]["judged"]["rows"] == 2
    assert found["paired"]["student_less_base_rate"]["rows"] == 2


def test_while_no_window_has_closed_provisional_rows_are_judged_and_it_says_so() -> None:
    predictions = predicted(["i", "j"], "click", [0.7, 0.4], [0, 20])
    found = evaluate(predictions, tables_of(LOG), WINDOWS, as_of=40).metrics["click"]
    assert found["judged_on"] == "provisional"
    assert found["base_rate"]["judged"]["rows"] == 2


def test_of_several_predictions_of_one_impression_the_first_counts() -> None:
    predictions = predicted(["i", "j", "i"], "click", [0.7, 0.4, 0.1], [0, 20, 30])
    found = evaluate(predictions, tables_of(LOG), WINDOWS, as_of=500).metrics["click"]
    assert found["rows"]["repeated"] == 1
    assert found["totals"]["student"]["log_loss"] == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 2)


def test_predictions_of_impressions_that_are_not_in_the_log_are_counted_and_left_out() -> None:
    for task in ("click", "conversion"):
        predictions = predicted(["i", "stranger"], task, [0.7, 0.4], [0, 20])
        rows_of = evaluate(predictions, tables_of(LOG), WINDOWS, as_of=500).metrics[task]["rows"]
        assert (rows_of["judged"], rows_of["not_in_log"]) == (1, 1)


def test_a_task_without_predictions_is_skipped_with_its_reason() -> None:
    predictions = predicted(["i"], "click", [0.7], [0])
    metrics = evaluate(predictions, tables_of(LOG), WINDOWS, skipped={"conversion": "too few"}).metrics
    assert metrics["skipped"] == {"conversion": "too few"}
    metrics = evaluate(predictions, tables_of(LOG), WINDOWS).metrics
    assert metrics["skipped"] == {"conversion": "there are no predictions of this task"}


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (predicted(["x"], "click", [0.5], [0]), "no prediction can be judged"),
        (predicted(["i"], "click", [0.5], [0]).drop_columns(["logit"]), "Missing: logit"),
        (predicted(["i"], "click", [float("nan")], [0]), "finite logits"),
        (
            predicted(["i", "j"], "click", [0.5, 0.5], [0, 20], teacher_probability=pa.array([0.5, None])),
            r"`teacher` in \[0, 1\]",
        ),
    ],
)
def test_predictions_that_cannot_be_judged_are_refused(predictions: pa.Table, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(predictions, tables_of(LOG), WINDOWS)


def test_a_predictor_without_values_is_left_out() -> None:
    empty = pa.array([None, None], pa.float64())
    predictions = predicted(["i", "j"], "click", [0.5, 0.5], [0, 20], teacher_probability=empty)
    totals = evaluate(predictions, tables_of(LOG), WINDOWS).metrics["click"]["totals"]
    assert set(totals) == {"student", "student_uncalibrated"}


# --- against a simulated log -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> SimulatedRun:
    return simulated_run(impressions=30_000, days=4.0)


@pytest.fixture(scope="module")
def metrics(run: SimulatedRun) -> dict[str, Any]:
    return run.evaluate().metrics


def judged_by_rule(run: SimulatedRun, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, student and maturity of each prediction, by the attribution rule, one impression at a time."""
    as_of = latest_arrival(run.tables)
    events: dict[str, list[Event]] = {}
    for kind, table in enumerate(run.tables):
        op = table["op"].to_pylist() if kind == CONVERSION else ["assert"] * table.num_rows
        ids, of = table["event_id"].to_pylist(), table["impression_id"].to_pylist()
        times, arrivals = table["event_time"].to_pylist(), table["arrival_time"].to_pylist()
        for event_id, name, time, arrival, how in zip(ids, of, times, arrivals, op, strict=True):
            events.setdefault(name, []).append(Event(kind, event_id, name, time, arrival, how))
    own = run.predictions.filter(pc.equal(run.predictions["task"].cast(pa.string()), task))
    seen, label, student, mature = set(), [], [], []
    for name, probability in zip(
        own["impression_id"].to_pylist(), own["probability"].to_pylist(), strict=True
    ):
        found = [row for row in labels_as_of(events[name], as_of, run.attribution) if row.task == task]
        if found and name not in seen:
            seen.add(name)
            label.append(found[0].label)
            mature.append(found[0].mature)
            student.append(probability)
    return np.array(label), np.array(student), np.array(mature)


@pytest.mark.parametrize("task", ["click", "conversion"])
def test_log_loss_and_auc_are_those_of_scikit_learn(
    run: SimulatedRun, metrics: dict[str, Any], task: str
) -> None:
    label, student, mature = judged_by_rule(run, task)
    for name, kept in (("mature", mature), ("provisional", ~mature)):
        figures = metrics[task]["by_maturity"][name]["student"]
        assert figures["rows"] == int(kept.sum())
        assert figures["positives"] == int(label[kept].sum())
        assert figures["log_loss"] == pytest.approx(log_loss(label[kept], student[kept]), rel=1e-12)
        assert figures["auc"] == pytest.approx(roc_auc_score(label[kept], student[kept]), rel=1e-12)
        assert figures["pcoc"] == pytest.approx(student[kept].sum() / label[kept].sum(), rel=1e-12)


@pytest.mark.parametrize("task", ["click", "conversion"])
def test_hours_and_maturities_add_up_to_the_totals(metrics: dict[str, Any], task: str) -> None:
    found = metrics[task]
    for part in ("by_hour", "by_maturity"):
        for predictor, total in found["totals"].items():
            groups = [group[predictor] for group in found[part].values()]
            assert sum(group["rows"] for group in groups) == total["rows"] == found["rows"]["judged"]
            loss = sum(group["rows"] * (group["log_loss"] or 0.0) for group in groups)
            assert loss / total["rows"] == pytest.approx(total["log_loss"])


@pytest.mark.parametrize("task", ["click", "conversion"])
def test_the_timeline_adds_up_to_the_judged_rows(metrics: dict[str, Any], task: str) -> None:
    line, judged = metrics[task]["timeline"], metrics[task]["by_maturity"]["mature"]
    rows_of = np.array(line["rows"])
    assert rows_of.sum() == judged["student"]["rows"]
    assert sum(line["positives"]) == judged["student"]["positives"]
    for predictor, figures in judged.items():
        assert rows_of @ line[predictor]["log_loss"] / rows_of.sum() == pytest.approx(figures["log_loss"])
        predicted_sum = rows_of @ line[predictor]["mean_probability"]
        assert predicted_sum / figures["positives"] == pytest.approx(figures["pcoc"])
    base = metrics[task]["base_rate"]["judged"]["log_loss"]
    assert rows_of @ line["base_rate"]["log_loss"] / rows_of.sum() == pytest.approx(base)


def test_the_running_base_rate_knows_what_was_known_before_each_row_and_nothing_else() -> None:
    rng = np.random.default_rng(4)
    log = []
    for name, start in enumerate(np.sort(rng.integers(0, 600, 60)).tolist()):
        log.append(Event(IMPRESSION, f"i{name}", f"i{name}", start, start + int(rng.integers(0, 9))))
        if rng.random() < 0.4:
            time = start + int(rng.integers(0, 40))
            log.append(Event(CLICK, f"c{name}", f"i{name}", time, time + int(rng.integers(0, 15))))
    shown = [event for event in log if event.kind == IMPRESSION]
    predictions = predicted(
        [event.event_id for event in shown],
        "click",
        [0.3] * len(shown),
        [event.event_time for event in shown],
    )
    found = evaluate(predictions, tables_of(log), WINDOWS, as_of=10_000).metrics["click"]["base_rate"]
    losses: dict[str, list[float]] = {"closed_windows": [], "known_labels": []}
    truth = {
        row.impression_id: row.label for row in labels_as_of(log, 10_000, WINDOWS) if row.task == "click"
    }
    for event in shown:
        # What the rule says one tick before: its labels, and which windows have closed.
        known = [row for row in labels_as_of(log, event.event_time - 1, WINDOWS) if row.task == "click"]
        for rule, counted in (
            ("closed_windows", [row for row in known if row.event_time + 60 < event.event_time]),
            ("known_labels", known),
        ):
            rate = (0.5 + sum(row.label for row in counted)) / (1.0 + len(counted))
            losses[rule].append(-math.log(rate if truth[event.impression_id] else 1 - rate))
    means = {rule: float(np.mean(values)) for rule, values in losses.items()}
    best = min(means, key=means.__getitem__)
    assert found["rule"] == best
    assert found["log_loss"] == pytest.approx(means[best], rel=1e-12)


@pytest.mark.parametrize("task", ["click", "conversion"])
def test_regret_is_the_mean_divergence_from_the_truth(
    run: SimulatedRun, metrics: dict[str, Any], task: str
) -> None:
    truth_of = dict(
        zip(
            run.simulation.truth["impression_id"].to_pylist(),
            run.simulation.truth[f"{task}_probability"].to_pylist(),
            strict=True,
        )
    )
    own = run.predictions.filter(pc.equal(run.predictions["task"].cast(pa.string()), task))
    student_of: dict[str, float] = {}
    for name, probability in zip(
        own["impression_id"].to_pylist(), own["probability"].to_pylist(), strict=True
    ):
        student_of.setdefault(name, probability)
    as_of = latest_arrival(run.tables)
    judged = evaluate(run.predictions, run.tables, run.attribution, as_of=as_of).metrics[task]["rows"][
        "judged"
    ]
    if task == "conversion":
        clicked = set(run.tables[1]["impression_id"].to_pylist())
        student_of = {name: value for name, value in student_of.items() if name in clicked}
    t = np.array([truth_of[name] for name in student_of])
    p = np.array(list(student_of.values()))
    divergence = t * np.log(t / p) + (1 - t) * np.log((1 - t) / (1 - p))
    found = metrics[task]["regret"]
    assert found["student"]["rows"] == judged
    # A few impressions lose their window or their click by lateness; they cannot move the mean by a percent.
    assert found["student"]["regret"] == pytest.approx(divergence.mean(), rel=0.01)
    assert found["student"]["true_pcoc"] == pytest.approx(p.sum() / t.sum(), rel=0.01)


@pytest.mark.parametrize("task", ["click", "conversion"])
def test_predictors_are_ranked_as_they_were_made(metrics: dict[str, Any], task: str) -> None:
    found = metrics[task]
    regret = {
        name: found["regret"][name]["regret"]
        for name in ("student", "student_uncalibrated", "teacher", "base_rate")
    }
    assert regret["student"] == min(regret.values())
    assert regret["base_rate"] == max(regret.values())
    assert abs(found["regret"]["student"]["true_pcoc"] - 1) < 0.03
    assert found["paired"]["student_less_teacher"]["mean"] < 0
    assert found["calibration"]["student"]["status"] == "good"
    assert found["regret"]["oracle"]["log_loss"] < found["by_maturity"]["mature"]["student"]["log_loss"]


def test_without_user_keys_the_users_of_the_log_are_taken(run: SimulatedRun, metrics: dict[str, Any]) -> None:
    bare = evaluate(run.predictions.drop_columns(["user_key"]), run.tables, run.attribution).metrics
    for task in ("click", "conversion"):
        by_key = metrics[task]["totals"]["student"]["gauc"]
        assert bare[task]["totals"]["student"]["gauc"] == pytest.approx(by_key, rel=1e-12)


def test_the_truth_must_cover_every_judged_impression(run: SimulatedRun) -> None:
    with pytest.raises(DataError, match="truth of every judged impression"):
        evaluate(run.predictions, run.tables, run.attribution, truth=run.simulation.truth.slice(0, 100))
    with pytest.raises(DataError, match="Missing: click_probability"):
        evaluate(
            run.predictions,
            run.tables,
            run.attribution,
            truth=run.simulation.truth.drop_columns(["click_probability"]),
        )


def test_files_hold_the_metrics_and_no_number_that_json_lacks(run: SimulatedRun, tmp_path: Path) -> None:
    evaluation = run.evaluate()
    written = evaluation.write(tmp_path)
    assert [path.name for path in written] == ["metrics.json", "reliability.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    metrics, reliability = (json.loads(path.read_text(), parse_constant=refuse) for path in written)
    assert metrics == json.loads(json.dumps(evaluation.metrics))
    table = reliability["click"]["student"]["table"]
    assert sum(row["rows"] for row in table) == metrics["click"]["by_maturity"]["mature"]["student"]["rows"]


def test_a_log_of_years_gets_a_timeline_of_at_most_120_bins_of_whole_days() -> None:
    rng = np.random.default_rng(0)
    time = rng.integers(0, 7000 * DAY_MS, 5_000)
    label = rng.random(5_000) < 0.3
    even = np.full(5_000, 0.3)
    line = timeline(
        JudgedRows({"student": even}, label, label | True, time, time, {"known_labels": even}), "known_labels"
    )
    assert len(line["start"]) <= 120
    assert line["bin_ms"] % DAY_MS == 0
    short = timeline(
        JudgedRows(
            {"student": even}, label, label | True, time % (3 * HOUR_MS), time, {"known_labels": even}
        ),
        "known_labels",
    )
    assert (short["bin_ms"], len(short["start"])) == (HOUR_MS, 3)


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(run: SimulatedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_simulation(run.simulation, folder / "events")
    pq.write_table(run.predictions, folder / "predictions.parquet")
    return folder


def command(folder: Path, *more: str) -> Any:
    return CliRunner().invoke(
        cli,
        [
            "evaluate",
            "--predictions",
            str(folder / "predictions.parquet"),
            "--events",
            str(folder / "events"),
            "--truth",
            str(folder / "events" / "truth.parquet"),
            "--out",
            str(folder / "out"),
            *more,
        ],
    )


def test_command_writes_what_the_function_says_and_prints_a_table(
    folder: Path, metrics: dict[str, Any]
) -> None:
    result = command(folder, "--set", "attribution.attribution_window=24h")
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "out" / "metrics.json").read_text())
    assert written["click"]["totals"] == json.loads(json.dumps(metrics["click"]["totals"]))
    shown = metrics["conversion"]["by_maturity"]["mature"]["student"]["log_loss"]
    assert f"{shown:.5f}" in result.stdout


def test_command_refuses_a_truth_that_was_computed_for_other_windows(folder: Path) -> None:
    result = command(folder)
    assert result.exit_code == 2
    assert "--set attribution.attribution_window=1d" in result.stderr


def test_command_names_a_file_that_is_not_there(folder: Path) -> None:
    result = command(folder, "--predictions", str(folder / "nowhere.parquet"))
    assert result.exit_code == 3
    assert "nowhere.parquet. There is no such file" in result.stderr
