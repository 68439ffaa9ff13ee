"""Settling ``labels.policy = "auto"``: which rows each task's stream emits, from how late its outcomes come.

Showing every window at once as a negative (FNW) is unbiased over all rows, but not for a user or item that
is seen again before its outcomes are known: its own embedding has heard the negatives only. Where outcomes
come within minutes that hardly happens. Where they come after hours the first row waits until most of them
are in, and the rest is weighted for (ES-DFM). Measured in ``docs/adr/0004-label-policy.md``.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.config import Config, Task
from pipelines.config_sections import TaskLabelsConfig
from pipelines.delay import DelayCurve, DelayGrid
from pipelines.duration import HOUR_MS, MINUTE_MS

__all__ = ["late_share", "settle_labels", "thinned"]

# Share of the outcomes that the first row waits for.
_WAITED_FOR = 0.9
# Outcomes that come sooner than this need no waiting.
_SOON_MS = HOUR_MS
# Ages at which a release keeps a delay curve.
_POINTS = 128


def settle_labels(config: Config, curves: Mapping[Task, DelayCurve]) -> Config:
    """The config with a policy and an observation window for each task; unchanged if none is ``auto``.

    A task whose outcomes have come within the hour in nine cases of ten gets ``fnw``; so does one without a
    delay curve. Any other gets ``esdfm`` and waits for nine in ten.

    Examples
    --------
    >>> import numpy as np
    >>> hours = 3_600_000 * np.linspace(0.1, 10, 100)
    >>> curve = DelayCurve.fit(hours, np.full(100, 36_000_000.0))
    >>> labels = settle_labels(Config(), {"conversion": curve}).labels
    >>> labels.click.policy, labels.conversion.policy, labels.conversion.observation_window
    ('fnw', 'esdfm', 32760000)
    """
    if config.labels.policy != "auto":
        return config
    settled: dict[str, TaskLabelsConfig] = {}
    for task in config.attribution.tasks:
        own: TaskLabelsConfig = getattr(config.labels, task)
        if own.policy is None:
            settled[task] = _settle(config, task, own, curves.get(task))
    return config.model_copy(update={"labels": config.labels.model_copy(update=settled)})


def late_share(config: Config, task: Task, curve: DelayCurve) -> float:
    """Share of a task's outcomes that come after its observation window.

    Under ``defer`` with a confirm window: of those that come before its end, for later ones are not said.
    """
    known, last = curve.cdf([config.observation(task)])[0], 1.0
    confirm = config.labels.confirm_window
    if confirm is not None and config.policy(task) == "defer":
        last = max(float(curve.cdf([confirm])[0]), float(known))
    return float(1.0 - known / last) if last > 0 else 1.0


def thinned(curve: DelayCurve) -> DelayCurve:
    """The curve at 128 ages up to its last, close together where it is young; the same between them.

    Examples
    --------
    >>> import numpy as np
    >>> hours = 3_600_000 * np.linspace(0.01, 10, 5_000)
    >>> curve = DelayCurve.fit(hours, np.full(5_000, 36_000_000.0))
    >>> small = thinned(curve)
    >>> len(small.delay), bool(np.abs(small.cdf(hours) - curve.cdf(hours)).max() < 0.01)
    (128, True)
    """
    if len(curve.delay) <= _POINTS:
        return curve
    ages = DelayGrid(horizon=int(curve.delay[-1]), bins=_POINTS).edges()
    return DelayCurve(ages, curve.cdf(ages), curve.support)


def _settle(config: Config, task: Task, own: TaskLabelsConfig, curve: DelayCurve | None) -> TaskLabelsConfig:
    wait = 0 if curve is None else curve.quantile(_WAITED_FOR)
    if wait <= _SOON_MS:
        return own.model_copy(update={"policy": "fnw"})
    rounded = -(-int(wait) // MINUTE_MS) * MINUTE_MS
    window = own.observation_window or min(rounded, config.attribution.width(task))
    return own.model_copy(update={"policy": "esdfm", "observation_window": window})
