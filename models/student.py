"""The student: a network of one task that is trained offline once and then learns online, batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Self

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from models.learn_batch import LearnBatch
from models.network import Layout, forward, initial_table, initial_weights, layer_of
from models.optimizers import Adam, TableAdagrad
from models.table_rows import TableRows
from models.warm_up import WarmUp, warm_up
from pipelines.config_sections import StudentConfig
from pipelines.errors import StaleStateError
from pipelines.feature_spec import FeatureSpec
from pipelines.training_set import TrainingRows, TrainingSet

__all__ = ["LearnBatch", "Student"]

LogitGradient = Callable[[NDArray[np.float64]], NDArray[np.float64]]

_PREDICT_ROWS = 8192
# Step of the bias for one row: constant, unlike Adagrad's, for the bias has to follow the base rate for ever.
_BIAS_RATE = 0.2 / 256
_WEIGHTS_FILE, _CONFIG_FILE, _SLOTS_FILE = "student.safetensors", "student.json", "slots.safetensors"


class Student:
    """A network of one task.

    ``learn`` moves embeddings, first-order weights and the bias; the layers named in ``config.frozen`` stay
    as ``fit`` left them. All of it is plain tensors, and on one thread the same rows in the same order give
    the same bits.

    Examples
    --------
    >>> from pipelines.feature_spec import Categorical
    >>> spec = FeatureSpec(categorical=(Categorical(name="item_id", buckets=8),))
    >>> student = Student.create(spec, StudentConfig(model="lr"))
    >>> rows, none, one = np.full((64, 1), 3, np.int32), np.zeros((64, 0), np.float32), np.ones(64)
    >>> student.learn(LearnBatch(rows, none, one, one, True, one * np.nan, "wait", 0.0))
    >>> student.predict_logit(rows[:1], none[:1]).round(3).tolist()
    [0.125]
    """

    def __init__(self, spec: FeatureSpec, config: StudentConfig, weights: dict[str, Tensor]) -> None:
        self.spec = spec
        self.config = config
        self.layout = Layout.of(spec, config)
        self.weights = weights
        self.steps = 0
        self.rows_learned = 0
        # Made when first needed: a served student never learns, and the slots are as large as the tables.
        self._tables: dict[str, TableAdagrad] | None = None
        self._small: Adam | None = None

    @classmethod
    def create(cls, spec: FeatureSpec, config: StudentConfig) -> Self:
        """A student that has learned nothing; its logits are near 0."""
        return cls(spec, config, initial_weights(Layout.of(spec, config), config.seed))

    def fit(
        self, train: TrainingRows, validation: TrainingSet | None = None, *, epochs: int | None = None
    ) -> WarmUp:
        """Train all layers offline, from the start; see `models.warm_up.warm_up`.

        ``epochs`` replaces ``config.warmup_epochs``.
        """
        for name, weight in initial_weights(self.layout, self.config.seed).items():
            self.weights[name].copy_(weight)
        self._touch_tables()
        return warm_up(self, train, validation, epochs or self.config.warmup_epochs)

    def predict_logit(self, buckets: NDArray[np.int32], numbers: NDArray[np.float32]) -> NDArray[np.float64]:
        """Log-odds of the outcome for each row, shape (n,); of ``p`` itself under every policy."""
        logit = np.empty(len(buckets), np.float64)
        with torch.inference_mode():
            for start in range(0, len(buckets), _PREDICT_ROWS):
                part = slice(start, start + _PREDICT_ROWS)
                rows, dense = _as_tensors(buckets[part], numbers[part])
                embedding, wide = self._gather(rows)
                logit[part] = forward(self.layout, self.weights, rows, embedding, wide, dense).numpy()
        return logit

    def learn(self, batch: LearnBatch) -> None:
        """One update: the loss is the sum over rows of weight x (policy loss + distillation).

        The weights are not renormalised. Table rows take the gradient of the sum, the small layers that are
        not frozen the gradient of the mean.

        Raises
        ------
        DataError
            If a label or weight is not a number; nothing is changed then.
        ConfigError
            If the policy is unknown.
        """
        if len(batch) == 0:
            return
        self.update(batch.buckets, batch.numbers, batch.gradient)
        self.steps += 1
        self.rows_learned += len(batch)

    def update(
        self, buckets: NDArray[np.int32], numbers: NDArray[np.float32], loss_gradient: LogitGradient
    ) -> None:
        """Predict, then step against the gradient that ``loss_gradient`` gives for the logits, both (n,)."""
        rows, dense = _as_tensors(buckets, numbers)
        embedding, wide = self._gather(rows)
        tables = {"embedding": embedding, "wide": wide} if self.layout.dim else {"wide": wide}
        small = self.small_optimizer()
        learning = {name: self.weights[name].detach() for name in small.names}
        leaves = [leaf.requires_grad_() for leaf in (*tables.values(), *learning.values())]
        output = forward(self.layout, {**self.weights, **learning}, rows, embedding, wide, dense)
        gradient = loss_gradient(output.detach().numpy().astype(np.float64))
        found = torch.autograd.grad(output, leaves, torch.from_numpy(gradient.astype(np.float32)))

        for name, part in zip(tables, found, strict=False):
            touched = rows[:, : self.layout.columns] if name == "embedding" else rows
            flat = part.reshape(-1, self.layout.dim) if name == "embedding" else part.reshape(-1)
            self.table_optimizers()[name].step(touched.reshape(-1), flat)
        if learning:
            small.step(
                {name: part / len(rows) for name, part in zip(learning, found[len(tables) :], strict=True)}
            )
        self.weights["bias"] -= _BIAS_RATE * float(gradient.sum())

    def table_optimizers(self) -> dict[str, TableAdagrad]:
        """Adagrad of each table."""
        if self._tables is None:
            self._tables = {
                name: TableAdagrad(
                    self.weights[name],
                    learning_rate=self.config.learning_rate,
                    initial_accumulator=self.config.initial_accumulator,
                    l2=self.config.l2,
                )
                for name in self.layout.tables
            }
        return self._tables

    def small_optimizer(self) -> Adam:
        """Adam of the small weights that learn: online those that are not frozen."""
        if self._small is None:
            self._small = Adam(
                self.small_weights(self.config.frozen), learning_rate=self.config.dense_learning_rate
            )
        return self._small

    def small_weights(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Weights that are neither tables nor the bias, and not of the layers in ``without``."""
        return {
            name: weight
            for name, weight in self.weights.items()
            if name not in (*self.layout.tables, "bias") and weight.numel() and layer_of(name) not in without
        }

    def thaw(self) -> None:
        """Let all small weights learn, with fresh slots; ends with `freeze`."""
        self._small = Adam(self.small_weights(), learning_rate=self.config.dense_learning_rate)

    def freeze(self) -> None:
        """Freeze the layers of ``config.frozen``; the others keep their slots."""
        self._small = self.small_optimizer().subset(self.small_weights(self.config.frozen))

    def reset_tables(self) -> None:
        """Every table row and its slots as if never seen."""
        if self.layout.dim:
            self.weights["embedding"].copy_(initial_table(self.layout, self.config.seed))
        self.weights["wide"].zero_()
        for optimizer in self.table_optimizers().values():
            optimizer.reset()

    def frozen_digest(self) -> str:
        """sha256 over names and bytes of the frozen layers."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            if layer_of(name) in self.config.frozen:
                digest.update(name.encode() + b"\0" + weight.numpy().tobytes())
        return digest.hexdigest()

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Weights, optimizer slots and counters: copies, exact. ``load_state`` continues from them."""
        state = {name: tensor.numpy().copy() for name, tensor in self._tensors().items()}
        state["counters"] = self._counters()
        return state

    def take_changes(self) -> tuple[dict[str, NDArray[np.generic]], dict[str, TableRows]]:
        """Copies of what ``state`` gives, of its tables only the rows that changed since the last call.

        Returns
        -------
        whole : dict of str to ndarray
            Small weights, their slots and the counters.
        tables : dict of str to TableRows
            Tables and their slots; all of a table that was set by other means than learning.
        """
        tensors, tables = self._tensors(), {}
        for table, optimizer in self.table_optimizers().items():
            rows = optimizer.take_touched()
            for name in (f"weights/{table}", f"accumulator/{table}"):
                values = tensors.pop(name).numpy()
                tables[name] = TableRows(rows, values.copy() if rows is None else values.take(rows, axis=0))
        whole = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
        return {**whole, "counters": self._counters()}, tables

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from what ``state`` gave.

        Raises
        ------
        StaleStateError
            If names or shapes do not fit this student; nothing is changed then.
        """
        tensors = self._tensors()
        _check_fit({**tensors, "counters": torch.zeros(3)}, state)
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(state[name])))
        self.steps, self.rows_learned, self.small_optimizer().steps = (int(n) for n in state["counters"])
        self._touch_tables()

    def to_files(
        self, *, slots: bool = False, weights: Mapping[str, NDArray[np.generic]] | None = None
    ) -> dict[str, bytes]:
        """The weights as safetensors, and the configuration as JSON.

        ``weights`` are written in place of the student's own: those of an earlier moment.
        ``slots`` adds the optimizer slots: whoever is to go on learning needs them. Without them the first
        updates of frequent rows would be as large as those of rows that were never seen.
        """
        about = {
            "version": 1,
            "spec_digest": self.spec.digest(),
            "config": self.config.model_dump(mode="json"),
        }
        own = {name: weight.numpy() for name, weight in self.weights.items()}
        written: Mapping[str, NDArray[np.generic]] = own if weights is None else weights
        files = {
            _WEIGHTS_FILE: safetensors.numpy.save(dict(written)),
            _CONFIG_FILE: json.dumps(about, indent=1, sort_keys=True).encode(),
        }
        if slots:
            learned = {name: array for name, array in self.state().items() if not name.startswith("weights/")}
            files[_SLOTS_FILE] = safetensors.numpy.save(learned)
        return files

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], spec: FeatureSpec) -> Self:
        """The student that ``to_files`` wrote.

        Raises
        ------
        StaleStateError
            If a file is missing or broken, or was made for another feature spec.
        """
        try:
            about = json.loads(files[_CONFIG_FILE])
            arrays = safetensors.numpy.load(files[_WEIGHTS_FILE])
            slots = safetensors.numpy.load(files[_SLOTS_FILE]) if _SLOTS_FILE in files else None
        except (KeyError, ValueError, SafetensorError) as error:
            raise StaleStateError(f"expected the files of a student. Received: {error!r}.") from error
        made_for = about.get("spec_digest")
        if made_for != spec.digest():
            raise StaleStateError(
                f"the student was made for feature spec {made_for}. Received: {spec.digest()}.",
                hint="load it with the feature spec of its own release",
            )
        student = cls.create(spec, StudentConfig.model_validate(about["config"]))
        _check_fit(student.weights, arrays)
        for name, weight in student.weights.items():
            weight.copy_(torch.from_numpy(arrays[name]))
        if slots is not None:
            student.load_state({**slots, **{f"weights/{name}": array for name, array in arrays.items()}})
        return student

    def _touch_tables(self) -> None:
        for optimizer in self.table_optimizers().values():
            optimizer.touch_all()

    def _counters(self) -> NDArray[np.generic]:
        return np.array([self.steps, self.rows_learned, self.small_optimizer().steps], np.int64)

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.weights["wide"].index_select(0, rows.reshape(-1)).view(rows.shape)
        if not self.layout.dim:
            return torch.zeros(len(rows), self.layout.columns, 0), wide
        inner = rows[:, : self.layout.columns]
        embedding = self.weights["embedding"].index_select(0, inner.reshape(-1))
        return embedding.view(*inner.shape, self.layout.dim), wide

    def _tensors(self) -> dict[str, Tensor]:
        small = self.small_optimizer()
        return {
            **{f"weights/{name}": weight for name, weight in self.weights.items()},
            **{f"accumulator/{name}": table.accumulator for name, table in self.table_optimizers().items()},
            **{f"mean/{name}": slot for name, slot in small.mean.items()},
            **{f"square/{name}": slot for name, slot in small.square.items()},
        }


def _as_tensors(buckets: NDArray[np.int32], numbers: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    # Arrays that may not be written to, views of Arrow, are no tensors without a copy.
    return torch.from_numpy(buckets.astype(np.int64)), torch.from_numpy(
        np.require(numbers, np.float32, ["C", "W"])
    )


def _check_fit(expected: Mapping[str, Tensor], received: Mapping[str, NDArray[np.generic]]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: array.shape for name, array in received.items()}
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        raise StaleStateError(
            f"student state does not fit: {wrong[0]} should have shape {shapes.get(wrong[0])}. "
            f"Received: {found.get(wrong[0])}.",
            hint="it belongs to another feature spec or student configuration",
        )
