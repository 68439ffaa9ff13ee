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
from pipelines.delay import DelayCurve
from pipelines.duration import HOUR_MS, MINUTE_MS

__all__ = ["late_share", "settle_labels"]

# Share of the outcomes that the first row waits for.
_WAITED_FOR = 0.9
# Outcomes that come sooner than this need no waiting.
_SOON_MS = HOUR_MS


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
    for task in ("click", "conversion"):
        own: TaskLabelsConfig = getattr(config.labels, task)
        if own.policy is None:
            settled[task] = _settle(config, task, own, curves.get(task))
    return config.model_copy(update={"labels": config.labels.model_copy(update=settled)})


def late_share(config: Config, task: Task, curve: DelayCurve) -> float:
    """Share of a task's outcomes that come after its observation window."""
    return float(1.0 - curve.cdf([config.observation(task)])[0])


def _settle(config: Config, task: Task, own: TaskLabelsConfig, curve: DelayCurve | None) -> TaskLabelsConfig:
    wait = 0 if curve is None else curve.quantile(_WAITED_FOR)
    if wait <= _SOON_MS:
        return own.model_copy(update={"policy": "fnw"})
    rounded = -(-int(wait) // MINUTE_MS) * MINUTE_MS
    window = own.observation_window or min(rounded, config.attribution.width(task))
    return own.model_copy(update={"policy": "esdfm", "observation_window": window})
