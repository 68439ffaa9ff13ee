"""Cutting a row of neighbours into groups: by violated order, and by equal weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibration.link import FloatArray

__all__ = ["equal_starts", "pooled_starts"]


def pooled_starts(value: FloatArray, weight: FloatArray) -> npt.NDArray[np.intp]:
    """Pool adjacent violators: where the blocks of the weighted isotonic fit begin.

    Parameters
    ----------
    value, weight : ndarray, shape (n,)
        Neighbours with ``value`` not strictly increasing are pooled into their weighted mean; ``weight`` > 0.

    Returns
    -------
    ndarray, shape (blocks,), of int
        First index of each block; the first is 0. Block means increase strictly.

    References
    ----------
    Ayer et al. (1955), An empirical distribution function for sampling with incomplete information.

    Examples
    --------
    >>> pooled_starts(np.array([1.0, 3.0, 2.0, 4.0]), np.ones(4)).tolist()
    [0, 1, 3]
    """
    means: list[float] = []
    weights: list[float] = []
    starts: list[int] = []
    for start, (mean, mass) in enumerate(zip(value.tolist(), weight.tolist(), strict=True)):
        first = start
        while means and means[-1] >= mean:
            before = weights.pop()
            mean = (means.pop() * before + mean * mass) / (before + mass)
            mass += before
            first = starts.pop()
        means.append(mean)
        weights.append(mass)
        starts.append(first)
    return np.array(starts, dtype=np.intp)


def equal_starts(weight: FloatArray, groups: int) -> npt.NDArray[np.intp]:
    """Where at most ``groups`` groups of nearly equal weight begin; one of the neighbours is never split.

    Parameters
    ----------
    weight : ndarray, shape (n,)
        Above 0.

    Examples
    --------
    >>> equal_starts(np.array([1.0, 1.0, 2.0, 4.0]), 2).tolist()
    [0, 3]
    """
    # A neighbour belongs to the group in which the middle of its weight falls.
    middle = np.cumsum(weight) - 0.5 * weight
    group = np.minimum((middle / weight.sum() * groups).astype(np.int64), groups - 1)
    return np.flatnonzero(np.diff(group, prepend=-1))
