"""No calibration: the baseline every other method must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy.typing as npt

from calibration.base import VERSION, checked_logit
from calibration.fixed import FixedCalibrator
from calibration.link import FloatArray
from calibration.state import expect_fields

__all__ = ["IdentityCalibrator"]


class IdentityCalibrator(FixedCalibrator):
    """Trust the model: the calibrated logit is the logit.

    Examples
    --------
    >>> IdentityCalibrator().transform([0.0]).tolist()
    [0.5]
    """

    kind: ClassVar[str] = "none"

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """The logit itself, checked and clipped, shape ``(n,)``."""
        return checked_logit(logit)

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"kind": self.kind, "version": VERSION}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The calibrator that :meth:`state` described."""
        expect_fields(state, cls.kind, (), VERSION)
        return cls()
