"""What is wrong with a snapshot is found, all of it, and nothing is found in a sound one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.check_events import event_findings
from pipelines.check_features import FeatureSample, feature_findings
from pipelines.check_findings import Finding, failed
from pipelines.check_lake import lake_findings, partition_findings
from pipelines.check_overlap import Overlap, RowSet, find_overlap, overlap_findings
from pipelines.config_sections import ChecksConfig
from pipelines.duration import DAY_MS, HOUR_MS, parse_duration
from pipelines.feature_spec import Categorical, FeatureSpec, Hour, Numeric
from pipelines.lake import KindTimes, LakeBatch, LakePartition
from pipelines.snapshot import MANIFEST_NAME, SPEC_NAME, read_manifest
from pipelines.snapshot_check import check_snapshot, scan_snapshot
from pipelines.snapshot_manifest import SnapshotManifest
from tests.snapshot_files import AS_OF, CONFIG, DAYS, RULE, Row, sample_rows, write_snapshot

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LIMITS = ChecksConfig()
SINCE = AS_OF - DAYS * DAY_MS


def both_tasks(n: int = 300) -> dict[Any, list[Row]]:
    return {"click": sample_rows(n, "click", 1), "conversion": sample_rows(n, "conversion", 2)}


# Files, sums, rows ----------------------------------------------------------------------------------------


def test_sound_snapshot_has_no_findings_however_it_is_cut(tmp_path: Path) -> None:
    for name, files, group_rows in (("a", 1, 64), ("b", 3, 5)):
        snapshot = write_snapshot(tmp_path, both_tasks(), name=name, files=files, group_rows=group_rows)
        scan = scan_snapshot(snapshot)
        assert failed(scan.findings) == []
        assert len({finding.check for finding in scan.findings}) > 20
        assert check_snapshot(snapshot) == []


def test_copies_and_sampled_negatives_are_sound_if_their_weights_say_so(tmp_path: Path) -> None:
    from pipelines.config import with_values

    config = with_values(CONFIG, "samples", {"negative_rate": 0.25})
    rows = []
    for row in sample_rows(300):
        copies = 3 if row["label"] else 1
        weight = 1 / 3 if row["label"] else 4.0
        own = row | {"copies": copies, "weight": weight, "negative_sampling_rate": 0.25}
        rows += [own | {"sample_id": own["sample_id"] + (f"#{k}" if k else "")} for k in range(copies)]
    assert check_snapshot(write_snapshot(tmp_path, {"conversion": rows}, config=config)) == []
    lost = [row for row in rows if not row["sample_id"].endswith("#2")]
    found = check_snapshot(write_snapshot(tmp_path, {"conversion": lost}, name="lost", config=config))
    positives = sum(row["copies"] == 3 for row in rows) // 3
    assert [text for text in found if "as many copies as it says" in text] == found
    assert f"({positives}, limit 0" in found[0]


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("known_at", AS_OF + 1, "known_at lies after as_of"),
        ("known_at", SINCE - 1, "known_at lies before the window opened"),
        ("outcome_known_at", AS_OF, "the outcome became known after known_at"),
        ("outcome_known_at", 1, "the outcome became known before the window opened"),
        ("outcome_known_at", None, "a label above 0 without a known outcome"),
        ("event_time", AS_OF, "the window opened outside the snapshot's window"),
        ("observed_share", 0.5, "mature but observed_share is not 1"),
        ("observed_share", 1.5, "observed_share lies outside [0, 1]"),
        ("elapsed", 3, "elapsed is not the age"),
        ("label", 1.5, "label lies outside [0, 1]"),
        ("weight", 0.0, "weight is not above 0"),
        ("weight", 2.0, "weight is not what sampling and copies make it"),
        ("sample_id", "other:conversion", "sample_id is not that of its impression and task"),
        ("kind", "confirm", "kinds of rows not as in the manifest"),
        ("copies", 2, "a row has not as many copies as it says"),
        ("impression_id", None, "a value is missing"),
    ],
)
def test_row_that_breaks_a_rule_is_found(tmp_path: Path, column: str, value: object, told: str) -> None:
    rows = sample_rows(200)
    place = next(k for k, row in enumerate(rows) if row["mature"] and row["label"])
    rows[place] = rows[place] | {column: value}
    found = check_snapshot(write_snapshot(tmp_path, {"conversion": rows}))
    assert any(told in text and "(1, limit 0" in text for text in found), found


def test_row_that_is_mature_too_early_is_found(tmp_path: Path) -> None:
    rows = sample_rows(200)
    place = next(k for k, row in enumerate(rows) if not row["mature"])
    rows[place] = rows[place] | {"mature": True, "observed_share": 1.0}
    found = check_snapshot(write_snapshot(tmp_path, {"conversion": rows}))
    assert [text.partition(" (")[0] for text in found] == ["conversion: mature before its window has closed"]


def test_sample_that_is_there_twice_is_found_across_files(tmp_path: Path) -> None:
    rows = sample_rows(200)
    snapshot = write_snapshot(tmp_path, {"conversion": [*rows, rows[5], rows[7]]}, files=3)
    assert check_snapshot(snapshot) == ["all tasks: sample_id appears more than once (2, limit 0)"]


def test_row_in_the_file_of_another_partition_is_found(tmp_path: Path) -> None:
    rows = sample_rows(200)
    snapshot = write_snapshot(tmp_path, {"conversion": rows})
    manifest = read_manifest(snapshot)
    first, second, *rest = manifest.partitions
    swapped = (
        first.model_copy(update={"partition": second.partition}),
        second.model_copy(update={"partition": first.partition}),
    )
    changed = manifest.model_copy(update={"partitions": (*swapped, *rest)})
    (snapshot / MANIFEST_NAME).write_text(changed.model_dump_json())
    found = check_snapshot(snapshot)
    assert any("the window opened outside its partition" in text for text in found)


@pytest.mark.parametrize("field", ["rows", "mature", "positives", "naive_positives", "weight", "oldest"])
def test_partition_that_is_not_as_in_the_manifest_is_named(tmp_path: Path, field: str) -> None:
    snapshot = write_snapshot(tmp_path, {"conversion": sample_rows(200)})
    manifest = read_manifest(snapshot)
    part = manifest.partitions[1]
    other = part.model_copy(update={field: getattr(part, field) + 1})
    parts = (manifest.partitions[0], other, *manifest.partitions[2:])
    (snapshot / MANIFEST_NAME).write_text(manifest.model_copy(update={"partitions": parts}).model_dump_json())
    found = check_snapshot(snapshot)
    assert any(
        "partitions not as in the manifest" in text and f"{part.partition}: {field}" in text for text in found
    ), found


def test_altered_missing_and_cut_off_files_are_all_named(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path, {"conversion": sample_rows(300)})
    first, second, third = sorted(snapshot.rglob("*.parquet"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    third.write_bytes(third.read_bytes() + b"\n")
    (snapshot / SPEC_NAME).write_text(FeatureSpec(hash_seed=7).to_toml())
    text = "; ".join(check_snapshot(snapshot))
    for path in (first, second, third):
        assert str(path.relative_to(snapshot)) in text
    assert "files missing or altered (4" in text
    assert "feature spec not that of the manifest" in text


def test_file_of_another_schema_with_the_right_digest_cannot_be_read_as_rows(tmp_path: Path) -> None:
    rows = {"conversion": sample_rows(100)}
    snapshot = write_snapshot(tmp_path, rows, name="s")  # type: ignore[arg-type]
    manifest = read_manifest(snapshot)
    part = manifest.partitions[0]
    ((name, _),) = part.files.items()
    pq.write_table(pa.table({"x": [1]}), snapshot / name)
    from tests.snapshot_files import _described

    file = _described(snapshot / name).model_copy(update={"rows": 1})
    changed = part.model_copy(update={"files": {name: file}})
    (snapshot / MANIFEST_NAME).write_text(
        manifest.model_copy(update={"partitions": (changed, *manifest.partitions[1:])}).model_dump_json()
    )
    assert any("files that cannot be read as rows" in text for text in check_snapshot(snapshot))


# Columns that betray ----------------------------------------------------------------------------------------

LEAK_SPEC = FeatureSpec(
    categorical=(
        Categorical(name="noise", buckets=9),
        Categorical(name="bought", buckets=9),
        Categorical(name="final", buckets=9),
        Categorical(name="item", buckets=9_000),
    ),
    numeric=(
        Numeric(name="price", low=0, high=9, mean=0, std=1),
        Numeric(name="age", low=0, high=9, mean=0, std=1),
    ),
    hour=Hour(),
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> SnapshotManifest:
    """Ten days of conversions: one day of open windows."""
    folder = tmp_path_factory.mktemp("leaks")
    return read_manifest(write_snapshot(folder, {"conversion": sample_rows(50, days=10)}, days=10))


def planted(n: int = 24_000) -> FeatureSample:
    """Noise, a column that says the label, one that says closed, items that come and go, and an age."""
    noise = np.random.default_rng(1)
    opened = AS_OF - noise.integers(1, 10 * DAY_MS, n)
    delay = noise.exponential(4 * HOUR_MS, n).astype(np.int64)
    label = ((noise.random(n) < 0.3) & (opened + delay <= AS_OF)).astype(np.float64)
    mature = opened + DAY_MS + RULE.allowed_lateness < AS_OF
    said = np.where(noise.random(n) < 0.999, label, 1 - label).astype(np.int64)
    item = (opened - SINCE + 8 * DAY_MS) // (6 * HOUR_MS) * 8 + noise.integers(0, 8, n)
    buckets = [1 + noise.integers(0, 9, n), 10 + said, 19 + mature, 28 + item]
    buckets.append(9_028 + 1 + opened // HOUR_MS % 24)
    return FeatureSample(
        buckets=np.stack(buckets, axis=1).astype(np.int32),
        numbers=np.stack([noise.normal(size=n), (AS_OF - opened) / DAY_MS], axis=1).astype(np.float32),
        label=label,
        weight=np.ones(n),
        mature=mature,
        opened=opened,
        outcome=np.where(label > 0, opened + delay, np.iinfo(np.int64).min),
        half=noise.random(n) < 0.5,
    )


def verdicts(findings: list[Finding]) -> set[tuple[str, str, str]]:
    return {
        (finding.subject.removeprefix("conversion "), finding.check.split(",")[0], finding.verdict)
        for finding in findings
        if finding.verdict != "ok"
    }


def test_columns_that_betray_label_closing_or_time_are_told_from_those_that_do_not(
    manifest: SnapshotManifest,
) -> None:
    found = feature_findings(planted(), manifest, "conversion", LEAK_SPEC, LIMITS)
    assert verdicts(found) == {
        ("bought", "label of mature windows", "failed"),
        ("bought", "label of open windows", "failed"),
        ("final", "closing of the window", "failed"),
        # Items come and go all the time: nothing that the closing adds to, but worth knowing.
        ("item", "closing of the window", "warning"),
        ("age (number)", "closing of the window", "warning"),
        ("age (number)", "number that grows with time", "failed"),
        ("hour_of_day", "positives said later", "warning"),
    }


def test_policy_that_says_a_window_once_has_no_later_kind(manifest: SnapshotManifest) -> None:
    labels = manifest.config["labels"] | {"policy": "wait"}
    waiting = manifest.model_copy(update={"config": manifest.config | {"labels": labels}})
    found = feature_findings(planted(6_000), waiting, "conversion", LEAK_SPEC, LIMITS)
    assert not any(finding.check.startswith("positives said later") for finding in found)


def test_too_few_rows_are_told_and_judged_by_no_limit(manifest: SnapshotManifest) -> None:
    sample = planted(60)
    found = feature_findings(sample, manifest, "conversion", LEAK_SPEC, LIMITS)
    assert failed(found) == []
    assert any(finding.verdict == "told" and "at least 50 are needed" in finding.note for finding in found)
    (nothing,) = feature_findings(None, manifest, "conversion", LEAK_SPEC, LIMITS)
    assert nothing.verdict == "told"


def test_sample_of_rows_is_the_same_for_any_files_and_about_as_large_as_asked_for(tmp_path: Path) -> None:
    rows = both_tasks(2_000)
    one = scan_snapshot(write_snapshot(tmp_path, rows, name="a"), leak_rows=500)
    other = scan_snapshot(write_snapshot(tmp_path, rows, name="b", files=3, group_rows=31), leak_rows=500)
    for task in ("click", "conversion"):
        left, right = one.samples[task], other.samples[task]
        assert left is not None
        assert right is not None
        assert 400 < len(left) < 600
        assert sorted(left.opened.tolist()) == sorted(right.opened.tolist())
        assert abs(left.half.mean() - 0.5) < 0.1


# Events and holes -------------------------------------------------------------------------------------------

EVENTS = {
    "impression": {"used": 90, "duplicate": 10, "read": 100},
    "click": {"credited": 40, "orphan": 4, "late": 6, "duplicate": 0, "read": 50},
    "conversion": {
        "credited": 1,
        "out_of_window": 3,
        "orphan": 0,
        "duplicate": 0,
        "before_window": 9,
        "read": 13,
    },
}


def test_rates_of_events_are_held_against_their_limits() -> None:
    found = event_findings(EVENTS, ChecksConfig(duplicate_rate=0.05, orphan_rate=0.05, coverage=0.5))
    assert [(own.subject, own.check, own.figure) for own in failed(found)] == [
        ("impression", "events delivered again", 0.1),
        ("click", "events whose impression is not known", 4 / 50),
        ("conversion", "events that found their window in time", 1 / 4),
    ]
    assert (
        failed(event_findings(EVENTS, ChecksConfig(duplicate_rate=0.1, orphan_rate=0.08, coverage=0.25)))
        == []
    )


def lake_batch(name: str, rows: Callable[[int], int], dead: int = 0) -> LakeBatch:
    """Impressions and clicks by hour of the snapshot's window."""
    hours = range(SINCE // HOUR_MS, AS_OF // HOUR_MS)
    parts = []
    for hour in hours:
        date = np.datetime_as_string(np.datetime64(hour, "h"), "D")
        parts += [
            LakePartition(kind=kind, event_date=date, event_hour=hour % 24, rows=rows(hour - hours[0]))
            for kind in ("impression", "click")
            if rows(hour - hours[0])
        ]
    total = sum(part.rows for part in parts) // 2
    counts = {"impression": total, "click": total, "dead_letter": dead}
    times = dict.fromkeys(("impression", "click"), KindTimes(event_time=None, arrival_time=None))
    return LakeBatch(
        batch=name, source="files", attempt="x", rows=counts, times=times, partitions=tuple(parts)
    )


def test_hours_without_events_are_named_and_so_are_dead_letters_and_lost_batches(tmp_path: Path) -> None:
    changes = {"lake_batches": ("one", "two", "lost")}
    snapshot = write_snapshot(tmp_path, {"conversion": sample_rows(50)}, changes=changes)
    manifest = read_manifest(snapshot)
    hole = lake_batch("one", lambda hour: 0 if hour == 30 else 4 if hour == 50 else 60, dead=90)
    whole = lake_batch("two", lambda hour: 0 if hour in (30, 50) else 40)
    found = lake_findings(manifest, [hole, whole, lake_batch("young", lambda hour: 1)], LIMITS)
    by_check = {finding.check: finding for finding in found}
    thin = by_check["hours below 20 % of the usual impressions"]
    assert (thin.figure, thin.verdict) == (2, "failed")
    assert "2026-01-03T06 0 of 100" in thin.note
    assert "2026-01-04T02 4 of 100" in thin.note
    assert by_check["hours below 20 % of the usual clicks"].figure == 2
    assert by_check["no conversions in the window"].verdict == "ok"
    dead = by_check["dead letters"]
    total = sum(hole.rows.values()) + sum(whole.rows.values())
    assert (dead.figure, dead.verdict) == (90 / total, "ok")
    assert by_check["batches of the snapshot that the lake lacks"].note == "lost"
    assert by_check["batches ingested since"].figure == 1
    strict = lake_findings(manifest, [hole, whole], ChecksConfig(dead_letter_rate=0.005))
    assert "dead letters" in {finding.check for finding in failed(strict)}


def test_day_that_the_snapshot_lacks_is_named(tmp_path: Path) -> None:
    rows = [row for row in sample_rows(400) if row["event_time"] // DAY_MS != SINCE // DAY_MS + 1]
    found = partition_findings(read_manifest(write_snapshot(tmp_path, {"conversion": rows})), LIMITS)
    (thin,) = failed(found)
    assert thin.check == "partitions below 20 % of the usual rows"
    assert "2026-01-03 0 of" in thin.note


# Training and test ------------------------------------------------------------------------------------------


def brute_force(train: list[Row], test: list[Row]) -> Overlap:
    begins = min(row["event_time"] for row in test)
    late = [row for row in train if row["known_at"] > begins]
    return Overlap(
        len(train),
        len(test),
        sum(row["sample_id"] in {own["sample_id"] for own in train} for row in test),
        sum(row["impression_id"] in {own["impression_id"] for own in train} for row in test),
        begins,
        len(late),
        sum((row["outcome_known_at"] or 0) > begins for row in late),
    )


def test_rows_in_both_sets_are_counted_and_so_are_labels_from_the_time_of_the_test(tmp_path: Path) -> None:
    rows = both_tasks(300)
    # A click of the first set opens a conversion window of the second: one impression, two tasks.
    rows["conversion"][250] |= {"impression_id": rows["click"][3]["impression_id"]}
    snapshot = write_snapshot(tmp_path, rows)
    every = [*rows["click"], *rows["conversion"]]
    cut, gap = AS_OF - DAY_MS, DAY_MS + RULE.allowed_lateness
    for train, test in (
        ((SINCE, cut), (cut, AS_OF)),
        ((SINCE, cut + 6 * HOUR_MS), (cut, AS_OF)),
        ((SINCE, cut - gap), (cut, AS_OF)),
        (None, None),
    ):
        chosen = [
            [row for row in every if span is None or span[0] <= row["event_time"] < span[1]]
            for span in (train, test)
        ]
        found = find_overlap(RowSet(str(snapshot), train), RowSet(str(snapshot), test))
        assert found == brute_force(*chosen)
    split = find_overlap(RowSet(str(snapshot), (SINCE, cut)), RowSet(str(snapshot), (cut, AS_OF)))
    verdict = {own.check: own.verdict for own in overlap_findings(split, LIMITS)}
    assert verdict == {
        "test rows that were trained on": "ok",
        "test rows whose impression was trained on": "warning",
        "train rows known only after the test begins": "failed",
    }
    apart = find_overlap(RowSet(str(snapshot), (SINCE, cut - gap)), RowSet(str(snapshot), (cut, AS_OF)))
    assert failed(overlap_findings(apart, LIMITS)) == []


def test_other_snapshot_with_rows_of_the_first_is_found(tmp_path: Path) -> None:
    rows = sample_rows(200)
    train = write_snapshot(tmp_path, {"conversion": rows[:150]}, name="train")
    test = write_snapshot(tmp_path, {"conversion": rows[140:]}, name="test")
    found = find_overlap(RowSet(str(train)), RowSet(str(test)))
    assert found == brute_force(rows[:150], rows[140:])
    assert failed(overlap_findings(found, LIMITS))[0].figure == pytest.approx(10 / 60)
    assert failed(overlap_findings(replace(found, reaching=0), ChecksConfig(overlap=0.2))) == []


def test_spark_counts_the_same_rows(spark: SparkSession, tmp_path: Path) -> None:
    from jobs.samples_check_spark import overlap, repeated_samples

    rows = sample_rows(200)
    snapshot = str(write_snapshot(tmp_path, {"conversion": [*rows, rows[3], rows[3], rows[9]]}))
    cut = AS_OF - DAY_MS
    train, test = RowSet(snapshot, (SINCE, cut + HOUR_MS)), RowSet(snapshot, (cut, AS_OF))
    assert repeated_samples(spark, snapshot) == 3
    assert overlap(spark, train, test) == find_overlap(train, test)


def test_delays_of_all_events_of_the_lake_are_those_of_brute_force(
    spark: SparkSession, tmp_path: Path
) -> None:
    from jobs.samples_check_spark import lake_arrivals
    from jobs.samples_ingest import ingest
    from pipelines.attribution import labels_as_of
    from pipelines.check_delays import DELAY_STEPS
    from pipelines.events import CLICK, CONVERSION, IMPRESSION
    from pipelines.lake import lake_batches
    from tests.test_samples_build import CONFIG as LOG_CONFIG
    from tests.test_samples_build import RULE as LOG_RULE
    from tests.test_samples_build import START, events_of, random_events, write_log

    log = random_events(700, seed=3)
    as_of = START + 3 * DAY_MS
    ingest(spark, tmp_path / "lake", LOG_CONFIG, events=write_log(tmp_path / "log", log))
    batches = tuple(batch.batch for batch in lake_batches(tmp_path / "lake"))
    tasks = {"click": sample_rows(9, "click"), "conversion": sample_rows(9)}
    config = LOG_CONFIG.model_dump(mode="json", exclude_none=True)
    manifest = read_manifest(write_snapshot(tmp_path, tasks)).model_copy(  # type: ignore[arg-type]
        update={"as_of": as_of, "since": START + DAY_MS, "lake_batches": batches, "config": config}
    )
    found = {own.of: own for own in lake_arrivals(spark, str(tmp_path / "lake"), manifest)}

    first: dict[tuple[int, str], Any] = {}
    for event in sorted(events_of(log), key=lambda own: own.arrival_time):
        if event.arrival_time <= as_of:
            first.setdefault((event.kind, event.event_id), event)
    shown = {own.impression_id: own for own in first.values() if own.kind == IMPRESSION}
    inside = {
        name: own
        for name, own in shown.items()
        # Shown a click window before, a conversion window of the snapshot may hang on it.
        if START + DAY_MS - LOG_RULE.click_window <= own.event_time < as_of
    }
    opened = {
        row.impression_id: row.event_time
        for row in labels_as_of(events_of(log), as_of, LOG_RULE)
        if row.task == "conversion" and row.impression_id in inside
    }
    clicks = [
        own.arrival_time - inside[own.impression_id].event_time
        for own in first.values()
        if own.kind == CLICK and own.impression_id in inside
    ]
    conversions = [
        own.arrival_time - opened[own.impression_id]
        for own in first.values()
        if own.kind == CONVERSION and own.impression_id in opened
    ]
    for name, delays in (("clicks", clicks), ("conversions", conversions)):
        own = found[f"all {name} of the lake"]
        assert own.count == len(delays) > 20
        expected = [np.mean(np.array(delays) <= parse_duration(step)) for step in DELAY_STEPS]
        assert own.shares == pytest.approx(expected)
