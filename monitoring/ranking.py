"""Ranking quality: exact AUC, for all rows or for each of many groups, and GAUC.

AUC is the chance that a positive is ranked above a negative of the same group, ties counting one half
(Mann-Whitney). It says nothing about the level of the probabilities. GAUC is the mean of the users' own
AUCs, weighted by their impressions [1]_: ranking between users, which no auction ever asks for, does not
count in it.

All of it is one sort on (group, probability, label) packed in an integer, and cumulative sums: no loop over
users.

References
----------
.. [1] Zhu et al. 2017, Optimized Cost per Click in Taobao Display Advertising, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitoring.inputs import (
    BoolArray,
    FloatArray,
    IntArray,
    binary_label,
    key_codes,
    probability_array,
    weight_array,
)

__all__ = ["Gauc", "GroupAuc", "auc", "auc_by_group", "dense_rank", "gauc"]

_INT64_MAX = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class GroupAuc:
    """AUC of each group that has rows.

    Attributes
    ----------
    group : (k,) int64
        The groups present, ascending.
    auc : (k,) float64
        NaN where the group has one class only.
    mass : (k,) float64
        Rows of the group, or their weight.
    """

    group: IntArray
    auc: FloatArray
    mass: FloatArray


@dataclass(frozen=True)
class Gauc:
    """GAUC with the support behind it.

    Attributes
    ----------
    value : float or None
        None if no user has both classes.
    row_share : float
        Share of the rows (or of their weight) of users who have both classes; the rest says nothing about
        ranking.
    users : int
        Users who have both classes.
    """

    value: float | None
    row_share: float
    users: int


def dense_rank(probability: FloatArray) -> tuple[IntArray, int]:
    """Ranks from 0, equal values sharing one, and the number of distinct values."""
    distinct, rank = np.unique(probability, return_inverse=True)
    return rank.astype(np.int64, copy=False), int(distinct.shape[0])


def _tied_blocks(
    label: BoolArray, block: IntArray, weight: FloatArray | None
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Sort rows into blocks of equal (group, rank): block number, positive mass, negative mass, ascending."""
    if weight is None:
        # The label rides in the lowest bit: sorting the packed integers needs no index and no gather.
        packed = (block << 1) | label
        packed.sort()
        block = packed >> 1
        positive = (packed & 1).astype(np.float64)
        negative = 1.0 - positive
    else:
        order = np.argsort(block)
        block = block[order]
        positive = np.where(label[order], weight[order], 0.0)
        negative = np.where(label[order], 0.0, weight[order])
    start = np.flatnonzero(np.concatenate(([True], block[1:] != block[:-1])))
    return block[start], np.add.reduceat(positive, start), np.add.reduceat(negative, start)


def auc_by_group(
    label: BoolArray,
    rank: IntArray,
    ranks: int,
    group: IntArray,
    groups: int,
    weight: FloatArray | None = None,
) -> GroupAuc:
    """Exact AUC within each group.

    Parameters
    ----------
    label : (n,) bool
    rank : (n,) int64 in [0, ranks)
        Equal for tied predictions, as `dense_rank` gives.
    group : (n,) int64 in [0, groups)
        ``groups`` may be far larger than n (a user in an hour, numbered hour * users + user).
    weight : (n,) float64, optional
    """
    if label.shape[0] == 0:
        empty = np.zeros(0, dtype=np.float64)
        return GroupAuc(np.zeros(0, dtype=np.int64), empty, empty)
    if 2 * groups * ranks > _INT64_MAX:
        present, compact = np.unique(group, return_inverse=True)
        inner = auc_by_group(label, rank, ranks, compact.astype(np.int64), int(present.shape[0]), weight)
        return GroupAuc(present[inner.group], inner.auc, inner.mass)
    block, positive, negative = _tied_blocks(label, group * ranks + rank, weight)
    block_group = block // ranks
    start = np.flatnonzero(np.concatenate(([True], block_group[1:] != block_group[:-1])))
    below = np.cumsum(negative) - negative
    blocks_of_group = np.diff(np.append(start, block.shape[0]))
    below -= np.repeat(below[start], blocks_of_group)
    wins = np.add.reduceat(positive * (below + 0.5 * negative), start)
    total_positive, total_negative = np.add.reduceat(positive, start), np.add.reduceat(negative, start)
    pairs = total_positive * total_negative
    value = np.divide(wins, pairs, out=np.full(start.shape[0], np.nan), where=pairs > 0)
    return GroupAuc(block_group[start], value, total_positive + total_negative)


def auc(
    label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None
) -> float | None:
    """Area under the ROC curve; 0.5 is chance, None if only one class is present.

    Examples
    --------
    >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    labels = binary_label(label)
    rank, ranks = dense_rank(probability_array(probability, labels.shape[0]))
    group = np.zeros(labels.shape[0], dtype=np.int64)
    value = auc_by_group(labels, rank, ranks, group, 1, weight_array(weight, labels.shape[0])).auc
    return None if value.shape[0] == 0 or np.isnan(value[0]) else float(value[0])


def gauc(
    label: npt.ArrayLike,
    probability: npt.ArrayLike,
    user_key: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
) -> Gauc:
    """AUC within users, averaged with the users' impressions as weights; users with one class left out.

    Parameters
    ----------
    user_key : (n,) int, str or object array
        Rows whose key is None belong to no user: they count in ``row_share`` only.

    Examples
    --------
    >>> label, user = [1, 0, 0, 1, 0], ["a", "a", "a", "b", "c"]
    >>> gauc(label, [0.5, 0.2, 0.6, 0.3, 0.3], user)
    Gauc(value=0.5, row_share=0.6, users=1)
    """
    labels = binary_label(label)
    rows = labels.shape[0]
    rank, ranks = dense_rank(probability_array(probability, rows))
    codes, users = key_codes(user_key, rows)
    weights = weight_array(weight, rows)
    total = float(rows) if weights is None else float(weights.sum())
    if (codes < 0).any():
        known = codes >= 0
        labels, rank, codes = labels[known], rank[known], codes[known]
        weights = None if weights is None else weights[known]
    by_user = auc_by_group(labels, rank, ranks, codes, users, weights)
    both = ~np.isnan(by_user.auc)
    mass = float(by_user.mass[both].sum())
    if mass == 0.0:
        return Gauc(None, 0.0, 0)
    return Gauc(float(by_user.auc[both] @ by_user.mass[both]) / mass, mass / total, int(both.sum()))
