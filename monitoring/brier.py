"""The Brier score taken apart: what calibration costs, what ranking earns, what nobody can know."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray, binary_label, probability_array, weight_array
from monitoring.reliability import equal_mass_bins

__all__ = ["BrierParts", "brier_parts", "reliability_null"]


@dataclass(frozen=True)
class BrierParts:
    """Brier score = reliability - resolution + uncertainty + within_variance - within_covariance, exactly.

    Attributes
    ----------
    brier : float
        Mean of (y - p)².
    reliability : float
        Miscalibration, ``Σ W_k (mean p_k - rate_k)² / W``: lower is better.
    resolution : float
        ``Σ W_k (rate_k - rate)² / W``: higher is better.
    uncertainty : float
        ``rate (1 - rate)``: the Brier score of the base rate.
    within_variance, within_covariance : float
        ``Σ w (p - mean p_k)² / W`` and ``2 Σ w (y - rate_k)(p - mean p_k) / W``: what the bins hide.
        ``resolution - within_variance + within_covariance`` is the resolution that does not depend much on
        the bins.
    reliability_null : float
        Expected ``reliability`` of a perfectly calibrated model with these predictions in these bins.
    reliability_z : float or None
        ``(reliability - reliability_null)`` in standard deviations of the null.
    bins : int
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_variance: float
    within_covariance: float
    reliability_null: float
    reliability_z: float | None
    bins: int


def brier_parts(
    label: npt.ArrayLike, probability: npt.ArrayLike, bins: int = 20, weight: npt.ArrayLike | None = None
) -> BrierParts | None:
    """Murphy's decomposition [1]_ over equal-mass bins, with the two within-bin terms that close it [2]_.

    Murphy's three terms add up to the Brier score only where all predictions of a bin are equal; with the
    variance and covariance within bins they do for any bins. With weights every mean is a weighted one.

    Null distribution: if the predictions are true, ``mean p_k - rate_k`` is about normal with variance
    ``V_k / W_k²``, ``V_k = Σw²p(1 - p)``, so ``W · reliability`` is a sum of ``V_k / W_k`` times independent
    chi-squares of one degree: mean ``Σ V_k / W_k``, variance ``2 Σ (V_k / W_k)²``. With few bins it is skewed
    to the right: z above 4, not 2, is news.

    Parameters
    ----------
    label : (n,) in {0, 1}
    probability : (n,) in [0, 1]
    bins : int
        At most so many; ties merge bins.
    weight : (n,) >= 0, optional

    Returns
    -------
    BrierParts or None
        None without rows, or without weight.

    References
    ----------
    .. [1] Murphy 1973, A New Vector Partition of the Probability Score.
    .. [2] Stephenson, Coelho and Jolliffe 2008, Two Extra Components in the Brier Score Decomposition.

    Examples
    --------
    >>> parts = brier_parts([0, 1, 0, 1], [0.1, 0.3, 0.6, 0.8], bins=2)
    >>> round(parts.reliability, 4), parts.resolution, parts.uncertainty
    (0.065, 0.0, 0.25)
    >>> sums = parts.reliability - parts.resolution + parts.uncertainty
    >>> abs(sums + parts.within_variance - parts.within_covariance - parts.brier) < 1e-12
    True
    """
    y = binary_label(label)
    p = probability_array(probability, y.shape[0])
    given = weight_array(weight, y.shape[0])
    w = np.ones(y.shape[0]) if given is None else given
    total = float(w.sum())
    if total == 0.0:
        return None
    place = equal_mass_bins(p, bins)

    def sums(of: FloatArray) -> FloatArray:
        return np.bincount(place, of).astype(np.float64)

    mass = sums(w)
    share = np.maximum(mass, np.finfo(np.float64).tiny)
    mean, rate = sums(w * p) / share, sums(w * y) / share
    base = float(w[y].sum()) / total
    inside = p - mean[place]
    reliability = float(mass @ (mean - rate) ** 2) / total
    null, spread = reliability_null(mass, sums(w**2 * p * (1.0 - p)))
    return BrierParts(
        brier=float(w @ (y - p) ** 2) / total,
        reliability=reliability,
        resolution=float(mass @ (rate - base) ** 2) / total,
        uncertainty=base * (1.0 - base),
        within_variance=float(w @ inside**2) / total,
        within_covariance=2.0 * float(w @ ((y - rate[place]) * inside)) / total,
        reliability_null=null,
        reliability_z=(reliability - null) / spread if spread > 0 else None,
        bins=int((mass > 0).sum()),
    )


def reliability_null(mass: FloatArray, variance: FloatArray) -> tuple[float, float]:
    """Mean and standard deviation of the reliability of a perfectly calibrated model.

    Parameters
    ----------
    mass, variance : (bins,)
        ``W_k`` and ``V_k``, as in `brier_parts`.
    """
    total = float(mass.sum())
    noise = variance / np.maximum(mass, np.finfo(np.float64).tiny)
    return float(noise.sum()) / total, math.sqrt(2.0 * float(noise @ noise)) / total
