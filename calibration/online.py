"""Platt scaling that follows the stream: Kalman filters over level and slope, weighed by how they predict.

The truth drifts, so the line may drift too (:mod:`calibration.line_filter`). How fast it does nobody knows
beforehand, and it changes: a few filters of different process noise hear the same rows, and each counts by
how well it has predicted lately (dynamic model averaging). What is used is the mean of their lines, a line
again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from calibration.base import VERSION, Calibrator, check_same_kind, checked_logit, checked_rows
from calibration.line_filter import LineFilters, Rows
from calibration.link import LOGIT_LIMIT, FloatArray, sigmoid
from calibration.platt import MINIMUM_SLOPE
from calibration.sketch import LogitSketch
from calibration.state import expect_fields, finite, finite_list
from pipelines.errors import ConfigError, DataError, StaleStateError

__all__ = ["OnlineConfig", "OnlinePlatt", "information_centre"]

# The slope acts within 8 logits of the centre (odds x 3000 either way) and is 1 beyond: one absurd logit,
# of weight one, must not turn the line.
REACH = 8.0
# No filter is given up: what predicts well again after a jump has this much to make up for, and no more.
_LOWEST_SCORE = -8.0


@dataclass(frozen=True, slots=True)
class OnlineConfig:
    """How fast the line may move.

    With rate ``p``, noise ``s`` and no weights a filter remembers about ``1 / sqrt(s p)`` rows and its
    level is uncertain by ``(s / p) ** 0.25`` logits: 14 000 rows and 4 % at a noise of 1e-7 and 5 %
    positives. Ten times the noise follows three times as fast and is 1.8 times as unsteady.

    Attributes
    ----------
    intercept_noise, slope_noise : float, >= 0
        Variance of the random walk per effective row (Σ weight), in logits squared and slopes squared.
        0 and 0: no drift, all rows count for ever.
    noise_factors : tuple of float, > 0
        One filter for each, with both noises times the factor. One factor: nothing is chosen.
    half_life : float, effective rows
        How long ago a filter has to have predicted well for that to count half.
    intercept, slope : float
        What the line is taken for before any row was seen; the intercept is that at the centre.
    intercept_deviation, slope_deviation : float, > 0
        Standard deviation of that.
    minimum_slope : float, in (0, 1]
        The slope never falls below: no ranking is lost.

    Raises
    ------
    ConfigError
        A value outside its range.
    """

    intercept_noise: float = 1e-7
    slope_noise: float = 1e-9
    noise_factors: tuple[float, ...] = (0.1, 0.5, 2.5, 12.5, 62.5, 312.5)
    half_life: float = 100_000.0
    intercept: float = 0.0
    slope: float = 1.0
    intercept_deviation: float = 0.3
    slope_deviation: float = 0.1
    minimum_slope: float = MINIMUM_SLOPE

    def __post_init__(self) -> None:
        for name in ("intercept_noise", "slope_noise"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise ConfigError(f"online calibration: {name} must be >= 0; got {getattr(self, name)}.")
        for name in ("intercept_deviation", "slope_deviation"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"online calibration: {name} must be in (0, 1]; got {getattr(self, name)}.")
        if not 0.0 < self.minimum_slope <= 1.0:
            raise ConfigError(
                f"online calibration: minimum_slope must be in (0, 1]; got {self.minimum_slope}."
            )
        if not (math.isfinite(self.intercept) and self.minimum_slope <= self.slope < math.inf):
            raise ConfigError(
                f"online calibration: intercept must be finite and slope at least {self.minimum_slope}; "
                f"got {self.intercept} and {self.slope}."
            )
        if not self.noise_factors or not all(math.isfinite(f) and f > 0.0 for f in self.noise_factors):
            raise ConfigError(
                f"online calibration: noise_factors must be above 0, at least one; got {self.noise_factors}."
            )
        if not (math.isfinite(self.half_life) and self.half_life > 0.0):
            raise ConfigError(
                f"online calibration: half_life must be finite and above 0; got {self.half_life}."
            )


class OnlinePlatt(Calibrator):
    """``logit q = logit p + intercept + (slope - 1) * clip(logit p - centre, -8, 8)``, by batch.

    ``intercept`` is the level error at ``centre``, the place where the rows have their information, so that
    level and slope are learned apart. Before the first row it is the identity.

    Each batch is first predicted by every filter, which adds its log likelihood to the filter's score, and
    then learned by each. Scores fade with the half-life of the configuration, and none is more than 8 nats
    behind the best; a filter's share is proportional to the exponential of its score.

    Parameters
    ----------
    config : OnlineConfig, optional
    centre : float, logits, optional
        Fixed for good. Without it, the first batch decides: its mean logit, weighted by ``weight * p (1 -
        p)``.

    Attributes
    ----------
    effective_rows : float
        Σ weight learned from: the support.

    References
    ----------
    Kalman (1960); the Laplace step for a logistic likelihood: Spiegelhalter and Lauritzen (1990).
    Raftery, Kárný and Ettler (2010), Online prediction under model uncertainty via dynamic model averaging.
    Bach (2010), Self-concordant analysis for logistic regression, arXiv 0910.4627.

    Examples
    --------
    The model says too much by a factor of e^0.3 in odds:

    >>> rng = np.random.default_rng(0)
    >>> online = OnlinePlatt()
    >>> for _ in range(200):
    ...     logit = rng.normal(-2.0, 1.0, 256)
    ...     online.update(logit, rng.random(256) < sigmoid(logit - 0.3))
    >>> round(online.intercept, 2), round(online.slope, 1)
    (-0.29, 1.0)
    """

    kind: ClassVar[str] = "kalman"
    is_strict: ClassVar[bool] = True

    def __init__(self, config: OnlineConfig | None = None, centre: float | None = None) -> None:
        self.config = config if config is not None else OnlineConfig()
        self.centre = None if centre is None else float(centre)
        if self.centre is not None and not abs(self.centre) <= LOGIT_LIMIT:
            raise ConfigError(f"the centre must be within {LOGIT_LIMIT} logits of 0; got {self.centre}.")
        self.effective_rows = 0.0
        self._factors = np.array(self.config.noise_factors)
        ones = np.ones(len(self._factors))
        self._filters = LineFilters(
            self.config.intercept * ones,
            self.config.slope * ones,
            self.config.intercept_deviation**2 * ones,
            self.config.slope_deviation**2 * ones,
            0.0 * ones,
        )
        self._score = 0.0 * ones

    # -- learning ---------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        logit: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
        *,
        config: OnlineConfig | None = None,
        centre: float | None = None,
    ) -> Self:
        """The belief after one window of rows, in any order."""
        return cls.fit_sketch(LogitSketch.of(logit, label, weight), config=config, centre=centre)

    @classmethod
    def fit_sketch(
        cls, sketch: LogitSketch, *, config: OnlineConfig | None = None, centre: float | None = None
    ) -> Self:
        """The belief after one window."""
        if sketch.rows <= 0.0:
            raise DataError(
                "cannot fit a Kalman filter to no rows.",
                hint="wait until labels have matured, or make it anew",
            )
        fitted = cls(config, centre)
        fitted.update_sketch(sketch)
        return fitted

    def update(self, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> None:
        """Learn from one batch; predict before.

        Parameters
        ----------
        logit : array_like, shape (n,), logit space
            The logit that goes into :meth:`transform_logit`, not what comes out.
        label : array_like, shape (n,), in [0, 1]
        weight : array_like, shape (n,), >= 0, optional
            A weight of 2 is the row twice. May be an importance weight (:mod:`calibration.delayed`).

        Raises
        ------
        DataError
            Bad values; nothing is learned then.
        """
        self._learn(*checked_rows(logit, label, weight))

    def update_sketch(self, sketch: LogitSketch) -> None:
        """Learn from a window at once: as from its rows, each with the logit of its bin's mean."""
        logit, rows, positives, _ = sketch.bins()
        self._learn(logit, positives / rows, rows)

    def _learn(self, z: FloatArray, y: FloatArray, w: FloatArray) -> None:
        if not w.any():
            return
        if self.centre is None:
            self.centre = information_centre(z, w)
        rows = Rows(z, self._offset(z), y, w)
        fading = 0.5 ** (rows.effective / self.config.half_life)
        score = fading * self._score + self._filters.log_likelihood(rows)
        # Only differences count.
        self._score = np.maximum(score - score.max(), _LOWEST_SCORE)
        noise = rows.effective * self._factors
        self._filters.drift(self.config.intercept_noise * noise, self.config.slope_noise * noise)
        self._filters.learn(rows, minimum_slope=self.config.minimum_slope)
        self.effective_rows += rows.effective

    def merge(self, other: Self) -> Self:
        """The belief after the rows of both: the product of the two over what both started from.

        Filters of the same configuration and centre that heard different rows of the same time. Exact for
        Gaussian beliefs without drift. With drift, what both started from is the prior that drifted as far as
        the one with more rows has, so that what they learned is counted once and the product is a belief.

        Raises
        ------
        DataError
            Another configuration or centre.
        """
        check_same_kind(self, other)
        if (self.config, self.centre) != (other.config, other.centre):
            raise DataError(
                "filters of different configurations or centres cannot be merged.",
                hint="give both the same centre when they are made",
            )
        merged = type(self)(self.config, self.centre)
        merged.effective_rows = self.effective_rows + other.effective_rows
        prior, noise = merged._filters, max(self.effective_rows, other.effective_rows) * merged._factors
        # Without the bound of `drift`: it is this that no belief is ever less certain than.
        prior.level_variance += self.config.intercept_noise * noise
        prior.slope_variance += self.config.slope_noise * noise
        merged._filters = _product(self._filters, other._filters, prior, self.config.minimum_slope)
        score = self._score + other._score
        merged._score = np.maximum(score - score.max(), _LOWEST_SCORE)
        return merged

    def frozen(self) -> Self:
        """The filter as it is: it keeps no rows."""
        return self.from_state(self.state())

    # -- reading ----------------------------------------------------------------------------------------

    @property
    def shares(self) -> FloatArray:
        """How much each filter counts, in the order of the configuration's factors; the sum is 1."""
        weight = np.exp(self._score)
        shares: FloatArray = weight / weight.sum()
        return shares

    @property
    def intercept(self) -> float:
        """Mean of the belief about the level error at the centre."""
        return float((self.shares * self._filters.level).sum())

    @property
    def slope(self) -> float:
        """Mean of the belief about the slope."""
        # About 1, so that where all filters say 1 the mean is 1 to the bit.
        return 1.0 + float((self.shares * (self._filters.slope - 1.0)).sum())

    @property
    def intercept_variance(self) -> float:
        """Variance of the belief about the level, what the filters differ by included."""
        spread = self._filters.level - self.intercept
        return float((self.shares * (self._filters.level_variance + spread**2)).sum())

    @property
    def slope_variance(self) -> float:
        """Variance of the belief about the slope."""
        spread = self._filters.slope - self.slope
        return float((self.shares * (self._filters.slope_variance + spread**2)).sum())

    @property
    def covariance(self) -> float:
        """Covariance of level and slope."""
        spread = (self._filters.level - self.intercept) * (self._filters.slope - self.slope)
        return float((self.shares * (self._filters.covariance + spread)).sum())

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit, shape ``(n,)``; strictly increasing."""
        z = checked_logit(logit)
        if self.centre is None:
            return z
        line: FloatArray = z + self.intercept + (self.slope - 1.0) * self._offset(z)
        return line

    def _offset(self, z: FloatArray) -> FloatArray:
        offset: FloatArray = np.clip(z - (self.centre or 0.0), -REACH, REACH)
        return offset

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """A few floats, as plain JSON data."""
        config = asdict(self.config) | {"noise_factors": list(self.config.noise_factors)}
        return {
            "kind": self.kind,
            "version": VERSION,
            "config": config,
            "centre": self.centre,
            "effective_rows": self.effective_rows,
            "score": self._score.tolist(),
            **{name: getattr(self._filters, name).tolist() for name in LineFilters.NAMES},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The filter that :meth:`state` described; ``StaleStateError`` if it is none."""
        numbers = ("score", *LineFilters.NAMES)
        expect_fields(state, cls.kind, ("config", "centre", "effective_rows", *numbers), VERSION)
        online = cls(
            _config_of(state["config"]), None if state["centre"] is None else finite(state, "centre")
        )
        online.effective_rows = finite(state, "effective_rows")
        score, *beliefs = (np.array(finite_list(state[name], name)) for name in numbers)
        if any(part.shape != online._score.shape for part in (score, *beliefs)):
            raise StaleStateError(f"expected {len(online._score)} filters in every list of {numbers}.")
        online._score, online._filters = score, LineFilters(*beliefs)
        return online


def _config_of(state: Any) -> OnlineConfig:
    names = [field.name for field in fields(OnlineConfig)]
    config = {"kind": "online_config", **state}
    expect_fields(config, "online_config", names)
    factors = tuple(finite_list(config["noise_factors"], "noise_factors"))
    numbers = {name: finite(config, name) for name in names if name != "noise_factors"}
    return OnlineConfig(noise_factors=factors, **numbers)


def _product(one: LineFilters, other: LineFilters, prior: LineFilters, minimum_slope: float) -> LineFilters:
    """The Gaussian beliefs ``one * other / prior``, filter by filter."""
    parts = [(1.0, one), (1.0, other), (-1.0, prior)]
    p_aa = p_ab = p_bb = towards_a = towards_b = np.zeros(len(prior.level))
    for sign, part in parts:
        aa, ab, bb = part.precision()
        p_aa, p_ab, p_bb = p_aa + sign * aa, p_ab + sign * ab, p_bb + sign * bb
        towards_a = towards_a + sign * (aa * part.level + ab * part.slope)
        towards_b = towards_b + sign * (ab * part.level + bb * part.slope)
    determinant = p_aa * p_bb - p_ab * p_ab
    slope = np.maximum((p_aa * towards_b - p_ab * towards_a) / determinant, minimum_slope)
    # On the bound the best level is the conditional mean.
    level = (towards_a - p_ab * slope) / p_aa
    return LineFilters(level, slope, p_bb / determinant, p_aa / determinant, -p_ab / determinant)


def information_centre(logit: FloatArray, weight: FloatArray) -> float:
    """Mean logit weighted by ``weight * p (1 - p)``: where a level error shows most."""
    p = sigmoid(logit)
    information = weight * p * (1.0 - p)
    return float((information * logit).sum()) / float(information.sum())
