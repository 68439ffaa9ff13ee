"""Adam for table rows, each with a clock of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.table_optimizer import TableOptimizer

__all__ = ["LazyAdam"]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


class LazyAdam(TableOptimizer):
    """Adam (Kingma & Ba 2015) of the rows of the batch: what is not touched neither moves nor decays.

    The bias of the moments is corrected by the number of updates of the *row*. `torch.optim.SparseAdam`
    takes the number of updates of the table; there the first step of a new row after a thousand others is
    three times the learning rate, here it is the learning rate. On rows that are in every batch the two are
    the same.

    Slots: ``mean`` and ``square`` of the table's shape, ``steps``, shape (rows,).

    Parameters
    ----------
    table : Tensor, shape (rows, d) or (rows,)
    learning_rate : float
        The size of a step, whatever the gradient: a tenth of Adagrad's or less.
    l2 : float
        Pull towards zero of the rows touched, in units of one row's gradient.

    Examples
    --------
    >>> table = torch.zeros(3)
    >>> LazyAdam(table, learning_rate=0.01, l2=0.0).step(torch.tensor([1, 2]), torch.tensor([2.0, -5.0]))
    >>> [round(value, 4) for value in table.tolist()]
    [0.0, -0.01, 0.01]
    """

    def __init__(self, table: Tensor, *, learning_rate: float, l2: float) -> None:
        self._learning_rate = learning_rate
        self._l2 = l2
        super().__init__(table)

    def first_slots(self, values: Tensor) -> dict[str, Tensor]:
        return {
            "mean": torch.zeros_like(values),
            "square": torch.zeros_like(values),
            "steps": torch.zeros(len(values), dtype=torch.int32),
        }

    def updated(
        self, old: Tensor, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self._l2:
            gradient.add_(old, alpha=self._l2)
        steps = slots["steps"].add_(1)
        mean = slots["mean"].mul_(_BETA_1).add_(gradient, alpha=1.0 - _BETA_1)
        square = slots["square"].mul_(_BETA_2).addcmul_(gradient, gradient, value=1.0 - _BETA_2)
        times = steps.double() if old.dim() == 1 else steps.double()[:, None]
        mean_share = (1.0 - _BETA_1**times).float()
        square_share = (1.0 - _BETA_2**times).float()
        root = (square / square_share).sqrt_().add_(_EPSILON)
        new = old.addcdiv_(mean / mean_share, root, value=-self._learning_rate)
        return new, {"mean": mean, "square": square, "steps": steps}
