"""Quality against the truth, where a simulator tells it: no noise of labels in these figures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from monitoring.inputs import clipped, probability_array
from monitoring.quality import Figures

__all__ = ["truth_quality"]


def truth_quality(true_probability: npt.ArrayLike, probability: npt.ArrayLike) -> Figures:
    """Regret and level of predictions when the true probability of each row is known.

    Parameters
    ----------
    true_probability, probability : (n,) in [0, 1]

    Returns
    -------
    dict
        ``rows``; ``regret``, the mean KL(Bernoulli(true) || Bernoulli(predicted)) in nats, which is the
        expected log loss above that of the truth, 0 at best; ``true_pcoc = Σ predicted / Σ true``;
        ``oracle_log_loss``, the mean entropy of the truth, the log loss no predictor can beat in
        expectation. None without rows.

    Examples
    --------
    >>> figures = truth_quality([0.1, 0.2], [0.1, 0.4])
    >>> round(figures["regret"], 4), round(figures["true_pcoc"], 4)
    (0.0458, 1.6667)
    """
    truth = np.asarray(true_probability, dtype=np.float64)
    truth = probability_array(truth, truth.shape[0], "true_probability")
    rows = truth.shape[0]
    predicted = probability_array(probability, rows)
    if rows == 0:
        return {"rows": 0, "regret": None, "true_pcoc": None, "oracle_log_loss": None}
    q, t = clipped(predicted), clipped(truth)
    # t ln t tends to 0 at 0, which the clipped value gives to 1e-14.
    negative_entropy = truth * np.log(t) + (1.0 - truth) * np.log1p(-t)
    cross_entropy = -(truth * np.log(q) + (1.0 - truth) * np.log1p(-q))
    total = float(truth.sum())
    return {
        "rows": rows,
        "regret": max(0.0, float((negative_entropy + cross_entropy).mean())),
        "true_pcoc": float(predicted.sum()) / total if total > 0 else None,
        "oracle_log_loss": -float(negative_entropy.mean()),
    }
