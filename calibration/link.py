"""Between logits and probabilities, once for the whole package.

Everything that turns a logit into a probability calls :func:`sigmoid`, so that serving, the online worker
and a batch job agree to the last bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LOGIT_LIMIT", "FloatArray", "logit_of", "sigmoid"]

FloatArray = npt.NDArray[np.float64]

# At 34 the probability is 1 - 1.7e-15: the last whole logit that float64 still tells well apart from 1
# (the spacing below 1 is 1.1e-16). Beyond it a "probability" would reach exactly 1 and its log loss infinity.
LOGIT_LIMIT = 34.0


def sigmoid(logit: npt.ArrayLike) -> FloatArray:
    """Probability of a logit, never exactly 0 or 1.

    Parameters
    ----------
    logit : array_like, shape (n,), logit space
        Not NaN; clipped to ``[-LOGIT_LIMIT, LOGIT_LIMIT]``.

    Returns
    -------
    ndarray, shape (n,), float64, probability space

    Examples
    --------
    >>> sigmoid([-np.inf, 0.0, 3.0]).round(4).tolist()
    [0.0, 0.5, 0.9526]
    >>> bool(sigmoid([-np.inf])[0] > 0.0)
    True
    """
    clipped = np.clip(np.asarray(logit, dtype=np.float64), -LOGIT_LIMIT, LOGIT_LIMIT)
    result: FloatArray = 1.0 / (1.0 + np.exp(-clipped))
    return result


def logit_of(probability: npt.ArrayLike) -> FloatArray:
    """Log odds ``ln p - ln(1 - p)``, clipped to ``[-LOGIT_LIMIT, LOGIT_LIMIT]`` so that 0 and 1 stay finite.

    Parameters
    ----------
    probability : array_like, shape (n,), probability space
        In ``[0, 1]``.

    Examples
    --------
    >>> logit_of([0.5, 0.01, 0.0]).round(4).tolist()
    [0.0, -4.5951, -34.0]
    """
    p = np.asarray(probability, dtype=np.float64)
    with np.errstate(divide="ignore"):
        result: FloatArray = np.clip(np.log(p) - np.log1p(-p), -LOGIT_LIMIT, LOGIT_LIMIT)
    return result
