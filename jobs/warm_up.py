"""The warm-up: join without learning, and turn what was joined into training sets."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.label_origin import LabelOrigin
from jobs.calibration_labels import label_origin
from jobs.online import OnlineLoop, StepResult
from pipelines.config import Task
from pipelines.delay import DelayCurve
from pipelines.delay_evenness import delay_unevenness
from pipelines.joined import Closed
from pipelines.joiner import TASKS
from pipelines.label_plan import late_share, thinned
from pipelines.training_set import TrainingSet

__all__ = ["WarmUp"]

log = logging.getLogger(__name__)


class WarmUp:
    """Collects the windows of a loop that is warming up, with the labels known at its end.

    The rows are those of `pipelines.attribution.labels_as_of`, as of the loop's clock.

    Attributes
    ----------
    late_share : dict of str to float
        By task, the share of the outcomes that come after the observation window; filled by
        `training_sets`, like the others.
    delay : dict of str to DelayCurve
    labels : dict of str to LabelOrigin
        What the calibrators are to learn from.
    """

    def __init__(self, loop: OnlineLoop) -> None:
        self.loop = loop
        self._rows: dict[Task, list[dict[str, NDArray[Any]]]] = {task: [] for task in loop.replay}
        self.late_share: dict[Task, float] = {}
        self.delay: dict[Task, DelayCurve] = {}
        self.labels: dict[Task, LabelOrigin] = {}

    def add(self, result: StepResult) -> None:
        """Keep the windows that one step has closed."""
        for task, parts in self._rows.items():
            closed = result.joined.closed[TASKS.index(task)]
            if len(closed):
                parts.append(self._columns(closed, mature=True))

    def training_sets(self) -> dict[Task, TrainingSet]:
        """The rows of each task, by time of opening. Tasks without a row are left out."""
        sets: dict[Task, TrainingSet] = {}
        for task, parts in self._rows.items():
            still_open = self.loop.joiner.open_windows(TASKS.index(task))
            if len(still_open):
                parts = [*parts, self._columns(still_open, mature=False)]
            if parts:
                columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                sets[task] = self._labelled(task, columns)
        return sets

    def _columns(self, windows: Closed, *, mature: bool) -> dict[str, NDArray[Any]]:
        features = self.loop.joiner.features
        return {
            **{
                name: features[name][windows.slot]
                for name in ("buckets", "numbers", "segment_key", "user_key", "ids")
                if name in features
            },
            "label": windows.label.astype(np.float32),
            "event_time": windows.event_time,
            "outcome_time": windows.outcome_time,
            "mature": np.full(len(windows), mature),
        }

    def _labelled(self, task: Task, columns: dict[str, NDArray[Any]]) -> TrainingSet:
        order = np.argsort(columns["event_time"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        attribution = self.loop.config.attribution
        elapsed = np.minimum(self.loop.clock - columns["event_time"], attribution.width(task))
        positive = columns["label"] > 0
        delay = (columns["outcome_time"] - columns["event_time"])[positive]
        curve = DelayCurve.fit(delay, elapsed[positive])
        unevenness = delay_unevenness(columns["event_time"][positive], delay, elapsed[positive])
        self.delay[task] = curve
        self.labels[task] = label_origin(self.loop.config, task, thinned(curve), unevenness)
        log.info("calibration labels task=%s mode=%s unevenness=%s", task, self.labels[task].mode, unevenness)
        self.late_share[task] = late_share(self.loop.config, task, curve)
        observed = np.where(columns["mature"], 1.0, curve.cdf(elapsed))
        return TrainingSet(
            buckets=columns["buckets"],
            numbers=columns["numbers"],
            user_key=columns["user_key"],
            segment_key=columns["segment_key"],
            label=columns["label"],
            weight=np.ones(len(order), np.float32),
            event_time=columns["event_time"],
            mature=columns["mature"],
            observed_share=observed.astype(np.float32),
            ids=columns.get("ids"),
        )
