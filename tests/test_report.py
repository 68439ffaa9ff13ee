"""The report: what it says of a run, what it says is missing, and that it carries everything with it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from jobs.cli import cli
from jobs.evaluation import evaluate
from jobs.report import write_report
from jobs.report_page import render
from jobs.report_plots import TimeBins
from jobs.report_run import RunFolder
from jobs.report_verdicts import base_rate_alarm, run_verdicts
from pipelines.duration import HOUR_MS
from pipelines.errors import DataError
from tests.run_folder import SimulatedRun, dump, simulated_run, write_run


@pytest.fixture(scope="module")
def run() -> SimulatedRun:
    return simulated_run(impressions=30_000, days=4.0)


@pytest.fixture(scope="module")
def full(run: SimulatedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(run, tmp_path_factory.mktemp("report"))


@pytest.fixture
def folder(full: Path, tmp_path: Path) -> Path:
    """A copy of the full run folder, to take things out of."""
    return Path(shutil.copytree(full, tmp_path / "run"))


def statuses(folder: Path) -> dict[str, str]:
    return {verdict.name: verdict.status for verdict in run_verdicts(RunFolder.read(folder))}


def text_of(html: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<style>.*?</style>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def edit(folder: Path, name: str, change: Any) -> None:
    path = folder / f"{name}.json"
    document = json.loads(path.read_text())
    change(document)
    dump(path, document)


# --- verdicts --------------------------------------------------------------------------------------------


def test_a_calibrated_student_that_beats_its_teacher_passes_every_check_of_quality(full: Path) -> None:
    found = statuses(full)
    for check in (
        "beats the running base rate",
        "online beats the frozen teacher",
        "regret below the frozen teacher's",
        "true PCOC",
    ):
        assert found[f"click: {check}"] == "good", check
    assert found["offline / online consistency"] == "good"
    assert found["rows accounted for"] == "good"
    assert found["recovery"] == "good"
    assert found["freshness"] == "good"


def test_what_was_not_recorded_is_unknown_never_good(folder: Path) -> None:
    for name in ("drift", "consistency", "freshness", "accounting", "summary"):
        (folder / f"{name}.json").unlink()
    found = statuses(folder)
    for check in (
        "offline / online consistency",
        "feature drift",
        "freshness",
        "rows accounted for",
        "recovery",
    ):
        assert found[check] == "unknown", check


def test_a_student_that_is_worse_than_the_running_base_rate_is_told_at_the_top(
    run: SimulatedRun, tmp_path: Path
) -> None:
    predictions = run.predictions
    guess = np.random.default_rng(0).beta(1, 6, predictions.num_rows).clip(1e-4, 0.99)
    place = predictions.column_names.index("probability")
    evaluate(
        predictions.set_column(place, "probability", pa.array(guess)), run.tables, run.attribution
    ).write(tmp_path)
    html = render(RunFolder.read(tmp_path))
    alarm = html.index("The click model does not beat the running base rate")
    assert alarm < html.index("Verdicts</h2>")
    assert "must not be served" in html
    assert statuses(tmp_path)["click: beats the running base rate"] == "bad"
    assert "Do not rely on this run" in html


def test_a_gain_over_the_base_rate_within_chance_is_not_taken_for_good(folder: Path) -> None:
    def shrink(metrics: dict[str, Any]) -> None:
        pair = metrics["click"]["paired"]["student_less_base_rate"]
        pair["standard_error"] = abs(pair["mean"])

    edit(folder, "metrics", shrink)
    assert statuses(folder)["click: beats the running base rate"] == "watch"
    alarm = base_rate_alarm(RunFolder.read(folder), "click")
    assert alarm is not None
    assert "is not proven to beat the running base rate" in alarm


def test_the_slowest_stage_is_held_against_the_budget(folder: Path) -> None:
    edit(folder, "freshness", lambda document: document.update(budget_s=0.5))
    assert statuses(folder)["freshness"] == "bad"


def test_freshness_is_taken_from_the_summary_where_there_is_no_file_of_its_own(folder: Path) -> None:
    (folder / "freshness.json").unlink()
    edit(folder, "summary", lambda document: document.update(freshness_s={"p50": 1.5, "p95": 4.25}))
    assert statuses(folder)["freshness"] == "good"
    assert "4.2 s" in text_of(render(RunFolder.read(folder)))


def test_drift_asks_for_a_look_and_does_not_fail_the_run(full: Path) -> None:
    drifted = [row for row in RunFolder.read(full).drift["features"] if row["verdict"] == "drifted"]  # type: ignore[index]
    assert drifted
    assert statuses(full)["feature drift"] == "watch"


def test_lost_rows_fail_the_run_and_are_counted(folder: Path) -> None:
    edit(folder, "accounting", lambda document: document["difference"].update(click=3))
    assert statuses(folder)["rows accounted for"] == "bad"
    assert "but 3 of them are lost or counted twice" in text_of(render(RunFolder.read(folder)))


# --- the page --------------------------------------------------------------------------------------------


def test_figures_of_every_file_are_on_the_page(full: Path) -> None:
    run = RunFolder.read(full)
    text = text_of(render(run))
    assert run.metrics is not None
    for task in ("click", "conversion"):
        for figures in run.metrics[task]["by_maturity"]["mature"].values():
            assert f"{figures['log_loss']:.5f}" in text
            for name in ("ne", "auc", "gauc", "pcoc"):
                assert f"{figures[name]:.4f}" in text
        assert f"{1000 * run.metrics[task]['regret']['student']['regret']:.3f}" in text
        assert f"{run.metrics[task]['base_rate']['judged']['log_loss']:.5f}" in text
    assert run.drift is not None
    for row in run.drift["features"]:
        assert row["feature"] in text
    assert run.accounting is not None
    total = sum(run.accounting["read"].values())
    assert f"{total:,} rows in, {total:,} rows accounted for." in text
    assert run.summary is not None
    assert run.summary["recovery"]["digest"] in text
    assert run.config_digest is not None
    assert run.config_digest[:16] in text


def test_sections_stand_in_the_order_in_which_a_reviewer_asks(full: Path) -> None:
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", render(RunFolder.read(full)))
    assert titles == [
        "Verdicts",
        "What was run",
        "Click model: P(click | impression)",
        "Conversion model: P(conversion | click)",
        "Drift",
        "Offline / online consistency",
        "Freshness",
        "Row accounting",
        "Recovery",
        "Stages and links",
    ]


def test_the_page_loads_nothing_runs_nothing_and_stays_below_two_megabytes(full: Path) -> None:
    path = write_report(full)
    assert path == full / "report.html"
    html = path.read_text()
    assert len(html) < 2_000_000
    assert "<script" not in html
    for address in re.findall(r'(?:src|srcset|poster|action)="([^"]*)"', html):
        assert address.startswith("data:image/svg+xml;base64,")
    assert "@import" not in html
    assert "url(" not in html
    for plot in re.findall(r"base64,([A-Za-z0-9+/=]+)", html):
        svg = base64.b64decode(plot).decode()
        assert not re.search(r'(?:href|src)="(?!#)', svg.replace('xlink:href="#', 'href="#'))


def test_the_same_run_gives_the_same_bytes(full: Path, tmp_path: Path) -> None:
    first, again = (write_report(full, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == again


def test_text_from_the_data_is_shown_as_text(folder: Path) -> None:
    hostile = "<script>alert(1)</script>"
    edit(folder, "drift", lambda document: document["features"][0].update(feature=hostile, why=hostile))
    edit(
        folder,
        "summary",
        lambda document: document.update(events=hostile, links={"x": "javascript:alert(1)"}),
    )
    html = render(RunFolder.read(folder))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert 'href="javascript' not in html


def test_each_file_may_be_missing_and_is_called_so(folder: Path) -> None:
    sentences = {
        "reliability": "The reliability diagram: not recorded. ctrstream evaluate writes reliability.json",
        "drift": "Drift: not recorded. ctrstream drift writes drift.json",
        "consistency": "Consistency: not recorded. ctrstream consistency rescores",
        "freshness": "Freshness: not recorded. ctrstream stream measures it",
        "accounting": "Row accounting: not recorded. ctrstream backtest",
        "summary": "Recovery: not recorded. ctrstream demo kills the worker",
    }
    for name in sentences:
        (folder / f"{name}.json").unlink()
    text = text_of(render(RunFolder.read(folder)))
    for sentence in sentences.values():
        assert sentence in text


def test_predictions_that_were_not_judged_are_called_so(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    text = text_of(render(RunFolder.read(folder)))
    assert "Quality: not recorded. ctrstream evaluate judges predictions.parquet by the log" in text
    assert statuses(folder)["quality"] == "unknown"


def test_a_task_that_was_not_predicted_has_a_section_with_the_reason(
    run: SimulatedRun, tmp_path: Path
) -> None:
    clicks = run.predictions.filter(pa.compute.equal(run.predictions["task"].cast(pa.string()), "click"))
    reason = "fewer than 50 conversions in the warm-up"
    evaluate(clicks, run.tables, run.attribution, skipped={"conversion": reason}).write(tmp_path)
    text = text_of(render(RunFolder.read(tmp_path)))
    assert "Conversion model: not judged. Fewer than 50 conversions in the warm-up" in text


def test_a_log_with_one_class_and_one_hour_still_gets_a_page(run: SimulatedRun, tmp_path: Path) -> None:
    converted = run.predictions.filter(
        pa.compute.and_(
            pa.compute.equal(run.predictions["task"].cast(pa.string()), "conversion"),
            pa.compute.is_in(run.predictions["impression_id"], run.tables[2]["impression_id"]),
        )
    ).slice(0, 12)
    impressions, clicks, conversions = run.tables
    kept = conversions.filter(pa.compute.equal(conversions["op"], "assert"))
    evaluate(converted, (impressions, clicks, kept), run.attribution).write(tmp_path)
    figures = RunFolder.read(tmp_path).task("conversion")["totals"]["student"]
    assert figures["positives"] == figures["rows"]
    assert figures["ne"] is None
    assert "Plots: not shown. All labels are alike" in text_of(render(RunFolder.read(tmp_path)))


def test_before_any_window_has_closed_the_page_says_that_labels_are_provisional(
    run: SimulatedRun, tmp_path: Path
) -> None:
    as_of = run.warm_up_until + HOUR_MS // 4
    early = run.predictions.filter(pa.compute.less(run.predictions["arrived_at"], as_of))
    evaluate(early, run.tables, run.attribution, as_of=as_of).write(tmp_path)
    assert "by provisional labels: no window has closed yet" in text_of(render(RunFolder.read(tmp_path)))


def test_label_policies_that_training_settled_are_said_for_each_task(folder: Path) -> None:
    config = folder / "config.toml"
    assert "Label policy auto" in text_of(render(RunFolder.read(folder)))
    config.write_text(
        config.read_text(encoding="utf-8")
        .replace("[labels.click]", '[labels.click]\npolicy = "fnw"')
        .replace(
            "[labels.conversion]", '[labels.conversion]\npolicy = "esdfm"\nobservation_window = "1213m"'
        ),
        encoding="utf-8",
    )
    said = "click fnw; conversion esdfm, first row after 20h 13m (settled from the delays)"
    assert said in text_of(render(RunFolder.read(folder)))


def test_time_bins_add_rows_losses_and_predictions_of_neighbouring_hours() -> None:
    hours = 200
    rng = np.random.default_rng(0)
    rows = rng.integers(50, 80, hours)
    positives = rng.integers(1, 5, hours)
    loss, probability = rng.random(hours), rng.random(hours)
    one = {"log_loss": loss.tolist(), "mean_probability": probability.tolist()}
    line = {
        "bin_ms": HOUR_MS,
        "start": [hour * HOUR_MS for hour in range(hours)],
        "rows": rows.tolist(),
        "positives": positives.tolist(),
        "student": one,
    }
    bins = TimeBins(line)
    together = bins.width // HOUR_MS
    assert together > 1
    first = slice(0, together)
    assert bins.rows[0] == rows[first].sum()
    assert bins.loss["student"][0] == pytest.approx((rows * loss)[first].sum())
    assert bins.pcoc("student")[0] == pytest.approx(
        (rows * probability)[first].sum() / positives[first].sum()
    )
    assert bins.rows.sum() == rows.sum()


# --- the folder and the command --------------------------------------------------------------------------


def test_command_writes_the_page_and_prints_where_it_is(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["report", "--run", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "nowhere"):
        result = CliRunner().invoke(cli, ["report", "--run", str(wrong)])
        assert result.exit_code == 3
        assert "expected a run folder" in result.stderr


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"click": ')
    with pytest.raises(DataError, match=r"metrics\.json is not valid JSON"):
        RunFolder.read(folder)
