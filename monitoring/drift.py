"""Feature drift between two windows: how large, chance or not, and whether it matters.

At a million rows every test rejects: D = 0.02 has a p-value of 1e-184. So a feature has drifted only if the
difference is not chance (false discovery rate over the features of the window) *and* its effect is above a
floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from monitoring.categorical_summary import CategoricalSummary
from monitoring.drift_distance import (
    categorical_cells,
    category_figures,
    cell_figures,
    distances,
    numeric_cells,
)
from monitoring.feature_summary import FeatureSummary
from monitoring.null_distributions import benjamini_hochberg
from monitoring.numeric_summary import NumericSummary
from pipelines.errors import DataError

__all__ = ["DriftFloor", "DriftRow", "DriftStatus", "compare", "drift_table", "is_persistent"]

DriftStatus: TypeAlias = Literal["ok", "watch", "drifted"]


@dataclass(frozen=True)
class DriftFloor:
    """Effects below which nobody need look: for each, a floor for ``watch`` and one for ``drifted``.

    A normal feature whose mean moves by a quarter (a half) of its standard deviation shows KS 0.10 (0.20)
    and PSI 0.06 (0.25).

    Attributes
    ----------
    psi : excess over its null expectation
    ks : largest difference of the distribution functions
    null_rate : absolute change
    new_mass : share of rows with a category the reference had not, above what sampling explains
    """

    psi: tuple[float, float] = (0.05, 0.2)
    ks: tuple[float, float] = (0.1, 0.2)
    null_rate: tuple[float, float] = (0.02, 0.1)
    new_mass: tuple[float, float] = (0.05, 0.2)


@dataclass(frozen=True)
class DriftRow:
    """Drift of one feature; None where a figure has no meaning for its kind or its rows.

    Attributes
    ----------
    verdict, why : str
    psi, psi_null, psi_excess : float
        Population stability index over the cells (null values are a cell of their own), its expectation
        ``(B - 1)(1/n + 1/m)`` without drift, and the difference, not below 0.
    js : float
        Jensen-Shannon divergence over the cells in bits, in [0, 1].
    ks, w1, w1_scaled : float
        Numeric: Kolmogorov-Smirnov distance (too small by at most one bin's share), Wasserstein-1 distance
        in units of the feature, and that over the range of the middle 90 % of the reference.
    p_value, q_value : float
        Pearson's test of homogeneity over the cells, for numeric features together with that of KS; q after
        Benjamini-Hochberg over the window's features.
    new_mass, new_mass_expected, lost_mass : float
        Categorical: share of current rows in categories unseen in the reference; what Good and Turing expect
        of it without drift (singletons of the reference over its rows); share of reference rows in
        categories gone since.
    oov_rate : float
        Categorical, with a vocabulary: share of current non-null rows outside it.
    """

    feature: str
    kind: str
    verdict: DriftStatus
    why: str
    psi: float | None
    psi_null: float | None
    psi_excess: float | None
    js: float | None
    ks: float | None
    w1: float | None
    w1_scaled: float | None
    p_value: float | None
    q_value: float | None
    null_rate_reference: float | None
    null_rate_current: float | None
    new_mass: float | None
    new_mass_expected: float | None
    lost_mass: float | None
    oov_rate: float | None
    cardinality_reference: int | None
    cardinality_current: int | None
    minimum_reference: float | None
    minimum_current: float | None
    maximum_reference: float | None
    maximum_current: float | None
    infinite_reference: int | None
    infinite_current: int | None
    rows_reference: int
    rows_current: int


def _effects(row: DriftRow, floor: DriftFloor) -> list[tuple[float, str]]:
    """Effects above their ``watch`` floor: size over the ``drifted`` floor, and words; largest first."""
    found: list[tuple[float, str]] = []

    def weigh(size: float, floors: tuple[float, float], words: str) -> None:
        if size >= floors[0]:
            found.append((size / floors[1], words))

    if row.psi_excess is not None:
        weigh(row.psi_excess, floor.psi, f"PSI {row.psi_excess:.3f} above chance")
    if row.ks is not None:
        weigh(row.ks, floor.ks, f"KS {row.ks:.3f}")
    before, now = row.null_rate_reference, row.null_rate_current
    if before is not None and now is not None:
        weigh(abs(now - before), floor.null_rate, f"null rate {before:.3f} to {now:.3f}")
    if row.new_mass is not None and row.new_mass_expected is not None:
        weigh(row.new_mass - row.new_mass_expected, floor.new_mass, f"{row.new_mass:.1%} in new categories")
    return sorted(found, reverse=True)


def _judged(row: DriftRow, chance: float | None, floor: DriftFloor, level: float) -> DriftRow:
    """The row with its verdict: a p-value or q-value ``chance`` up to ``level`` is more than chance."""
    if row.rows_reference == 0 or row.rows_current == 0:
        empty = "reference" if row.rows_reference == 0 else "current"
        return replace(row, verdict="watch", why=f"no rows in the {empty} window")
    if chance is None or chance > level:
        return replace(row, verdict="ok", why="no more than chance")
    effects = _effects(row, floor)
    if not effects:
        return replace(row, verdict="ok", why="not chance, but below every floor")
    verdict: DriftStatus = "drifted" if effects[0][0] >= 1.0 else "watch"
    return replace(row, verdict=verdict, why="; ".join(words for _, words in effects))


def compare(
    reference: FeatureSummary,
    current: FeatureSummary,
    vocabulary: Iterable[Any] | None = None,
    floor: DriftFloor | None = None,
    level: float = 0.01,
) -> DriftRow:
    """Compare two windows of one feature, judged on its own; `drift_table` judges a whole window.

    Parameters
    ----------
    reference, current : summaries of the same feature and kind, numeric ones over the same edges
    vocabulary : values the model knows, optional
    level : float
        Largest p-value that is taken for more than chance.

    Examples
    --------
    >>> reference = CategoricalSummary("country")
    >>> reference.update(np.array(["de"] * 900 + ["fr"] * 100))
    >>> current = reference.empty_like()
    >>> current.update(np.array(["de"] * 500 + ["fr"] * 500))
    >>> row = compare(reference, current)
    >>> row.verdict, round(row.psi_excess, 2)
    ('drifted', 0.87)
    """
    if reference.name != current.name or reference.kind != current.kind:
        raise DataError(
            f"expected two windows of {reference.kind} `{reference.name}`, "
            f"received {current.kind} `{current.name}`.",
            hint="summarise the current window with like=reference",
        )
    figures: dict[str, Any] = dict.fromkeys(DriftRow.__dataclass_fields__)
    figures.update(feature=reference.name, kind=reference.kind, verdict="ok", why="")
    figures.update(_side_figures("reference", reference), **_side_figures("current", current))
    if reference.rows and current.rows:
        if isinstance(reference, NumericSummary) and isinstance(current, NumericSummary):
            if not np.array_equal(reference.edges, current.edges):
                raise DataError(
                    f"expected two windows of `{reference.name}` over the same edges, received others.",
                    hint="summarise the current window with like=reference",
                )
            figures.update(_numeric_figures(reference, current))
        elif isinstance(reference, CategoricalSummary) and isinstance(current, CategoricalSummary):
            figures.update(cell_figures(*categorical_cells(reference, current)))
            figures.update(category_figures(reference, current, vocabulary))
    row = DriftRow(**figures)
    return _judged(row, row.p_value, floor or DriftFloor(), level)


def _numeric_figures(reference: NumericSummary, current: NumericSummary) -> dict[str, Any]:
    """Cell figures and distances; of the p-values of both tests the smaller one, doubled (Bonferroni).

    Pearson's test sees nulls and any change of shape, the one of KS sees a shift long before it does.
    """
    figures = cell_figures(*numeric_cells(reference, current))
    figures.update(distances(reference, current))
    of_ks = figures.pop("ks_p_value")
    if of_ks is not None and figures["p_value"] is not None:
        figures["p_value"] = min(1.0, 2.0 * min(figures["p_value"], of_ks))
    return figures


def _side_figures(side: str, summary: FeatureSummary) -> dict[str, Any]:
    """What one window shows by itself."""
    figures: dict[str, Any] = {
        f"rows_{side}": summary.rows,
        f"null_rate_{side}": summary.nulls / summary.rows if summary.rows else None,
        f"cardinality_{side}": summary.cardinality,
    }
    if isinstance(summary, NumericSummary):
        figures[f"infinite_{side}"] = summary.infinite
        if summary.counts.any():
            figures[f"minimum_{side}"] = summary.minimum
            figures[f"maximum_{side}"] = summary.maximum
    return figures


_ORDER: dict[str, int] = {"drifted": 0, "watch": 1, "ok": 2}


def drift_table(
    reference: Mapping[str, FeatureSummary],
    current: Mapping[str, FeatureSummary],
    vocabularies: Mapping[str, Iterable[Any]] | None = None,
    floor: DriftFloor | None = None,
    level: float = 0.01,
) -> list[dict[str, Any]]:
    """Drift of every feature of the reference, worst first, ready for a table.

    Parameters
    ----------
    reference, current : dict of feature -> summary, as `monitoring.feature_summary.summarise` gives
        A feature that is gone from ``current`` is reported, not skipped.
    level : float
        False discovery rate over the features (Benjamini-Hochberg).

    Returns
    -------
    list of dict
        The fields of `DriftRow`; ``verdict`` is ``ok``, ``watch`` or ``drifted``.

    Examples
    --------
    >>> from monitoring.feature_summary import summarise
    >>> rng = np.random.default_rng(0)
    >>> before = summarise({"age": rng.normal(size=5000), "height": rng.normal(size=5000)})
    >>> now = summarise({"age": rng.normal(size=5000), "height": rng.normal(0.6, 1, size=5000)}, like=before)
    >>> [(row["feature"], row["verdict"]) for row in drift_table(before, now)]
    [('height', 'drifted'), ('age', 'ok')]
    """
    floors = floor or DriftFloor()
    rows = []
    for name, summary in reference.items():
        known = (vocabularies or {}).get(name)
        rows.append(compare(summary, current.get(name, summary.empty_like()), known, floors, level))
    # Features without a test count as tests that found nothing.
    q_values = benjamini_hochberg([1.0 if row.p_value is None else row.p_value for row in rows]).tolist()
    judged = []
    for row, q in zip(rows, q_values, strict=True):
        if row.feature not in current:
            judged.append(replace(row, verdict="drifted", why="absent from the current window"))
            continue
        judged.append(_judged(replace(row, q_value=None if row.p_value is None else q), q, floors, level))
    judged.sort(key=lambda row: (_ORDER[row.verdict], -_severity(row, floors), row.feature))
    return [asdict(row) for row in judged]


def _severity(row: DriftRow, floor: DriftFloor) -> float:
    """Largest effect over its floor; the PSI where none reaches one."""
    effects = _effects(row, floor)
    if not effects:
        return row.psi_excess or 0.0
    return effects[0][0]


def is_persistent(verdicts: Sequence[str], need: int = 2, of: int = 3) -> bool:
    """Whether at least ``need`` of the last ``of`` windows drifted: one bad hour is not yet an alarm.

    Examples
    --------
    >>> is_persistent(["ok", "drifted", "drifted"]), is_persistent(["drifted", "ok", "ok", "drifted"])
    (True, False)
    """
    return sum(verdict == "drifted" for verdict in verdicts[-of:]) >= need
