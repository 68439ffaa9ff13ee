"""Students with rows of their own for ids: what they learn, what they forget, and that all sides agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.checkpoint import CheckpointStore
from jobs.consistency import check_consistency
from jobs.online import OnlineLoop
from jobs.online_state import load_loop_state, loop_state, take_loop_changes
from jobs.publishing import Learned, load_first, publish_student
from jobs.release import Release
from jobs.served_log import ServedLog
from jobs.state_digest import state_digest
from jobs.state_mirror import StateMirror
from jobs.training import train_models
from models.late_head import LateHead
from models.learn_batch import LearnBatch
from models.student import Student
from pipelines.config import load_config
from pipelines.config_sections import StudentConfig
from pipelines.duration import HOUR_MS
from pipelines.errors import ConfigError, StaleStateError
from pipelines.feature_spec import Categorical, Cross, FeatureSpec, Sequence
from pipelines.features import Encoded, encode_rows
from pipelines.training_set import TrainingSet
from tests.small_run import DYNAMIC, SETTINGS, SmallRun

OPTIMIZERS = ["adagrad", "rowwise_adagrad", "ftrl", "lazy_adam"]
SPEC = FeatureSpec(
    categorical=(Categorical(name="item_id", buckets=8), Categorical(name="user_id", buckets=5)),
    dynamic=("item_id",),
)


def encoded(spec: FeatureSpec, items: list[str | None], users: list[str] | None = None) -> Encoded:
    users = users or ["u"] * len(items)
    return encode_rows(
        [
            {"item_id": item, "user_id": user, "event_time": 0}
            for item, user in zip(items, users, strict=True)
        ],
        spec,
    )


def batch_of(rows: Encoded, label: NDArray[np.float64]) -> LearnBatch:
    one = np.ones(len(rows))
    return LearnBatch(rows.buckets, rows.numbers, label, one, True, one * np.nan, "wait", 0.0, ids=rows.ids)


def training_set(rows: Encoded, label: NDArray[np.float64]) -> TrainingSet:
    n = len(rows)
    return TrainingSet(
        buckets=rows.buckets,
        numbers=rows.numbers,
        user_key=rows.user_key,
        segment_key=rows.segment_key,
        label=label.astype(np.float32),
        weight=np.ones(n, np.float32),
        event_time=np.arange(n, dtype=np.int64) * 60_000,
        mature=np.ones(n, np.bool_),
        observed_share=np.ones(n, np.float32),
        ids=rows.ids,
    )


def config_of(**changes: Any) -> StudentConfig:
    tables = {"capacity": 64, "admit_after": 1, "filter_cells": 1024, "ttl": "3h"}
    tables |= {name: changes.pop(name) for name in list(changes) if name in tables}
    return StudentConfig.model_validate({"embedding_dim": 3, "hidden": (4,), **changes, "tables": tables})


def learn(student: Student, rows: Encoded, label: NDArray[np.float64], now: int) -> None:
    student.see(rows.buckets, rows.ids, now)
    student.learn(batch_of(rows, label))


def slots_of(student: Student, rows: Encoded) -> list[int]:
    assert student.ids is not None
    return [int(slot) for slot in student.ids.find(rows.ids[:, 0])]


def random_traffic(seed: int, rows: int = 30) -> tuple[list[str | None], NDArray[np.float64]]:
    noise = np.random.default_rng(seed)
    items: list[str | None] = [f"i{number}" for number in seed * 7 + noise.integers(0, 40, rows)]
    return items, noise.integers(0, 2, rows).astype(np.float64)


# --- ids ---------------------------------------------------------------------------


def test_ids_say_field_and_value_and_nulls_have_none() -> None:
    spec = FeatureSpec(
        categorical=(Categorical(name="item_id", buckets=8), Categorical(name="user_id", buckets=5)),
        cross=(Cross(of=("item_id", "user_id"), buckets=4),),
        sequence=(Sequence(name="seen", buckets=6, max_length=3),),
        dynamic=("user_id", "seen", "item_id_x_user_id", "item_id"),
    )
    rows: list[Mapping[str, Any]] = [
        {"item_id": "a", "user_id": "a", "features": {"seen": ["a", None]}},
        {"item_id": "b", "user_id": None, "features": {"seen": ["b", "a", "c", "d"]}},
        {"item_id": "a", "user_id": "b", "features": {}},
    ]
    found = encode_rows(rows, spec)
    plain = encode_rows(rows, spec.model_copy(update={"dynamic": ()}))
    assert np.array_equal(found.buckets, plain.buckets)
    assert plain.ids.shape == (3, 0)
    assert spec.id_columns == [0, 1, 2, 3, 4, 5]
    ids = found.ids
    assert (ids == 0).tolist() == [
        [False, False, False, False, True, True],
        [False, True, True, False, False, False],
        [False, False, False, True, True, True],
    ]
    assert ids[0, 0] == ids[2, 0] != ids[1, 0]
    assert ids[0, 3] == ids[1, 4]
    # The same value of another field is another id.
    assert len({ids[0, 0], ids[0, 1], ids[0, 2], ids[0, 3]}) == 4


def test_a_spec_without_dynamic_fields_is_what_it_was() -> None:
    plain = SPEC.model_copy(update={"dynamic": ()})
    assert "dynamic" not in plain.to_toml()
    assert FeatureSpec.from_toml(SPEC.to_toml()) == SPEC == plain.with_dynamic(["item_id"])
    assert plain.digest() != SPEC.digest()
    with pytest.raises(ConfigError, match=r"features.dynamic: .*Not among them: price"):
        plain.with_dynamic(["price"])


# --- one student -------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_room_for_all_it_is_a_hashed_student_without_collisions_to_the_bit(optimizer: str) -> None:
    # First-order weights begin at 0 in any row, so where rows lie must not matter.
    names = [f"i{number}" for number in range(40)]
    config = config_of(model="lr", optimizer=optimizer, learning_rate=0.05)
    dynamic = Student.create(SPEC, config)
    wide = FeatureSpec(
        categorical=(Categorical(name="item_id", buckets=1 << 20), Categorical(name="user_id", buckets=5))
    )
    assert len(set(encoded(wide, [*names]).buckets[:, 0].tolist())) == 40
    assert len(set(encoded(SPEC, [*names]).buckets[:, 0].tolist())) < 8
    hashed = Student.create(wide, config)
    noise = np.random.default_rng(0)
    for step in range(20):
        items: list[str | None] = [names[number] for number in noise.integers(0, 40, 30)]
        label = noise.integers(0, 2, 30).astype(np.float64)
        learn(dynamic, encoded(SPEC, items), label, step)
        learn(hashed, encoded(wide, items), label, step)
    mine, theirs = encoded(SPEC, [*names]), encoded(wide, [*names])
    logit = dynamic.predict_logit(mine.buckets, mine.numbers, mine.ids)
    assert np.array_equal(logit, hashed.predict_logit(theirs.buckets, theirs.numbers))
    assert len(set(logit.tolist())) > 8


def test_an_id_shares_its_bucket_until_it_is_admitted_and_begins_where_the_bucket_stands() -> None:
    student = Student.create(SPEC, config_of(admit_after=3, model="fm"))
    row = encoded(SPEC, ["a"])
    hashed_row = int(row.buckets[0, 0])
    for step in range(2):
        learn(student, row, np.ones(1), step)
    assert slots_of(student, row) == [-1]
    bucket = student.weights["embedding"][hashed_row].clone()
    before = student.predict_logit(row.buckets, row.numbers, row.ids)
    assert np.array_equal(before, student.predict_logit(row.buckets, row.numbers))
    student.see(row.buckets, row.ids, 2)
    assert slots_of(student, row) == [0]
    assert np.array_equal(student.predict_logit(row.buckets, row.numbers, row.ids), before)
    student.learn(batch_of(row, np.ones(1)))
    assert np.array_equal(student.weights["embedding"][hashed_row], bucket)
    assert student.predict_logit(row.buckets, row.numbers, row.ids)[0] > before[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_that_are_free_are_zero_and_so_are_their_slots(optimizer: str) -> None:
    student = Student.create(SPEC, config_of(capacity=50, optimizer=optimizer, learning_rate=0.05))
    assert student.ids is not None
    expired = 0
    for step in range(30):
        items, label = random_traffic(step)
        before = set(student.ids.keys[student.ids.keys != 0].tolist())
        learn(student, encoded(SPEC, items), label, step * HOUR_MS // 2)
        expired += len(before - set(student.ids.keys.tolist()))
        free = student.layout.table_rows + student.ids.free
        live = np.setdiff1d(np.arange(student.layout.table_rows, len(student.weights["wide"])), free)
        for name, values in student.state().items():
            if name.split("/")[-1] in student.layout.tables:
                assert not values[free].any()
        assert student.weights["embedding"].numpy()[live].any(axis=1).all()
    assert expired > 100
    assert len(student.weights["wide"]) == student.layout.table_rows + 50


def test_an_expired_id_reads_its_bucket_again_and_comes_back_with_nothing() -> None:
    student = Student.create(SPEC, config_of())
    row, other = encoded(SPEC, ["a"]), encoded(SPEC, ["b"])
    for step in range(3):
        learn(student, row, np.ones(1), step)
    own = student.predict_logit(row.buckets, row.numbers, row.ids)
    learn(student, other, np.zeros(1), 4 * HOUR_MS)
    assert slots_of(student, row) == [-1]
    shared = student.predict_logit(row.buckets, row.numbers, row.ids)
    assert np.array_equal(shared, student.predict_logit(row.buckets, row.numbers))
    assert shared[0] < own[0]
    student.see(row.buckets, row.ids, 4 * HOUR_MS)
    assert np.array_equal(student.predict_logit(row.buckets, row.numbers, row.ids), shared)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_student_restored_at_any_commit_goes_on_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    config = config_of(capacity=50, optimizer=optimizer, admit_after=2, learning_rate=0.05)
    student, store = Student.create(SPEC, config), CheckpointStore(tmp_path, keep=100, deltas=3)
    store.open()
    digests: dict[str, str] = {}
    for step in range(12):
        items, label = random_traffic(step)
        learn(student, encoded(SPEC, items), label, step * HOUR_MS // 2)
        arrays, tables = student.take_changes()
        store.commit(step, arrays, {}, tables=tables, cursor=[step], outputs=[], volatile={})
        head = store.head()
        assert head is not None
        digests[head] = state_digest(student.state(), {})
    assert {len(store.manifest(name)["chain"]) > 0 for name in digests} == {True, False}
    for number, (name, digest) in enumerate(digests.items()):
        restored = Student.create(SPEC, config)
        restored.load_state(store.read(name).arrays)
        assert state_digest(restored.state(), {}) == digest
        for step in range(number + 1, 12):
            items, label = random_traffic(step)
            learn(restored, encoded(SPEC, items), label, step * HOUR_MS // 2)
        assert state_digest(restored.state(), {}) == list(digests.values())[-1]


def test_a_student_from_files_with_slots_goes_on_and_one_without_serves_the_same() -> None:
    student = Student.create(SPEC, config_of(capacity=50, admit_after=2))
    for step in range(5):
        items, label = random_traffic(step)
        learn(student, encoded(SPEC, items), label, step * HOUR_MS)
    served = Student.from_files(student.to_files(), SPEC)
    again = Student.from_files(student.to_files(slots=True), SPEC)
    items, label = random_traffic(4)
    rows = encoded(SPEC, [*items, "never seen", None])
    logit = student.predict_logit(rows.buckets, rows.numbers, rows.ids)
    assert {slot >= 0 for slot in slots_of(student, rows)} == {True, False}
    assert np.array_equal(served.predict_logit(rows.buckets, rows.numbers, rows.ids), logit)
    assert state_digest(again.state(), {}) == state_digest(student.state(), {})
    plain = SPEC.model_copy(update={"dynamic": ()})
    without = Student.create(plain, student.config)
    with pytest.raises(StaleStateError, match="does not fit: accumulator/embedding"):
        without.load_state(student.state())
    with pytest.raises(StaleStateError, match="does not fit: ids/clock"):
        student.load_state(without.state())


def test_learning_all_over_forgets_every_id() -> None:
    student = Student.create(SPEC, config_of(admit_after=2))
    items, label = random_traffic(1)
    learn(student, encoded(SPEC, items + items), np.tile(label, 2), HOUR_MS)
    student.reset_tables()
    fresh = Student.create(SPEC, config_of(admit_after=2))
    for name, values in fresh.state().items():
        if name.split("/")[-1] in ("embedding", "wide") or name.startswith("ids") or name == "weights/ids":
            assert np.array_equal(student.state()[name], values), name


# --- the loop ----------------------------------------------------------------------


def test_ids_come_and_go_as_the_log_is_read_and_the_changes_make_up_the_state(dynamic_run: SmallRun) -> None:
    loop, mirror, gone, known = dynamic_run.warm_loop(), StateMirror(), set[int](), set[int]()
    table = loop.students["click"].ids
    assert table is not None
    for number, events in enumerate(dynamic_run.steps(dynamic_run.warm_rows)):
        loop.step(events)
        now = set(table.keys[table.keys != 0].tolist())
        gone, known = gone | (known - now), now
        if number % 8 == 0:
            arrays, tables, plain = take_loop_changes(loop)
            mirror.apply(arrays, tables)
            assert mirror.digest(plain) == state_digest(*loop_state(loop))
    assert len(known) <= 300
    assert len(gone) > 100
    assert len(gone & known) > 10
    assert state_digest(*loop_state(loop)) == state_digest(*loop_state(dynamic_run.backtest.loop))


@pytest.mark.parametrize("policy", ["fnw", "bidefuse"])
def test_a_loop_restored_half_way_goes_on_to_the_same_bits(dynamic_run: SmallRun, policy: str) -> None:
    config = load_config(None, [*SETTINGS, *DYNAMIC, f"labels.policy={policy}"])
    dynamic_run = replace(dynamic_run, config=config)
    loop, steps = dynamic_run.warm_loop(), list(dynamic_run.steps(dynamic_run.warm_rows))
    for events in steps[: len(steps) // 2]:
        loop.step(events)
    restored = dynamic_run.begun(OnlineLoop(config))
    arrays, plain = loop_state(loop)
    load_loop_state(restored, arrays, json.loads(json.dumps(plain)))
    for events in steps[len(steps) // 2 :]:
        loop.step(events)
        restored.step(events)
    assert state_digest(*loop_state(restored)) == state_digest(*loop_state(loop))


def test_a_release_gives_the_logits_of_the_worker_for_ids_with_and_without_rows(
    dynamic_run: SmallRun, tmp_path: Path
) -> None:
    root, loop = dynamic_run.first_releases(tmp_path / "releases"), dynamic_run.backtest.loop
    first = load_first(root)
    arrays, plain = loop_state(loop)
    learned = Learned.at_cut(loop, arrays, plain)
    assert learned == Learned.now(loop)
    name = publish_student(root, learned, first, epoch=3, parent=first.student.name, extra={})
    release = Release.load(root / name)
    assert release.spec.dynamic == ("user_id", "item_id", "tags")
    impressions = dynamic_run.files.impressions.slice(0, 2000).to_pylist()
    contract = ("user_id", "item_id", "event_time", "position", "impression_id")
    rows = [
        {
            **{key: row[key] for key in contract},
            "features": {key: value for key, value in row.items() if key not in contract},
        }
        for row in impressions
    ]
    found = release.encode(rows)
    for task, student in loop.students.items():
        assert student.ids is not None
        assert set((student.ids.find(found.ids) >= 0).ravel().tolist()) == {True, False}
        served = release.models[task]
        assert isinstance(served, Student)
        assert served.ids is not None
        assert np.array_equal(served.ids.keys, student.ids.keys)
        logit = student.predict_logit(found.buckets, found.numbers, found.ids)
        assert np.array_equal(release.score(found)[task].logit, logit)
        assert not np.array_equal(student.predict_logit(found.buckets, found.numbers), logit)
    log = ServedLog(tmp_path / "served.jsonl")
    for start in range(0, 60, 20):
        part = release.encode(rows[start : start + 20])
        log.append("r", release, 0, rows[start : start + 20], part, release.score(part))
    log.close()
    outcome = check_consistency(tmp_path / "served.jsonl", root)
    assert (outcome["status"], outcome["rows"], outcome["features"]) == ("good", 60, [])
    lines = (tmp_path / "served.jsonl").read_text().splitlines()
    doctored = json.loads(lines[7])
    doctored["ids"][1] += 1
    lines[7] = json.dumps(doctored)
    (tmp_path / "served.jsonl").write_text("\n".join(lines) + "\n")
    assert check_consistency(tmp_path / "served.jsonl", root)["first_differing_feature"] == "item_id (id)"


def test_an_expired_id_is_in_no_later_release(dynamic_run: SmallRun) -> None:
    releases = [Release.load(path) for path in sorted((dynamic_run.out / "releases").glob("student-*"))]
    assert len(releases) > 1
    kept = []
    for release in releases:
        student = release.models["click"]
        assert isinstance(student, Student)
        assert student.ids is not None
        kept.append(set(student.ids.keys[student.ids.keys != 0].tolist()))
        assert not student.weights["embedding"][student.layout.table_rows + student.ids.free].any()
    assert kept[0] - kept[-1]


def test_teachers_and_late_heads_know_ids_by_their_buckets() -> None:
    items, label = random_traffic(1, 400)
    rows = encoded(SPEC, items)
    train = training_set(rows, label)
    settings = ["teacher.model=network", "student.warmup_epochs=1", "calibration.segments=[]"]
    models = train_models({"click": train}, SPEC, load_config(None, settings)).models["click"]
    assert isinstance(models.teacher, Student)
    assert models.teacher.ids is None
    again = Student.from_files(models.teacher.to_files(), SPEC)
    logit = models.teacher.predict_logit(rows.buckets, rows.numbers)
    assert np.array_equal(again.predict_logit(rows.buckets, rows.numbers, rows.ids), logit)
    # The rows of the warm-up have been seen.
    assert models.student.ids is not None
    assert 10 < len(models.student.ids) <= len(set(items))
    assert "weights/ids" not in LateHead(SPEC, models.student.config, 0.3).state()


def test_a_student_trained_without_ids_has_learned_its_buckets_and_takes_ids_from_there() -> None:
    items, label = random_traffic(1, 400)
    rows = encoded(SPEC, items)
    student = Student.create(SPEC, config_of(warmup_epochs=1))
    student.fit(replace(training_set(rows, label), ids=None))
    assert student.ids is not None
    assert len(student.ids) == 0
    logit = student.predict_logit(rows.buckets, rows.numbers, rows.ids)
    assert len(set(logit.tolist())) == len(set(rows.buckets[:, 0].tolist()))
    student.see(rows.buckets, rows.ids, HOUR_MS)
    assert len(student.ids) == len(set(items))
    assert np.array_equal(student.predict_logit(rows.buckets, rows.numbers, rows.ids), logit)


def test_windows_said_again_are_no_news_of_their_ids(dynamic_run: SmallRun) -> None:
    loop = dynamic_run.warm_loop()
    student = loop.students["click"]
    assert student.ids is not None
    before = len(student.ids)
    ids = np.arange(1, 43, dtype=np.int64).reshape(-1, len(student.spec.id_columns))
    buckets = np.ones((len(ids), len(student.spec.column_field)), np.int32)
    first = np.zeros(len(ids), np.bool_)
    columns: dict[str, NDArray[Any]] = {"buckets": buckets, "ids": ids, "first": first}
    for _ in range(3):
        loop._see("click", columns, student.ids.clock)
    assert len(student.ids) == before
    first[:] = True
    for _ in range(3):
        loop._see("click", columns, student.ids.clock)
    assert student.ids.find(ids).min() >= 0
