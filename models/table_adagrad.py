"""Adagrad for table rows, with one step size for each weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.table_optimizer import TableOptimizer

__all__ = ["TableAdagrad"]


class TableAdagrad(TableOptimizer):
    """Adagrad (Duchi et al. 2011) on the rows of the batch.

    The first step of a new row has the full learning rate. Slot ``accumulator``: sum of squared gradients.

    Parameters
    ----------
    table : Tensor, shape (rows, d) or (rows,)
    learning_rate : float
    initial_accumulator : float
        First value of the sum of squared gradients: the smaller, the larger the first steps of a row.
    l2 : float
        Pull towards zero of the rows touched, in units of one row's gradient.

    Examples
    --------
    >>> table = torch.zeros(4)
    >>> TableAdagrad(table, learning_rate=0.1, initial_accumulator=0.0, l2=0.0).step(
    ...     torch.tensor([1, 3, 3]), torch.tensor([2.0, 1.0, 1.0]))
    >>> [round(value, 4) for value in table.tolist()]
    [0.0, -0.1, 0.0, -0.1]
    """

    def __init__(self, table: Tensor, *, learning_rate: float, initial_accumulator: float, l2: float) -> None:
        self._learning_rate = learning_rate
        self._initial = initial_accumulator
        self._l2 = l2
        super().__init__(table)

    def first_slots(self, values: Tensor) -> dict[str, Tensor]:
        return {"accumulator": torch.full_like(values, self._initial)}

    def updated(
        self, old: Tensor, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self._l2:
            gradient.add_(old, alpha=self._l2)
        squares = slots["accumulator"].addcmul_(gradient, gradient)
        new = old.addcdiv_(gradient, squares.sqrt().clamp_(min=1e-12), value=-self._learning_rate)
        return new, {"accumulator": squares}
