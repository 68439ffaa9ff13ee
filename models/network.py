"""The networks on one fused embedding table: weights by name, and one forward formula in tensor operations.

The formula takes the table rows of a batch already gathered. Automatic differentiation then ends at those
rows, and no gradient the size of the table ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.config_sections import StudentConfig
from pipelines.feature_spec import FeatureSpec

__all__ = ["TABLES", "Layout", "forward", "initial_table", "initial_weights", "layer_of"]

# Weights with one entry for each table row: learned row by row.
TABLES = ("embedding", "wide")

_CROSS_RANK = 16
# Tiny, so that a row never seen predicts what the other fields say; not zero, so that its factors can part.
_EMBEDDING_SCALE = 0.01


@dataclass(frozen=True)
class Layout:
    """Shapes of a network, from the feature spec and the student's configuration.

    Attributes
    ----------
    model : {"lr", "fm", "deepfm", "dcn"}
    table_rows : int
    fields : int
        Interacting fields (without the wide-only ones).
    columns : int
        Columns of ``buckets`` that belong to interacting fields; they come first.
    column_field : tuple of int
        Field of every column, wide-only ones included.
    has_sequences : bool
    numbers : int
    dim : int
        Length of an embedding; 0 for "lr", which has none.
    hidden : tuple of int
    cross_layers : int
    """

    model: str
    table_rows: int
    fields: int
    columns: int
    column_field: tuple[int, ...]
    has_sequences: bool
    numbers: int
    dim: int
    hidden: tuple[int, ...]
    cross_layers: int

    @classmethod
    def of(cls, spec: FeatureSpec, config: StudentConfig) -> Layout:
        fields = len(spec.field_names) - spec.wide_only_fields
        column_field = tuple(spec.column_field)
        return cls(
            model=config.model,
            table_rows=spec.table_rows,
            fields=fields,
            columns=sum(field < fields for field in column_field),
            column_field=column_field,
            has_sequences=bool(spec.sequence),
            numbers=len(spec.numeric),
            dim=0 if config.model == "lr" else config.embedding_dim,
            hidden=config.hidden,
            cross_layers=config.cross_layers,
        )

    @property
    def tables(self) -> tuple[str, ...]:
        """The weights that have one entry for each table row."""
        return TABLES if self.dim else ("wide",)

    @property
    def input_width(self) -> int:
        """Width of what the dense layers see: all field embeddings, then the numbers."""
        return self.fields * self.dim + self.numbers


def layer_of(name: str) -> str:
    """The layer that a weight belongs to: ``embedding``, ``wide``, ``bias``, ``cross`` or ``dense``.

    Examples
    --------
    >>> layer_of("dense.0.weight"), layer_of("wide.numbers")
    ('dense', 'wide')
    """
    return name.split(".", 1)[0]


def initial_table(layout: Layout, seed: int) -> Tensor:
    """The embedding table before any training: small noise, row 0 zero; shape (table_rows, dim)."""
    noise = np.random.Generator(np.random.Philox(key=seed))
    table = noise.standard_normal((layout.table_rows, layout.dim), dtype=np.float32) * _EMBEDDING_SCALE
    table[0] = 0.0
    return torch.from_numpy(table)


def initial_weights(layout: Layout, seed: int) -> dict[str, Tensor]:
    """All weights by name, float32. The predictions of these are near the bias.

    ``embedding`` (table_rows, dim), ``wide`` (table_rows,), ``wide.numbers`` (numbers,), ``bias`` (1,), then
    by model ``cross.*`` and ``dense.*``. For DeepFM ``cross.pairs`` (fields, fields) says how much each pair
    of fields counts in the factorisation machine (Pan et al. 2018, FwFM): 1 at the start, which is plain FM.
    """
    noise = np.random.Generator(np.random.Philox(key=seed + 1))

    def normal(scale: float, *shape: int) -> Tensor:
        return torch.from_numpy((noise.standard_normal(shape) * scale).astype(np.float32))

    weights = {"embedding": initial_table(layout, seed)} if layout.dim else {}
    weights |= {
        "wide": torch.zeros(layout.table_rows),
        "wide.numbers": torch.zeros(layout.numbers),
        "bias": torch.zeros(1),
    }
    width = layout.input_width
    if layout.model == "deepfm":
        weights["cross.pairs"] = torch.ones(layout.fields, layout.fields)
    if layout.model == "dcn":
        rank = min(_CROSS_RANK, width)
        for layer in range(layout.cross_layers):
            weights[f"cross.{layer}.down"] = normal(width**-0.5, width, rank)
            weights[f"cross.{layer}.up"] = normal(rank**-0.5, rank, width)
            weights[f"cross.{layer}.bias"] = torch.zeros(width)
        weights["cross.out"] = normal(0.1 * width**-0.5, width)
    if layout.model in ("deepfm", "dcn"):
        for layer, units in enumerate((*layout.hidden, 1)):
            scale = (2.0 / width) ** 0.5
            # The last layer starts small: the first predictions then come from the bias.
            weights[f"dense.{layer}.weight"] = normal(
                scale if layer < len(layout.hidden) else 0.1 * scale, width, units
            )
            weights[f"dense.{layer}.bias"] = torch.zeros(units)
            width = units
    return weights


def forward(
    layout: Layout,
    weights: dict[str, Tensor],
    buckets: Tensor,
    embedding: Tensor,
    wide: Tensor,
    numbers: Tensor,
) -> Tensor:
    """Logit of each row, shape (n,).

    Parameters
    ----------
    weights : dict
        Everything but the tables.
    buckets : Tensor of int64, shape (n, all columns)
        Only read to tell padding from values, where there are sequences.
    embedding : Tensor, shape (n, layout.columns, dim)
        Gathered rows of the interacting columns.
    wide : Tensor, shape (n, all columns)
        Gathered first-order weights.
    numbers : Tensor, shape (n, numbers)
    """
    if layout.has_sequences:
        embedding, wide = _averaged(layout, buckets, embedding, wide)
    logit = weights["bias"] + wide.sum(1)
    if layout.numbers:
        logit = logit + numbers @ weights["wide.numbers"]
    if layout.model == "lr" or layout.fields == 0:
        return logit
    if layout.model == "fm":
        total = embedding.sum(1)
        # Rendle (2010), eq. 5: all pairs in linear time.
        return logit + 0.5 * ((total * total).sum(1) - (embedding * embedding).sum((1, 2)))
    flat = embedding.reshape(len(embedding), -1)
    inputs = torch.cat((flat, numbers), 1) if layout.numbers else flat
    if layout.model == "deepfm":
        pairs = torch.triu(weights["cross.pairs"], 1)
        logit = logit + (embedding * torch.matmul(pairs, embedding)).sum((1, 2))
    else:
        logit = logit + _crossed(layout, weights, inputs)
    return logit + _dense(layout, weights, inputs)


def _averaged(layout: Layout, buckets: Tensor, embedding: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    # Each value of a sequence counts 1 / (values of its field); padding rows are zero and count nothing.
    field = torch.tensor(layout.column_field)
    present = (buckets != 0).to(wide.dtype)
    counts = torch.zeros(len(buckets), int(field.max()) + 1).index_add_(1, field, present)
    share = present / counts.clamp_(min=1.0)[:, field]
    weighted = embedding * share[:, : layout.columns, None]
    pooled = torch.zeros(len(buckets), layout.fields, layout.dim).index_add(
        1, field[: layout.columns], weighted
    )
    return pooled, wide * share


def _crossed(layout: Layout, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    # Wang et al. (2021), DCN-v2, eq. 1 with the low-rank product of eq. 2.
    x = inputs
    for layer in range(layout.cross_layers):
        low = x @ weights[f"cross.{layer}.down"]
        x = inputs * torch.addmm(weights[f"cross.{layer}.bias"], low, weights[f"cross.{layer}.up"]) + x
    return x @ weights["cross.out"]


def _dense(layout: Layout, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    hidden = inputs
    last = len(layout.hidden)
    for layer in range(last + 1):
        hidden = torch.addmm(weights[f"dense.{layer}.bias"], hidden, weights[f"dense.{layer}.weight"])
        if layer < last:
            hidden = torch.relu(hidden)
    return hidden[:, 0]
