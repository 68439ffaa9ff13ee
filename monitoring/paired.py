"""Two predictors on the same rows, kept as sums: is the first one worse, and is its level right?

A *round* is a stretch of rows of a size fixed beforehand. It may be looked at while it fills: a look at the
share t of a round must exceed the limit ``z / sqrt(t)`` (`look_limit`), which is to say that the sum so far
must exceed what z asks of the whole round. By the reflection principle a Brownian motion that is judged at
every moment does so twice as often as at the end alone, so however often a round is looked at, two equal
predictors are told apart with a chance of at most ``2 * (1 - Phi(z))``; looked at once, ``1 - Phi(z)``.
Rounds share no rows.

References
----------
.. [1] O'Brien and Fleming 1979, A multiple testing procedure for clinical trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy.typing as npt

from monitoring.inputs import binary_label, probability_array
from monitoring.quality import row_log_loss

__all__ = ["PairedSums", "look_limit"]


def look_limit(z: float, share: float) -> float:
    """What a standard normal statistic must exceed at the share of a round, in [0, 1].

    Examples
    --------
    >>> look_limit(3.0, 0.25), look_limit(3.0, 1.0), look_limit(3.0, 0.0)
    (6.0, 3.0, inf)
    """
    return math.inf if share <= 0.0 else z / math.sqrt(min(share, 1.0))


@dataclass
class PairedSums:
    """Sums over rows of which two predictors, `first` and `second`, each gave a probability.

    Attributes
    ----------
    rows, positives : int
    first_loss, second_loss : float
        Sums of the log loss in nats.
    first_square, second_square, product : float
        Sums of squares and of the product of the two losses.
    first_expected, second_expected : float
        Sums of the probabilities.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(3)
    >>> truth = rng.beta(1, 9, size=10_000)
    >>> sums = PairedSums()
    >>> sums.update(rng.random(10_000) < truth, np.full(10_000, 0.1), truth)
    >>> sums.worse_z() > 4, abs(sums.level_z(0.9, 1.1)) < 4
    (True, True)
    """

    rows: int = 0
    positives: int = 0
    first_loss: float = 0.0
    second_loss: float = 0.0
    first_square: float = 0.0
    second_square: float = 0.0
    product: float = 0.0
    first_expected: float = 0.0
    second_expected: float = 0.0

    def update(self, label: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> None:
        """Add rows: ``label`` in {0, 1}, probabilities in [0, 1], each (n,)."""
        y = binary_label(label)
        p, q = probability_array(first, len(y), "first"), probability_array(second, len(y), "second")
        one, other = row_log_loss(y, p), row_log_loss(y, q)
        self.rows += len(y)
        self.positives += int(y.sum())
        self.first_loss += float(one.sum())
        self.second_loss += float(other.sum())
        self.first_square += float(one @ one)
        self.second_square += float(other @ other)
        self.product += float(one @ other)
        self.first_expected += float(p.sum())
        self.second_expected += float(q.sum())

    def merge(self, more: PairedSums) -> PairedSums:
        """The sums of both sets of rows."""
        mine, theirs = asdict(self), asdict(more)
        return PairedSums(**{name: mine[name] + theirs[name] for name in mine})

    def worse_z(self, allowed: float = 0.0) -> float | None:
        """How surely the first predictor is worse than ``1 + allowed`` times the second's log loss.

        The mean of ``first - (1 + allowed) * second`` over its standard error: standard normal where the
        first is worse by exactly that, lower where it is not. None if the rows cannot tell.
        """
        if self.rows < 2:
            return None
        factor = 1.0 + allowed
        mean = (self.first_loss - factor * self.second_loss) / self.rows
        square = self.first_square - 2.0 * factor * self.product + factor**2 * self.second_square
        variance = (square - self.rows * mean**2) / (self.rows - 1)
        # Equal predictors leave only the rounding of their sums.
        if variance <= 1e-12 * max(self.first_square, self.second_square) / self.rows:
            return None
        return mean / math.sqrt(variance / self.rows)

    def level_z(self, low: float, high: float) -> float:
        """How surely the first predictor's PCOC is above ``high`` (positive) or below ``low`` (negative).

        Under a PCOC of exactly the bound the positives are Poisson around the predicted sum over the bound
        (of few positives among many rows; a little more spread than they have otherwise). 0 within.
        """
        over, under = self.first_expected / high, self.first_expected / low
        if over > self.positives:
            return (over - self.positives) / math.sqrt(over)
        if self.positives > under:
            return (under - self.positives) / math.sqrt(max(under, 1e-12))
        return 0.0

    def value(self) -> dict[str, float | int | None]:
        """Rows, positives, mean log losses, PCOC of both and the plain z of the difference."""
        n, positives = self.rows, self.positives
        return {
            "rows": n,
            "positives": positives,
            "log_loss": self.first_loss / n if n else None,
            "second_log_loss": self.second_loss / n if n else None,
            "z": self.worse_z(),
            "pcoc": self.first_expected / positives if positives else None,
            "second_pcoc": self.second_expected / positives if positives else None,
        }

    def state(self) -> dict[str, Any]:
        """JSON state."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PairedSums:
        """Inverse of `state`, exact."""
        return cls(**state)
