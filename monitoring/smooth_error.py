"""Smoothed calibration error: residuals averaged by a kernel as wide as the error itself, no bins to choose.

The kernel lies on the axis of *probability*. The width is the fixed point of "error at this width = width",
which needs errors and positions in one unit; on that axis the value is also within a constant factor of the
distance to the nearest calibrated predictor [1]_. On the axis of logits neither holds. Small rates lose
nothing by it: where a model of a 2 % rate errs by a tenth, the kernel is 0.002 wide.

References
----------
.. [1] Błasiok and Nakkiran 2023, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitoring.inputs import FloatArray, binary_label, probability_array, weight_array

__all__ = [
    "NullError",
    "SmoothError",
    "SmoothedResiduals",
    "fixed_point",
    "smooth_calibration_error",
]

# Grid points to a width: the value is then within 0.1 % of that of an endless grid.
_POINTS_A_WIDTH = 16
# Widths below 1.5e-5 are reached by 1e8 rows and more only; they share the finest grid.
_FINEST_GRID = 2**20
_COARSEST_GRID = 2**8
_TOLERANCE = 1e-4
_NOTHING = 1e-9
_SECANTS = 10


@dataclass(frozen=True)
class SmoothError:
    """Smoothed calibration error beside that of a perfect model.

    Attributes
    ----------
    smooth_ece : float
        Also the width of the kernel, in probability.
    relative : float or None
        Over the base rate; None without positives.
    null : float
        What a perfectly calibrated model with these predictions shows in the middle.
    p_value : float or None
        Share of the draws from such a model that show as much; None if nothing was drawn.
    """

    smooth_ece: float
    relative: float | None
    null: float
    p_value: float | None


class SmoothedResiduals:
    """Masses at points of [0, 1], smoothed by the reflected Gaussian kernel at any width.

    Reflection at 0 and 1 makes cosines the kernel's eigenfunctions: a cosine transform, times
    ``exp(-π²k²σ²/2)``, and back. Masses go to the two next points of a grid by their distance to each, which
    keeps their mean place.

    Parameters
    ----------
    position : ndarray, shape (n,), probability space
    mass : ndarray, shape (n,)
    """

    def __init__(self, position: FloatArray, mass: FloatArray) -> None:
        self._position, self._mass = position, mass
        self._grids: dict[int, FloatArray] = {}

    def grid(self, width: float) -> FloatArray:
        """The masses on a grid that is fine enough for a kernel of this width, not smoothed."""
        points = grid_points(width)
        if points not in self._grids:
            self._grids[points] = on_grid(self._position, self._mass, points)
        return self._grids[points]

    def spacing(self, width: float) -> float:
        """Distance of the points of that grid."""
        return 1.0 / grid_points(width)

    def absolute(self, width: float) -> float:
        """``∫ |Σ mass K_width(t, position)| dt`` over [0, 1]; it never increases with the width."""
        return float(np.abs(smoothed(self.grid(width), width)).sum())


def grid_points(width: float) -> int:
    """Points of the grid for a kernel of this width: a power of two."""
    wanted = 1 << math.ceil(math.log2(_POINTS_A_WIDTH / width))
    return min(max(wanted, _COARSEST_GRID), _FINEST_GRID)


def on_grid(position: FloatArray, mass: FloatArray, points: int) -> FloatArray:
    """Masses on a grid of cell middles, shape (points,), each shared between two neighbours."""
    at = np.clip(position * points - 0.5, 0.0, points - 1.0)
    below = np.minimum(at.astype(np.int64), points - 2)
    upper = mass * (at - below)
    grid = np.bincount(below, mass - upper, points) + np.bincount(below + 1, upper, points)
    return grid.astype(np.float64, copy=False)


def smoothed(grid: FloatArray, width: float) -> FloatArray:
    """Masses on a grid, shape (..., points), after the reflected Gaussian kernel of this width."""
    points = grid.shape[-1]
    mirrored = np.concatenate((grid, grid[..., ::-1]), axis=-1)
    wave = np.arange(points + 1)
    kernel = np.exp(-0.5 * (math.pi * width * wave) ** 2)
    result: FloatArray = np.fft.irfft(np.fft.rfft(mirrored) * kernel, 2 * points)[..., :points]
    return result


def fixed_point(error: Callable[[float], float], start: float) -> float:
    """The width at which an error that never increases with the width equals it.

    Between any width and its error lies the answer. Within what is left of (0, 1] by that, a few secants in
    logarithms, then bisection: where the grid changes, an error may jump by some ten-thousandths over its
    width. 0 if the answer is below 1e-9.
    """
    low, high = 0.0, 1.0
    width, before, steps = min(max(start, _NOTHING), 1.0), None, 0
    while True:
        value, steps = error(width), steps + 1
        low, high = max(low, min(width, value)), min(high, max(width, value))
        if high < _NOTHING:
            return 0.0
        if abs(value - width) <= _TOLERANCE * width or high - low <= _TOLERANCE * high:
            return value
        guess = low
        if value > 0.0 and steps < _SECANTS:
            gap = math.log(value / width)
            # The slope of the logarithm of error / width is at most -1.
            slope = -1.5 if before is None else (gap - before[1]) / math.log(width / before[0])
            guess, before = width * math.exp(-gap / min(slope, -1.0)), (width, gap)
        middle = 0.5 * (low + high) if low > 0.0 else high / 16.0
        width = guess if low < guess < high else middle


def smooth_calibration_error(
    label: npt.ArrayLike,
    probability: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    draws: int = 0,
    seed: int = 0,
) -> SmoothError | None:
    """smECE [1]_: ``σ = ∫ |Σ w(p - y) K_σ(t, p) / W| dt``, K the Gaussian kernel reflected at 0 and 1.

    The right side never increases with σ, so there is one solution, and it is the error.

    Null distribution: if the predictions are true, the integrand is about normal with variance
    ``Σ w²p(1 - p) K_σ(t, p)² / W²``; its mean absolute value integrated, and set equal to σ, is ``null``.
    The p-value draws normal residuals of the right variance in each cell of the grid and solves for σ again.

    Parameters
    ----------
    label : (n,) in {0, 1}
    probability : (n,) in [0, 1]
    weight : (n,) >= 0, optional
    draws, seed : int
        How many perfect models to draw for the p-value, which is then at least 1 / (draws + 1).

    Returns
    -------
    SmoothError or None
        None without weight.

    References
    ----------
    .. [1] Błasiok and Nakkiran 2023, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing.

    Examples
    --------
    >>> rng = np.random.default_rng(5)
    >>> truth = rng.beta(1, 30, size=50_000)
    >>> label = rng.random(50_000) < truth
    >>> error = smooth_calibration_error(label, truth, draws=99)
    >>> round(error.relative, 3), round(error.null * 31, 3), error.p_value > 0.05
    (0.087, 0.083, True)
    >>> smooth_calibration_error(label, 1.2 * truth, draws=99).p_value
    0.01
    """
    y = binary_label(label)
    p = probability_array(probability, y.shape[0])
    given = weight_array(weight, y.shape[0])
    w = np.ones(y.shape[0]) if given is None else given
    total = float(w.sum())
    if total == 0.0:
        return None
    share = w / total
    residuals = SmoothedResiduals(p, share * (p - y))
    null = NullError(p, share**2 * p * (1.0 - p))
    value = fixed_point(residuals.absolute, null.middle)
    base = float(share[y].sum())
    return SmoothError(
        smooth_ece=value,
        relative=value / base if base > 0 else None,
        null=null.middle,
        p_value=float(1 + (null.draws(draws, seed) >= value).sum()) / (draws + 1) if draws else None,
    )


class NullError:
    """Smoothed calibration errors of perfectly calibrated models.

    Parameters
    ----------
    position : ndarray, shape (n,), probability space
    variance : ndarray, shape (n,)
        Of the mass at each position.

    Attributes
    ----------
    middle : float
        The fixed point of the expected error.
    """

    def __init__(self, position: FloatArray, variance: FloatArray) -> None:
        self._noise = SmoothedResiduals(position, variance)
        self.middle = fixed_point(self.expected, math.sqrt(float(variance.sum())))

    def expected(self, width: float) -> float:
        """``∫ √(2 V(t) / π) dt`` with ``V(t) = Σ variance K_σ(t, position)²``, σ the width.

        For the kernel reflected at 0, ``K_σ² = K_{σ/√2} / 2σ√π + exp(-(t² + position²) / σ²) / πσ²``; at 1
        alike.
        """
        grid = self._noise.grid(width)
        points = len(grid)
        at = (np.arange(points) + 0.5) / points
        # Rounding in the transform may leave values a little below 0.
        square = (
            np.maximum(smoothed(grid, width / math.sqrt(2.0)), 0.0)
            * points
            / (2 * width * math.sqrt(math.pi))
        )
        for distance in (at, 1.0 - at):
            near = np.exp(-((distance / width) ** 2))
            square += near * float(near @ grid) / (math.pi * width**2)
        return float(np.sqrt(square * (2.0 / math.pi)).mean())

    def draws(self, count: int, seed: int = 0) -> FloatArray:
        """Errors of so many perfect models, shape (count,): normal masses of the right variance."""
        spread = np.sqrt(self._noise.grid(self.middle))
        rng = np.random.default_rng(seed)

        def drawn() -> float:
            grid = spread * rng.standard_normal(len(spread))
            return fixed_point(lambda width: float(np.abs(smoothed(grid, width)).sum()), self.middle)

        return np.array([drawn() for _ in range(count)])
