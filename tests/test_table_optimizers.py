"""Optimizers of table rows against torch, brute force in float64, and across a commit and a restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.checkpoint import CheckpointStore
from jobs.online_state import loop_state, take_loop_changes
from jobs.state_digest import state_digest
from models.lazy_adam import LazyAdam
from models.learn_batch import LearnBatch
from models.rowwise_adagrad import RowwiseAdagrad
from models.student import Student
from models.table_adagrad import TableAdagrad
from models.table_ftrl import TableFtrl
from models.table_optimizer import TableOptimizer
from pipelines.config import load_config
from pipelines.config_sections import StudentConfig
from pipelines.errors import ConfigError, StaleStateError
from pipelines.feature_spec import Categorical, FeatureSpec
from tests.small_run import SmallRun

OPTIMIZERS = get_args(StudentConfig.model_fields["optimizer"].annotation)
ROWS, DIM = 12, 3
SPEC = FeatureSpec(
    categorical=(Categorical(name="item_id", buckets=50), Categorical(name="user_id", buckets=70)),
)
Steps = list[tuple[Tensor, Tensor]]


def random_steps(count: int, seed: int = 2, dim: int | None = DIM) -> Steps:
    """Batches of rows with repetitions; some rows come in few of them."""
    noise = torch.Generator().manual_seed(seed)
    shape = (20,) if dim is None else (20, dim)
    return [
        (
            1 + torch.randint(0, ROWS - 1, (20,), generator=noise) * (torch.rand(20, generator=noise) < 0.5),
            torch.randn(shape, generator=noise),
        )
        for _ in range(count)
    ]  # fmt: skip


def start(dim: int | None = DIM) -> Tensor:
    table = 0.1 * torch.randn(
        (ROWS,) if dim is None else (ROWS, dim), generator=torch.Generator().manual_seed(1)
    )
    table[0] = 0.0
    return table


def summed(rows: Tensor, gradient: Tensor) -> dict[int, NDArray[np.float64]]:
    """The gradient of each row of a batch."""
    found: dict[int, NDArray[np.float64]] = {}
    for row, part in zip(rows.tolist(), gradient.double().numpy(), strict=True):
        found[row] = found.get(row, np.zeros_like(part)) + part
    return found


def sparse(rows: Tensor, gradient: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], gradient, (ROWS, *gradient.shape[1:]), check_invariants=True)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_adagrad_is_the_sparse_adagrad_of_torch() -> None:
    table, theirs = start(), torch.nn.Parameter(start())
    ours = TableAdagrad(table, learning_rate=0.1, initial_accumulator=0.3, l2=0.0)
    torch_adagrad = torch.optim.Adagrad([theirs], lr=0.1, initial_accumulator_value=0.3, eps=0.0)
    for rows, gradient in random_steps(20):
        ours.step(rows, gradient)
        theirs.grad = sparse(rows, gradient)
        torch_adagrad.step()
    torch.testing.assert_close(table, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_lazy_adam_is_the_sparse_adam_of_torch_where_every_batch_has_every_row() -> None:
    table, theirs = start(), torch.nn.Parameter(start())
    ours, torch_adam = LazyAdam(table, learning_rate=0.05, l2=0.0), torch.optim.SparseAdam([theirs], lr=0.05)
    every = torch.arange(1, ROWS)
    noise = torch.Generator().manual_seed(3)
    for _ in range(30):
        gradient = torch.randn(ROWS - 1, DIM, generator=noise)
        ours.step(every, gradient)
        theirs.grad = sparse(every, gradient)
        torch_adam.step()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(table, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_lazy_adam_moves_each_row_as_adam_of_torch_moves_it_alone() -> None:
    table = start()
    alone = {row: torch.nn.Parameter(table[row].clone()) for row in range(1, ROWS)}
    adams = {row: torch.optim.Adam([weight], lr=0.05) for row, weight in alone.items()}
    ours = LazyAdam(table, learning_rate=0.05, l2=0.0)
    for rows, gradient in random_steps(30):
        ours.step(rows, gradient)
        for row, total in summed(rows, gradient).items():
            alone[row].grad = torch.from_numpy(total.astype(np.float32))
            adams[row].step()
    for row, weight in alone.items():
        torch.testing.assert_close(table[row], weight.detach(), rtol=1e-4, atol=1e-5)
    assert len(set(ours.slots["steps"][1:].tolist())) > 1


@pytest.mark.parametrize("dim", [None, 1, DIM])
def test_rowwise_adagrad_divides_a_row_by_the_root_of_its_mean_square(dim: int | None) -> None:
    table = start(dim)
    ours = RowwiseAdagrad(table, learning_rate=0.1, initial_accumulator=0.3, l2=0.2)
    weights, squares = start(dim).double().numpy(), np.full(ROWS, 0.3)
    for rows, gradient in random_steps(20, dim=dim):
        ours.step(rows, gradient)
        for row, total in summed(rows, gradient).items():
            total = total + 0.2 * weights[row]
            squares[row] += np.mean(total**2)
            weights[row] -= 0.1 * total / math.sqrt(squares[row])
    np.testing.assert_allclose(table.numpy(), weights, rtol=1e-4, atol=1e-5)
    assert ours.slots["accumulator"].shape == (ROWS,)


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.7, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize("dim", [None, DIM])
def test_ftrl_is_algorithm_1_of_the_paper(l1: float, l2: float, dim: int | None) -> None:
    alpha, beta = 0.1, 1.0
    table = torch.zeros_like(start(dim))
    ours = TableFtrl(table, learning_rate=alpha, initial_accumulator=0.0, l1=l1, l2=l2)
    z, n = np.zeros(table.shape), np.zeros(table.shape)

    def weight(z: float, n: float) -> float:
        if abs(z) <= l1:
            return 0.0
        return -(z - math.copysign(l1, z)) / ((beta + math.sqrt(n)) / alpha + l2)

    for rows, gradient in random_steps(20, dim=dim):
        ours.step(rows, gradient)
        for row, total in summed(rows, gradient).items():
            for place in np.ndindex(total.shape):
                at = (row, *place)
                g, w = float(total[place]), weight(z[at], n[at])
                sigma = (math.sqrt(n[at] + g * g) - math.sqrt(n[at])) / alpha
                z[at] += g - sigma * w
                n[at] += g * g
    expected = np.vectorize(weight, otypes=[float])(z, n)
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-4, atol=1e-5)
    if l1:
        assert 0 < int((table[1:] == 0).sum()) < table[1:].numel()


def test_ftrl_with_constant_gradients_reaches_the_minimum_of_its_regularised_sum() -> None:
    # With n fixed, the weight minimises g w + stiffness w^2 / 2 + l1 |w|: solved on a grid.
    table = torch.zeros(2)
    TableFtrl(table, learning_rate=0.5, initial_accumulator=0.0, l1=0.4, l2=1.5).step(
        torch.tensor([1]), torch.tensor([2.0])
    )
    grid = np.linspace(-2, 2, 400_001)
    objective = 2.0 * grid + ((1.0 + 2.0) / 0.5 + 1.5) * grid**2 / 2 + 0.4 * np.abs(grid)
    assert float(table[1]) == pytest.approx(grid[np.argmin(objective)], abs=1e-5)


@pytest.mark.parametrize("l1", [0.0, 0.5])
def test_ftrl_begins_where_the_table_stands(l1: float) -> None:
    table = start()
    ours = TableFtrl(table, learning_rate=0.1, initial_accumulator=0.01, l1=l1, l2=0.3)
    before = table.clone()
    ours.step(torch.arange(1, ROWS), torch.zeros(ROWS - 1, DIM))
    torch.testing.assert_close(table, before, rtol=1e-5, atol=1e-6)


def make(optimizer: str, table: Tensor) -> TableOptimizer:
    made: dict[str, Callable[[], TableOptimizer]] = {
        "adagrad": lambda: TableAdagrad(table, learning_rate=0.1, initial_accumulator=0.1, l2=0.1),
        "rowwise_adagrad": lambda: RowwiseAdagrad(table, learning_rate=0.1, initial_accumulator=0.1, l2=0.1),
        "ftrl": lambda: TableFtrl(table, learning_rate=0.1, initial_accumulator=0.1, l1=0.1, l2=0.1),
        "lazy_adam": lambda: LazyAdam(table, learning_rate=0.01, l2=0.1),
    }
    return made[optimizer]()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dim", [None, DIM])
def test_only_rows_of_the_batch_and_their_slots_change_and_padding_stays_zero(
    optimizer: str, dim: int | None
) -> None:
    table = start(dim)
    ours = make(optimizer, table)
    ours.step(torch.tensor([1, 3, 3]), torch.ones((3,) if dim is None else (3, dim)))
    assert [part.rows for part in ours.take_changes()["weights"]] == [None]
    before = {"table": table.clone(), **{name: slot.clone() for name, slot in ours.slots.items()}}
    ours.step(torch.tensor([0, 5, 5, 2]), torch.ones((4,) if dim is None else (4, dim)))
    for (part,) in ours.take_changes().values():
        assert part.rows is not None
        assert part.rows.tolist() == [0, 2, 5]
    after = {"table": table, **ours.slots}
    for name, values in before.items():
        same = (values == after[name]).reshape(ROWS, -1).all(1)
        assert torch.nonzero(~same).ravel().tolist() == ([2, 5] if name == "table" else [0, 2, 5])
    assert not table[0].any()
    ours.reset()
    assert [part.rows for part in ours.take_changes()["weights"]] == [None]
    for name, first in make(optimizer, table).slots.items():
        torch.testing.assert_close(ours.slots[name], first)


def learn(student: Student, seed: int, rows: int = 40) -> None:
    rng = np.random.default_rng(seed)
    buckets = np.column_stack([rng.integers(1, 50, rows), rng.integers(51, 120, rows)]).astype(np.int32)
    label, one = rng.integers(0, 2, rows).astype(np.float64), np.ones(rows)
    none = np.zeros((rows, 0), np.float32)
    student.learn(LearnBatch(buckets, none, label, one, True, one * np.nan, "wait", 0.0))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [(), ("cross", "dense")])
def test_a_student_restored_from_base_and_deltas_goes_on_to_the_same_bits(
    optimizer: str, frozen: tuple[str, ...], tmp_path: Path
) -> None:
    config = StudentConfig.model_validate(
        {"optimizer": optimizer, "frozen": frozen, "embedding_dim": 3, "learning_rate": 0.05}
    )
    student, store = Student.create(SPEC, config), CheckpointStore(tmp_path)
    store.open()
    for step in range(1, 6):
        learn(student, step, rows=5)
        arrays, tables = student.take_changes()
        store.commit(step, arrays, {}, tables=tables, cursor=[step], outputs=[], volatile={})
    head = store.head()
    assert head is not None
    assert len(store.manifest(head)["chain"]) == 4
    found = CheckpointStore(tmp_path)
    found.open()
    loaded = found.load()
    assert loaded is not None
    restored = Student.create(SPEC, config)
    restored.load_state(loaded.arrays)
    from_release = Student.from_files(student.to_files(slots=True), SPEC)
    for one in (student, restored, from_release):
        for seed in range(10, 15):
            learn(one, seed)
    digest = state_digest(student.state(), {})
    assert state_digest(restored.state(), {}) == digest == state_digest(from_release.state(), {})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_layers_have_no_slots_and_every_other_weight_but_the_bias_has(optimizer: str) -> None:
    config = StudentConfig.model_validate({"optimizer": optimizer, "frozen": ("dense",)})
    state = Student.create(SPEC, config).state()
    owners = {name.split("/", 1)[1] for name in state if "/" in name and not name.startswith("weights/")}
    assert owners == {"embedding", "wide", "cross.pairs"}


def test_l1_with_another_optimizer_than_ftrl_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student.*l1 needs optimizer"):
        load_config(None, ["student.l1=0.5"])
    assert load_config(None, ["student.l1=0.5", "student.optimizer=ftrl"]).student.l1 == 0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_what_a_value_is_worth(optimizer: str) -> None:
    rate = 0.01 if optimizer == "lazy_adam" else 0.1
    config = StudentConfig.model_validate({"model": "lr", "optimizer": optimizer, "learning_rate": rate})
    student, rng = Student.create(SPEC, config), np.random.default_rng(0)
    truth = np.where(np.arange(120) % 3 == 0, 1.0, -1.0)
    for _ in range(200):
        buckets = np.column_stack([rng.integers(1, 50, 64), rng.integers(51, 120, 64)]).astype(np.int32)
        chance = 1.0 / (1.0 + np.exp(-truth[buckets].sum(1)))
        label = (rng.random(64) < chance).astype(np.float64)
        one, none = np.ones(64), np.zeros((64, 0), np.float32)
        student.learn(LearnBatch(buckets, none, label, one, True, one * np.nan, "wait", 0.0))
    every = np.array([(item, user) for item in range(1, 50) for user in range(51, 120)], np.int32)
    logit = student.predict_logit(every, np.zeros((len(every), 0), np.float32))
    assert np.corrcoef(logit, truth[every].sum(1))[0, 1] > 0.85


@pytest.mark.parametrize("take", [loop_state, take_loop_changes])
def test_no_state_is_taken_for_a_commit_once_a_frozen_layer_has_changed(
    small_run: SmallRun, take: Callable[[Any], Any]
) -> None:
    loop = small_run.warm_loop()
    assert take(loop) is not None
    loop.students["click"].weights["dense.0.bias"][0] += 1.0
    with pytest.raises(StaleStateError, match="frozen layers of the click student have changed"):
        take(loop)
