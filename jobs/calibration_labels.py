"""Which labels the online calibrator of a task hears: settled when it is first fitted, then held to."""

from __future__ import annotations

import numpy as np

from calibration.label_origin import LabelOrigin
from calibration.state import digest
from pipelines.config import Config, Task
from pipelines.delay import DelayCurve
from pipelines.duration import DAY_MS
from pipelines.errors import DataError
from pipelines.label_windows import AT_ONCE

__all__ = ["LARGEST_UNEVENNESS", "begun_origin", "label_origin"]

# Mean difference between delay curves of parts of the day and the common one up to which the share of the
# outcomes that should have come by an age can be told from the age alone.
LARGEST_UNEVENNESS = 0.03


def label_origin(
    config: Config, task: Task, curve: DelayCurve | None, unevenness: float | None = None
) -> LabelOrigin:
    """The origin that ``calibration.labels`` asks for.

    ``auto`` is ``delay_model`` where outcomes come as late at each time of the day, ``matured`` where they do
    not, or where that is not known.

    Parameters
    ----------
    config : Config
        With a settled label policy of the task.
    curve : DelayCurve, optional
        How late the outcomes come.
    unevenness : float, optional
        `pipelines.delay_evenness.delay_unevenness` of the same outcomes.

    Raises
    ------
    DataError
        If ``delay_model`` is asked for and there are too few outcomes for a curve.
    """
    mode, policy = config.calibration.labels, config.policy(task)
    curve = curve if curve is not None else DelayCurve(np.zeros(0), np.zeros(0), 0.0)
    has_curve = len(curve.delay) > 0
    if mode == "auto":
        is_even = unevenness is not None and unevenness <= LARGEST_UNEVENNESS
        mode = "delay_model" if has_curve and is_even else "matured"
    if mode == "delay_model" and not has_curve:
        raise DataError(
            f"calibration.labels = delay_model needs a delay curve; the {task} task has {curve.support:g} "
            "outcomes to learn one from.",
            hint="a longer warm-up, or calibration.labels = matured",
        )
    width = config.attribution.width(task)
    closing = width + config.attribution.allowed_lateness
    mean = curve.mean(width)
    if mode == "delay_model" or (mode == "policy" and policy in AT_ONCE):
        lag = mean
    elif mode == "matured" or policy == "wait":
        lag = closing
    else:
        lag = DAY_MS if policy == "relabel" else config.observation(task)
    return LabelOrigin(mode, policy, width, lag, _digest(curve) if mode == "delay_model" else None)


def begun_origin(
    origin: LabelOrigin | None, config: Config, task: Task, curve: DelayCurve | None
) -> LabelOrigin:
    """The origin for a calibrator that has heard no label yet, and whose model was trained with ``origin``.

    What training has settled for ``auto`` stands; a named kind of labels is taken at its word.
    """
    if origin is not None and config.calibration.labels == "auto":
        calibration = config.calibration.model_copy(update={"labels": origin.mode})
        config = config.model_copy(update={"calibration": calibration})
    return label_origin(config, task, curve)


def _digest(curve: DelayCurve) -> str:
    return digest(curve.state())
