"""Calibrators that are functions of a sketch, and keep it: so rows can come later, from anywhere, exactly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy.typing as npt

from calibration.base import VERSION, Calibrator, check_same_kind
from calibration.sketch import LogitSketch
from calibration.state import expect_fields
from pipelines.errors import ConfigError, DataError, StaleStateError

__all__ = ["SketchCalibrator"]


class SketchCalibrator(Calibrator):
    """What Platt, temperature, beta, isotonic and histogram calibration have in common.

    The parameters depend on the sums of the sketch alone, and those are exact. So, to the bit,
    ``fit(A).merge(fit(B))``, ``fit(A)`` updated by ``B`` and ``fit(A + B)`` are one calibrator, whatever the
    order of rows. A calibrator made from parameters, or :meth:`frozen`, has no sketch and cannot learn.

    A kind of calibrator says how its parameters follow from a sketch (:meth:`of_sketch`), what they are
    (:meth:`parameters`), and how it is made of them (:meth:`of_parameters`).

    Attributes
    ----------
    names : tuple of str
        Names of the parameters.
    sketch : LogitSketch or None
        The rows learned from; not to be changed.
    """

    is_strict: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]]
    sketch: LogitSketch | None = None

    @classmethod
    @abstractmethod
    def of_sketch(cls, sketch: LogitSketch) -> Self:
        """The calibrator of these rows, of which there are some, without its sketch."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """The parameters by name, as plain JSON data."""

    @classmethod
    @abstractmethod
    def of_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The calibrator of :meth:`parameters`; ``DataError`` or ``StaleStateError`` if there is none."""

    @classmethod
    def fit(cls, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> Self:
        """Fit to rows, by way of a sketch; conventions of :mod:`calibration.base`.

        Raises
        ------
        DataError
            No rows, or bad values.
        """
        return cls.fit_sketch(LogitSketch.of(logit, label, weight))

    @classmethod
    def fit_sketch(cls, sketch: LogitSketch) -> Self:
        """Fit to a sketch: as to its rows, each with the logit of its bin's mean probability."""
        if sketch.rows <= 0.0:
            raise DataError(
                f"cannot fit calibration of kind {cls.kind!r} to no rows.",
                hint="wait until labels have matured",
            )
        fitted = cls.of_sketch(sketch)
        fitted.sketch = sketch.copy()
        return fitted

    def update(self, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> None:
        """Fit anew to the rows learned from and these."""
        self.update_sketch(LogitSketch.of(logit, label, weight))

    def update_sketch(self, sketch: LogitSketch) -> None:
        """Fit anew to the rows learned from and those of the sketch."""
        # All parameters at once, and the sketch with them.
        vars(self).update(vars(self.fit_sketch(self._learned() + sketch)))

    def merge(self, other: Self) -> Self:
        """The calibrator of the rows of both."""
        check_same_kind(self, other)
        return self.fit_sketch(self._learned() + other._learned())

    def frozen(self) -> Self:
        """The same map without its sketch: what a release carries, some 100 kB lighter."""
        return self.of_parameters(self.parameters())

    def state(self) -> dict[str, Any]:
        """Plain JSON data: the parameters, and the sketch unless frozen."""
        sketch = None if self.sketch is None else self.sketch.state()
        return {"kind": self.kind, "version": VERSION, **self.parameters(), "sketch": sketch}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The calibrator that :meth:`state` described; ``StaleStateError`` if it is none."""
        expect_fields(state, cls.kind, (*cls.names, "sketch"), VERSION)
        try:
            calibrator = cls.of_parameters(state)
        except (ConfigError, DataError) as error:
            raise StaleStateError(f"calibration state of kind {cls.kind!r}: {error}") from error
        if state["sketch"] is not None:
            calibrator.sketch = LogitSketch.from_state(state["sketch"])
        return calibrator

    def _learned(self) -> LogitSketch:
        if self.sketch is None:
            raise DataError(
                f"this calibration of kind {self.kind!r} is frozen: it can neither learn nor be merged.",
                hint="learn with the calibrator that it was frozen from, or fit a new one",
            )
        return self.sketch
