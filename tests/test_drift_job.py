"""Drift of a log between two windows: features, labels, predictions, and the command that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.cli import cli
from jobs.drift import drift_between, drift_document, drift_of_labels, drift_of_predictions
from pipelines.config_sections import AttributionConfig
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import DataError
from pipelines.feature_spec import Categorical, FeatureSpec, Numeric, Sequence
from pipelines.outcomes import Tables

DAY_ONE, DAY_TWO = (0, DAY_MS), (DAY_MS, 2 * DAY_MS)
N = 6_000


def log_of(second_day: dict[str, Any] | None = None, click_rates: tuple[float, float] = (0.2, 0.2)) -> Tables:
    """Two days of impressions, half each; ``second_day`` says which features change, and to what."""
    rng = np.random.default_rng(8)
    half = N // 2
    first = {
        "campaign": rng.choice(["a", "b", "c"], half, p=[0.6, 0.3, 0.1]).tolist(),
        "price": rng.normal(10, 2, half).tolist(),
        "tags": [["x", "y"] if draw < 0.5 else ["x"] for draw in rng.random(half)],
    }
    fresh = {
        "campaign": rng.choice(["a", "b", "c"], half, p=[0.6, 0.3, 0.1]).tolist(),
        "price": rng.normal(10, 2, half).tolist(),
        "tags": [["x", "y"] if draw < 0.5 else ["x"] for draw in rng.random(half)],
        **(second_day or {}),
    }
    ids = [f"i{n}" for n in range(N)]
    time = np.sort(np.concatenate([rng.integers(1, DAY_MS, half), rng.integers(DAY_MS, 2 * DAY_MS, half)]))
    impressions = pa.table(
        {
            "event_id": ids,
            "impression_id": ids,
            "event_time": time,
            "arrival_time": time,
            "user_id": [f"u{n % 50}" for n in range(N)],
            "item_id": [f"t{n % 20}" for n in range(N)],
            **{name: pa.array(first[name] + fresh[name]) for name in first},
        }
    )
    rate = np.where(time < DAY_MS, *click_rates)
    clicked = np.flatnonzero(rng.random(N) < rate)
    clicks = pa.table(
        {
            "event_id": [f"c{n}" for n in clicked],
            "impression_id": [ids[n] for n in clicked],
            "event_time": time[clicked] + 1_000,
            "arrival_time": time[clicked] + 1_000,
        }
    )
    conversions = clicks.slice(0, 0).append_column("op", pa.array([], pa.string()))
    # The last event closes all click windows before it.
    late = pa.table(
        {
            "event_id": ["late"],
            "impression_id": ["nobody"],
            "event_time": [3 * DAY_MS],
            "arrival_time": [3 * DAY_MS],
            "op": ["assert"],
        }
    )
    return impressions, clicks, pa.concat_tables([conversions, late])


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["feature"]: row for row in rows}


def test_nothing_drifts_between_windows_of_one_distribution() -> None:
    rows = drift_between(log_of(), None, reference=DAY_ONE, current=DAY_TWO)
    assert {row["feature"]: row["verdict"] for row in rows} == {
        "campaign": "ok",
        "price": "ok",
        "tags": "ok",
    }


def test_a_moved_number_and_a_new_category_drift_and_come_first() -> None:
    rng = np.random.default_rng(3)
    half = N // 2
    moved = {
        "price": rng.normal(13, 2, half).tolist(),
        "campaign": rng.choice(["a", "new"], half, p=[0.6, 0.4]).tolist(),
    }
    rows = drift_between(log_of(moved), None, reference=DAY_ONE, current=DAY_TWO)
    assert [row["verdict"] for row in rows] == ["drifted", "drifted", "ok"]
    assert rows[-1]["feature"] == "tags"
    # Two normals 1.5 standard deviations apart: KS = 2Φ(0.75) - 1.
    assert by_name(rows)["price"]["ks"] == pytest.approx(0.547, abs=0.03)
    share = moved["campaign"].count("new") / half
    assert by_name(rows)["campaign"]["new_mass"] == pytest.approx(share)


def test_out_of_vocabulary_is_what_no_earlier_impression_had_not_only_what_the_reference_lacked() -> None:
    impressions, clicks, conversions = log_of()
    time = impressions["event_time"].to_numpy()
    # "d" was seen on day one, but not in the reference hour; "e" was never seen before day two.
    campaign = np.where(time < 2 * HOUR_MS, "a", np.where(time < DAY_MS, "d", "e")).astype(object)
    campaign[(time >= DAY_MS) & (np.arange(N) % 4 == 0)] = "d"
    place = impressions.column_names.index("campaign")
    changed = impressions.set_column(place, "campaign", pa.array(campaign, pa.string()))
    rows = drift_between((changed, clicks, conversions), None, reference=(0, 2 * HOUR_MS), current=DAY_TWO)
    row = by_name(rows)["campaign"]
    current = campaign[time >= DAY_MS]
    assert row["new_mass"] == 1.0
    assert row["oov_rate"] == pytest.approx((current == "e").mean())


def test_null_rates_are_those_of_the_windows_and_an_empty_list_counts_as_null() -> None:
    half = N // 2
    holes: dict[str, Any] = {
        "price": [None if n % 4 == 0 else 10.0 for n in range(half)],
        "tags": [[] if n % 2 == 0 else ["x"] for n in range(half)],
    }
    rows = by_name(drift_between(log_of(holes), None, reference=DAY_ONE, current=DAY_TWO))
    assert rows["price"]["null_rate_reference"] == 0.0
    assert rows["price"]["null_rate_current"] == 0.25
    assert rows["tags"]["null_rate_current"] == 0.5
    assert rows["price"]["verdict"] == "drifted"


def test_the_spec_says_what_a_feature_is_and_a_missing_column_is_all_null() -> None:
    spec = FeatureSpec(
        categorical=(Categorical(name="campaign", buckets=10), Categorical(name="gone", buckets=10)),
        numeric=(Numeric(name="price", low=0, high=20, mean=10, std=2),),
        sequence=(Sequence(name="tags", buckets=10, max_length=2),),
    )
    rows = by_name(drift_between(log_of(), spec, reference=DAY_ONE, current=DAY_TWO))
    assert set(rows) == {"campaign", "gone", "price", "tags"}
    assert rows["gone"]["null_rate_current"] == 1.0
    assert rows["price"]["kind"] == "numeric"


def test_a_numeric_feature_that_holds_words_is_refused() -> None:
    spec = FeatureSpec(numeric=(Numeric(name="campaign", low=0, high=1, mean=0, std=1),))
    with pytest.raises(DataError, match="feature campaign is numeric in the feature spec"):
        drift_between(log_of(), spec, reference=DAY_ONE, current=DAY_TWO)


def test_an_empty_window_is_refused_and_told_what_the_log_holds() -> None:
    with pytest.raises(DataError, match="The log holds 1970-01-01T00:00:"):
        drift_between(log_of(), None, reference=DAY_ONE, current=(9 * DAY_MS, 10 * DAY_MS))


def test_a_click_rate_that_doubles_is_a_drift_of_the_label() -> None:
    windows = AttributionConfig()
    same = drift_of_labels(log_of(), windows, reference=DAY_ONE, current=DAY_TWO)
    assert {row["verdict"] for row in same} == {"ok"}
    doubled = log_of(click_rates=(0.2, 0.4))
    rows = by_name(drift_of_labels(doubled, windows, reference=DAY_ONE, current=DAY_TWO))
    assert rows["click label"]["verdict"] != "ok"
    assert rows["click label"]["rows_reference"] == N // 2


def test_predictions_are_compared_by_task_and_time_of_prediction() -> None:
    rng = np.random.default_rng(5)
    time = np.arange(2_000) * (2 * DAY_MS // 2_000)
    parts = [
        pa.table(
            {
                "task": [task] * 2_000,
                "predicted_at": time,
                "logit": rng.normal(0, 1, 2_000) + shift * (time >= DAY_MS),
            }
        )
        for task, shift in (("click", 0.0), ("conversion", 1.0))
    ]
    rows = by_name(drift_of_predictions(pa.concat_tables(parts), reference=DAY_ONE, current=DAY_TWO))
    assert rows["click logit"]["verdict"] == "ok"
    assert rows["conversion logit"]["verdict"] == "drifted"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    impressions, clicks, _ = log_of({"price": rng.normal(13, 2, N // 2).tolist()})
    pq.write_table(impressions, tmp_path / "impressions.parquet")
    pq.write_table(clicks, tmp_path / "clicks.parquet")
    return tmp_path


def command(folder: Path, reference: str, *more: str) -> Any:
    current = "1970-01-02T00:00:00Z/1970-01-03T00:00:00Z"
    out = str(folder / "found" / "drift.json")
    return CliRunner().invoke(
        cli,
        [
            "drift",
            "--events",
            str(folder),
            "--reference",
            reference,
            "--current",
            current,
            "--out",
            out,
            *more,
        ],
    )


def test_command_writes_the_document_and_prints_the_worst_features(folder: Path) -> None:
    result = command(folder, "1970-01-01T00:00:00Z/1970-01-02T00:00:00Z")
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "found" / "drift.json").read_text())
    assert (found["reference"], found["current"]) == ([0, DAY_MS], [DAY_MS, 2 * DAY_MS])
    assert found["features"][0]["feature"] == "price"
    assert "price" in result.stdout
    assert "drifted" in result.stdout


def test_the_document_of_the_function_is_what_the_command_writes(folder: Path) -> None:
    from pipelines.event_files import EventFiles

    command(folder, "1970-01-01T00:00:00Z/1970-01-02T00:00:00Z")
    written = json.loads((folder / "found" / "drift.json").read_text())
    direct = drift_document(
        EventFiles(folder).tables, None, reference=DAY_ONE, current=DAY_TWO, attribution=AttributionConfig()
    )
    assert written == json.loads(json.dumps(direct))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("1970-01-01T00:00:00Z", "two times with a slash between"),
        ("1970-01-02T00:00:00Z/1970-01-01T00:00:00Z", "expected FROM before TO"),
        ("1970-01-01T00:00:00/1970-01-02T00:00:00", "time with an offset"),
    ],
)
def test_command_refuses_what_is_no_window(folder: Path, reference: str, message: str) -> None:
    result = command(folder, reference)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_command_fails_with_the_code_of_bad_data_on_an_empty_window(folder: Path) -> None:
    result = command(folder, "1980-01-01T00:00:00Z/1980-01-02T00:00:00Z")
    assert result.exit_code == 3
    assert "choose windows inside the log" in result.stderr
