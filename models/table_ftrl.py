"""FTRL-proximal for table rows: weights that do not earn their keep are exactly zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.table_optimizer import TableOptimizer

__all__ = ["TableFtrl"]

# "beta = 1 is usually good enough" (section 4.3 of the paper).
_BETA = 1.0


class TableFtrl(TableOptimizer):
    """FTRL-proximal with L1 and L2 (McMahan et al. 2013, algorithm 1) on the rows of the batch.

    Every weight is a function of its two slots: ``z``, the gradients less what holds the weight to its
    former values, and ``n``, the sum of squared gradients. A weight is zero while ``|z| <= l1``. The slots
    begin so that each weight is where the table has it; the paper's begin at zero.

    Parameters
    ----------
    table : Tensor, shape (rows, d) or (rows,)
    learning_rate : float
        The paper's alpha.
    initial_accumulator : float
        First value of ``n``; the paper's is 0.
    l1, l2 : float
        The paper's lambda_1 and lambda_2.

    References
    ----------
    McMahan et al. (2013), Ad click prediction: a view from the trenches, KDD.

    Examples
    --------
    >>> table = torch.zeros(3)
    >>> ftrl = TableFtrl(table, learning_rate=0.1, initial_accumulator=0.0, l1=1.0, l2=0.0)
    >>> ftrl.step(torch.tensor([1, 2]), torch.tensor([0.9, 3.0]))
    >>> [round(value, 4) for value in table.tolist()]
    [0.0, 0.0, -0.05]
    """

    def __init__(
        self, table: Tensor, *, learning_rate: float, initial_accumulator: float, l1: float, l2: float
    ) -> None:
        self._alpha = learning_rate
        self._initial = initial_accumulator
        self._l1, self._l2 = l1, l2
        super().__init__(table)

    def first_slots(self, values: Tensor) -> dict[str, Tensor]:
        n = torch.full_like(values, self._initial)
        # What `_weights` makes `values` of.
        return {"z": -values * self._stiffness(n) - values.sign() * self._l1, "n": n}

    def updated(
        self, old: Tensor, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        n = torch.addcmul(slots["n"], gradient, gradient)
        sigma = (n.sqrt() - slots["n"].sqrt()) / self._alpha
        z = slots["z"] + gradient - sigma * old
        # Of what holds the weight: alpha's sum of sigmas, and the ridge.
        shrunk = (z.abs() - self._l1).clamp_(min=0.0) * z.sign()
        # From 0, for the negative of 0 is no 0 to the bit.
        return 0.0 - shrunk / self._stiffness(n), {"z": z, "n": n}

    def _stiffness(self, n: Tensor) -> Tensor:
        return (n.sqrt() + _BETA) / self._alpha + self._l2
