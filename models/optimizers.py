"""Which optimizer the tables have, and Adam for the small layers; the state of all is plain arrays."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.lazy_adam import LazyAdam
from models.rowwise_adagrad import RowwiseAdagrad
from models.table_adagrad import TableAdagrad
from models.table_ftrl import TableFtrl
from models.table_optimizer import TableOptimizer
from pipelines.config_sections import StudentConfig

__all__ = ["Adam", "table_optimizer"]


def table_optimizer(table: Tensor, config: StudentConfig) -> TableOptimizer:
    """The optimizer that the configuration names, for one table."""
    rate, first, l2 = config.learning_rate, config.initial_accumulator, config.l2
    if config.optimizer == "lazy_adam":
        return LazyAdam(table, learning_rate=rate, l2=l2)
    if config.optimizer == "ftrl":
        return TableFtrl(table, learning_rate=rate, initial_accumulator=first, l1=config.l1, l2=l2)
    adagrad = RowwiseAdagrad if config.optimizer == "rowwise_adagrad" else TableAdagrad
    return adagrad(table, learning_rate=rate, initial_accumulator=first, l2=l2)


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) over named tensors, updated in place.

    The gradient of all tensors together is clipped to norm 10: tiny embeddings at the start otherwise spoil
    the second moments.
    """

    _LARGEST_NORM = 10.0

    def __init__(self, weights: Mapping[str, Tensor], *, learning_rate: float) -> None:
        self._weights = dict(weights)
        self._learning_rate = learning_rate
        self.mean = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self.square = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self.steps = 0

    @property
    def names(self) -> list[str]:
        return list(self._weights)

    def subset(self, weights: Mapping[str, Tensor]) -> Adam:
        """Adam of some of the tensors only, with their slots as they are here."""
        part = Adam(weights, learning_rate=self._learning_rate)
        part.mean = {name: self.mean[name].clone() for name in weights}
        part.square = {name: self.square[name].clone() for name in weights}
        part.steps = self.steps
        return part

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One update with the gradient of the mean loss."""
        self.steps += 1
        norm = sum(float(torch.sum(gradient * gradient)) for gradient in gradients.values()) ** 0.5
        scale = min(1.0, self._LARGEST_NORM / norm) if norm > 0.0 else 1.0
        rate = self._learning_rate / (1.0 - 0.9**self.steps)
        unbias = 1.0 - 0.999**self.steps
        for name, gradient in gradients.items():
            clipped = gradient * scale
            self.mean[name].mul_(0.9).add_(clipped, alpha=0.1)
            self.square[name].mul_(0.999).addcmul_(clipped, clipped, value=0.001)
            self._weights[name].addcdiv_(
                self.mean[name], (self.square[name] / unbias).sqrt_().add_(1e-8), value=-rate
            )
