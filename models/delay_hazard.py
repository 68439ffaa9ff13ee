"""Training the delay network of `pipelines.delay_hazard`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.delay import DelayCurve, DelayGrid
from pipelines.delay_bins import GROUP_BINS, DelayBins
from pipelines.delay_hazard import NUMBER_LIMIT, DelayHazard, base_logit, table_rows
from pipelines.delay_rows import DelayRows, whole
from pipelines.errors import ConfigError, DataError
from pipelines.feature_spec import FeatureSpec

__all__ = ["HazardConfig", "hazard_columns", "train_hazard"]

_EMBEDDING_SCALE = 0.1
# An embedding learned from a few outcomes says nothing about a delay, and soon knows them by heart.
_OUTCOMES_PER_VALUE = 50
# Where the held-out loss no longer falls the steps become shorter, so often and by so much.
_CUTS, _CUT = 3, 0.3
# A pass of fewer steps could end before the first of them has shown any effect.
_STEPS_A_PASS = 20
# A network may be made to move the curve a little further than it was trained to, not much.
_LARGEST_SCALE = 1.25
_GOLDEN = (5.0**0.5 - 1.0) / 2.0


@dataclass(frozen=True)
class HazardConfig:
    """Size and training of a delay network.

    Attributes
    ----------
    fields : tuple of str
        Features that it looks at, besides all numbers; empty: chosen by `hazard_columns`.
    bins, dim : int
        Delay bins; length of an embedding.
    hidden : tuple of int
        Units of the layers between.
    largest_table : int
        Rows of a column's table at most; values beyond share them by hash.
    epochs, patience, batch_rows : int
        Passes at most; passes without a better held-out loss before steps are cut, in the end stopped; rows
        of a step at most.
    learning_rate, l2 : float
        Of Adam; decay of the embeddings (decoupled: AdamW), so that rare values stay near the others.
    validation : float
        Share of the rows, drawn at random, that decides when to stop and how far to trust the network.
    seed : int
    """

    fields: tuple[str, ...] = ()
    bins: int = GROUP_BINS
    dim: int = 4
    hidden: tuple[int, ...] = (32,)
    largest_table: int = 4096
    epochs: int = 40
    patience: int = 2
    batch_rows: int = 512
    learning_rate: float = 0.01
    l2: float = 1.0
    validation: float = 0.15
    seed: int = 17

    def __post_init__(self) -> None:
        if self.bins < 2 or self.dim < 1 or self.epochs < 1 or self.batch_rows < 1 or self.largest_table < 2:
            raise ConfigError(
                "a delay network needs 2 bins, 1 dimension, 1 epoch, 1 row a step, 2 table rows."
            )
        if not 0.0 < self.validation < 1.0:
            raise ConfigError(f"expected a validation share in (0, 1). Received: {self.validation:g}.")


def hazard_columns(
    spec: FeatureSpec, rows: DelayRows, config: HazardConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Columns of ``buckets`` that a network looks at, the first table row of each, and its table's size.

    Sequences are left out. Without a list of fields so are crosses, the numbers' buckets (the numbers
    themselves are there), what is wide only, and fields with fewer than 50 outcomes for each value on
    average.

    Raises
    ------
    ConfigError
        If a field that was asked for is no feature, or is a sequence.
    """
    fields = {name: (index, size) for index, (name, size) in enumerate(spec.fields())}
    sequences = {part.name for part in spec.sequence}
    wrong = [name for name in config.fields if name not in fields or name in sequences]
    if wrong:
        raise ConfigError(
            f"expected features with one value each. Received: {', '.join(wrong)}.",
            hint=f"choose among {', '.join(name for name in fields if name not in sequences)}",
        )
    by_default = {part.name for part in spec.categorical if not part.wide_only}
    by_default |= {spec.hour.name} if spec.hour is not None else set()
    columns, offsets, sizes = [], [], []
    for name, (index, size) in fields.items():
        column = spec.column_field.index(index)
        if config.fields and name not in config.fields:
            continue
        if not config.fields:
            distinct = len(np.unique(rows.buckets[:, column]))
            if name not in by_default or distinct * _OUTCOMES_PER_VALUE > len(rows):
                continue
        columns.append(column)
        offsets.append(spec.offsets[index])
        sizes.append(min(size, config.largest_table))
    return tuple(columns), tuple(offsets), tuple(sizes)


def train_hazard(
    rows: DelayRows,
    spec: FeatureSpec,
    base: DelayCurve,
    horizon: int,
    config: HazardConfig | None = None,
    *,
    open_windows: bool = False,
) -> DelayHazard:
    """Train a network on outcomes.

    1. Put delays and follow-ups into bins; hold out a random part.
    2. Start at the common curve: the last layer is zero.
    3. Minimise the negative log likelihood of the reverse hazards; where the held-out part gets no better, go
       back to the best weights and on with shorter steps, three times.
    4. Scale the network's output so that the held-out part is most likely; 0 is the common curve.

    The loss of a row with delay bin d and follow-up bin u is ``-log r_d - sum over d < j <= u of log(1 -
    r_j)``, which is ``-log f(d | x) + log F(u | x)``: the outcome could only be seen because it came within
    the follow-up. For a closed window u is the last bin.

    Parameters
    ----------
    rows : DelayRows
    spec : FeatureSpec
        What encoded the rows.
    base : DelayCurve
        The common curve.
    horizon : int
        Age (ms) from which a window has closed.
    config : HazardConfig, optional
    open_windows : bool
        Learn from open windows, too.

    Raises
    ------
    DataError
        If there are fewer than 2 rows.

    References
    ----------
    Gensheimer and Narasimhan (2019), A scalable discrete-time survival model for neural networks, PeerJ 7
    (hazards forward in time, right-censored data). Lagakos, Barraj and De Gruttola (1988), Nonparametric
    analysis of truncated survival data (reverse time turns right truncation into left truncation).
    """
    config = HazardConfig() if config is None else config
    bins = DelayBins(DelayGrid(horizon, config.bins), base)
    used = whole(rows if open_windows else rows.closed(horizon), bins.grid)
    if len(used) < 2:
        raise DataError(f"expected outcomes to learn delays from. Received: {len(used)}.")
    columns, offsets, sizes = hazard_columns(spec, used, config)
    noise = np.random.Generator(np.random.Philox(key=config.seed))
    order = noise.permutation(len(used))
    held = max(1, round(config.validation * len(used)))
    data = _Tensors.of(used, bins, columns, offsets, sizes)
    with _one_thread():
        weights = _initial(data, config, sum(sizes), noise)
        best = _descend(weights, data.take(order[held:]), data.take(order[:held]), config, noise)
        scale = _best_scale(best, data.take(order[:held]))
    layers = len(config.hidden) + 1
    return DelayHazard(
        bins=bins,
        columns=columns,
        offsets=offsets,
        sizes=sizes,
        embedding=best["embedding"].numpy(),
        layers=tuple((best[f"{n}.weight"].numpy(), best[f"{n}.bias"].numpy()) for n in range(layers)),
        scale=scale,
        support=float(len(used)),
        spec_digest=spec.digest(),
    )


@dataclass(frozen=True)
class _Tensors:
    """Inputs, and for each bin but the first whether it is a trial of the row and whether it was hit."""

    rows: Tensor
    numbers: Tensor
    trial: Tensor
    hit: Tensor
    base: Tensor

    @classmethod
    def of(
        cls,
        rows: DelayRows,
        bins: DelayBins,
        columns: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> _Tensors:
        own, covered = rows.bins(bins.grid)
        bin_number = np.arange(1, bins.grid.bins)
        hit = own[:, None] == bin_number
        trial = (own[:, None] <= bin_number) & (bin_number <= covered[:, None])
        numbers = np.clip(rows.numbers, -NUMBER_LIMIT, NUMBER_LIMIT).astype(np.float32)
        return cls(
            torch.from_numpy(table_rows(rows.buckets, columns, offsets, sizes)),
            torch.from_numpy(numbers),
            torch.from_numpy(trial.astype(np.float32)),
            torch.from_numpy(hit.astype(np.float32)),
            torch.from_numpy(base_logit(bins).astype(np.float32)),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: NDArray[np.int64]) -> _Tensors:
        place = torch.from_numpy(chosen)
        return _Tensors(self.rows[place], self.numbers[place], self.trial[place], self.hit[place], self.base)


def _initial(
    data: _Tensors, config: HazardConfig, table: int, noise: np.random.Generator
) -> dict[str, Tensor]:
    def normal(scale: float, *shape: int) -> Tensor:
        return torch.from_numpy((noise.standard_normal(shape) * scale).astype(np.float32))

    weights = {"embedding": normal(_EMBEDDING_SCALE, table, config.dim)}
    width = data.rows.shape[1] * config.dim + data.numbers.shape[1]
    last = len(config.hidden)
    for number, units in enumerate((*config.hidden, len(data.base))):
        # He et al. (2015) for ReLU; the last layer is zero, so that the curve is where it starts.
        scale = (2.0 / max(width, 1)) ** 0.5 if number < last else 0.0
        weights[f"{number}.weight"] = normal(scale, width, units)
        weights[f"{number}.bias"] = torch.zeros(units)
        width = units
    return weights


def _moved(weights: dict[str, Tensor], data: _Tensors) -> Tensor:
    hidden = torch.cat((weights["embedding"][data.rows].flatten(1), data.numbers), 1)
    last = (len(weights) - 1) // 2 - 1
    for number in range(last + 1):
        hidden = torch.addmm(weights[f"{number}.bias"], hidden, weights[f"{number}.weight"])
        if number < last:
            hidden = torch.relu(hidden)
    return hidden


def _loss(moved: Tensor, data: _Tensors) -> Tensor:
    """Mean over rows of the sum over their trials."""
    logit = data.base + moved
    each = torch.nn.functional.softplus(logit) - data.hit * logit
    return (each * data.trial).sum() / len(data)


def _descend(
    weights: dict[str, Tensor],
    train: _Tensors,
    held_out: _Tensors,
    config: HazardConfig,
    noise: np.random.Generator,
) -> dict[str, Tensor]:
    """The weights that were best on the held-out rows; those before the first step are the curve."""
    for weight in weights.values():
        weight.requires_grad_(True)
    layers = [weight for name, weight in weights.items() if name != "embedding"]
    groups = [
        {"params": [weights["embedding"]], "weight_decay": config.l2},
        {"params": layers, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    batch_rows = min(config.batch_rows, -(-len(train) // _STEPS_A_PASS))
    best, least, waited, cuts = _copy(weights), _held_out_loss(weights, held_out), 0, 0
    for _ in range(config.epochs):
        order = noise.permutation(len(train))
        for start in range(0, len(train), batch_rows):
            batch = train.take(order[start : start + batch_rows])
            optimizer.zero_grad()
            _loss(_moved(weights, batch), batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        loss = _held_out_loss(weights, held_out)
        if loss < least:
            best, least, waited = _copy(weights), loss, 0
        else:
            waited += 1
        if waited >= config.patience:
            if cuts == _CUTS:
                break
            _go_back(weights, best, optimizer)
            waited, cuts = 0, cuts + 1
    return best


def _go_back(weights: dict[str, Tensor], best: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(best[name])
    for group in optimizer.param_groups:
        group["lr"] *= _CUT


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _held_out_loss(weights: dict[str, Tensor], data: _Tensors) -> float:
    with torch.no_grad():
        return float(_loss(_moved(weights, data), data))


def _best_scale(weights: dict[str, Tensor], data: _Tensors) -> float:
    """The scale in [0, 1.25] of least held-out loss, by golden section: the loss is convex in it."""
    with torch.no_grad():
        moved = _moved(weights, data)
        low, high = 0.0, _LARGEST_SCALE
        while high - low > 1e-3:
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            if float(_loss(left * moved, data)) <= float(_loss(right * moved, data)):
                high = right
            else:
                low = left
        return 0.5 * (low + high) if bool(moved.any()) else 0.0


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same sums in the same order, whatever machine it runs on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
