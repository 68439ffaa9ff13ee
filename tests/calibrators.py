"""One calibrator of each kind: how it is fitted, and rows to fit it to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from calibration.base import Calibrator
from calibration.beta import BetaCalibrator
from calibration.decayed import DecayedCalibrator
from calibration.histogram import HistogramCalibrator
from calibration.identity import IdentityCalibrator
from calibration.isotonic import IsotonicCalibrator
from calibration.link import sigmoid
from calibration.online import OnlinePlatt
from calibration.plain_isotonic import PlainIsotonicCalibrator
from calibration.platt import PlattCalibrator
from calibration.sampling import SamplingCorrection
from calibration.temperature import TemperatureCalibrator

Fit = Callable[..., Calibrator]

KINDS: dict[str, type[Calibrator]] = {
    "none": IdentityCalibrator,
    "sampling": SamplingCorrection,
    "temperature": TemperatureCalibrator,
    "platt": PlattCalibrator,
    "beta": BetaCalibrator,
    "isotonic": IsotonicCalibrator,
    "plain_isotonic": PlainIsotonicCalibrator,
    "histogram": HistogramCalibrator,
    "decayed": DecayedCalibrator,
    "kalman": OnlinePlatt,
}
FIXED = ("none", "sampling")
# Those whose state holds a sketch: everything about rows is exact.
SKETCHED = ("temperature", "platt", "beta", "isotonic", "plain_isotonic", "histogram", "decayed")
STRICT = tuple(kind for kind, calibrator in KINDS.items() if calibrator.is_strict)

FITS: dict[str, Fit] = {
    **{kind: calibrator.fit for kind, calibrator in KINDS.items()},
    "sampling": partial(SamplingCorrection.fit, negative_sampling_rate=0.1),
    # Two filters can only be merged around one centre.
    "kalman": partial(OnlinePlatt.fit, centre=-2.0),
}


def click_log(rows: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model that is wrong in level and, below -1, in slope; and clicks."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-2.0, 1.5, rows)
    return logit, (rng.random(rows) < sigmoid(-0.4 - np.logaddexp(0, -logit))).astype(float)
