"""Which delay model is worth its size: the simplest that the others do not beat on held-out outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.delay import DelayGrid
from pipelines.delay_model import DelayModel
from pipelines.delay_rows import DelayRows, delay_loss
from pipelines.errors import DataError

__all__ = ["DelayChoice", "choose"]


# Nats an outcome. A gain of 0.001 moves a share of one half by 2 %: less is not worth a larger model.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class DelayChoice:
    """The kind that was chosen, and why.

    Attributes
    ----------
    kind : str
    loss : dict of kind to float
        Mean negative log likelihood of the held-out outcomes, nats.
    gain : dict of kind to (float, float)
        By how much each was better than the simpler one that it had to beat, and the standard error of that.
    outcomes : int
        Held out.
    reason : str
        A sentence for the log.
    """

    kind: str
    loss: dict[str, float]
    gain: dict[str, tuple[float, float]]
    outcomes: int
    reason: str


def choose(candidates: Mapping[str, DelayModel], held_out: DelayRows, grid: DelayGrid) -> DelayChoice:
    """Compare delay models on outcomes that none of them has seen.

    From the first, the simplest, on: a further one takes its place if its mean `delay_loss` is lower by more
    than 0.001 nats and by more than one standard error of the paired difference. So a model with more
    parameters has to show that it is better.

    Parameters
    ----------
    candidates : mapping of kind to model
        The simplest first.
    held_out : DelayRows
        `pipelines.delay_rows.whole` for the grid.
    grid : DelayGrid
        Bins on which all are judged.

    Raises
    ------
    DataError
        If there are fewer than 2 outcomes or no candidates.

    References
    ----------
    Breiman, Friedman, Olshen and Stone (1984), Classification and regression trees, section 3.4.3 (the
    one-standard-error rule).
    """
    if len(held_out) < 2 or not candidates:
        raise DataError(f"expected candidates and 2 held-out outcomes. Received: {len(held_out)}.")
    losses = {kind: delay_loss(model, held_out, grid) for kind, model in candidates.items()}
    names = list(losses)
    best, gain, words = names[0], {}, []
    for kind in names[1:]:
        difference = losses[best] - losses[kind]
        mean, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
        gain[kind] = (mean, error)
        is_better = mean > max(error, _LEAST_GAIN)
        words.append(
            f"{kind} {'beats' if is_better else 'does not beat'} {best}: "
            f"{mean:+.4f} nats an outcome, standard error {error:.4f}"
        )
        best = kind if is_better else best
    reason = f"{best}, on {len(held_out)} held-out outcomes" + (f" ({'; '.join(words)})" if words else "")
    means = {kind: float(loss.mean()) for kind, loss in losses.items()}
    return DelayChoice(best, means, gain, len(held_out), reason)
