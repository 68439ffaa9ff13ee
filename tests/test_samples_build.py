"""A snapshot built by Spark says what the rule says, whole or not at all, and the same when built again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.samples import command
from jobs.samples_build import build
from jobs.samples_ingest import ingest
from pipelines.attribution import Event, labels_as_of
from pipelines.config import Config, with_values
from pipelines.config_sections import AttributionConfig, CalibrationConfig
from pipelines.delay import DelayCurve
from pipelines.duration import DAY_MS, HOUR_MS, MINUTE_MS
from pipelines.errors import ConfigError, DataError
from pipelines.events import CLICK, CONVERSION, IMPRESSION, TOPICS
from pipelines.feature_spec import Categorical, FeatureSpec, Hour, Numeric
from pipelines.features import encode
from pipelines.hashing import hash_text
from pipelines.snapshot import MANIFEST_NAME, read_manifest, read_rows, read_snapshot, read_spec
from pipelines.snapshot_check import check_snapshot

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

START = 1_767_571_200_000
AS_OF = START + 3 * DAY_MS
RULE = AttributionConfig(click_window=30 * MINUTE_MS, attribution_window=DAY_MS)
CONFIG = Config(attribution=RULE, calibration=CalibrationConfig(segments=("campaign_id",)))
SPEC = FeatureSpec(
    categorical=(
        Categorical(name="user_id", buckets=50),
        Categorical(name="campaign_id", buckets=20),
        Categorical(name="position", buckets=8, wide_only=True),
    ),
    numeric=(Numeric(name="price", low=0, high=9, mean=4, std=2, boundaries=(2.0, 5.0)),),
    hour=Hour(),
)


def random_events(n: int, seed: int = 1) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Impressions over four days with clicks and conversions, some late, doubled, retracted, orphaned."""
    rng = np.random.default_rng(seed)
    shown = np.sort(START + rng.integers(0, 4 * DAY_MS, n))
    # A number sign in an id must not pass for the mark of a further copy.
    ids = np.array([f"i#{k}" for k in range(n)])

    def arrival(time: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        late = rng.random(len(time)) < 0.05
        return time + rng.integers(0, 2_000, len(time)) + late * rng.integers(0, 3 * HOUR_MS, len(time))

    impressions = pa.table(
        {
            "event_id": ids,
            "impression_id": ids,
            "event_time": shown,
            "arrival_time": arrival(shown),
            "user_id": [f"u{k}" for k in rng.integers(0, 40, n)],
            "item_id": [f"t{k}" for k in rng.integers(0, 9, n)],
            "position": pa.array(rng.integers(1, 5, n), pa.int32()),
            "campaign_id": [f"c{k}" for k in rng.integers(0, 12, n)],
            "price": pa.array(rng.uniform(0, 9, n), mask=rng.random(n) < 0.1),
        }
    )
    clicked = np.flatnonzero(rng.random(n) < 0.4)
    clicked = np.sort(np.append(clicked, clicked[::9]))
    time = shown[clicked] + rng.integers(-2_000, 45 * MINUTE_MS, len(clicked))
    time = np.maximum(time, shown[clicked] - 1_000)
    clicks = pa.table(
        {
            "event_id": [f"c{k}" for k in range(len(clicked))],
            "impression_id": ids[clicked],
            "event_time": time,
            "arrival_time": arrival(time),
        }
    )
    bought = rng.choice(len(clicked), len(clicked) // 2)
    time = time[bought] + (rng.exponential(0.4 * DAY_MS, len(bought))).astype(np.int64)
    conversions = pa.table(
        {
            "event_id": [f"v{k}" for k in range(len(bought))],
            "impression_id": ids[clicked][bought],
            "event_time": time,
            "arrival_time": arrival(time),
            "op": rng.choice(["assert", "retract", "restate"], len(bought), p=[0.8, 0.1, 0.1]),
            "credit": rng.choice([0.5, 1.0], len(bought)),
        }
    )
    shown_to_reader = impressions.filter(pa.array(rng.random(n) > 0.02))  # the others' clicks are orphans
    return doubled(shown_to_reader, rng), doubled(clicks, rng), doubled(conversions, rng)


def doubled(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    again = table.take(pa.array(rng.integers(0, len(table), len(table) // 20)))
    later = pa.array(again.column("arrival_time").to_numpy() + rng.integers(1, HOUR_MS, len(again)))
    index = table.column_names.index("arrival_time")
    return pa.concat_tables([table, again.set_column(index, "arrival_time", later)])


def write_log(folder: Path, tables: tuple[pa.Table, pa.Table, pa.Table]) -> Path:
    folder.mkdir(parents=True)
    for topic, table in zip(TOPICS, tables, strict=True):
        pq.write_table(table, folder / f"{topic}.parquet")
    return folder


def events_of(tables: tuple[pa.Table, pa.Table, pa.Table]) -> list[Event]:
    return [
        Event(
            kind, row["event_id"], row["impression_id"], row["event_time"], row["arrival_time"],
            row.get("op") or "assert", row.get("credit") or 1.0,
        )
        for kind, table in zip((IMPRESSION, CLICK, CONVERSION), tables, strict=True)
        for row in table.to_pylist()
    ]  # fmt: skip


def made(
    spark: SparkSession,
    lake: Path,
    out: Path,
    as_of: int,
    window: int,
    config: Config,
    spec: FeatureSpec | None,
    **sampling: Any,
) -> Path:
    return Path(build(spark, lake, out, as_of, window, with_values(config, "samples", sampling), spec))


@pytest.fixture(scope="module")
def log() -> tuple[pa.Table, pa.Table, pa.Table]:
    return random_events(3_000)


@pytest.fixture(scope="module")
def lake(spark: SparkSession, log: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    ingest(spark, folder / "lake", CONFIG, events=write_log(folder / "log", log))
    return folder / "lake"


@pytest.fixture(scope="module")
def snapshot(spark: SparkSession, lake: Path) -> Path:
    return made(spark, lake, lake.parent / "snapshots", AS_OF, 2 * DAY_MS, CONFIG, SPEC)


def test_snapshot_holds_the_rows_of_the_rule(snapshot: Path, log: Any) -> None:
    said = {}
    for task in ("click", "conversion"):
        for row in read_rows(snapshot, task).to_pylist():
            assert row["sample_id"] == f"{row['impression_id']}:{row['task']}"
            said[row["sample_id"]] = tuple(
                row[name]
                for name in (
                    "kind",
                    "label",
                    "label_version",
                    "event_time",
                    "known_at",
                    "elapsed",
                    "mature",
                    "outcome_known_at",
                )
            )
    expected = {
        f"{row.impression_id}:{row.task}": (row.kind, row.label, row.label_version, *row[6:])
        for row in labels_as_of(events_of(log), AS_OF, RULE)
        if AS_OF - 2 * DAY_MS <= row.event_time < AS_OF
    }
    assert said == expected
    assert len(expected) > 1_500


def test_features_are_those_of_the_one_extraction_code(snapshot: Path, log: Any) -> None:
    impressions = {row["impression_id"]: row for row in reversed(log[0].to_pylist())}
    for task in ("click", "conversion"):
        table = read_rows(snapshot, task)
        own = pa.Table.from_pylist([impressions[name] for name in table.column("impression_id").to_pylist()])
        encoded = encode(own, SPEC, ("campaign_id",))
        training = read_snapshot(snapshot, task)
        np.testing.assert_array_equal(training.buckets, encoded.buckets)
        np.testing.assert_array_equal(training.numbers, encoded.numbers)
        np.testing.assert_array_equal(training.user_key, encoded.user_key)
        np.testing.assert_array_equal(training.segment_key, encoded.segment_key)
        for name in ("user_id", "item_id", "position"):
            assert table.column(name).to_pylist() == own.column(name).to_pylist()


def test_manifest_counts_every_row_and_every_event(snapshot: Path, log: Any) -> None:
    manifest = read_manifest(snapshot)
    for task, summary in manifest.tasks.items():
        training = read_snapshot(snapshot, task)
        assert (summary.rows, summary.positives) == (len(training), training.label.sum())
        assert summary.mature == int(training.mature.sum())
        assert summary.label_rate == pytest.approx(training.label.mean())
        assert summary.mature_label_rate == pytest.approx(training.label[training.mature].mean())
    for kind in ("impression", "click", "conversion"):
        classes = dict(manifest.events[kind])
        assert classes.pop("read") == sum(classes.values()) > 0
    assert manifest.events["click"]["duplicate"] > 0
    assert manifest.events["click"]["negative_delay"] > 0
    assert manifest.events["click"]["out_of_window"] > 0
    assert manifest.events["click"]["orphan"] > 0
    assert manifest.events["conversion"]["retraction"] > 0
    assert manifest.feature_spec_digest == SPEC.digest() == read_spec(snapshot).digest()
    assert check_snapshot(snapshot) == []


def test_observed_share_is_the_delay_curve_at_the_age_of_the_window(snapshot: Path) -> None:
    training = read_snapshot(snapshot, "conversion")
    curve = DelayCurve.from_state(read_manifest(snapshot).tasks["conversion"].delay_curve)
    age = np.minimum(AS_OF - training.event_time, DAY_MS + RULE.allowed_lateness)
    expected = np.where(training.mature, 1.0, curve.cdf(age))
    np.testing.assert_allclose(training.observed_share, expected, atol=1e-6)
    assert 0 < (~training.mature).sum() < len(training)
    # Exponential with mean 0.4 days, credited within 1 day: F(12 h) = (1 - exp(-1.25)) / (1 - exp(-2.5)).
    assert curve.cdf([DAY_MS / 2])[0] == pytest.approx(0.777, abs=0.06)


def test_same_inputs_return_the_same_snapshot_untouched(
    spark: SparkSession, lake: Path, snapshot: Path
) -> None:
    before = (snapshot / MANIFEST_NAME).stat().st_mtime_ns
    assert made(spark, lake, snapshot.parent, AS_OF, 2 * DAY_MS, CONFIG, SPEC) == snapshot
    assert (snapshot / MANIFEST_NAME).stat().st_mtime_ns == before


def test_built_again_elsewhere_the_content_is_equal(
    spark: SparkSession, lake: Path, snapshot: Path, tmp_path: Path
) -> None:
    again = made(spark, lake, tmp_path, AS_OF, 2 * DAY_MS, CONFIG, SPEC)
    assert again.name == snapshot.name
    for task, summary in read_manifest(snapshot).tasks.items():
        assert read_manifest(again).tasks[task].content_digest == summary.content_digest
        assert read_rows(again, task).equals(read_rows(snapshot, task))


def test_negatives_are_sampled_by_a_stable_hash_and_weighted(
    spark: SparkSession, lake: Path, snapshot: Path, tmp_path: Path
) -> None:
    rate = 0.25
    sampled = made(spark, lake, tmp_path, AS_OF, 2 * DAY_MS, CONFIG, SPEC, negative_rate=rate)
    assert sampled.name != snapshot.name
    whole, kept = read_rows(snapshot, "click").to_pylist(), read_rows(sampled, "click").to_pylist()
    expected = [
        row["sample_id"]
        for row in whole
        if row["label"] > 0 or hash_text(row["sample_id"]) >> 11 < rate * 2**53
    ]
    assert [row["sample_id"] for row in kept] == expected
    assert {(row["label"], row["weight"], row["negative_sampling_rate"]) for row in kept} == {
        (0, 4.0, 0.25),
        (1, 1.0, 0.25),
    }
    summary = read_manifest(sampled).tasks["click"]
    assert summary.label_rate == pytest.approx(read_manifest(snapshot).tasks["click"].label_rate, rel=0.1)


def test_spec_is_inferred_where_none_is_given(spark: SparkSession, lake: Path, tmp_path: Path) -> None:
    inferred = made(spark, lake, tmp_path, AS_OF, 2 * DAY_MS, CONFIG, None)
    manifest = read_manifest(inferred)
    assert manifest.feature_spec_inferred
    assert "campaign_id" in read_spec(inferred).field_names
    assert read_snapshot(inferred, "click").buckets.max() < read_spec(inferred).table_rows


def test_window_without_impressions_is_refused_and_leaves_nothing(
    spark: SparkSession, lake: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="expected impressions in the 1d before --as-of"):
        build(spark, lake, tmp_path, START - DAY_MS, DAY_MS, CONFIG, SPEC)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="expected a lake"):
        build(spark, tmp_path / "none", tmp_path, AS_OF, DAY_MS, CONFIG, SPEC)


def test_impressions_that_do_not_fit_the_spec_are_left_out_and_counted(
    spark: SparkSession, log: Any, tmp_path: Path
) -> None:
    impressions, *outcomes = log
    price = [None if value is None else str(value) for value in impressions.column("price").to_pylist()]
    price[::50] = ["cheap"] * len(price[::50])
    index = impressions.column_names.index("price")
    odd = (impressions.set_column(index, "price", pa.array(price)), *outcomes)
    ingest(spark, tmp_path / "lake", CONFIG, events=write_log(tmp_path / "log", odd))
    built = made(spark, tmp_path / "lake", tmp_path / "snapshots", AS_OF, 2 * DAY_MS, CONFIG, SPEC)
    summary = read_manifest(built).tasks["click"]
    # Copies of an impression that differ are the producer's fault: the first to arrive counts.
    assert 0.01 < summary.misfits / (summary.rows + summary.misfits) < 0.04
    assert check_snapshot(built) == []


def test_spec_that_nothing_fits_is_told_with_a_reason(
    spark: SparkSession, lake: Path, tmp_path: Path
) -> None:
    wrong = FeatureSpec(numeric=(Numeric(name="campaign_id", low=0, high=1, mean=0, std=1),))
    with pytest.raises(
        DataError, match=r"feature campaign_id must be a finite number, as in the feature spec"
    ):
        build(spark, lake, tmp_path, AS_OF, DAY_MS, CONFIG, wrong)
    assert list(tmp_path.iterdir()) == []


def test_negative_rate_and_window_out_of_range_are_refused(spark: SparkSession, lake: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples\.negative_rate"):
        made(spark, lake, lake, AS_OF, DAY_MS, CONFIG, SPEC, negative_rate=0.0)
    with pytest.raises(ConfigError, match="window longer than 0"):
        build(spark, lake, lake, AS_OF, 0, CONFIG, SPEC)


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from jobs.samples_build import build
from jobs.snapshot_write import Describer, RowWriter, Workplace
from pipelines.feature_spec import FeatureSpec
from pipelines.config import load_config
from pipelines.spark_session import spark_session

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

point, lake, out, as_of, window, spec, config = sys.argv[1:]
if point == "rows":
    Describer.partitions = die
elif point == "facts":
    RowWriter.write = die
else:
    Workplace.publish = die
spark = spark_session("killed", master="local[1]")
build(spark, lake, out, int(as_of), int(window), load_config(Path(config)), FeatureSpec.read(Path(spec)))
"""


def test_build_killed_at_any_point_leaves_nothing_visible_and_the_next_one_succeeds(
    spark: SparkSession, lake: Path, snapshot: Path, tmp_path: Path
) -> None:
    from pipelines.config import dump_config

    (tmp_path / "spec.toml").write_text(SPEC.to_toml())
    (tmp_path / "config.toml").write_text(dump_config(CONFIG))
    out = tmp_path / "snapshots"
    arguments = [lake, out, AS_OF, 2 * DAY_MS, tmp_path / "spec.toml", tmp_path / "config.toml"]
    for point, left_behind in (("facts", "scratch-"), ("rows", "data-"), ("manifest", "data-")):
        done = subprocess.run(
            [sys.executable, "-c", KILLED_BUILD, point, *map(str, arguments)],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            check=False,
            env={**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"},
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        (left,) = out.iterdir()
        # What the one before has left is swept by the next; what this one has left is no snapshot.
        folders = {path.name.rsplit(".", 2)[1] for path in left.iterdir() if path.is_dir()}
        assert len(folders) == 1
        assert any(path.name.startswith(left_behind) for path in left.iterdir())
        with pytest.raises(DataError, match="a build was cut off"):
            read_manifest(left)
    again = made(spark, lake, out, AS_OF, 2 * DAY_MS, CONFIG, SPEC)
    assert [path.name for path in out.iterdir()] == [again.name] == [snapshot.name]
    assert len([path for path in again.iterdir() if path.name.startswith(("data-", "scratch-"))]) == 1
    assert check_snapshot(again) == []
    first, second = read_manifest(snapshot), read_manifest(again)
    assert [part.content_digest for part in first.partitions] == [
        part.content_digest for part in second.partitions
    ]


def test_check_command_tells_sound_from_altered(snapshot: Path, tmp_path: Path) -> None:
    from jobs.cli import cli

    done = CliRunner().invoke(cli, ["samples", "check", "--snapshot", str(snapshot)])
    assert done.exit_code == 0, done.output
    assert "sound" in done.output
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(snapshot), str(copy)], check=True)
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["tasks"]["click"]["positives"] += 1
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    done = CliRunner().invoke(cli, ["samples", "check", "--snapshot", str(copy)])
    assert done.exit_code == 3
    assert "as in the manifest" in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["build", "--window", "7"], "expected a duration"),
        (["build", "--window", "7d", "--as-of", "2026-01-01"], "names no time zone"),
        (["build", "--window", "7d", "--spark-conf", "memory=1g"], "--spark-conf spark.some.key=value"),
        (["ingest", "--events", ".", "--continuous"], "either --events or Kafka"),
    ],
)
def test_wrong_usage_is_told_with_exit_code_2(arguments: list[str], told: str, tmp_path: Path) -> None:
    from jobs.cli import cli

    rest = ["--lake", str(tmp_path / "lake")]
    if arguments[0] == "build":
        rest += ["--out", str(tmp_path / "out")]
        rest += [] if "--as-of" in arguments else ["--as-of", "2026-01-01T00:00:00Z"]
    done = CliRunner().invoke(cli, ["samples", *arguments, *rest])
    assert done.exit_code == 2, done.output
    assert told in " ".join(done.output.split())


def test_commands_of_samples_are_listed() -> None:
    assert set(command.commands) == {"ingest", "build", "relabel", "check", "replay", "show"}


# A real log -----------------------------------------------------------------------------------------------


def real_log(name: str) -> Path:
    root = os.environ.get("CTRSTREAM_DATA") or Path(__file__).parent.parent.parent / "shared" / "data"
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"the research log {name} is not in {root}; set CTRSTREAM_DATA to the folder that has it")
    return folder


def test_daily_label_rates_of_a_real_log_are_those_of_pandas(spark: SparkSession, tmp_path: Path) -> None:
    folder = real_log("news_return")
    shown, clicked, returned = (pd.read_parquet(folder / f"{topic}.parquet") for topic in TOPICS)
    chosen = pd.util.hash_pandas_object(shown["impression_id"], index=False) % 10 == 0
    shown = shown[chosen]
    keep = set(shown["impression_id"])
    clicked = clicked[clicked["impression_id"].isin(keep)]
    returned = returned[returned["impression_id"].isin(keep)]
    log = tmp_path / "log"
    log.mkdir()
    for topic, table in zip(TOPICS, (shown, clicked, returned), strict=True):
        table.to_parquet(log / f"{topic}.parquet")
    ingest(spark, tmp_path / "lake", CONFIG, events=log)
    as_of = int(shown["event_time"].max()) // DAY_MS * DAY_MS - 2 * DAY_MS + 7 * HOUR_MS
    width = 4 * DAY_MS
    snapshot = made(spark, tmp_path / "lake", tmp_path / "snapshots", as_of, width, CONFIG, None)

    opened = shown.merge(clicked, on="impression_id", suffixes=("", "_click"))
    delay = opened["event_time_click"] - opened["event_time"]
    opened = opened[(delay >= 0) & (delay <= RULE.click_window)]
    since = (as_of - width) // DAY_MS * DAY_MS
    opened = opened[opened["event_time_click"].between(since, as_of, inclusive="left")]
    joined = opened.merge(
        returned.rename(columns={"event_time": "event_time_return"}), on="impression_id", how="left"
    )
    late = joined["event_time_return"] - joined["event_time_click"]
    joined["label"] = late.between(0, DAY_MS) & (joined["event_time_return"] <= as_of)
    joined["matured"] = late.between(0, DAY_MS)
    day = joined["event_time_click"] // DAY_MS
    joined["naive"] = joined["label"] & (joined["event_time_return"] < (day + 1) * DAY_MS)
    joined["mature"] = joined["event_time_click"] + DAY_MS + RULE.allowed_lateness < as_of
    joined["seen"] = joined["label"] & joined["mature"]
    labels = joined.groupby(["impression_id", day])[["label", "matured", "naive", "mature", "seen"]].max()
    expected = labels.groupby(level=1).sum()
    expected["rows"] = labels.groupby(level=1).size()

    sample = read_rows(snapshot, "conversion", ["event_time", "label"]).to_pandas()
    by_day = sample.groupby(sample["event_time"] // DAY_MS).agg(
        rows=("label", "size"), label=("label", "sum")
    )
    assert by_day["rows"].tolist() == expected["rows"].tolist()
    assert by_day["label"].tolist() == expected["label"].astype(int).tolist()
    parts = read_manifest(snapshot).of_task("conversion")
    for name, column in (
        ("rows", "rows"),
        ("mature", "mature"),
        ("positives", "label"),
        ("naive_positives", "naive"),
        ("mature_positives", "seen"),
    ):
        assert [getattr(part, name) for part in parts] == expected[column].astype(int).tolist()
    # Closed days have all their outcomes; a job that labels once and never looks back misses many.
    closed = [part.closed for part in parts]
    assert closed == [True, True, True, False, False]
    assert expected["label"].tolist()[:3] == expected["matured"].tolist()[:3]
    assert expected["naive"].sum() < 0.8 * expected["label"].sum()
    # The delay curve sees through the truncation: it is the distribution of the delays of the same clicks
    # once all of them are known, although the latest labels are still to come.
    matured = labels["matured"].groupby(level=1).mean()
    assert (by_day["label"] / by_day["rows"]).iloc[-1] < 0.5 * matured.iloc[-1]
    curve = DelayCurve.from_state(read_manifest(snapshot).tasks["conversion"].delay_curve)
    delays = (joined["event_time_return"] - joined["event_time_click"])[joined["matured"]]
    for hours in (1, 2, 5, 10, 18, 22):
        assert curve.cdf([hours * HOUR_MS])[0] == pytest.approx((delays <= hours * HOUR_MS).mean(), abs=0.04)
