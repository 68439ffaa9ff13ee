"""Kalman filters over level and slope of a line between logits: several at once, one Laplace step a batch.

A filter believes that ``theta = (level, slope)`` is normal. Between rows theta takes a random walk; a batch
then updates the belief by Bayes' rule, with the logistic likelihood replaced by a Gaussian at its peak::

    prior      N(m, P + Q)        Q = process noise per effective row x Σ weight
    mode       of  log N(theta; m, P + Q) + Σ weight * log likelihood(theta)
    posterior  N(mode, inverse Hessian at the mode)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.link import FloatArray, sigmoid

__all__ = ["LineFilters", "Rows"]

# A Newton step that moves no row by more than 1 logit lowers the objective for certain: within r logits
# curvature changes by at most e**r, and (e**r - r - 1) / r**2 < 1 for r = 1 (self-concordance; Bach 2010,
# section 2).
_LARGEST_MOVE = 1.0
_TOLERANCE = 1e-7
_MAXIMUM_STEPS = 60
# Variance beyond which a random walk without information stops growing, logits squared.
_LARGEST_VARIANCE = 1.0


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch: arrays of shape ``(n,)``.

    Attributes
    ----------
    logit, offset : ndarray
        The line says ``logit + level + (slope - 1) * offset``.
    label, weight : ndarray
        Σ weight is above 0.
    """

    logit: FloatArray
    offset: FloatArray
    label: FloatArray
    weight: FloatArray

    @property
    def effective(self) -> float:
        """Σ weight."""
        return float(self.weight.sum())


class LineFilters:
    """Beliefs of ``f`` filters that hear the same rows; arrays of shape ``(f,)``.

    Parameters
    ----------
    level, slope : ndarray
        Means.
    level_variance, slope_variance, covariance : ndarray
        Positive definite.

    Examples
    --------
    >>> filters = LineFilters(*np.array([[0.0], [1.0], [0.09], [0.01], [0.0]]))
    >>> rows = Rows(np.zeros(100), np.zeros(100), np.ones(100), np.ones(100))
    >>> filters.learn(rows, minimum_slope=0.05)
    >>> filters.level.round(2).tolist()
    [1.56]
    """

    NAMES = ("level", "slope", "level_variance", "slope_variance", "covariance")

    def __init__(
        self,
        level: FloatArray,
        slope: FloatArray,
        level_variance: FloatArray,
        slope_variance: FloatArray,
        covariance: FloatArray,
    ) -> None:
        self.level, self.slope = level.copy(), slope.copy()
        self.level_variance, self.slope_variance = level_variance.copy(), slope_variance.copy()
        self.covariance = covariance.copy()

    def copy(self) -> LineFilters:
        """Independent filters of the same beliefs."""
        return LineFilters(*(getattr(self, name) for name in self.NAMES))

    def log_likelihood(self, rows: Rows) -> FloatArray:
        """Σ weight x log likelihood of the rows under each filter's mean, shape (f,)."""
        z = self._line(rows, np.arange(len(self.level)))
        likelihood: FloatArray = (rows.weight * (rows.label * z - np.logaddexp(0.0, z))).sum(axis=1)
        return likelihood

    def drift(self, level_noise: FloatArray, slope_noise: FloatArray) -> None:
        """Random walk: only the diagonal grows, so the covariance stays positive definite."""
        for variance, noise in ((self.level_variance, level_noise), (self.slope_variance, slope_noise)):
            variance += np.minimum(noise, np.maximum(0.0, _LARGEST_VARIANCE - variance))

    def learn(self, rows: Rows, *, minimum_slope: float) -> None:
        """Move means and covariances to mode and inverse Hessian of each log posterior, slope bounded."""
        precision = self.precision()
        prior_level, prior_slope = self.level.copy(), self.slope.copy()
        reach = float(np.abs(rows.offset).max())
        on_bound = np.zeros(len(self.level), dtype=bool)
        # Filters that have arrived are left alone, so that none depends on what its neighbours need.
        moving = np.arange(len(self.level))
        for _ in range(_MAXIMUM_STEPS):
            g_a, g_b, h_aa, h_ab, h_bb = self._derivatives(rows, moving)
            p_aa, p_ab, p_bb = (entry[moving] for entry in precision)
            from_a, from_b = (prior_level - self.level)[moving], (prior_slope - self.slope)[moving]
            g_a, g_b = g_a + p_aa * from_a + p_ab * from_b, g_b + p_ab * from_a + p_bb * from_b
            h_aa, h_ab, h_bb = h_aa + p_aa, h_ab + p_ab, h_bb + p_bb
            determinant = h_aa * h_bb - h_ab * h_ab
            bound = on_bound[moving]
            step_a = np.where(bound, g_a / h_aa, (h_bb * g_a - h_ab * g_b) / determinant)
            step_b = np.where(bound, 0.0, (h_aa * g_b - h_ab * g_a) / determinant)
            move = np.abs(step_a) + np.abs(step_b) * reach
            shrink = _LARGEST_MOVE / np.maximum(move, _LARGEST_MOVE)
            self.level[moving] += shrink * step_a
            self.slope[moving] += shrink * step_b
            self.level_variance[moving] = h_bb / determinant
            self.slope_variance[moving] = h_aa / determinant
            self.covariance[moving] = -h_ab / determinant
            # Where the mode lies beyond the bound, the best level on it is the constrained mode.
            still = move < _TOLERANCE
            beyond = still & ~bound & (self.slope[moving] < minimum_slope)
            on_bound[moving[beyond]] = True
            self.slope[moving[beyond]] = minimum_slope
            moving = moving[~still | beyond]
            if not len(moving):
                break
        np.maximum(self.slope, minimum_slope, out=self.slope)

    def precision(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Inverse covariances: level, mixed, slope."""
        determinant = self.level_variance * self.slope_variance - self.covariance**2
        return (
            self.slope_variance / determinant,
            -self.covariance / determinant,
            self.level_variance / determinant,
        )

    def _line(self, rows: Rows, of: npt.NDArray[np.intp]) -> FloatArray:
        line: FloatArray = rows.logit + self.level[of, None] + (self.slope[of, None] - 1.0) * rows.offset
        return line

    def _derivatives(
        self, rows: Rows, of: npt.NDArray[np.intp]
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Gradient (2) and negative Hessian (3) of the log likelihood at the means."""
        q = sigmoid(self._line(rows, of))
        residual, curvature = rows.weight * (rows.label - q), rows.weight * q * (1.0 - q)
        bent = curvature * rows.offset
        return (
            residual.sum(axis=1),
            (residual * rows.offset).sum(axis=1),
            curvature.sum(axis=1),
            bent.sum(axis=1),
            (bent * rows.offset).sum(axis=1),
        )
