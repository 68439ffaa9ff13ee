"""Maps that are known and not learned: no calibration, and the correction of a known sampling rate."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy.typing as npt

from calibration.base import Calibrator, check_same_kind, checked_rows
from calibration.sketch import LogitSketch
from pipelines.errors import DataError

__all__ = ["FixedCalibrator"]


class FixedCalibrator(Calibrator):
    """Rows are checked and teach nothing: the map is known beforehand."""

    is_strict: ClassVar[bool] = True

    @classmethod
    def fit(cls, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> Self:
        """The map, once the rows are found good; none are needed."""
        checked_rows(logit, label, weight)
        return cls()

    @classmethod
    def fit_sketch(cls, sketch: LogitSketch) -> Self:
        """The map."""
        return cls()

    def update(self, logit: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> None:
        """Check the rows."""
        checked_rows(logit, label, weight)

    def update_sketch(self, sketch: LogitSketch) -> None:
        """Do nothing: the rows of a sketch have been checked."""

    def merge(self, other: Self) -> Self:
        """The map itself; ``DataError`` if the other is another one."""
        check_same_kind(self, other)
        if self.state() != other.state():
            raise DataError(f"cannot merge calibrations that differ: {self.state()} and {other.state()}.")
        return self.frozen()

    def frozen(self) -> Self:
        """The map itself."""
        return self.from_state(self.state())
