"""Adagrad for table rows, with one step size for each row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.table_adagrad import TableAdagrad

__all__ = ["RowwiseAdagrad"]


class RowwiseAdagrad(TableAdagrad):
    """Adagrad whose sum of squares is one number a row: the mean over the row of the squared gradient.

    The slots of an embedding of 8 take a ninth of its memory and not half. For a table of single weights it
    is Adagrad itself. Slot ``accumulator``, shape (rows,).

    Parameters
    ----------
    table : Tensor, shape (rows, d) or (rows,)
    learning_rate : float
    initial_accumulator : float
        First value of the sum of squares: the smaller, the larger the first steps of a row.
    l2 : float
        Pull towards zero of the rows touched, in units of one row's gradient.

    References
    ----------
    Mudigere et al. (2022), Software-hardware co-design for fast and scalable training of deep learning
    recommendation models, section 4.1.2.

    Examples
    --------
    >>> table = torch.zeros(2, 2)
    >>> RowwiseAdagrad(table, learning_rate=0.1, initial_accumulator=0.0, l2=0.0).step(
    ...     torch.tensor([1]), torch.tensor([[1.0, 7.0]]))
    >>> [round(value, 4) for value in table[1].tolist()]
    [-0.02, -0.14]
    """

    def first_slots(self, values: Tensor) -> dict[str, Tensor]:
        return {"accumulator": torch.full((len(values),), self._initial)}

    def updated(
        self, old: Tensor, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self._l2:
            gradient.add_(old, alpha=self._l2)
        square = gradient * gradient
        squares = slots["accumulator"].add_(square.mean(1) if square.dim() == 2 else square)
        root = squares.sqrt().clamp_(min=1e-12)
        new = old.addcdiv_(gradient, root[:, None] if old.dim() == 2 else root, value=-self._learning_rate)
        return new, {"accumulator": squares}
