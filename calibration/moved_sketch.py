"""The sketch of calibrated rows, from the sketch of the rows and a calibrator."""

from __future__ import annotations

import numpy as np

from calibration.base import Calibrator
from calibration.sketch import LogitSketch
from calibration.sketch_layout import SUMS, UNITS, cells_of, places_of, probability_of

__all__ = ["moved"]


def moved(sketch: LogitSketch, calibrator: Calibrator) -> LogitSketch:
    """What a sketch of the calibrated logits would hold, as if rows had the logit of their bin.

    Weights and labels are kept exactly; what the rows are expected to bring is that of their new logit. A row
    ends at most a bin's width, stretched by the calibrator, from where it would be sketched by itself.

    Parameters
    ----------
    sketch : LogitSketch
        Of logits as the calibrator takes them.
    calibrator : Calibrator

    Examples
    --------
    >>> from calibration.temperature import TemperatureCalibrator
    >>> rows = LogitSketch.of([-2.0, 1.0], [0, 1])
    >>> halved = moved(rows, TemperatureCalibrator(0.5))
    >>> halved.rows, round(halved.expected, 2)
    (2.0, 0.89)
    """
    if sketch.rows == 0.0:
        return LogitSketch()
    _, sums = sketch.units()
    # Squares may round to something where rows round to nothing; such bins have no logit.
    kept = sums[:, sums[0] > 0].copy()
    logit, *_ = sketch.bins()
    cell, offset = cells_of(calibrator.transform_logit(logit))
    there, position = np.unique(places_of(cell), return_inverse=True)
    total = np.zeros((len(SUMS), len(there)), np.int64)
    expected = SUMS.index("expected")
    kept[expected] = np.rint(kept[0] * UNITS[0] * probability_of(cell, offset) / UNITS[expected])
    for one, amounts in zip(total, kept, strict=True):
        np.add.at(one, position, amounts)
    return LogitSketch.from_units(there, total)
