"""Undo negative down-sampling, exactly, in logit space.

A model trained on every positive but only a share ``w`` of the negatives sees odds that are ``1/w`` times
too high. So ``odds q = w * odds p``, that is ``logit q = logit p + ln w``; in probabilities ``q = p / (p +
(1 - p) / w)``.

References
----------
He et al. (2014), Practical Lessons from Predicting Clicks on Ads at Facebook, section 6.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy.typing as npt

from calibration.base import VERSION, checked_logit, checked_rows
from calibration.fixed import FixedCalibrator
from calibration.link import FloatArray
from calibration.state import expect_fields, finite
from pipelines.errors import ConfigError

__all__ = ["SamplingCorrection"]


class SamplingCorrection(FixedCalibrator):
    """Shift logits by ``ln w``, ``w`` the kept share of negatives.

    Parameters
    ----------
    negative_sampling_rate : float
        Kept share of the negatives the model was trained on, in (0, 1]; 1 changes nothing.

    Raises
    ------
    ConfigError
        The rate is not in (0, 1].

    Examples
    --------
    A tenth of the negatives was kept; the model says 0.5:

    >>> SamplingCorrection(0.1).transform([0.0]).round(4).tolist()
    [0.0909]
    """

    kind: ClassVar[str] = "sampling"

    def __init__(self, negative_sampling_rate: float = 1.0) -> None:
        if not 0.0 < negative_sampling_rate <= 1.0:
            raise ConfigError(
                f"negative_sampling_rate must be in (0, 1]; got {negative_sampling_rate}.",
                hint="it is the share of negatives that was kept: 0.1 for one in ten",
            )
        self.negative_sampling_rate = float(negative_sampling_rate)
        self._shift = math.log(self.negative_sampling_rate)

    @classmethod
    def fit(
        cls,
        logit: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
        *,
        negative_sampling_rate: float = 1.0,
    ) -> Self:
        """The correction of this rate, once the rows are found good: they cannot tell it."""
        checked_rows(logit, label, weight)
        return cls(negative_sampling_rate)

    def transform_logit(self, logit: npt.ArrayLike) -> FloatArray:
        """Logit under the true share of negatives, shape ``(n,)``."""
        corrected: FloatArray = checked_logit(logit) + self._shift
        return corrected

    def state(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"kind": self.kind, "version": VERSION, "negative_sampling_rate": self.negative_sampling_rate}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The correction that :meth:`state` described."""
        expect_fields(state, cls.kind, ("negative_sampling_rate",), VERSION)
        return cls(finite(state, "negative_sampling_rate"))
