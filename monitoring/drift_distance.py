"""Distances between two windows of one feature, from their summaries.

Population stability index and Jensen-Shannon divergence over a few hundred cells, Kolmogorov-Smirnov and
Wasserstein-1 over the fine bins, Pearson's test of homogeneity and Kolmogorov's limit for chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from monitoring.categorical_summary import CategoricalSummary
from monitoring.inputs import FloatArray
from monitoring.null_distributions import chi_square_tail, kolmogorov_tail
from monitoring.numeric_summary import NumericSummary

__all__ = ["categorical_cells", "category_figures", "cell_figures", "distances", "numeric_cells"]

_TOP_CATEGORIES = 255
# PSI over 2048 bins is mostly its own noise; 64 cells of equal mass keep what a reader would call a shift.
_NUMERIC_CELLS = 64
# The rule of thumb under which the chi-square approximation of a cell holds.
_EXPECTED_A_CELL = 5.0


def categorical_cells(
    reference: CategoricalSummary, current: CategoricalSummary
) -> tuple[FloatArray, FloatArray]:
    """Counts of the most frequent categories of both windows together, then the others, then nulls.

    Ranking by the pooled counts keeps the null distribution: given the pooled counts, which window a row
    fell in is chance.
    """
    pooled = reference.counts + current.counts
    smaller = min(reference.rows, current.rows)
    least = _EXPECTED_A_CELL * (reference.rows + current.rows) / smaller
    top = [key for key, count in pooled.most_common(_TOP_CATEGORIES) if count >= least]
    sides = []
    for side in (reference, current):
        counts = [side.counts[key] for key in top]
        sides.append(np.array([*counts, side.rows - side.nulls - sum(counts), side.nulls], dtype=np.float64))
    return sides[0], sides[1]


def numeric_cells(reference: NumericSummary, current: NumericSummary) -> tuple[FloatArray, FloatArray]:
    """Counts of neighbouring bins in cells of about equal pooled mass, then infinite values, then nulls."""
    pooled = reference.counts + current.counts
    smaller = min(reference.rows, current.rows)
    cells = int(min(_NUMERIC_CELLS, max(2.0, smaller // (2 * _EXPECTED_A_CELL))))
    before = np.cumsum(pooled) - pooled
    cell = before * cells // max(1, int(pooled.sum()))
    sides = []
    for side in (reference, current):
        counts = np.bincount(cell, side.counts, cells)
        sides.append(np.append(counts, [side.infinite, side.nulls]).astype(np.float64))
    return sides[0], sides[1]


def cell_figures(reference: FloatArray, current: FloatArray) -> dict[str, float | None]:
    """PSI, JS and the test of homogeneity over cells with counts in either window."""
    used = (reference + current) > 0
    n, m, a, b = float(reference.sum()), float(current.sum()), reference[used], current[used]
    cells = a.shape[0]
    # Half a row added to each cell keeps the logarithm finite where one window has none.
    p, q = (a + 0.5) / (n + 0.5 * cells), (b + 0.5) / (m + 0.5 * cells)
    psi = float(((p - q) * np.log(p / q)).sum())
    null = (cells - 1) * (1.0 / n + 1.0 / m)
    p, q = a / n, b / m
    middle = (p + q) / 2.0

    def divergence(side: FloatArray) -> float:
        held = side > 0
        return float((side[held] * np.log2(side[held] / middle[held])).sum())

    pooled = (a + b) / (n + m)
    pearson = float((((p - q) ** 2) / pooled).sum()) * n * m / (n + m)
    return {
        "psi": psi,
        "psi_null": null,
        "psi_excess": max(0.0, psi - null),
        "js": max(0.0, 0.5 * divergence(p) + 0.5 * divergence(q)),
        "p_value": chi_square_tail(pearson, cells - 1),
    }


def distances(reference: NumericSummary, current: NumericSummary) -> dict[str, float | None]:
    """KS and W1 between the finite values, from the fine bins.

    ``W1 = ∫ |F - G|``, where the integral of a distribution function over a bin follows exactly from the
    counts and the sum of the values in it. Where F and G cross within a bin a sliver is left out: the figure
    is a lower bound, tight to a percent, but up to a fifth short where the tail has no variance and a
    few huge values carry the distance. The p-value of KS is conservative with ties.
    """
    n, m = int(reference.counts.sum()), int(current.counts.sum())
    edges = reference.edges
    if n == 0 or m == 0 or edges.shape[0] == 0:
        return {"ks": None, "ks_p_value": None, "w1": None, "w1_scaled": None}
    # F - G just below each edge.
    gap = np.cumsum(reference.counts)[:-1] / n - np.cumsum(current.counts)[:-1] / m
    count, total = reference.counts / n - current.counts / m, reference.sums / n - current.sums / m
    # ∫ (F - G) from each edge to the next, up to the first edge, and from the last edge up.
    between = gap[:-1] * np.diff(edges) + count[1:-1] * edges[1:] - total[1:-1]
    outside = abs(count[0] * edges[0] - total[0]) + abs(total[-1] - count[-1] * edges[-1])
    w1 = float(np.abs(between).sum() + outside)
    width = _middle_range(reference)
    ks = float(np.abs(gap).max())
    return {
        "ks": ks,
        "ks_p_value": kolmogorov_tail(ks * math.sqrt(n * m / (n + m))),
        "w1": w1,
        "w1_scaled": w1 / width if width > 0 else None,
    }


def _middle_range(summary: NumericSummary) -> float:
    """Distance from the 5 % to the 95 % quantile, to a bin."""
    share = np.cumsum(summary.counts)[:-1] / int(summary.counts.sum())
    low, high = np.searchsorted(share, [0.05, 0.95])
    last = share.shape[0] - 1
    return float(summary.edges[min(high, last)] - summary.edges[min(low, last)])


def category_figures(
    reference: CategoricalSummary, current: CategoricalSummary, vocabulary: Iterable[Any] | None
) -> dict[str, float | None]:
    """Shares of rows in new, lost and out-of-vocabulary categories, of the rows that are not null."""
    seen, now = reference.rows - reference.nulls, current.rows - current.nulls
    if seen == 0 or now == 0:
        return {}
    new = sum(count for key, count in current.counts.items() if key not in reference.counts)
    lost = sum(count for key, count in reference.counts.items() if key not in current.counts)
    single = sum(1 for count in reference.counts.values() if count == 1)
    figures: dict[str, float | None] = {
        "new_mass": new / now,
        "new_mass_expected": single / seen,
        "lost_mass": lost / seen,
    }
    if vocabulary is not None:
        known = set(vocabulary)
        figures["oov_rate"] = sum(count for key, count in current.counts.items() if key not in known) / now
    return figures
