"""Reliability diagram as a table on logit axes, and the expected calibration error that belongs to it.

Bins hold equal numbers of rows, because click probabilities crowd near zero; the axes are logits, where
0.001 against 0.002 is as visible as 0.1 against 0.2. No plotting here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray, IntArray, binary_label, probability_array, weight_array
from monitoring.quality import Figures

__all__ = [
    "CalibrationError",
    "equal_mass_bins",
    "error_of_groups",
    "expected_calibration_error",
    "reliability_table",
    "wilson_interval",
]

_Z95 = 1.959963984540054


def equal_mass_bins(probability: FloatArray, bins: int) -> IntArray:
    """Bin number of each row, from 0: bins of about equal counts, equal values in one bin, no bin empty.

    Examples
    --------
    >>> equal_mass_bins(np.array([0.1, 0.4, 0.2, 0.4, 0.3, 0.4]), 3).tolist()
    [0, 2, 0, 2, 1, 2]
    """
    rows = probability.shape[0]
    if rows == 0:
        return np.zeros(0, dtype=np.int64)
    cut = (np.arange(1, bins) * rows) // bins
    edges = np.unique(np.partition(probability, np.unique(cut))[cut])
    _, compact = np.unique(np.searchsorted(edges, probability, side="right"), return_inverse=True)
    return compact.astype(np.int64)


def wilson_interval(rate: float, support: float, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a rate seen in ``support`` rows; honest at 0 and 1, unlike ``rate ± z·se``.

    Examples
    --------
    >>> [round(end, 4) for end in wilson_interval(0.0, 100)]
    [0.0, 0.037]
    """
    if support <= 0:
        return 0.0, 1.0
    shrink = 1.0 + z * z / support
    centre = (rate + z * z / (2.0 * support)) / shrink
    half = z * math.sqrt(rate * (1.0 - rate) / support + z * z / (4.0 * support**2)) / shrink
    return (0.0 if rate == 0.0 else max(0.0, centre - half)), (
        1.0 if rate == 1.0 else min(1.0, centre + half)
    )


def _logit(probability: float) -> float | None:
    return math.log(probability / (1.0 - probability)) if 0.0 < probability < 1.0 else None


@dataclass(frozen=True)
class _BinSums:
    """Sums over the rows of each bin, (bins,): rows, positives, Σw, Σwy, Σwp, Σw², Σw²p(1 - p)."""

    rows: FloatArray
    positives: FloatArray
    weight: FloatArray
    positive: FloatArray
    probability: FloatArray
    weight_square: FloatArray
    variance: FloatArray


def _bin_sums(
    label: npt.ArrayLike, probability: npt.ArrayLike, bins: int, weight: npt.ArrayLike | None
) -> _BinSums:
    y = binary_label(label)
    p = probability_array(probability, y.shape[0])
    given = weight_array(weight, y.shape[0])
    w = np.ones(y.shape[0]) if given is None else given
    place = equal_mass_bins(p, bins)
    columns = (np.ones(y.shape[0]), y, w, w * y, w * p, w * w, w * w * p * (1.0 - p))
    return _BinSums(*(np.bincount(place, column).astype(np.float64) for column in columns))


def reliability_table(
    label: npt.ArrayLike, probability: npt.ArrayLike, bins: int = 20, weight: npt.ArrayLike | None = None
) -> list[Figures]:
    """Predicted against observed, a row for each equal-mass bin, ascending.

    Parameters
    ----------
    label : (n,) in {0, 1}
    probability : (n,) in [0, 1]
    bins : int
        At most so many; ties merge bins.
    weight : (n,) >= 0, optional
        The interval then rests on the effective number of rows (Σw)² / Σw².

    Returns
    -------
    list of dict
        ``rows, positives, mean_probability, observed_rate, low, high`` (95 % Wilson interval of the observed
        rate) and the same on the logit axis, ``predicted_logit, observed_logit, low_logit, high_logit``;
        None where a rate is 0 or 1.

    Examples
    --------
    >>> row = reliability_table([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], bins=10)[0]
    >>> row["rows"], row["observed_rate"], row["predicted_logit"], round(row["low"], 2)
    (4, 0.5, 0.0, 0.15)
    """
    sums = _bin_sums(label, probability, bins, weight)
    table: list[Figures] = []
    for place in range(sums.rows.shape[0]):
        mass = float(sums.weight[place])
        if mass == 0.0:
            continue
        predicted = min(1.0, float(sums.probability[place]) / mass)
        observed = min(1.0, float(sums.positive[place]) / mass)
        low, high = wilson_interval(observed, mass**2 / float(sums.weight_square[place]))
        table.append(
            {
                "rows": int(sums.rows[place]),
                "positives": int(sums.positives[place]),
                "mean_probability": predicted,
                "observed_rate": observed,
                "low": low,
                "high": high,
                "predicted_logit": _logit(predicted),
                "observed_logit": _logit(observed),
                "low_logit": _logit(low),
                "high_logit": _logit(high),
            }
        )
    return table


@dataclass(frozen=True)
class CalibrationError:
    """Expected calibration error beside what a perfect model would show on the same rows.

    Attributes
    ----------
    ece : float
        Mean over rows of \\|mean predicted - observed rate\\| of their bin.
    relative : float or None
        ``ece`` over the base rate; None without positives.
    null : float
        Expected ``ece`` of a perfectly calibrated model with these predictions.
    null_relative : float or None
    z : float or None
        ``(ece - null)`` in standard deviations of the null: above 3 it is not noise.
    bins : int
    """

    ece: float
    relative: float | None
    null: float
    null_relative: float | None
    z: float | None
    bins: int


def expected_calibration_error(
    label: npt.ArrayLike, probability: npt.ArrayLike, bins: int = 20, weight: npt.ArrayLike | None = None
) -> CalibrationError | None:
    """ECE over equal-mass bins, with its null level; None without rows.

    If the predictions are true, ``Σ w(y - p)`` of a bin is about normal with variance ``V = Σ w²p(1 - p)``,
    so its absolute value has mean √(2V/π) and variance V(1 - 2/π); the null level is the sum of the means
    over all bins. No threshold on ECE itself makes sense: the null level depends on the number of rows and
    bins.

    Examples
    --------
    >>> rng = np.random.default_rng(5)
    >>> probability = rng.beta(1, 30, size=100_000)
    >>> error = expected_calibration_error(rng.random(100_000) < probability, probability)
    >>> round(error.null_relative, 3), abs(error.z) < 3
    (0.055, True)
    """
    sums = _bin_sums(label, probability, bins, weight)
    if float(sums.weight.sum()) == 0.0:
        return None
    return error_of_groups(sums.weight, sums.positive, sums.probability, sums.variance)


def error_of_groups(
    weight: FloatArray, positive: FloatArray, probability: FloatArray, variance: FloatArray
) -> CalibrationError:
    """The same from Σw (not all 0), Σwy, Σwp and Σw²p(1 - p) of groups of rows, each (groups,)."""
    mass = float(weight.sum())
    ece = float(np.abs(probability - positive).sum()) / mass
    null = float(np.sqrt(variance * (2.0 / math.pi)).sum()) / mass
    spread = math.sqrt(float(variance.sum()) * (1.0 - 2.0 / math.pi)) / mass
    base = float(positive.sum()) / mass
    return CalibrationError(
        ece=ece,
        relative=ece / base if base > 0 else None,
        null=null,
        null_relative=null / base if base > 0 else None,
        z=(ece - null) / spread if spread > 0 else None,
        bins=int((weight > 0).sum()),
    )
