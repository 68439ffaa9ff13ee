"""The network and the student: formula, gradients, determinism, state and what it learns."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.base import sigmoid
from models.losses import cured_log_loss
from models.network import Layout, forward, initial_weights
from models.optimizers import Adam, TableAdagrad
from models.student import LearnBatch, Student
from pipelines.config_sections import StudentConfig
from pipelines.errors import ConfigError, DataError, StaleStateError
from pipelines.feature_spec import Categorical, Cross, FeatureSpec, Numeric, Sequence
from pipelines.training_set import TrainingSet

MODELS = ["lr", "fm", "deepfm", "dcn"]
SPEC = FeatureSpec(
    categorical=(
        Categorical(name="user_id", buckets=40, group="user"),
        Categorical(name="item_id", buckets=30, group="item"),
        Categorical(name="position", buckets=6, group="position", wide_only=True),
    ),
    numeric=(Numeric(name="price", low=0, high=9, mean=4, std=2, boundaries=(3.0, 6.0)),),
    cross=(Cross(of=("user_id", "item_id"), buckets=64),),
)
SEQUENCE_SPEC = FeatureSpec(
    categorical=(Categorical(name="item_id", buckets=30, group="item"),),
    sequence=(Sequence(name="history", buckets=20, max_length=3),),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_rows(spec: FeatureSpec, n: int, seed: int = 0) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    noise = np.random.default_rng(seed)
    offsets, sizes = spec.offsets, spec.sizes
    columns = [offsets[field] + noise.integers(0, sizes[field], n) for field in spec.column_field]
    return np.stack(columns, 1).astype(np.int32), noise.normal(size=(n, len(spec.numeric))).astype(np.float32)


def batch_of(
    rows: tuple[NDArray[np.int32], NDArray[np.float32]], label: NDArray[np.float64], **changes: Any
) -> LearnBatch:
    n = len(label)
    fields: dict[str, Any] = {
        "buckets": rows[0],
        "numbers": rows[1],
        "label": label,
        "weight": np.ones(n),
        "first": np.ones(n, bool),
        "teacher_logit": np.full(n, np.nan),
        "policy": "wait",
        "distillation_weight": 0.2,
    }
    return LearnBatch(**{**fields, **changes})


def training_set(
    rows: tuple[NDArray[np.int32], NDArray[np.float32]],
    label: NDArray[np.float64],
    share: NDArray[np.float64] | None = None,
) -> TrainingSet:
    n = len(label)
    share = np.ones(n) if share is None else share
    return TrainingSet(
        buckets=rows[0],
        numbers=rows[1],
        user_key=np.zeros(n, np.int64),
        segment_key=np.zeros((n, 0), np.int64),
        label=label.astype(np.float32),
        weight=np.ones(n, np.float32),
        event_time=np.arange(n, dtype=np.int64) * 1000,
        mature=share >= 1.0,
        observed_share=share.astype(np.float32),
    )


def shaken(spec: FeatureSpec, config: StudentConfig) -> Student:
    """A student whose weights are all far from their start, padding row excepted."""
    student = Student.create(spec, config)
    noise = torch.Generator().manual_seed(5)
    for name, weight in student.weights.items():
        weight += 0.3 * torch.randn(weight.shape, generator=noise)
        if name in student.layout.tables:
            weight[0] = 0.0
    return student


def learn_labels(n: int, seed: int = 3) -> NDArray[np.float64]:
    return (np.random.default_rng(seed).random(n) < 0.3).astype(np.float64)


@pytest.mark.parametrize("model", ["fm", "deepfm"])
def test_interactions_are_the_sum_over_pairs_of_fields(model: str) -> None:
    student = shaken(SPEC, StudentConfig(model=model, hidden=(4,)))
    buckets, numbers = random_rows(SPEC, 7)
    weights = {name: weight.numpy().astype(np.float64) for name, weight in student.weights.items()}
    expected = np.empty(7)
    for row in range(7):
        vectors = weights["embedding"][buckets[row, :4]]
        logit = (
            weights["bias"][0] + weights["wide"][buckets[row]].sum() + numbers[row] @ weights["wide.numbers"]
        )
        for i, j in itertools.combinations(range(4), 2):
            pair = weights["cross.pairs"][i, j] if model == "deepfm" else 1.0
            logit += pair * float(vectors[i] @ vectors[j])
        if model == "deepfm":
            inputs = np.concatenate([vectors.ravel(), numbers[row]])
            hidden = np.maximum(inputs @ weights["dense.0.weight"] + weights["dense.0.bias"], 0.0)
            logit += float(hidden @ weights["dense.1.weight"][:, 0] + weights["dense.1.bias"][0])
        expected[row] = logit
    np.testing.assert_allclose(student.predict_logit(buckets, numbers), expected, rtol=1e-5, atol=1e-5)


def test_cross_layers_multiply_the_input_with_a_linear_map_of_the_layer_before() -> None:
    config = StudentConfig(model="dcn", hidden=(), cross_layers=2)
    student = shaken(SPEC, config)
    weights = {name: weight.numpy().astype(np.float64) for name, weight in student.weights.items()}
    buckets, numbers = random_rows(SPEC, 1)
    x0 = np.concatenate([weights["embedding"][buckets[0, :4]].ravel(), numbers[0]])
    x = x0
    for layer in range(2):
        full = weights[f"cross.{layer}.down"] @ weights[f"cross.{layer}.up"]
        x = x0 * (x @ full + weights[f"cross.{layer}.bias"]) + x
    logit = weights["bias"][0] + weights["wide"][buckets[0]].sum() + numbers[0] @ weights["wide.numbers"]
    logit += x @ weights["cross.out"] + x0 @ weights["dense.0.weight"][:, 0] + weights["dense.0.bias"][0]
    np.testing.assert_allclose(student.predict_logit(buckets, numbers), [logit], rtol=1e-4)


def test_wide_only_field_adds_the_same_to_every_logit() -> None:
    student = shaken(SPEC, StudentConfig(model="deepfm"))
    buckets, numbers = random_rows(SPEC, 50)
    moved = buckets.copy()
    position = SPEC.offsets[-1]
    buckets[:, -1], moved[:, -1] = position, position + 3
    change = student.predict_logit(moved, numbers) - student.predict_logit(buckets, numbers)
    wide = student.weights["wide"].numpy()
    np.testing.assert_allclose(change, wide[position + 3] - wide[position], atol=2e-6)


@pytest.mark.parametrize("model", MODELS)
def test_sequence_counts_as_the_average_of_its_values_and_padding_as_nothing(model: str) -> None:
    student = shaken(SEQUENCE_SPEC, StudentConfig(model=model))
    item, history = SEQUENCE_SPEC.offsets
    none = np.zeros((4, 0), np.float32)
    a, b = history + 2, history + 7
    buckets = np.array([[item, a, a, a], [item, a, 0, 0], [item, a, b, 0], [item, 0, 0, 0]], np.int32)
    logit = student.predict_logit(buckets, none)
    assert logit[0] == pytest.approx(logit[1], abs=1e-5)
    for name in student.layout.tables:
        table = student.weights[name]
        table[history + 9] = (table[a] + table[b]) / 2
    averaged = student.predict_logit(np.array([[item, history + 9, 0, 0]], np.int32), none[:1])
    assert averaged[0] == pytest.approx(logit[2], abs=1e-5)
    assert np.isfinite(logit[3])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("spec", [SPEC, SEQUENCE_SPEC], ids=["plain", "sequence"])
def test_one_update_steps_along_the_gradient_of_the_whole_network(model: str, spec: FeatureSpec) -> None:
    """The update ends differentiation at the gathered rows; here torch differentiates through the tables."""
    config = StudentConfig(model=model, hidden=(4,), frozen=(), l2=0.0, initial_accumulator=0.5)
    student = shaken(spec, config)
    rows, label = random_rows(spec, 40), learn_labels(40)
    weight = np.linspace(0.5, 2.0, 40)
    before = {name: tensor.clone().requires_grad_() for name, tensor in student.weights.items()}
    buckets = torch.from_numpy(rows[0].astype(np.int64))
    layout = Layout.of(spec, config)
    embedding = (
        before["embedding"][buckets[:, : layout.columns]]
        if layout.dim
        else torch.zeros(40, layout.columns, 0)
    )
    logit = forward(layout, before, buckets, embedding, before["wide"][buckets], torch.from_numpy(rows[1]))
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logit, torch.from_numpy(label).float(), torch.from_numpy(weight).float(), reduction="sum"
    )
    losses.backward()  # type: ignore[no-untyped-call]
    student.learn(batch_of(rows, label, weight=weight))
    for name in student.layout.tables:
        gradient = before[name].grad
        assert gradient is not None
        expected = before[name].detach() - config.learning_rate * gradient / (0.5 + gradient**2).sqrt()
        expected[0] = 0.0
        torch.testing.assert_close(student.weights[name], expected, rtol=1e-4, atol=1e-6)
    bias = before["bias"].grad
    assert bias is not None
    assert float(student.weights["bias"] - before["bias"].detach()) == pytest.approx(
        float(-0.2 / 256 * bias), rel=1e-4
    )
    for name in student.small_weights():
        assert not torch.equal(student.weights[name], before[name])


def test_table_adagrad_equals_dense_adagrad_of_torch_on_repeated_rows() -> None:
    table = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    table[0] = 0.0
    reference = torch.nn.Parameter(table.clone())
    ours = TableAdagrad(table, learning_rate=0.1, initial_accumulator=0.3, l2=0.0)
    theirs = torch.optim.Adagrad([reference], lr=0.1, initial_accumulator_value=0.3, eps=0.0)
    noise = torch.Generator().manual_seed(2)
    for _ in range(5):
        rows = torch.randint(1, 10, (20,), generator=noise)
        gradient = torch.randn(20, 3, generator=noise)
        ours.step(rows, gradient)
        reference.grad = torch.zeros(10, 3).index_add_(0, rows, gradient)
        theirs.step()
    torch.testing.assert_close(table, reference.detach(), rtol=1e-5, atol=1e-6)


def test_adam_equals_adam_of_torch() -> None:
    weight = torch.tensor([1.0, -2.0])
    reference = torch.nn.Parameter(weight.clone())
    ours = Adam({"w": weight}, learning_rate=0.01)
    theirs = torch.optim.Adam([reference], lr=0.01)
    for step in range(20):
        gradient = torch.tensor([0.3 * step, -1.0])
        ours.step({"w": gradient})
        reference.grad = gradient.clone()
        theirs.step()
    torch.testing.assert_close(weight, reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_untouched_rows_padding_and_frozen_layers_stay_to_the_bit(model: str) -> None:
    student = Student.create(SPEC, StudentConfig(model=model))
    before, digest = student.state(), student.frozen_digest()
    buckets, numbers = random_rows(SPEC, 30)
    buckets[:, 0] = SPEC.offsets[0] + 1
    for _ in range(3):
        student.learn(batch_of((buckets, numbers), learn_labels(30)))
    after = student.state()
    untouched = np.setdiff1d(np.arange(SPEC.table_rows), buckets)
    for name in student.layout.tables:
        for part in ("weights", "accumulator"):
            key = f"{part}/{name}"
            np.testing.assert_array_equal(after[key][untouched], before[key][untouched])
            assert not np.array_equal(after[key], before[key])
    for name in student.weights:
        if name.startswith(("cross", "dense")):
            np.testing.assert_array_equal(after[f"weights/{name}"], before[f"weights/{name}"])
    assert student.frozen_digest() == digest
    assert not any(key.startswith(("mean/cross", "mean/dense")) for key in after)


def test_layer_that_is_not_frozen_learns() -> None:
    student = Student.create(SPEC, StudentConfig(model="deepfm", frozen=("cross",)))
    before = student.state()
    student.learn(batch_of(random_rows(SPEC, 30), learn_labels(30)))
    after = student.state()
    assert not np.array_equal(after["weights/dense.0.weight"], before["weights/dense.0.weight"])
    np.testing.assert_array_equal(after["weights/cross.pairs"], before["weights/cross.pairs"])


def test_predicting_changes_nothing() -> None:
    student = shaken(SPEC, StudentConfig())
    rows = random_rows(SPEC, 100)
    before = student.state()
    first = student.predict_logit(*rows)
    np.testing.assert_array_equal(first, student.predict_logit(*rows))
    for key, value in student.state().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("model", MODELS)
def test_learning_continues_to_the_bit_from_a_saved_state(model: str) -> None:
    config = StudentConfig(model=model, frozen=("cross",))
    student = Student.create(SPEC, config)
    batches = [
        batch_of(random_rows(SPEC, 64, seed), learn_labels(64, seed), policy="fnw") for seed in range(8)
    ]
    for batch in batches[:4]:
        student.learn(batch)
    state = student.state()
    resumed = Student.create(SPEC, config)
    resumed.load_state(state)
    for batch in batches[4:]:
        student.learn(batch)
        resumed.learn(batch)
    for key, value in student.state().items():
        np.testing.assert_array_equal(value, resumed.state()[key])
    assert resumed.steps == 8
    assert resumed.rows_learned == 8 * 64


def test_state_is_a_copy() -> None:
    student = Student.create(SPEC, StudentConfig())
    state = student.state()
    kept = {key: value.copy() for key, value in state.items()}
    student.learn(batch_of(random_rows(SPEC, 64), learn_labels(64)))
    for key, value in state.items():
        np.testing.assert_array_equal(value, kept[key])


def test_state_of_another_shape_is_refused_before_anything_changes() -> None:
    student = Student.create(SPEC, StudentConfig())
    before = student.state()
    for other in (StudentConfig(embedding_dim=4), StudentConfig(model="fm"), StudentConfig(frozen=())):
        with pytest.raises(StaleStateError, match="does not fit"):
            student.load_state(Student.create(SPEC, other).state())
    for key, value in student.state().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("model", MODELS)
def test_files_give_back_the_same_predictions(model: str) -> None:
    student = shaken(SPEC, StudentConfig(model=model))
    rows = random_rows(SPEC, 100)
    files = student.to_files()
    loaded = Student.from_files(files, SPEC)
    np.testing.assert_array_equal(loaded.predict_logit(*rows), student.predict_logit(*rows))
    assert loaded.frozen_digest() == student.frozen_digest()
    assert sorted(files) == ["student.json", "student.safetensors"]
    with pytest.raises(StaleStateError, match="feature spec"):
        Student.from_files(files, SEQUENCE_SPEC)
    with pytest.raises(StaleStateError, match="files of a student"):
        Student.from_files({**files, "student.safetensors": b"broken"}, SPEC)


def test_label_that_is_not_a_number_is_refused_and_changes_nothing() -> None:
    student = Student.create(SPEC, StudentConfig())
    before = student.state()
    label = learn_labels(10)
    label[4] = np.nan
    with pytest.raises(DataError, match="row 4"):
        student.learn(batch_of(random_rows(SPEC, 10), label))
    with pytest.raises(ConfigError, match="policy"):
        student.learn(batch_of(random_rows(SPEC, 10), learn_labels(10), policy="deferred"))
    for key, value in student.state().items():
        np.testing.assert_array_equal(value, before[key])


def test_empty_batch_is_no_step() -> None:
    student = Student.create(SPEC, StudentConfig())
    student.learn(batch_of(random_rows(SPEC, 0), np.zeros(0)))
    assert student.steps == 0
    assert len(student.predict_logit(*random_rows(SPEC, 0))) == 0


def test_teacher_pulls_on_first_emissions_with_a_finite_logit_only() -> None:
    rows, label, logit = random_rows(SPEC, 4), np.zeros(4), np.array([0.3, 0.3, 0.3, 0.3])
    first = np.array([True, True, False, True])
    teacher = np.array([2.0, np.nan, 2.0, -2.0])
    weight = np.array([1.0, 1.0, 1.0, 3.0])
    plain = batch_of(rows, label, distillation_weight=0.0, weight=weight).gradient(logit)
    both = batch_of(rows, label, first=first, teacher_logit=teacher, weight=weight).gradient(logit)
    p, towards = sigmoid(logit), sigmoid(np.array([2.0, 0.0, 0.0, -2.0]))
    expected = 0.2 * weight * (p - towards) * [1, 0, 0, 1]
    np.testing.assert_allclose(both - plain, expected, atol=1e-12)


def delayed_stream(policy: str, p: float, clicks: int, seed: int) -> NDArray[np.float64]:
    """Labels of rows in the order in which a policy emits them; conversions come 200 clicks late."""
    converted = np.random.default_rng(seed).random(clicks) < p
    if policy == "wait":
        return converted.astype(np.float64)
    shown: list[float] = []
    for click in range(clicks):
        shown.append(0.0)
        if click >= 200 and converted[click - 200]:
            shown.append(1.0)
    return np.array(shown)


@pytest.mark.parametrize("policy", ["wait", "fnw", "fnc"])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.6])
def test_student_finds_the_conversion_rate_of_a_stream_of_changing_labels(policy: str, p: float) -> None:
    spec = FeatureSpec(categorical=(Categorical(name="item_id", buckets=4),))
    student = Student.create(spec, StudentConfig(model="lr", l2=0.0))
    student.weights["bias"].fill_(np.log(p / (1 - p)) - 0.7)
    labels = delayed_stream(policy, p, 60_000, seed=11)
    rows, none = np.full((256, 1), 2, np.int32), np.zeros((256, 0), np.float32)
    late: list[float] = []
    for start in range(0, len(labels) - 256, 256):
        student.learn(batch_of((rows, none), labels[start : start + 256], policy=policy))
        if start > len(labels) // 2:
            late.append(float(sigmoid(student.predict_logit(rows[:1], none[:1]))[0]))
    # 30,000 clicks: a standard error of 1.0 % of 0.6 and 2.5 % of 0.05 at the most.
    assert np.mean(late) == pytest.approx(p, rel=0.06)


def simulated(n: int, seed: int) -> tuple[tuple[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float64]]:
    """Rows with a known probability: effects of users, items and the number."""
    rows = random_rows(SPEC, n, seed)
    truth = np.random.default_rng(77).normal(0.0, 1.0, SPEC.table_rows)
    return rows, sigmoid(-1.0 + truth[rows[0][:, 0]] + truth[rows[0][:, 1]] + 0.5 * rows[1][:, 0])


@pytest.mark.parametrize("model", MODELS)
def test_offline_training_finds_the_signal(model: str) -> None:
    rows, p = simulated(20_000, 1)
    # First-order weights alone carry the whole effect in "lr" and have one pass to find it.
    rates = {"learning_rate": 0.4, "dense_learning_rate": 0.01} if model == "lr" else {}
    student = Student.create(SPEC, StudentConfig.model_validate({"model": model, **rates}))
    report = student.fit(training_set(rows, (np.random.default_rng(4).random(20_000) < p).astype(float)))
    fresh, q = simulated(5_000, 2)
    f = sigmoid(student.predict_logit(*fresh))
    regret = np.mean(q * np.log(q / f) + (1 - q) * np.log((1 - q) / (1 - f)))
    signal = np.mean(q * np.log(q / q.mean()) + (1 - q) * np.log((1 - q) / (1 - q.mean())))
    assert regret < 0.15 * signal
    assert report.epochs == 3


def test_offline_training_on_open_labels_is_not_biased_low() -> None:
    rows, p = simulated(30_000, 1)
    noise = np.random.default_rng(4)
    share = np.clip(1.5 - np.arange(30_000) / 20_000, 0.0, 1.0)
    seen = (noise.random(30_000) < p * share).astype(float)
    student = Student.create(SPEC, StudentConfig(model="deepfm"))
    student.fit(training_set(rows, seen, share))
    fresh, q = simulated(10_000, 2)
    assert np.mean(sigmoid(student.predict_logit(*fresh))) / np.mean(q) == pytest.approx(1.0, abs=0.05)
    assert seen.mean() / p.mean() < 0.85


def test_best_epoch_on_the_validation_rows_is_kept() -> None:
    rows, p = simulated(6_000, 1)
    data = training_set(rows, (np.random.default_rng(4).random(6_000) < p).astype(float))
    train, validation = data.split(int(data.event_time[4_500]))
    student = Student.create(SPEC, StudentConfig(warmup_epochs=6))
    report = student.fit(train, validation)
    losses = report.validation_log_loss
    assert report.epochs == int(np.argmin(losses)) + 1
    kept = cured_log_loss(student.predict_logit(validation.buckets, validation.numbers), validation)
    assert kept == pytest.approx(min(losses), rel=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_row_never_seen_starts_near_the_base_rate(model: str) -> None:
    rows, _ = simulated(20_000, 1)
    rows[0][:, :2] = np.minimum(rows[0][:, :2], [SPEC.offsets[0] + 29, SPEC.offsets[1] + 19])
    label = (np.random.default_rng(4).random(20_000) < 0.1).astype(float)
    student = Student.create(SPEC, StudentConfig(model=model))
    student.fit(training_set(rows, label))
    fresh = (rows[0][:200].copy(), rows[1][:200])
    fresh[0][:, 0], fresh[0][:, 1] = SPEC.offsets[0] + 35, SPEC.offsets[1] + 25
    assert sigmoid(student.predict_logit(*fresh)).mean() == pytest.approx(0.1, abs=0.03)


def test_training_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        Student.create(SPEC, StudentConfig()).fit(training_set(random_rows(SPEC, 0), np.zeros(0)))


def test_same_rows_give_the_same_bits_in_another_process() -> None:
    program = """
import hashlib, numpy as np, torch
torch.set_num_threads(1)
from tests.test_models_student import SPEC, batch_of, learn_labels, random_rows, training_set
from models.student import Student
from pipelines.config_sections import StudentConfig
student = Student.create(SPEC, StudentConfig())
student.fit(training_set(random_rows(SPEC, 2000, 1), learn_labels(2000)))
for seed in range(10):
    student.learn(batch_of(random_rows(SPEC, 256, seed), learn_labels(256, seed), policy="fnw"))
state = student.state()
print(hashlib.sha256(b"".join(state[key].tobytes() for key in sorted(state))).hexdigest())
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_initial_weights_depend_on_the_seed_only() -> None:
    layout = Layout.of(SPEC, StudentConfig())
    again, other = initial_weights(layout, 17), initial_weights(layout, 18)
    for name, weight in initial_weights(layout, 17).items():
        assert torch.equal(weight, again[name])
    assert not torch.equal(again["embedding"], other["embedding"])
    assert torch.count_nonzero(again["embedding"][0]) == 0
