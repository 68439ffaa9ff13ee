"""What a window of one feature looked like: counts that add up, from which every drift figure follows.

Two kinds, told apart by how the values compare and not by their type alone:

- `CategoricalSummary`: a count for each value (strings or int64 hash keys);
- `NumericSummary`: counts between fixed edges, up to 2048 quantiles of the reference, so that two windows
  share them.

Both have ``update / merge / state``. Merging counts is exact in any order; the sums of values of numeric bins
are float64 and agree up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from monitoring.categorical_summary import CategoricalSummary
from monitoring.numeric_summary import NumericSummary
from pipelines.errors import DataError

__all__ = ["FeatureSummary", "Kind", "summarise", "summary_from_state"]

Kind: TypeAlias = Literal["categorical", "numeric"]
FeatureSummary: TypeAlias = CategoricalSummary | NumericSummary


def summary_from_state(state: Mapping[str, Any]) -> FeatureSummary:
    """Inverse of ``state`` of either kind, exact.

    Examples
    --------
    >>> summary = NumericSummary.of("age", [18.0, 30.0])
    >>> summary_from_state(summary.state()).state() == summary.state()
    True
    """
    if state["kind"] == "categorical":
        counts: Counter[Any] = Counter(dict(zip(state["keys"], state["counts"], strict=True)))
        return CategoricalSummary(state["name"], state["rows"], state["nulls"], counts)
    if state["kind"] != "numeric":
        raise DataError(f"expected a summary of kind categorical or numeric, received {state['kind']!r}.")
    return NumericSummary(
        state["name"],
        np.asarray(state["edges"], dtype=np.float64),
        state["is_discrete"],
        np.asarray(state["counts"], dtype=np.int64),
        np.asarray(state["sums"], dtype=np.float64),
        state["rows"],
        state["nulls"],
        state["infinite"],
        float("inf") if state["minimum"] is None else state["minimum"],
        float("-inf") if state["maximum"] is None else state["maximum"],
    )


def summarise(
    columns: Mapping[str, npt.ArrayLike],
    like: Mapping[str, FeatureSummary] | None = None,
    kinds: Mapping[str, Kind] | None = None,
) -> dict[str, FeatureSummary]:
    """Summarise a window of features.

    Parameters
    ----------
    columns : dict of feature -> values (n,)
    like : dict of feature -> summary, optional
        The reference: its kinds and edges are used. Without it, columns set their own edges (this is the
        reference).
    kinds : dict of feature -> kind, optional
        Default: float columns are numeric; strings, objects, booleans and integers (hash keys) are
        categorical.

    Raises
    ------
    DataError
        If a column is not in ``like``.

    Examples
    --------
    >>> reference = summarise({"age": np.array([18.0, 30.0]), "campaign": np.array(["a", "b"])})
    >>> current = summarise({"age": np.array([19.0]), "campaign": np.array(["c"])}, like=reference)
    >>> [(s.kind, s.rows) for s in current.values()]
    [('numeric', 1), ('categorical', 1)]
    """
    summaries: dict[str, FeatureSummary] = {}
    for name, values in columns.items():
        summary: FeatureSummary
        if like is not None:
            if name not in like:
                raise DataError(f"expected features of the reference ({', '.join(like)}), received `{name}`.")
            summary = like[name].empty_like()
        else:
            column = np.asarray(values)
            kind = (kinds or {}).get(name, "numeric" if column.dtype.kind == "f" else "categorical")
            if kind == "numeric":
                summaries[name] = NumericSummary.of(name, column)
                continue
            summary = CategoricalSummary(name)
        summary.update(values)
        summaries[name] = summary
    return summaries
