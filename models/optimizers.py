"""Two optimizers whose state is plain arrays: Adagrad for the rows of a batch, Adam for small layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Adam", "TableAdagrad"]


class TableAdagrad:
    """Adagrad that touches only the table rows of the batch.

    The gradients of a row are *summed* over the batch, not averaged: what one event does to the row of its
    user is then the same in a batch of 256 and in a last batch of 3. A row that has not been touched for a
    day is left exactly as it was; the first step of a new row has the full learning rate.

    Parameters
    ----------
    table : Tensor, shape (rows, d) or (rows,)
        Updated in place. Row 0 is padding and stays zero.
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
        self._table = table
        self._learning_rate = learning_rate
        self._initial = initial_accumulator
        self._l2 = l2
        self.accumulator = torch.full_like(table, initial_accumulator)
        # Sums duplicates without a sort: all zero between steps, so not part of the state.
        self._scratch = torch.zeros_like(table)
        self._touched = torch.zeros(len(table), dtype=torch.bool)
        self._all_touched = True

    def reset(self) -> None:
        """Forget all gradients seen."""
        self.accumulator.fill_(self._initial)
        self.touch_all()

    def touch_all(self) -> None:
        """Count every row as changed: whoever writes the table or the slots by other means says so."""
        self._all_touched = True

    def take_touched(self) -> NDArray[np.int64] | None:
        """Rows that have changed since the last call, ascending; None if all may have."""
        # Much faster than torch's nonzero.
        rows = None if self._all_touched else np.flatnonzero(self._touched.numpy())
        self._all_touched = False
        self._touched.zero_()
        return rows

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One update.

        Parameters
        ----------
        rows : Tensor of int64, shape (m,)
            Rows of the table, with repetitions.
        gradient : Tensor, shape (m, d) or (m,)
            Of the sum of the loss, for each entry of ``rows``.
        """
        scratch = self._scratch
        scratch.index_add_(0, rows, gradient)
        total = scratch.index_select(0, rows)
        scratch.index_fill_(0, rows, 0.0)
        old = self._table.index_select(0, rows)
        if self._l2:
            total.add_(old, alpha=self._l2)
        squares = self.accumulator.index_select(0, rows).addcmul_(total, total)
        # Repetitions of a row write the same value, so the order of the copies does not matter.
        self.accumulator.index_copy_(0, rows, squares)
        new = old.addcdiv_(total, squares.sqrt_().clamp_(min=1e-12), value=-self._learning_rate)
        self._table.index_copy_(0, rows, new)
        self._table[0] = 0.0
        self._touched.index_fill_(0, rows, True)


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
