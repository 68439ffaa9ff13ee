"""Offline / online consistency, record by record: the same rows, scored twice by one release, must agree.

The worker logs the logit it served (and the buckets it looked up); offline, the same release scores the same
snapshots again. Any row that differs by more than float noise means two feature codes, two vocabularies or
two models, and the gate is closed: 0 rows above 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray
from pipelines.errors import DataError

__all__ = ["GATE", "NOISE", "consistency", "differing_features", "spearman"]

# float32 sums in another order differ by some 1e-6; 1e-5 is worth counting, 1e-4 is no longer rounding.
NOISE = 1e-5
GATE = 1e-4


def _average_rank(values: FloatArray) -> FloatArray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2.0)[place]


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float | None:
    """Rank correlation, ties given their average rank; None if a side is constant or has fewer than two rows.

    Examples
    --------
    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 6)
    0.8
    """
    a = _average_rank(np.asarray(first, dtype=np.float64))
    b = _average_rank(np.asarray(second, dtype=np.float64))
    if a.shape[0] < 2:
        return None
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return None if spread == 0.0 else float(a @ b) / spread


def differing_features(
    logged_buckets: npt.ArrayLike, rescored_buckets: npt.ArrayLike, feature_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Features whose bucket differs between serving and rescoring, in the order of the features.

    Parameters
    ----------
    logged_buckets, rescored_buckets : (n, f) integers
        The bucket of each feature at serving and offline.
    feature_names : f names

    Returns
    -------
    list of dict
        ``feature, rows`` (differing), ``share, first_row``; empty if all agree.

    Examples
    --------
    >>> differing_features([[1, 2], [3, 4]], [[1, 2], [3, 5]], ["user", "item"])
    [{'feature': 'item', 'rows': 1, 'share': 0.5, 'first_row': 1}]
    """
    logged, rescored = np.asarray(logged_buckets), np.asarray(rescored_buckets)
    if logged.shape != rescored.shape or logged.ndim != 2 or logged.shape[1] != len(feature_names):
        raise DataError(
            f"expected two bucket matrices of shape (n, {len(feature_names)}), one column a feature name, "
            f"received {logged.shape} and {rescored.shape}."
        )
    differs = logged != rescored
    return [
        {
            "feature": name,
            "rows": int(column.sum()),
            "share": float(column.mean()),
            "first_row": int(np.argmax(column)),
        }
        for name, column in zip(feature_names, differs.T, strict=True)
        if column.any()
    ]


def consistency(
    logged_logit: npt.ArrayLike,
    rescored_logit: npt.ArrayLike,
    *,
    logged_buckets: npt.ArrayLike | None = None,
    rescored_buckets: npt.ArrayLike | None = None,
    feature_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare logged logits with the same rows rescored offline.

    Parameters
    ----------
    logged_logit, rescored_logit : (n,) float
        Raw logits of the same rows, in the same order, by the same release.
    logged_buckets, rescored_buckets, feature_names : optional, together
        See `differing_features`.

    Returns
    -------
    dict
        ``rows``; ``non_finite`` rows (NaN or infinite on either side: they always break the gate);
        ``max_abs_delta``, ``p99_abs_delta``, ``share_over_noise`` (1e-5), ``rows_over_gate`` (1e-4,
        non-finite included), ``worst_row``, ``spearman``; ``features`` (`differing_features`) and
        ``first_differing_feature``; ``status`` and ``why``: ``good`` if no row is over the gate and no
        bucket differs, ``bad`` otherwise, ``unknown`` without rows.

    Examples
    --------
    >>> outcome = consistency([0.5, -1.0, 2.0], [0.5, -1.0, 2.1])
    >>> outcome["status"], outcome["rows_over_gate"], outcome["worst_row"]
    ('bad', 1, 2)
    """
    logged = np.asarray(logged_logit, dtype=np.float64)
    rescored = np.asarray(rescored_logit, dtype=np.float64)
    if logged.ndim != 1 or logged.shape != rescored.shape:
        raise DataError(
            f"expected two logit arrays of one shape (n,), received {logged.shape} and {rescored.shape}.",
            hint="join both sides on impression_id and task first; rows of one side only are another finding",
        )
    features: list[dict[str, Any]] = []
    parts = (logged_buckets, rescored_buckets, feature_names)
    if logged_buckets is not None and rescored_buckets is not None and feature_names is not None:
        features = differing_features(logged_buckets, rescored_buckets, feature_names)
    elif any(part is not None for part in parts):
        raise DataError("expected `logged_buckets`, `rescored_buckets` and `feature_names` together.")
    outcome = {
        **_delta_figures(logged, rescored),
        "features": features,
        "first_differing_feature": features[0]["feature"] if features else None,
    }
    outcome["status"], outcome["why"] = _judge(outcome)
    return outcome


def _delta_figures(logged: FloatArray, rescored: FloatArray) -> dict[str, Any]:
    rows = logged.shape[0]
    finite = np.isfinite(logged) & np.isfinite(rescored)
    delta = np.abs(logged[finite] - rescored[finite])
    broken = rows - delta.shape[0]
    worst: int | None = None
    if broken:
        worst = int(np.argmin(finite))
    elif rows and float(delta.max()) > 0.0:
        worst = int(np.argmax(delta))
    seen = delta.shape[0] > 0
    return {
        "rows": rows,
        "non_finite": broken,
        "max_abs_delta": float(delta.max()) if seen else None,
        "p99_abs_delta": float(np.quantile(delta, 0.99)) if seen else None,
        "share_over_noise": (int((delta > NOISE).sum()) + broken) / rows if rows else None,
        "rows_over_gate": int((delta > GATE).sum()) + broken,
        "worst_row": worst,
        "spearman": spearman(logged[finite], rescored[finite]),
    }


def _judge(outcome: Mapping[str, Any]) -> tuple[str, str]:
    if outcome["rows"] == 0:
        return "unknown", "no rows to compare"
    first = outcome["first_differing_feature"]
    reasons = []
    if outcome["rows_over_gate"]:
        reasons.append(
            f"{outcome['rows_over_gate']} of {outcome['rows']} rows differ by more than {GATE:g} in the logit"
        )
    if first is not None:
        reasons.append(f"{len(outcome['features'])} features differ, `{first}` first")
    if reasons:
        return "bad", "; ".join(reasons)
    return "good", f"{outcome['rows']} rows agree, max |Δlogit| {outcome['max_abs_delta']:.2g}"
