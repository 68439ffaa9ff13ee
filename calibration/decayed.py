"""A calibrator that forgets: a sketch that decays, fitted anew with each window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy.typing as npt

from calibration.base import check_same_kind
from calibration.isotonic import IsotonicCalibrator
from calibration.link import FloatArray
from calibration.platt import PlattCalibrator
from calibration.sketch import LogitSketch
from calibration.sketch_calibrator import SketchCalibrator
from calibration.state import finite
from pipelines.errors import ConfigError, DataError, StaleStateError

__all__ = ["HALF_LIFE", "DecayedCalibrator"]

# Rows (Σ weight) after which a row counts half. In `make bench-calibration-drift` 3 000 closes more of the
# gap at 100 000 rows a day, 10 000 at 300 000 and more.
HALF_LIFE = 10_000.0
_METHODS: dict[str, type[SketchCalibrator]] = {
    method.kind: method for method in (IsotonicCalibrator, PlattCalibrator)
}


class DecayedCalibrator(SketchCalibrator):
    """Strict isotonic or Platt calibration of rows whose weight halves with every ``half_life`` rows later.

    Each update is one window: what was learned decays by the window's Σ weight, the window is added whole,
    and the map is fitted anew (some ms). Windows are to be long against that, and short against the
    half-life. Within a window the order of rows plays no role; :meth:`merge` adds what two calibrators
    remember of the same windows over different rows, exactly.

    Parameters
    ----------
    calibrator : SketchCalibrator
        Isotonic or Platt: the map as of the last window.
    half_life : float, effective rows

    Examples
    --------
    The rate doubles; half of what the calibrator remembers is from after that:

    >>> decayed = DecayedCalibrator.fit([0.0] * 1000, [1] * 100 + [0] * 900, half_life=1000.0, method="platt")
    >>> decayed.update([0.0] * 1000, [1] * 200 + [0] * 800)
    >>> decayed.transform([0.0]).round(2).tolist()
    [0.17]
    """

    kind: ClassVar[str] = "decayed"
    names: ClassVar[tuple[str, ...]] = ("half_life", "calibrator")

    def __init__(self, calibrator: SketchCalibrator, half_life: float = HALF_LIFE) -> None:
        if not (math.isfinite(half_life) and half_life > 0.0):
            raise ConfigError(f"decayed calibration: half_life must be finite and above 0; got {half_life}.")
        if calibrator.kind not in _METHODS:
            raise ConfigError(
                f"decayed calibration: expected one of {sorted(_METHODS)}; got {calibrator.kind!r}."
            )
        self.calibrator = calibrator
        self.half_life = float(half_life)

    @classmethod
    def fit(
        cls,
        logit: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
        *,
        half_life: float = HALF_LIFE,
        method: str = IsotonicCalibrator.kind,
    ) -> Self:
        """Fit to the rows of a first window."""
        return cls.fit_sketch(LogitSketch.of(logit, label, weight), half_life=half_life, method=method)

    @classmethod
    def fit_sketch(
        cls, sketch: LogitSketch, *, half_life: float = HALF_LIFE, method: str = IsotonicCalibrator.kind
    ) -> Self:
        """Fit to the sketch of a first window; ``method`` is ``isotonic`` or ``platt``."""
        if method not in _METHODS:
            raise ConfigError(f"decayed calibration: expected one of {sorted(_METHODS)}; got {method!r}.")
        inner = _METHODS[method].fit_sketch(sketch)
        fitted = cls(inner.frozen(), half_life)
        fitted.sketch = inner.sketch
        return fitted

    @classmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The isotonic calibrator of a sketch's rows, with the usual half-life."""
        return cls(IsotonicCalibrator.of_sketch(sketch))

    def update_sketch(self, sketch: LogitSketch) -> None:
        """Learn a window."""
        remembered = self._learned().copy()
        remembered.decay(0.5 ** (sketch.rows / self.half_life))
        vars(self).update(vars(self._fitted(remembered + sketch)))

    def merge(self, other: Self) -> Self:
        """The calibrator of what both remember."""
        check_same_kind(self, other)
        if (self.calibrator.kind, self.half_life) != (other.calibrator.kind, other.half_life):
            raise DataError("decayed calibrators of different methods or half-lives cannot be merged.")
        return self._fitted(self._learned() + other._learned())

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Calibrated logit as of the last window, shape ``(n,)``."""
        return self.calibrator.transform_logit(logit)

    def parameters(self) -> dict[str, Any]:
        """Half-life, and the state of the map."""
        return {"half_life": self.half_life, "calibrator": self.calibrator.state()}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The calibrator of :meth:`parameters`."""
        inner = parameters["calibrator"]
        kind = inner.get("kind") if isinstance(inner, Mapping) else None
        if kind not in _METHODS:
            raise StaleStateError(f"expected decayed calibration of {sorted(_METHODS)}; got {kind!r}.")
        return cls(_METHODS[kind].from_state(inner), finite(parameters, "half_life"))

    def _fitted(self, sketch: LogitSketch) -> Self:
        return self.fit_sketch(sketch, half_life=self.half_life, method=self.calibrator.kind)
